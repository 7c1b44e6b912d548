"""What a GPU would pay for: memory, and waiting for it. On a CPU stand-ins count both."""

import warnings
from collections import Counter
from contextlib import nullcontext
from inspect import signature

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, default_data_collator

from helpers import devices, toys
from hf_gr import GRTrainer, create_optimizer
from hf_gr.optim import IRE, OPTIMIZERS, tensors
from hf_gr.optim.ascents import ASCENTS
from hf_gr.optim.radius_rules import RADIUS_RULES
from hf_gr.optimizer_factory import TIME_VARYING_DEFAULTS

#: Of the weights, for what is as large as two layers, norms, and what an allocator rounds up.
SLACK = 0.15
GR_CASES = [
    *({"gr_ascent": name} for name in ASCENTS),
    *({"gr_radius_rule": name, "gr_lambda": 0.05} for name in RADIUS_RULES),
    {"gr_lambda": 0.2},
]


ADMIRE = {"gr_lambda": 0, "ire_kappa": 2.0, "ire_mask": "uniform", "ire_interval": 100, "ire_start_step": 0}


class Wide(nn.Module):
    """Many weights and few activations. No operation in it makes the host wait."""

    def __init__(self, width: int = 256):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(16)))

    def forward(self, x, labels):
        return {"loss": F.mse_loss(self.layers(x), labels)}


def examples(count: int, width: int = 256) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [{name: torch.randn(width, generator=generator) for name in ("x", "labels")} for _ in range(count)]


def trainer_of(device: str, folder, **flags) -> GRTrainer:
    torch.manual_seed(0)
    settings = {"optim": "sgd", "optim_args": "momentum=0.9", "gr_warmup": "none", **flags}
    return toys.trainer(folder, model=Wide(), data=examples(24), use_cpu=device == "cpu", **settings)


def between_steps(device: str, folder, **flags) -> tuple[GRTrainer, dict]:
    """A trainer that has gradients and moments from a plain step, and a batch on the device."""
    trainer = trainer_of(device, folder, **flags)
    trainer.create_optimizer()
    inputs = default_data_collator(examples(1))
    inputs = {name: value.to(device) for name, value in inputs.items()}
    Trainer.training_step(trainer, trainer.model, inputs)
    trainer.optimizer.step()
    return trainer, inputs


def optimizer_of(device: str, name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """With gradients, after a step. Not on the CPU, where the steps are others, but on a device without any values."""
    model = Wide().to("meta" if device == "cpu" else device)
    optimizer = IRE(adamw(model)) if name == "IRE" else by_name(name, model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    if isinstance(optimizer, IRE):
        masks = {i: torch.ones_like(p, dtype=torch.uint8) for i, p in enumerate(model.parameters())}
        optimizer.load_state_dict({**optimizer.state_dict(), "ire": {"masks": masks}})
    optimizer.step()
    return model, optimizer


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), fused=next(model.parameters()).device.type != "meta")


def by_name(name: str, model: nn.Module) -> torch.optim.Optimizer:
    settings = {
        key: value for key, value in TIME_VARYING_DEFAULTS.items() if key in signature(OPTIMIZERS[name]).parameters
    }
    return create_optimizer(name, model, lr=1e-3, weight_decay=0.1, **settings)


# ---- Memory ----


@pytest.fixture
def small_blocks(monkeypatch):
    """Beside these few weights, as the real ones are beside those of other models."""
    monkeypatch.setattr(tensors, "GPU_BLOCK", 2**16)


@pytest.mark.parametrize("flags", GR_CASES, ids=str)
def test_a_step_needs_a_copy_of_the_weights(flags, device, tmp_path, small_blocks):
    """Beyond what a plain step needs that adds to the gradients of an earlier micro-batch."""
    trainer, inputs = between_steps(device, tmp_path, **flags)
    model = trainer.model
    plain = devices.extra_memory(device, lambda: Trainer.training_step(trainer, model, inputs))
    regularized = devices.extra_memory(device, lambda: trainer.training_step(model, inputs))
    assert 0 < regularized - plain <= (1 + SLACK) * nbytes(model)


def nbytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("name", [*OPTIMIZERS, "IRE"])
def test_an_optimizer_needs_a_copy_of_the_weights(name, device, small_blocks):
    model, optimizer = optimizer_of(device, name)
    extra = devices.extra_memory(device, optimizer.step)
    assert extra <= (1 + SLACK) * nbytes(model), extra / nbytes(model)


# ---- Waiting ----


@pytest.mark.parametrize("flags", GR_CASES, ids=str)
def test_a_step_never_waits(flags, device, tmp_path):
    trainer, inputs = between_steps(device, tmp_path, **flags)
    trainer.training_step(trainer.model, inputs)
    with devices.never_waiting(device):
        trainer.training_step(trainer.model, inputs)


@pytest.mark.parametrize("name", [*OPTIMIZERS, "IRE"])
def test_an_optimizer_never_waits(name, device):
    """On a CPU this is seen by the device without values: whoever asks for one gets an error."""
    _, optimizer = optimizer_of(device, name)
    with devices.never_waiting(device) if device == "cuda" else nullcontext():
        optimizer.step()


@pytest.mark.parametrize("settings", [{}, {"scope": "per_tensor", "beta": 0.9}, {"mask": "inverted"}], ids=str)
def test_a_choice_of_coordinates_never_waits(settings, device):
    model = Wide().to("meta" if device == "cpu" else device)
    ire = IRE(adamw(model), **settings)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    has_labels = torch.ones((), dtype=torch.bool, device=next(model.parameters()).device)
    with devices.never_waiting(device) if device == "cuda" else nullcontext():
        for _ in range(2):
            ire.update_mask(only_if=has_labels)


@pytest.mark.parametrize("flags", [{}, {"gr_ascent": "momentum"}, ADMIRE], ids=["GR", "MSAM", "AdmIRE"])
def test_between_two_logs_a_run_waits_as_a_plain_one(flags, device, tmp_path):
    def of_two_steps(**flags) -> Counter[str]:
        """Without those of the beginning and the end of a run."""
        few, many = (waits_of_run(device, tmp_path, max_steps=steps, **flags) for steps in (4, 6))
        return many - few

    assert of_two_steps(**flags) == of_two_steps(gr_lambda=0)


def waits_of_run(device: str, folder, **flags) -> Counter[str]:
    # An optimizer that is not fused cannot skip a step by itself, and is told by the host.
    fused = {"optim": "adamw_torch_fused", "optim_args": None}
    trainer = trainer_of(device, folder, logging_steps=100, **fused, **flags)
    trainer.nonfinite_guard.looks_at_once = False  # as on a GPU
    found = devices.waits(device, trainer.train)
    # On a CPU, where it does not wait for that, IRE reads its kappa.
    return Counter({where: count for where, count in found.items() if device != "cpu" or "optim/ire.py" not in where})


# ---- What the tests themselves use ----


def test_what_stands_in_for_cuda_notices():
    x = torch.ones(250)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), devices.never_waiting("cpu"):
        x.sum().item()
    assert devices.waits("cpu", lambda: [x.sum().item(), x.tolist()]).total() == 2
    assert devices.extra_memory("cpu", lambda: x + (x + 1)) == 2 * x.nbytes
    kept = [x.clone()]

    def frees_first() -> None:
        kept[0].add_(1)
        kept.clear()
        x + (x + 1)

    assert devices.extra_memory("cpu", frees_first) == x.nbytes


def test_what_is_asked_of_cuda(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", calls.append)
    with pytest.raises(RuntimeError), devices.never_waiting("cuda"):
        raise RuntimeError("called a synchronizing CUDA operation")
    assert calls == ["error", "default"]

    def wait() -> None:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert list(devices.waits("cuda", wait).values()) == [2]
    assert calls == ["error", "default", "warn", "default"]
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 350)
    assert devices.extra_memory("cuda", lambda: calls.append("run")) == 250
    assert calls[-2:] == ["reset", "run"]
