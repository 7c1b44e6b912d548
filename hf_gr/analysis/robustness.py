"""How much a model's metrics change when its weights are quantized or disturbed by noise.

Only the weights of linear, convolutional and embedding layers are disturbed. Biases, norms, class tokens, position
embeddings that are plain parameters, and buffers such as BatchNorm's statistics are kept.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

GRANULARITIES = ("channel", "tensor")

Metrics = dict[str, float]


def weight_matrices(model: nn.Module) -> list[Tensor]:
    """The weights that are disturbed, output channels (of embeddings, tokens) first; a tied weight is listed once.

    They are views: writing to one of them changes the model.
    """
    found = {}
    for module in model.modules():
        is_conv1d = type(module).__name__ == "Conv1D"  # GPT-2's linear layer in transformers: (in, out)
        if is_conv1d or isinstance(module, nn.Linear | nn.Embedding | _ConvNd):
            channels = 1 if is_conv1d or getattr(module, "transposed", False) else 0
            weight = cast(Tensor, module.weight)
            found[id(weight)] = weight.detach().transpose(0, channels)
    return list(found.values())


def quantize(weight: Tensor, bits: int, granularity: str = "channel") -> Tensor:
    """`weight` after symmetric round-to-nearest to `bits` bits: scale round(weight / scale), with

        scale = max|weight| / (2^(bits - 1) - 1),

    where the maximum is over one output channel (a row of `weight`) or over the whole tensor. The grid has as many
    values below zero as above it: {-scale, 0, scale} at 2 bits. ("Integer Quantization for Deep Learning Inference", Wu
    et al., 2020, arXiv:2004.09602, Section 3.1.2, calibrated by the maximum.)

    No error exceeds scale / 2. The largest weights are kept exactly, so quantizing again changes nothing.
    """
    levels = 2 ** (bits - 1) - 1
    # In float32 the largest weight would not always divide into its own grid.
    exact = weight.double()
    over = tuple(range(1 if granularity == "channel" else 0, weight.dim()))
    largest = exact.abs().amax(over, keepdim=True)
    steps = (exact * levels / largest.clamp(min=torch.finfo(exact.dtype).tiny)).round()  # a row may be all zeros
    return (steps * largest / levels).to(weight.dtype)


def quantize_by_torchao(weight: Tensor, bits: int, granularity: str = "channel") -> Tensor:
    """`weight` as torchao stores it to `bits` bits (2 to 8) with `IntxWeightOnlyConfig`, and multiplies by it.

    Its grid has one more value, below zero, and so a smaller scale than that of `quantize`: max|weight| /
    (2^(bits - 1) - 1 / 2). There is one scale per channel; `granularity` is only for `quantize`.

    Raises:
        ModuleNotFoundError: torchao is not installed.
    """
    from torchao.quantization import IntxWeightOnlyConfig, quantize_

    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(weight.flatten(1).clone(), requires_grad=False)
    quantize_(layer, IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}")))
    return cast(Any, layer.weight).dequantize().to(weight.dtype).view_as(weight)


QUANTIZERS = {"nearest": quantize, "torchao": quantize_by_torchao}


def add_noise(weight: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """`weight + scale * std(weight) * z` with z ~ N(0, 1), and the standard deviation of the whole tensor.

    The unit makes the result independent of how a network distributes a factor over its layers. `generator` is on the
    CPU, so that every device gets the same z.
    """
    z = torch.randn(weight.shape, generator=generator).to(weight)
    return weight + scale * weight.std(correction=0) * z


@contextmanager
def disturbed(weights: Sequence[Tensor], disturb: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside this context each weight is replaced by `disturb(weight)`. Then all are restored bitwise, also after an
    error."""
    originals = [weight.clone() for weight in weights]
    try:
        for weight in weights:
            weight.copy_(disturb(weight))
        yield
    finally:
        for weight, original in zip(weights, originals, strict=True):
            weight.copy_(original)


def robustness(
    model: nn.Module,
    evaluate: Callable[[], Metrics],
    bits: Sequence[int] = (8, 4, 3, 2),
    noise: Sequence[float] = (0.1, 0.25, 0.5, 1.0),
    granularity: str = "channel",
    noise_samples: int = 5,
    seed: int = 0,
    quantizer: str = "nearest",
) -> Iterator[tuple[str, list[Metrics]]]:
    """The result of `evaluate()` for the model as it is, and under each disturbance: (name, one result per draw).

    Args:
        evaluate: measures `model` in its current state.
        bits: see `quantize`, as for `granularity`; one draw each.
        noise: scales of `add_noise`; `noise_samples` draws each, which are the same for all scales and, given `seed`,
            for all models of one architecture.
        quantizer: a key of `QUANTIZERS`.

    Raises:
        ValueError: the model has no weights to disturb.
    """
    weights = weight_matrices(model)
    if not weights:
        raise ValueError(f"{type(model).__name__} has no linear, convolutional or embedding layer to disturb.")

    def under(disturb: Callable[[Tensor], Tensor]) -> Metrics:
        with disturbed(weights, disturb):
            return evaluate()

    yield "none", [evaluate()]
    for count in bits:
        yield f"{count} bits", [under(partial(QUANTIZERS[quantizer], bits=count, granularity=granularity))]
    for scale in noise:
        generator = torch.Generator().manual_seed(seed)
        draw = partial(add_noise, scale=scale, generator=generator)
        yield f"noise {scale:g}", [under(draw) for _ in range(noise_samples)]
