"""Muon for hidden matrices and AdamW for the rest, against torch's own two."""

import pytest
import torch
from torch import nn

from helpers import toys
from helpers.reference import train as reference_train
from helpers.training import relative_error_of_path, run, sum_of_token_losses
from hf_gr import create_optimizer
from hf_gr.optim import Muon
from hf_gr.optim.muon import hidden_matrices

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon since 2.9")
LR, DECAY = 0.02, 0.1
FLAGS = {"optim": "muon", "learning_rate": LR, "weight_decay": DECAY, "lr_scheduler_type": "constant",
         "max_grad_norm": 0.0, "max_steps": 4}  # fmt: skip


def test_hidden_matrices_of_models():
    def hidden(model):
        chosen = {id(p) for p in hidden_matrices(model)}
        return {name for name, p in model.named_parameters() if id(p) in chosen}

    llama = toys.llama()
    projections = {f"{layer}_proj.weight" for layer in "qkvo"} | {
        f"{layer}_proj.weight" for layer in ("gate", "up", "down")
    }
    assert {name.rpartition(".layers.")[2].split(".", 2)[2] for name in hidden(llama)} == projections
    assert len(hidden(llama)) == 2 * len(projections)
    assert hidden(toys.llama(tie_word_embeddings=True)) == hidden(llama)
    names = hidden(toys.vit())
    assert len(names) == 12 and not any("embed" in name or "classifier" in name or "bias" in name for name in names)


class TwoOptimizers:
    """What users write without it."""

    def __init__(self, model):
        matrices = hidden_matrices(model)
        self.muon = torch.optim.Muon(matrices, LR, DECAY, adjust_lr_fn="match_rms_adamw")
        others = [p for p in model.parameters() if not any(p is q for q in matrices)]
        groups = [{"params": [p for p in others if p.ndim > 1], "weight_decay": DECAY},
                  {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0}]  # fmt: skip
        self.adamw = torch.optim.AdamW(groups, LR)

    def step(self):
        self.muon.step()
        self.adamw.step()


def windows():
    data = toys.text()
    for k in range(FLAGS["max_steps"]):
        window = data[2 * k : 2 * k + 2]
        count = sum((e["labels"][1:] != -100).sum() for e in window)
        yield lambda model, window=window, count=count: sum_of_token_losses(model, window) / count


def in_float32(gradient, coefficients, steps, eps):
    """Newton-Schulz as torch has it, but in bfloat16 the last bit of a gradient makes a difference of 2^-8."""
    a, b, c = coefficients
    x = gradient / gradient.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("degree", [0.0, 0.1])
def test_by_name_in_a_trainer_it_is_torchs_own_two(degree, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", in_float32)
    recorder = toys.PathRecorder()
    trainer = run(toys.llama(), toys.text(), tmp_path, callbacks=[recorder], gr_lambda=degree, gr_r=0.1,
                  gr_warmup="none", **FLAGS)  # fmt: skip
    assert type(trainer.optimizer.optimizer) is Muon and len(trainer.optimizer.param_groups) == 2
    model = toys.llama()
    strength = {"strategy": "none", "warmup_steps": 1, "r": 0.1, "lambda_": degree, "max_grad_norm": float("inf")}
    expected = reference_train(model, list(windows()), lambda _: TwoOptimizers(model), **strength)
    assert relative_error_of_path(recorder.path, expected) <= 1e-3
    if degree == 0:
        assert torch.equal(recorder.path[1], expected[1])


def test_it_has_a_step_of_the_size_of_adamw(tmp_path):
    """A fifth of the learning rate where the gradient has full rank, so that one learning rate serves both."""
    model = toys.llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run(model, toys.text(), tmp_path, gr_lambda=0, **FLAGS | {"max_steps": 1, "weight_decay": 0.0})
    for name, p in model.named_parameters():
        moved = (p.detach() - before[name]).square().mean().sqrt().item()
        if "proj" in name:
            assert 0.1 * LR < moved < 0.25 * LR, name


def test_ire_amplifies_it_and_a_run_resumes_bitwise(tmp_path):
    flags = {**FLAGS, "gr_r": 0.05, "gr_warmup": "none", "ire_kappa": 1.0, "ire_interval": 2, "ire_start_step": 1}
    whole = run(toys.llama(), toys.text(), tmp_path / "whole", **flags, save_strategy="steps", save_steps=2)
    again = toys.trainer(tmp_path / "whole", toys.llama(), toys.text(), **flags)
    again.train(resume_from_checkpoint=f"{tmp_path}/whole/checkpoint-2")
    assert torch.equal(toys.weights(again.model), toys.weights(whole.model))
    plain = run(toys.llama(), toys.text(), tmp_path / "plain", **{**flags, "ire_kappa": 0.0})
    assert not torch.equal(toys.weights(plain.model), toys.weights(whole.model))


def test_in_a_loop_of_ones_own():
    model = toys.llama()
    optimizer = create_optimizer("muon", model, LR, DECAY, momentum=0.9)
    hidden = {
        id(p) for g in optimizer.param_groups for p, chosen in zip(g["params"], g["hidden"], strict=True) if chosen
    }
    assert hidden == {id(p) for p in hidden_matrices(model)}
    assert Muon([nn.Parameter(torch.ones(2, 3))]).param_groups[0]["hidden"] == [True]


MATRIX, VECTOR = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: create_optimizer("muon", nn.Conv1d(2, 2, 1), LR), "the model has no hidden matrix for it"),
        (lambda: Muon([MATRIX], lr=-1.0), "lr=-1.0: must be >= 0"),
        (lambda: Muon([MATRIX], momentum=1.0), "momentum=1.0, betas=.*: each must be in"),
        (lambda: Muon([MATRIX], ns_steps=0), "ns_steps=0: give 1 to 99"),
        (
            lambda: Muon([{"params": [MATRIX, VECTOR], "hidden": [True]}]),
            "give True or False for each of the 2 parameters",
        ),
        (lambda: Muon([{"params": [VECTOR], "hidden": [True]}]), r"one of these has the shape \(2,\)"),
        (lambda: Muon([nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16))]), "keep the weights in float32"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_older_torch_is_told(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match="optim=muon needs torch"):
        Muon([MATRIX])
