"""Ascents, radius rules, reuse and the gauge inside `GRTrainer`, against loops written out slowly from the papers."""

import copy
import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers import toys
from helpers.training import relative_error_of_path, run
from hf_gr import GRTrainer

R, STEPS, BATCH = 0.3, 10, 2
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.1}
SGD = {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1}
CONSTANT = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0}


class Net(nn.Module):
    """Two layers in float64, with a norm between them; counts its forward passes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(192, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 10)).double()
        self.calls = 0

    def forward(self, pixel_values, labels):
        self.calls += 1
        logits = self.layers(pixel_values.flatten(1).double())
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def windows(accumulation: int):
    data, size = toys.images(BATCH * accumulation * STEPS), BATCH * accumulation
    for k in range(STEPS):
        examples = data[k * size : (k + 1) * size]
        yield torch.stack([e["pixel_values"] for e in examples]), torch.tensor([e["labels"] for e in examples])


def gradients(model: nn.Module, offsets: list[Tensor] | None, window, functional: bool = False) -> list[Tensor]:
    """Of the loss at theta + offsets; of the logits there, weighted by the gradient of the loss at theta."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for p, offset in zip(moved.parameters(), offsets or [0] * 99, strict=False):
            p += offset
    there = moved(*window)
    if functional:
        here = model(*window)
        (weight,) = torch.autograd.grad(here["loss"], here["logits"])
        return list(torch.autograd.grad(there["logits"], list(moved.parameters()), weight))
    return list(torch.autograd.grad(there["loss"], list(moved.parameters())))


def norm(tensors: list[Tensor]) -> float:
    return sum((t**2).sum().item() for t in tensors) ** 0.5


def clipped(tensors: list[Tensor], max_norm: float) -> list[Tensor]:
    return [t * min(1.0, max_norm / norm(tensors)) for t in tensors]


def dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum((x * y).sum().item() for x, y in zip(a, b, strict=True))


def asam(theta, g1, r, is_scaled=lambda p: True):
    t = [p.abs() + 0.01 if is_scaled(p) else torch.ones_like(p) for p in theta]
    length = norm([a * g for a, g in zip(t, g1, strict=True)])
    return [r * a * a * g / length for a, g in zip(t, g1, strict=True)]


def sam(theta, g1, r):
    return [r * g / norm(g1) for g in g1]


class Rule:
    """One step of a method: (theta, g(offsets), step from 1) -> the gradient for the optimizer."""

    def __init__(self, offsets, ratio=1.0, start=0, interval=1, alpha=0.0, functional=False, clip=float("inf")):
        self.offsets, self.ratio, self.start, self.interval = offsets, ratio, start, interval
        self.alpha, self.v, self.functional, self.clip = alpha, None, functional, clip

    def __call__(self, theta, gradient, step):
        g1 = gradient(None)
        if step <= self.start:
            return g1
        if (step - 1 - self.start) % self.interval:
            scale = self.alpha * norm(g1) / norm(self.v)
            return [a + scale * b for a, b in zip(g1, self.v, strict=True)]
        g1 = clipped(g1, self.clip)
        g2 = clipped(gradient(self.offsets(theta, g1, R), self.functional), self.clip)
        along = dot(g1, g2) / norm(g1) ** 2
        self.v = [b - along * a for a, b in zip(g1, g2, strict=True)]
        return [(1 - self.ratio) * a + self.ratio * b for a, b in zip(g1, g2, strict=True)]


class MSAM:
    """theta - r m/||m||, with the momentum kept by hand; the first step is plain."""

    def __init__(self, beta, weight, start=0):
        self.beta, self.weight, self.start, self.m = beta, weight, start, None

    def offsets(self, theta, gradient, step):
        return None if self.m is None or step <= self.start else [-R * m / norm(self.m) for m in self.m]

    def __call__(self, theta, gradient, step):
        g = gradient(self.offsets(theta, gradient, step))
        if self.m is None:  # Adam begins with 0, SGD with the first gradient
            self.m = [x * self.weight for x in g]
        else:
            self.m = [self.beta * m + self.weight * x for m, x in zip(self.m, g, strict=True)]
        return g


class SAMAndMSAM(MSAM):
    """From step `start` on: the gradient at theta + r g1/||g1|| in every `interval`-th step, MSAM's in the others."""

    def __init__(self, beta, weight, start, interval, momentum_r):
        super().__init__(beta, weight)
        self.begin, self.interval, self.momentum_r = start, interval, momentum_r

    def offsets(self, theta, gradient, step):
        if step <= self.begin:
            return None
        if (step - 1 - self.begin) % self.interval == 0:
            return sam(theta, gradient(None), R)
        return [-self.momentum_r * m / norm(self.m) for m in self.m]


#: Flags -> the rule by hand.
METHODS = {
    "adaptive": ({"gr_ascent": "adaptive"}, lambda _: Rule(asam)),
    "adaptive, lambda": ({"gr_ascent": "adaptive", "gr_lambda": 0.5 * R}, lambda _: Rule(asam, 0.5)),
    "adaptive weights": (
        {"gr_ascent": "adaptive_weights"},
        lambda _: Rule(lambda *a: asam(*a, is_scaled=lambda p: p.ndim > 1)),
    ),
    "momentum": ({"gr_ascent": "momentum"}, lambda optim: MSAM(*optim)),
    "momentum, late": (
        {"gr_ascent": "momentum", "gr_warmup": "zero", "gr_warmup_steps": 4},
        lambda optim: MSAM(*optim, start=4),
    ),
    "looksam": ({"gr_interval": 3, "gr_reuse": 0.7}, lambda _: Rule(sam, interval=3, alpha=0.7)),
    "looksam, lambda": (
        {"gr_interval": 2, "gr_reuse": 0.7, "gr_lambda": 0.5 * R, "gr_warmup": "zero", "gr_warmup_steps": 2},
        lambda _: Rule(sam, 0.5, start=2, interval=2, alpha=0.7 * 0.5),
    ),
    "momentum between": (
        {"gr_interval": 3, "gr_momentum_r": 2 * R, "gr_warmup": "zero", "gr_warmup_steps": 2},
        lambda optim: SAMAndMSAM(*optim, start=2, interval=3, momentum_r=2 * R),
    ),
    "rule gradient": ({"gr_radius_rule": "gradient"}, lambda _: Rule(lambda p, g, r: sam(p, g, min(r * norm(g), 1)))),
    "rule gradient, lambda": (
        {"gr_radius_rule": "gradient", "gr_lambda": 0.5 * R, "gr_r_max": 0.2},
        lambda _: Rule(lambda p, g, r: sam(p, g, min(r * norm(g), 0.2)), 0.5),
    ),
    "rule loss": (
        {"gr_radius_rule": "loss", "gr_r_max": 0.1},
        lambda _: Rule(lambda p, g, r: sam(p, g, min(r / norm(g), 0.1))),
    ),
    "functional": ({"gr_second_pass_kind": "functional"}, lambda _: Rule(sam, functional=True)),
    "functional, lambda": (
        {"gr_second_pass_kind": "functional", "gr_lambda": 0.5 * R, "gr_warmup": "zero", "gr_warmup_steps": 2},
        lambda _: Rule(sam, 0.5, start=2, functional=True),
    ),
    "clip": ({"gr_clip": 1.0}, lambda _: Rule(sam, clip=1.0)),
    "clip, rule gradient, lambda": (
        {"gr_clip": 1.0, "gr_radius_rule": "gradient", "gr_lambda": 3 * R},
        lambda _: Rule(lambda p, g, r: [r * x for x in g], 3, clip=1.0),
    ),
}  # fmt: skip


def reference(method: str, optim: dict, accumulation: int) -> list[Tensor]:
    model = Net()
    params = list(model.parameters())
    if optim is ADAM:
        optimizer = torch.optim.AdamW(
            [{"params": [p for p in params if p.ndim > 1], "weight_decay": 0.1},
             {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0}], lr=1e-2)  # fmt: skip
        moments = (0.9, 0.1)
    else:
        optimizer, moments = torch.optim.SGD(params, lr=0.1, momentum=0.9), (0.9, 1)
    rule = METHODS[method][1](moments)
    path = [toys.weights(model)]
    for step, window in enumerate(windows(accumulation), start=1):
        theta = [p.detach().clone() for p in params]
        g = rule(theta, lambda *args, window=window: gradients(model, args[0], window, *args[1:]), step)
        for p, value in zip(params, g, strict=True):
            p.grad = value
        optimizer.step()
        path.append(toys.weights(model))
    return path


def train(folder, method="adaptive", optim=SGD, accumulation=1, cls=GRTrainer, **flags):
    recorder = toys.PathRecorder()
    settings = {"gr_r": R, "gr_warmup": "none", "max_steps": STEPS, "gradient_accumulation_steps": accumulation,
                **CONSTANT, **optim, **METHODS[method][0], **flags}  # fmt: skip
    data = toys.images(BATCH * accumulation * STEPS)
    trainer = run(Net(), data, folder, cls=cls, callbacks=[recorder], **settings)
    return trainer, recorder.path


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("optim", [ADAM, SGD], ids=["AdamW", "SGD"])
@pytest.mark.parametrize("method", METHODS)
def test_path_equals_the_reference(method, optim, accumulation, tmp_path):
    _, path = train(tmp_path, method, optim, accumulation)
    expected = reference(method, optim, accumulation)
    assert relative_error_of_path(path, expected) <= 1e-10
    plain = train(tmp_path, method, optim, accumulation, gr_lambda=0.0)[1]
    assert relative_error_of_path(plain, expected) > 1e-3  # the method matters here


@pytest.mark.parametrize("accumulation", [1, 3])
def test_momentum_takes_one_pass(accumulation, tmp_path):
    trainer, _ = train(tmp_path, "momentum", ADAM, accumulation)
    assert trainer.model.calls == STEPS * accumulation
    assert trainer.costs()["train_passes"] == pytest.approx(STEPS)
    segment = trainer.recorder.record.segments[-1]
    assert segment.regularized_steps == STEPS - 1  # the first step has no momentum yet
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["gr_lambda"] for entry in logs] == [0.0] + [R] * (STEPS - 1)
    assert all(entry["gr_perturbed_grad_norm"] == entry["grad_norm"] for entry in logs[1:])
    assert not any("gr_linearity" in entry or "gr_grad_norm" in entry for entry in logs[1:])


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("momentum", r"gr_ascent='momentum': SGD as .* no first moment .* adamw_torch, or gr_ascent=gradient"),
        ("momentum between", r"gr_momentum_r=0.6: SGD as .* no first moment .* adamw_torch, or gr_momentum_r=0"),
    ],
)
def test_an_optimizer_without_momentum_is_refused(method, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, method, {"optim": "sgd", "learning_rate": 0.1})


def test_without_gr_no_step_follows_the_momentum(tmp_path):
    off = train(tmp_path / "off", "momentum between", ADAM, gr_lambda=0.0)[0]
    plain = train(tmp_path / "plain", "adaptive", ADAM, gr_lambda=0.0)[0]
    assert torch.equal(toys.weights(off.model), toys.weights(plain.model))
    assert off.recorder.record.segments[-1].momentum_steps == 0


def test_steps_along_the_momentum_are_counted_logged_and_on_the_card(tmp_path):
    trainer, _ = train(tmp_path, "momentum between", ADAM)
    segment = trainer.recorder.record.segments[-1]
    assert (segment.regularized_steps, segment.momentum_steps, segment.passes) == (3, 5, STEPS + 3)
    assert trainer.model.calls == sum(trainer.planned_passes()) == STEPS + 3
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["gr_r"] for entry in logs] == [R] * 3 + [2 * R, 2 * R, R] * 2 + [2 * R]
    between = [entry for entry in logs if entry["gr_r"] == 2 * R]
    assert all(entry["gr_perturbed_grad_norm"] == entry["grad_norm"] for entry in between)
    assert not any("gr_linearity" in entry or "gr_grad_norm" in entry for entry in between)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "So it was in 3 of 10 steps; in 5 it was the gradient at theta - r_m m/||m||" in card
    assert "becker2024" in card and "foret2021" in card and "| `gr_momentum_r` | r_m | 0.6 |" in card


@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_scaler_changes_nothing(method, tmp_path):
    """The scale is a power of two: what it multiplies and divides is exact."""
    _, plain = train(tmp_path, method, SGD, 2)
    _, scaled = train(tmp_path, method, SGD, 2, cls=toys.ScaledTrainer)
    assert relative_error_of_path(scaled, plain) <= 1e-12


@pytest.mark.parametrize("method", ["momentum", "adaptive, lambda", "looksam", "looksam, lambda", "momentum between"])
def test_a_resumed_run_is_bitwise_the_whole_one(method, tmp_path):
    # Step 4 is between two regularized ones, for both intervals.
    flags = {"save_strategy": "steps", "save_steps": 4, "seed": 3}
    _, whole = train(tmp_path, method, ADAM, 2, **flags)
    trainer = _resumable(tmp_path, method, flags)
    trainer.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-4")
    assert torch.equal(toys.weights(trainer.model), whole[-1])


def _resumable(folder, method, flags, **others):
    settings = {"gr_r": R, "gr_warmup": "none", "max_steps": STEPS, "gradient_accumulation_steps": 2,
                **CONSTANT, **ADAM, **METHODS[method][0], **flags, **others}  # fmt: skip
    return toys.trainer(folder, Net(), toys.images(BATCH * 2 * STEPS), **settings)


def test_a_checkpoint_with_nothing_to_reuse_is_refused(tmp_path):
    flags = {"save_strategy": "steps", "save_steps": 4}
    train(tmp_path, "looksam", ADAM, 2, gr_reuse=0.0, **flags)
    with pytest.raises(ValueError, match=r"gr_reuse=0.7: .*checkpoint-4 .* has no gr_reuse.pt. Resume with gr_reuse=0"):
        _resumable(tmp_path, "looksam", flags).train(resume_from_checkpoint=f"{tmp_path}/checkpoint-4")


def test_reuse_is_counted_and_on_the_card(tmp_path):
    trainer, _ = train(tmp_path, "looksam")
    segment = trainer.recorder.record.segments[-1]
    assert (segment.regularized_steps, segment.reused_steps, segment.passes) == (4, 6, STEPS + 4)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "So it was in 4 of 10 steps; in 6 it was g1 + alpha ||g1|| v/||v||" in card
    assert "liu2022towards" in card and "foret2021" in card and "| `gr_reuse` | alpha | 0.7 |" in card


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("adaptive", ["kwon2021asam", r"$$d = \frac{T^2 g_1}", "in 10 of 10 steps"]),
        ("momentum", ["becker2024momentum", r"$$g = g_2 = \nabla L", "in 9 of 10 steps"]),
        ("rule gradient", ["karakida2023", "With lambda = r this is SAM", "lambda followed it"]),
        ("clip", ["g1 and g2 were each clipped to the norm `gr_clip`.", "| `gr_clip` |"]),
        ("functional", ["singh2025avoiding", r"$$g_2 = J(\theta')^\top \nabla \ell(z(\theta))$$", "in 10 of 10 steps"]),
    ],
)
def test_the_card_names_what_was_used(method, words, tmp_path):
    trainer, _ = train(tmp_path, method, ADAM)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert not [word for word in words if word not in card]
    assert ("foret2021" in card) == (method in ("rule gradient", "clip"))


@pytest.mark.parametrize("scope", ["global", "micro"])
@pytest.mark.parametrize("rule", ["gradient", "loss"])
def test_a_zero_gradient_gives_no_radius(rule, scope, tmp_path):
    """The second micro-batch of the first step has none; in the second step neither has one."""
    data = [{"x": torch.tensor([x, 0.0])} for x in (1.0, 0.0, 0.0, 0.0)]
    trainer = run(Bowl(0.0), data, tmp_path, max_steps=2, gr_r=0.1, gr_warmup="none", gr_radius_rule=rule,
                  gr_scope=scope, gradient_accumulation_steps=2, per_device_train_batch_size=1, optim="sgd",
                  learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0)  # fmt: skip
    expected = torch.tensor([0.3 - 0.1 * 0.5, -0.4], dtype=torch.float64)
    torch.testing.assert_close(trainer.model.theta.detach(), expected)


class Bowl(nn.Module):
    """L = a/2 ||theta||^2 + the mean of x . theta: the rise within r is r ||g|| + a r^2 / 2."""

    def __init__(self, a):
        super().__init__()
        self.a, self.theta = a, nn.Parameter(torch.tensor([0.3, -0.4], dtype=torch.float64))

    def forward(self, x):
        return {"loss": self.a / 2 * self.theta.square().sum() + (x.double() @ self.theta).mean()}


@pytest.mark.parametrize("logging_steps", [1, 2])
@pytest.mark.parametrize("flags", [{}, {"gr_scope": "micro"}, {"gr_lambda": 0.05}], ids=str)
def test_the_gauge_is_the_rise_of_the_loss(flags, logging_steps, tmp_path):
    a, r = 4.0, 0.1
    data = [{"x": torch.tensor([0.1 * i, 1.0])} for i in range(16)]
    trainer = run(Bowl(a), data, tmp_path, max_steps=4, gr_r=r, gr_warmup="none", gradient_accumulation_steps=2,
                  optim="sgd", learning_rate=0.0, logging_steps=logging_steps, **flags)  # fmt: skip
    xs = torch.stack([e["x"] for e in data]).double().reshape(4, 2, 2, 2).mean(2)  # (steps, micro-batches, 2)
    slopes = (trainer.model.theta.detach() * a + xs).norm(dim=-1)  # of each micro-batch
    if flags.get("gr_scope") != "micro":
        slopes = (trainer.model.theta.detach() * a + xs.mean(1)).norm(dim=-1, keepdim=True)
    rises = (r * slopes + a * r**2 / 2).mean(1).reshape(-1, logging_steps).mean(1)
    linear = (r * slopes).mean(1).reshape(-1, logging_steps).mean(1)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["gr_sharpness"] for entry in logs] == pytest.approx(rises.tolist(), rel=1e-5)
    assert [entry["gr_linearity"] for entry in logs] == pytest.approx((rises / linear).tolist(), rel=1e-5)


def test_the_gauge_of_a_scaled_ascent_is_1_where_the_loss_is_linear(tmp_path):
    data = [{"x": torch.tensor([0.1 * i, 1.0])} for i in range(8)]
    for flags in ({"gr_ascent": "adaptive"}, {"gr_ascent": "adaptive_weights"}, {}):
        trainer = run(Bowl(0.0), data, tmp_path, max_steps=2, gr_r=0.5, gr_warmup="none", **flags)
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert [entry["gr_linearity"] for entry in logs] == pytest.approx([1, 1], rel=1e-5)


def test_a_step_without_second_pass_has_no_gauge(tmp_path):
    trainer, _ = train(tmp_path, "looksam")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [i for i, entry in enumerate(logs) if "gr_linearity" in entry] == [0, 3, 6, 9]
    assert json.dumps(logs)
