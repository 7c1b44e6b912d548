"""The estimate that IRE reads: the gradient of the loss with labels drawn from the model's own distribution.

Its square is the Gauss-Newton-Bartlett estimate of the diagonal of the Fisher matrix, up to the batch size (Liu et al.,
"Sophia", 2023, Algorithm 2): h ~ B g^2, with g = 1/B sum_b grad(-log p(y_b | x_b)) and y_b ~ p(. | x_b).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Labels with this value take no part in the loss; the convention of torch and transformers.
IGNORED = -100


@torch.no_grad()
def sample_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One label per row of `logits` (rows x classes), drawn from softmax(logits).

    By an exponential race, as `torch.multinomial` does it, which however stops the program at a logit that is not a
    number; here the loss of the label is not a number then.
    """
    probabilities = logits.float().softmax(dim=-1)
    return probabilities.div_(torch.empty_like(probabilities).exponential_(generator=generator)).argmax(dim=-1)


def classification_losses(logits: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """-log p(y | x) for a sampled y per row; rows whose label is -100 are left out."""
    logits = logits[labels.reshape(-1) != IGNORED]
    return F.cross_entropy(logits.float(), sample_labels(logits, generator), reduction="none")


def causal_lm_losses(logits: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """-log p(y_t | x_<t) for a sampled y_t at each position whose label, the next token, is not -100.

    Args:
        logits: batch x length x vocabulary.
        labels: batch x length, not shifted.
    """
    logits = logits[:, :-1][labels[:, 1:] != IGNORED]
    return F.cross_entropy(logits.float(), sample_labels(logits, generator), reduction="none")


def distribution_of(model: nn.Module) -> str | None:
    """What the logits of `model` mean: "classification", "causal_lm", or None where that is not known."""
    unwrap = getattr(model, "get_base_model", None)  # of peft
    inner = unwrap() if unwrap is not None else model
    name, config = type(inner).__name__, getattr(inner, "config", None)
    if name.endswith(("ForCausalLM", "LMHeadModel")) and not getattr(config, "is_encoder_decoder", False):
        return "causal_lm"
    if name.endswith(("ForImageClassification", "ForSequenceClassification")):
        is_softmax = getattr(config, "num_labels", 1) > 1 and getattr(config, "problem_type", None) in (
            None,
            "single_label_classification",
        )
        return "classification" if is_softmax else None
    return None


def first_rows(inputs: dict[str, Any], rows: int, batch_size: int) -> dict[str, Any]:
    """The first `rows` examples of a batch: whatever has `batch_size` as its first dimension is cut."""
    return {
        key: value[:rows] if isinstance(value, Tensor) and value.dim() and len(value) == batch_size else value
        for key, value in inputs.items()
    }


@contextmanager
def without_randomness(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, so that dropout is off and the running statistics of BatchNorm stand still; the modes of
    all modules as they were afterwards.

    A layer with activation checkpointing stays in training mode itself, not its children: it would not save memory
    otherwise.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, was_training in modes:
        if getattr(module, "gradient_checkpointing", False) and was_training:
            module.training = True
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


def layer_kind(name: str, module: nn.Module) -> str:
    """What kind of layer a parameter belongs to, told from its name and the module that owns it."""
    path = f".{name.lower()}"
    if path.endswith("bias"):
        return "bias"
    if "norm" in type(module).__name__.lower():
        return "norm"
    if isinstance(module, nn.Embedding) or any(word in path for word in ("embed", "cls_token", "mask_token")):
        return "embedding"
    if path.split(".")[-2] in ("lm_head", "classifier", "score", "head", "fc", "output_layer"):
        return "head"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv"
    if any(word in path for word in ("attn", "attention")):
        return "attention"
    return "mlp" if "mlp" in path or "intermediate" in path or "feed_forward" in path else "other"


def layer_kinds(model: nn.Module) -> dict[Tensor, str]:
    """The kind of every trainable parameter; one that is shared counts where it is found first."""
    modules = dict(model.named_modules())
    return {
        p: layer_kind(name, modules[name.rpartition(".")[0]]) for name, p in model.named_parameters() if p.requires_grad
    }
