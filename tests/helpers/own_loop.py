"""The loop of the docs, word for word, and the same written out slowly."""

import copy
import os

import torch
from accelerate.state import GradientState
from torch import Tensor, nn
from torch.nn import functional as F

from helpers import pages
from hf_gr.optim.ascents import NORM_EPS

ACCUMULATION, STEPS, BATCH = 2, 4, 3
RADIUS, DEGREE, WARMUP_STEPS, LEARNING_RATE = 0.1, 0.05, 2, 0.2


def block() -> str:
    (found,) = [b for b in pages.blocks(pages.DOCS / "guides" / "own_trainer.md", "python") if b.comment == "loop"]
    return found.code


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)).double()


def examples(processes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    count = processes * ACCUMULATION * STEPS * BATCH
    return [(torch.randn(4, generator=generator, dtype=torch.float64), torch.tensor(i % 3)) for i in range(count)]


def loss_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def flat(tensors) -> Tensor:
    return torch.cat([t.detach().reshape(-1).double() for t in tensors]).clone()


def relative_error(reached: Tensor, expected: Tensor) -> float:
    return ((reached - expected).norm() / (expected - flat(make_model().parameters())).norm()).item()


def run_block(seed: int = 0) -> dict:
    """What the block makes of a model; `batches` are those of this process in the order of the first passes, with the
    state of the generator before each."""
    calls = []

    def recorded(model, batch):
        calls.append((batch[0].tolist(), batch[1].tolist(), torch.get_rng_state().tolist()))
        return loss_of(model, batch)

    model = make_model()
    scope = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=LEARNING_RATE),
        "loader": torch.utils.data.DataLoader(examples(int(os.environ.get("WORLD_SIZE", 1))), batch_size=BATCH),
        "loss_of": recorded,
    }
    torch.manual_seed(seed)
    exec(block(), scope)
    GradientState._reset_state()
    assert len(calls) == 2 * ACCUMULATION * STEPS  # each batch twice, in two passes over a window
    windows = [calls[k : k + 2 * ACCUMULATION] for k in range(0, len(calls), 2 * ACCUMULATION)]
    assert all(window[:ACCUMULATION] == window[ACCUMULATION:] for window in windows)
    return {
        "weights": flat(model.parameters()),
        "buffers": flat(model.buffers()),
        "rng_state": torch.get_rng_state(),
        "batches": [call for window in windows for call in window[:ACCUMULATION]],
    }


def reference(batches_of_ranks: list[list[tuple]], model: nn.Module | None = None) -> Tensor:
    """SGD on (1 - lambda/r) g1 + (lambda/r) g2, both the mean over the micro-batches of all processes."""
    model = make_model() if model is None else model
    params = list(model.parameters())

    def gradient(model: nn.Module, window: list[tuple]) -> Tensor:
        losses = []
        for x, y, rng_state in window:
            torch.set_rng_state(torch.tensor(rng_state, dtype=torch.uint8))
            losses.append(loss_of(model, (torch.tensor(x, dtype=torch.float64), torch.tensor(y))))
        return flat(torch.autograd.grad(sum(losses) / len(losses), list(model.parameters())))

    for step in range(STEPS):
        window = [b for rank in batches_of_ranks for b in rank[step * ACCUMULATION : (step + 1) * ACCUMULATION]]
        scale = min(1.0, (step + 1) / WARMUP_STEPS)
        g1 = gradient(model, window)
        perturbed = copy.deepcopy(model)
        nn.utils.vector_to_parameters(
            flat(params) + scale * RADIUS * g1 / (g1.norm() + NORM_EPS), perturbed.parameters()
        )
        g = (1 - DEGREE / RADIUS) * g1 + DEGREE / RADIUS * gradient(perturbed, window)
        nn.utils.vector_to_parameters(flat(params) - LEARNING_RATE * g, model.parameters())
    return flat(params)
