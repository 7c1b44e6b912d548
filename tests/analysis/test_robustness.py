"""Quantization and noise in closed form; what is disturbed, and that it is restored."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from helpers import toys
from hf_gr.analysis.robustness import (
    add_noise,
    disturbed,
    quantize,
    quantize_by_torchao,
    robustness,
    weight_matrices,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bits_of(model):
    return [p.detach().clone().view(torch.int32) for p in model.parameters()]


# ---- Quantization ----


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_values_on_the_grid_stay(bits):
    levels = 2 ** (bits - 1) - 1
    grid = torch.arange(-levels, levels + 1) * torch.tensor([[0.5], [0.0078125]])
    assert torch.equal(quantize(grid, bits), grid)


def test_two_bits_have_three_values():
    row = torch.tensor([[-3.0, -1.6, -1.4, 0.0, 1.4, 1.6, 2.0]])
    assert quantize(row, 2).tolist() == [[-3, -3, 0, 0, 0, 3, 3]]


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_quantization(bits, granularity):
    """No error above half a scale, the largest weight exact, no more values than levels; nothing the second time."""
    weight = normal(6, 4, 3, 3) * torch.arange(1.0, 7.0).view(-1, 1, 1, 1)
    parts = weight.flatten(1) if granularity == "channel" else weight.flatten()[None]
    scale = parts.abs().amax(1) / (2 ** (bits - 1) - 1)
    quantized = quantize(weight, bits, granularity)
    new = quantized.view_as(parts)
    assert ((new - parts).abs() <= 0.5001 * scale[:, None]).all()
    assert torch.equal(new.abs().amax(1), parts.abs().amax(1))
    assert all(len(row.unique()) <= 2**bits - 1 for row in new)
    assert torch.equal(quantize(quantized, bits, granularity), quantized)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quantization_is_that_of_torch(bits):
    weight, levels = normal(10, 20), 2 ** (bits - 1) - 1
    scale = weight.abs().amax(1) / levels
    expected = torch.fake_quantize_per_channel_affine(
        weight, scale, torch.zeros(10, dtype=torch.int32), 0, -levels, levels
    )
    torch.testing.assert_close(quantize(weight, bits), expected)


def test_rows_do_not_see_each_other_but_share_the_scale_of_a_tensor():
    weight = torch.tensor([[1.0, 0.4], [100.0, 40.0]])
    assert quantize(weight, 2).tolist() == [[1, 0], [100, 0]]
    assert quantize(weight, 2, "tensor").tolist() == [[0, 0], [100, 0]]


def test_rows_of_zeros_and_half_precision():
    assert quantize(torch.zeros(3, 4), 4).tolist() == torch.zeros(3, 4).tolist()
    weight = normal(3, 4).bfloat16()
    new = quantize(weight, 8)
    assert new.dtype == torch.bfloat16 and torch.equal(new, quantize(weight.double(), 8).bfloat16())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quantization_by_torchao(bits):
    """One value more than ours: no error above half of its smaller scale, apart from its clipping at the top."""
    pytest.importorskip("torchao")
    weight = normal(6, 4, 3, 3) * torch.arange(1.0, 7.0).view(-1, 1, 1, 1)
    quantized = quantize_by_torchao(weight, bits)
    scale = weight.flatten(1).abs().amax(1) / (2 ** (bits - 1) - 0.5)
    assert quantized.dtype == weight.dtype and quantized.shape == weight.shape
    assert ((quantized - weight).flatten(1).abs() <= 0.51 * scale[:, None]).all()
    assert all(len(row.unique()) <= 2**bits for row in quantized.flatten(1))
    assert not torch.equal(quantized, quantize(weight, bits))


# ---- Noise ----


@pytest.mark.parametrize("scale", [0.1, 2.0])
def test_noise_has_the_standard_deviation_of_the_weights(scale):
    weight = 3 * normal(200, 500) + 1
    noise = add_noise(weight, scale, torch.Generator().manual_seed(1)) - weight
    sigma = scale * weight.std().item()
    n = noise.numel()
    assert abs(noise.mean().item()) < 5 * sigma / math.sqrt(n)
    assert noise.std().item() == pytest.approx(sigma, rel=5 / math.sqrt(2 * n))
    assert torch.equal(add_noise(weight, scale, torch.Generator().manual_seed(1)) - weight, noise)


def test_a_constant_weight_has_no_noise():
    assert add_noise(torch.ones(1, 1), 1.0, torch.Generator()).tolist() == [[1.0]]


# ---- What is disturbed ----


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.conv = nn.Conv2d(3, 5, 2)
        self.up = nn.ConvTranspose1d(3, 6, 2)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.tokens.weight
        self.positions = nn.Parameter(torch.ones(1, 2, 4))


def test_weights_of_layers_once_with_their_channels_first():
    assert [tuple(w.shape) for w in weight_matrices(Layers())] == [(7, 4), (5, 3, 2, 2), (6, 3, 2)]


def test_the_linear_layers_of_gpt2_are_transposed():
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9, n_positions=5, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    shapes = [tuple(w.shape) for w in weight_matrices(model)]
    assert shapes == [(9, 8), (5, 8), (24, 8), (8, 8), (32, 8), (8, 32)]
    weight = model.transformer.h[0].mlp.c_fc.weight  # (in, out)
    expected = quantize(weight.detach().T, 2).T
    with disturbed(weight_matrices(model), lambda w: quantize(w, 2)):
        assert torch.equal(weight, expected)


@pytest.mark.parametrize("is_tied", [True, False])
def test_tied_weights_are_disturbed_once(is_tied):
    model = toys.llama(tie_word_embeddings=is_tied)
    weights = weight_matrices(model)
    assert len(weights) == 2 * 7 + (1 if is_tied else 2)
    tokens = model.get_input_embeddings().weight
    expected = tokens + 1
    with disturbed(weights, lambda w: w + 1):
        assert torch.equal(tokens, expected)
        assert torch.equal(model.lm_head.weight, expected) == is_tied


def test_biases_and_norms_are_kept():
    model = toys.vit()
    kept = {n: p.detach().clone() for n, p in model.named_parameters() if p.dim() == 1 or "embeddings." in n}
    kept.pop("vit.embeddings.patch_embeddings.projection.weight")
    with disturbed(weight_matrices(model), lambda w: w + 1):
        now = dict(model.named_parameters())
        assert len(kept) > 10 and all(torch.equal(now[name], old) for name, old in kept.items())


def test_everything_is_restored_bitwise():
    model = toys.vit()
    with torch.no_grad():
        model.classifier.weight[0, :2] = torch.tensor([-0.0, math.nan])
    before = bits_of(model)
    for _, draws in robustness(model, lambda: {"loss": 0.0}, bits=[2], noise=[0.5], noise_samples=2):
        assert draws and all(map(torch.equal, bits_of(model), before))


def test_and_after_an_error():
    model = toys.vit()
    before, weights = bits_of(model), weight_matrices(model)

    def interrupted():
        assert not all(map(torch.equal, bits_of(model), before))
        raise KeyboardInterrupt

    def only_the_first(weight):
        if weight is not weights[0]:
            raise MemoryError
        return weight + 1

    for error, disturb in ((KeyboardInterrupt, lambda w: w + 1), (MemoryError, only_the_first)):
        with pytest.raises(error), disturbed(weights, disturb):
            interrupted()
        assert all(map(torch.equal, bits_of(model), before))


def test_a_model_without_weights():
    with pytest.raises(ValueError, match="LayerNorm has no linear"):
        next(robustness(nn.LayerNorm(3), dict))


# ---- What it measures ----


def quadratic(curvature):
    """A model and its loss, curvature / 2 times the squared distance to its own weights."""
    model = nn.Linear(300, 200, bias=False)
    with torch.no_grad():
        model.weight.copy_(normal(200, 300))
    minimum = model.weight.detach().clone()
    return model, lambda: {"loss": (curvature / 2 * (model.weight.detach() - minimum).double().square().sum()).item()}


def test_a_sharp_minimum_loses_more_than_a_flat_one():
    """The loss rises by curvature / 2 times s^2 std^2 n in expectation, and here for every draw in proportion."""
    flat, sharp = (dict(robustness(*quadratic(h), bits=[4, 2], noise=[0.5, 1.0])) for h in (1.0, 10.0))
    assert list(flat) == ["none", "4 bits", "2 bits", "noise 0.5", "noise 1"]
    assert flat["none"] == sharp["none"] == [{"loss": 0}]
    for name in list(flat)[1:]:
        assert [d["loss"] for d in sharp[name]] == pytest.approx([10 * d["loss"] for d in flat[name]])
    losses = [draw["loss"] for draw in flat["noise 1"]]
    n = 300 * 200
    expected = normal(200, 300).square().mean().item() * n / 2
    assert len(set(losses)) == 5 and losses == pytest.approx([expected] * 5, rel=5 * math.sqrt(2 / n))
    # The same draws at every scale.
    assert [4 * draw["loss"] for draw in flat["noise 0.5"]] == pytest.approx(losses, rel=1e-5)
    assert flat["4 bits"][0]["loss"] < flat["2 bits"][0]["loss"]


def test_a_factor_moved_between_layers_changes_nothing():
    model = nn.Sequential(nn.Linear(5, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
    inputs, labels = normal(20, 5), torch.arange(20) % 3

    def evaluate():
        with torch.no_grad():
            return {"loss": F.cross_entropy(model(inputs), labels).item()}

    before = list(robustness(model, evaluate))
    with torch.no_grad():
        model[0].weight.mul_(8)
        model[2].weight.div_(8)
    assert list(robustness(model, evaluate)) == before
    assert list(robustness(model, evaluate, seed=1))[:5] == before[:5]
    assert list(robustness(model, evaluate, seed=1)) != before
