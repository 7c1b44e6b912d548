"""What `gr_diagnostics_steps` logs, against the optimizer's state and gradients taken by hand."""

import copy
import sys

import numpy as np
import pytest
import torch

from helpers import toys
from hf_gr import GRTrainer
from hf_gr.analysis.second_moments import log_rates, statistics_of, sums_of
from hf_gr.cli.trainers import ImageTrainer
from hf_gr.data.images import IS_WRONG

ADAM = {"optim": "adamw_torch", "gr_r": 0.1, "gr_warmup": "none", "gr_diagnostics_steps": 1}


class Spy(GRTrainer):
    """Keeps, for each step, the second moments with their correction, the weights and the batch."""

    def __init__(self, *args, **kwargs):
        self.seen = []
        super().__init__(*args, **kwargs)

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        self.base = getattr(optimizer, "base_optimizer", optimizer)
        self.base.register_step_post_hook(lambda *_: self.seen.append(self.rates()))
        return optimizer

    def rates(self) -> np.ndarray:
        """log psi of every coordinate, in float64 and from the formula; NaN for one that has had no gradient."""
        rates = []
        for group in self.base.param_groups:
            for p in group["params"]:
                state = self.base.state[p]
                if "square_avg" in state:
                    v = state["square_avg"].double()
                else:
                    v = state["exp_avg_sq"].double() / (1 - group["betas"][1] ** float(state["step"]))
                rates.append(torch.where(v > 0, -torch.log(v.sqrt() + group["eps"]), torch.nan).flatten())
        return torch.cat(rates).numpy()


def entries(trainer, key):
    return {e["step"]: e[key] for e in trainer.state.log_history if key in e}


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "rmsprop", "lamb"])
@pytest.mark.parametrize("kappa", [0, 2.0])
def test_the_spread_and_the_change_are_those_of_the_optimizer(tmp_path, optim, kappa):
    flags = {"optim": optim, "ire_kappa": kappa, "ire_start_step": 0, "gr_lambda": 0, "gr_diagnostics_steps": 1}
    trainer = toys.trainer(tmp_path, cls=Spy, **flags)
    trainer.train()
    spread, change = entries(trainer, "adaptive_lr_spread"), entries(trainer, "adaptive_lr_change")
    assert list(spread) == [1, 2, 3, 4, 5, 6] and list(change) == [2, 3, 4, 5, 6]  # at first there is no earlier state
    for step, rates in enumerate(trainer.seen, 1):
        assert spread[step] == pytest.approx(np.nanstd(rates), rel=1e-5)
        if step > 1:
            changes = rates - trainer.seen[step - 2]
            assert change[step] == pytest.approx(np.sqrt(np.nanmean(changes**2)), rel=1e-4)


def test_neither_the_loss_scale_nor_the_learning_rate_changes_them():
    """psi of c g is psi / c where eps is negligible, and both statistics are of log psi."""
    found = []
    for scale in (1.0, 1000.0):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.zeros(500))
        optimizer = torch.optim.Adam([p], lr=scale, eps=1e-30)
        rates = []
        for _ in range(3):
            p.grad = scale * torch.randn(500)
            optimizer.step()
            rates.append(log_rates(optimizer, [p]))
        found.append(statistics_of(sums_of(rates[2], rates[1])))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert 0 < found[0]["adaptive_lr_change"] < found[0]["adaptive_lr_spread"]


def test_coordinates_without_a_gradient_are_left_out():
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.Adam([p])
    p.grad = torch.tensor([1.0, 0.0, 2.0, 0.0])
    optimizer.step()
    found = statistics_of(sums_of(log_rates(optimizer, [p])))
    assert found == {"adaptive_lr_spread": pytest.approx(np.log(2) / 2, rel=1e-5)}


@pytest.mark.parametrize("degree", [0.1, 0.05, 0.3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_cosine_is_that_of_both_gradients(tmp_path, degree, accumulation):
    """Of the whole window, before they are mixed and clipped."""
    windows, weights = [], []

    class Keep(GRTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            windows.append(copy.copy(inputs))
            weights.append(copy.deepcopy(model))
            return super().training_step(model, inputs, *args, **kwargs)

    flags = {**ADAM, "gr_lambda": degree, "gradient_accumulation_steps": accumulation, "max_steps": 3}
    trainer = toys.trainer(tmp_path, cls=Keep, max_grad_norm=0.1, **flags)
    trainer.train()
    logged = entries(trainer, "gr_cosine")
    assert list(logged) == [1, 2, 3]
    for step in range(3):
        model, batches = weights[step * accumulation], windows[step * accumulation :][:accumulation]

        def gradient(model, batches=batches):
            model.zero_grad()
            sum(model(**batch).loss for batch in batches).backward()
            return torch.cat([p.grad.flatten() for p in model.parameters()])

        g1 = gradient(model)
        with torch.no_grad():
            start = 0
            for p in model.parameters():
                p += 0.1 * g1[start : start + p.numel()].view_as(p) / g1.norm()
                start += p.numel()
        expected = torch.cosine_similarity(g1.double(), gradient(model).double(), dim=0).item()
        assert logged[step + 1] == pytest.approx(expected, abs=2e-5)


class Tiny(torch.nn.Module):
    """102 parameters, whose Hessian can be written down."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(12, 4), torch.nn.Tanh(), torch.nn.Linear(4, 10))

    def forward(self, pixel_values, labels):
        logits = self.layers(pixel_values.flatten(1))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def top_eigenvalue(model, denominators, batches) -> float:
    """Of P^-1 H, from the whole matrix in float64."""
    model = copy.deepcopy(model).double()
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def loss(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        values = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        inputs = [{**batch, "pixel_values": batch["pixel_values"].double()} for batch in batches]
        return sum(torch.func.functional_call(model, values, (), batch)["loss"] for batch in inputs) / len(batches)

    hessian = torch.autograd.functional.hessian(loss, toys.weights(model))
    root = torch.cat([p.flatten() for p in denominators]).double().sqrt()
    return torch.linalg.eigvalsh(hessian / root[:, None] / root[None, :])[-1].item()


@pytest.mark.parametrize("optim", ["adamw_torch", "rmsprop"])
def test_the_preconditioned_sharpness_is_that_of_the_whole_matrix(tmp_path, optim):
    """Every tenth time, after the step, on its batches, in evaluation mode; with the rate of the next step."""
    seen, batches = {}, []

    class Keep(Spy):
        def training_step(self, model, inputs, *args, **kwargs):
            batches.append(copy.copy(inputs))
            return super().training_step(model, inputs, *args, **kwargs)

        def log(self, logs, *args, **kwargs):
            if "preconditioned_sharpness" in logs:
                group, denominators = self.base.param_groups[0], []
                for p in self.model.parameters():
                    state = self.base.state[p]
                    v = (
                        state["square_avg"]
                        if optim == "rmsprop"
                        else state["exp_avg_sq"] / (1 - 0.999 ** state["step"])
                    )
                    denominators.append(v.sqrt() + group["eps"])
                threshold = (2 if optim == "rmsprop" else 38) / group["lr"]
                seen[self.state.global_step] = top_eigenvalue(self.model, denominators, batches[-2:]), threshold
            super().log(logs, *args, **kwargs)

    flags = {"optim": optim, "gr_lambda": 0, "gr_diagnostics_steps": 1, "gradient_accumulation_steps": 2}
    trainer = toys.trainer(tmp_path, Tiny(), toys.images(80, size=2), cls=Keep, max_steps=20, **flags)
    trainer.train()
    sharpness, threshold = entries(trainer, "preconditioned_sharpness"), entries(trainer, "stability_threshold")
    assert list(seen) == list(sharpness) == [10]  # at step 20 the rate is 0
    for step, (expected, edge) in seen.items():
        assert sharpness[step] == pytest.approx(expected, rel=0.02)
        assert threshold[step] == pytest.approx(edge, rel=1e-6)


@pytest.mark.parametrize("method", [{"gr_lambda": 0}, {"gr_interval": 2}, {"gr_warmup": "zero", "gr_warmup_steps": 4}])
def test_the_mean_of_an_epoch_is_over_all_its_steps(tmp_path, method):
    """Also over those that were not logged, and with the norm of g1, not of the mixed gradient."""
    flags = {**ADAM, "max_steps": -1, "num_train_epochs": 2, **method}
    every = toys.trainer(tmp_path / "every", **flags)
    every.train()
    logged = [e for e in every.state.log_history if "grad_norm" in e]
    norms = [e.get("gr_grad_norm", e["grad_norm"]) for e in logged]
    assert len(norms) == 24
    rare = toys.trainer(tmp_path / "rare", **flags, logging_steps=7)
    rare.train()
    means = entries(rare, "grad_norm_epoch_mean")
    assert list(means) == [12, 24]
    assert means[12] == pytest.approx(np.mean(norms[:12]), rel=1e-5)
    assert means[24] == pytest.approx(np.mean(norms[12:]), rel=1e-5)


def test_what_does_not_exist_is_not_logged(tmp_path):
    flags = {"gr_diagnostics_steps": 2, "gr_r": 0.1, "gr_warmup": "none", "max_steps": 12}
    sgd = toys.trainer(tmp_path / "a", optim="sgd", **flags)
    sgd.train()
    assert not entries(sgd, "adaptive_lr_spread") and list(entries(sgd, "gr_cosine")) == [2, 4, 6, 8, 10, 12]
    one_pass = toys.trainer(tmp_path / "b", gr_ascent="momentum", **flags)
    one_pass.train()
    assert list(entries(one_pass, "adaptive_lr_spread")) == [2, 4, 6, 8, 10, 12]
    assert not entries(one_pass, "gr_cosine")
    # Its first step is a plain one, with a g1.
    assert entries(one_pass, "grad_norm_epoch_mean")[12] == pytest.approx(entries(one_pass, "grad_norm")[1], rel=1e-6)


@pytest.mark.parametrize("method", [{}, {"gr_lambda": 0}, {"gr_lambda": 0.05, "gr_interval": 2, "gr_reuse": 0.7}])
def test_the_run_is_the_same_without_them(tmp_path, method):
    """Bitwise, with dropout and accumulation."""
    flags = {**ADAM, "gradient_accumulation_steps": 2, **method}
    paths = []
    for steps in (0, 1):
        recorder = toys.PathRecorder()
        trainer = toys.trainer(
            tmp_path / str(steps),
            toys.vit(dropout=0.1),
            callbacks=[recorder],
            **{**flags, "gr_diagnostics_steps": steps, "max_steps": 12},
        )
        trainer.train()
        paths.append(recorder.path)
    assert all(torch.equal(a, b) for a, b in zip(*paths, strict=True)) and len(paths[0]) == 13


def test_a_gradient_scaler_changes_nothing(tmp_path):
    plain = toys.trainer(tmp_path / "a", cls=GRTrainer, **ADAM)
    scaled = toys.trainer(tmp_path / "b", cls=toys.ScaledTrainer, **ADAM)
    for trainer in (plain, scaled):
        trainer.train()
    for key in ("adaptive_lr_spread", "adaptive_lr_change", "gr_cosine"):
        assert entries(scaled, key) == pytest.approx(entries(plain, key), rel=1e-4)


def test_a_layer_that_the_loss_does_not_use_is_no_obstacle(tmp_path):
    found = []
    for is_there in (False, True):
        model = Tiny()
        if is_there:
            model.unused = torch.nn.Linear(2, 2)
        flags = {**ADAM, "max_steps": 11, "learning_rate": 1e-3}
        trainer = toys.trainer(tmp_path / str(is_there), model, toys.images(24, size=2), **flags)
        trainer.train()
        found.append(entries(trainer, "preconditioned_sharpness"))
    assert list(found[0]) == [10] and found[1] == pytest.approx(found[0], rel=0.04)


def test_weights_in_half_precision_are_not_measured(tmp_path):
    flags = {**ADAM, "gr_half_precision_weights": True, "max_steps": 11}
    trainer = toys.trainer(tmp_path, toys.vit().bfloat16(), **flags)
    trainer.train()
    assert len(entries(trainer, "adaptive_lr_spread")) == 11 and not entries(trainer, "preconditioned_sharpness")


def test_what_is_not_installed_is_known_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(ImportError, match="analysis"):
        toys.trainer(tmp_path, gr_diagnostics_steps=1)


def test_it_is_no_setting_of_the_run(tmp_path):
    trainer = toys.trainer(tmp_path, **ADAM, max_steps=1)
    trainer.train()
    assert "gr_diagnostics_steps" not in trainer.recorder.segment.settings
    with pytest.raises(ValueError, match="gr_diagnostics_steps=-1"):
        toys.trainer(tmp_path, gr_diagnostics_steps=-1)


def test_what_the_loss_counts_is_counted_once(tmp_path):
    """The shares of memorized labels are those of training steps alone, and the run's own trainer is measured, too."""
    images = [{**image, IS_WRONG: i % 3 == 0} for i, image in enumerate(toys.images(48))]
    flags = {
        "optim": "adamw_torch",
        "gr_lambda": 0,
        "max_steps": 20,
        "remove_unused_columns": False,
        "logging_steps": 4,
    }
    logs = []
    for steps in (0, 1):
        trainer = toys.trainer(
            tmp_path / str(steps), data=images, cls=ImageTrainer, gr_diagnostics_steps=steps, **flags
        )
        trainer.train()
        logs.append([e["train_accuracy_wrong_labels"] for e in trainer.state.log_history if "loss" in e])
    assert logs[0] == logs[1] and len(logs[0]) == 5
    assert list(entries(trainer, "preconditioned_sharpness")) == [10]
