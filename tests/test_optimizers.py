"""LARS, TVLARS and LAMB on plain tensors, against references written from the formulas."""

import copy
import logging
import math

import pytest
import torch
from reference import lamb_steps, lars_steps, phi

from hf_gr import IRE, LAMB, LARS, TVLARS
from hf_gr import optimizers as module
from hf_gr.optimizers import time_varying_factor

STEPS = 10
SHAPES = [(4, 3), (5,), (2, 3, 2, 2), (1, 6), (), (3, 3)]


def problem(seed: int = 0) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """Weights, among them a layer of zeros, and gradients for some steps, among them a layer's that are zero."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    weights = [draw(shape) for shape in SHAPES]
    weights[3].zero_()
    gradients = [[draw(shape) * 5 for shape in SHAPES] for _ in range(STEPS)]
    for grads in gradients[:2]:
        grads[5].zero_()
    return weights, gradients


def run(make, weights, gradients, before=None) -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = make(params)
    for t, grads in enumerate(gradients):
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        if before is not None:
            before(t, optimizer)
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True)), "a gradient was changed"
    return [p.detach() for p in params], optimizer


def assert_close(actual, expected, tolerance=1e-12):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


PATHS = [pytest.param(True, id="foreach"), pytest.param(False, id="each"), pytest.param(None, id="default")]

LARS_SETTINGS = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "nesterov": True},
    {"weight_decay": 0.1, "momentum": 0.0},
    {"bias_lr_scale": 0.024},
    {"weight_decay": 0.1, "norm_clamp": (0, 2)},
]


def as_reference(settings: dict) -> dict:
    names = {"norm_clamp": "clamp", "trust_coefficient": "eta"}
    return {names.get(key, key): value for key, value in settings.items()}


@pytest.mark.parametrize("foreach", PATHS)
@pytest.mark.parametrize("settings", LARS_SETTINGS, ids=str)
def test_lars_is_its_formula(settings, foreach):
    weights, gradients = problem()
    actual, _ = run(lambda ps: LARS(ps, 0.7, **settings, foreach=foreach), weights, gradients)
    assert_close(actual, lars_steps(weights, gradients, 0.7, **as_reference(settings)))


@pytest.mark.parametrize("foreach", PATHS)
@pytest.mark.parametrize("settings", LARS_SETTINGS, ids=str)
def test_tvlars_is_its_formula(settings, foreach):
    weights, gradients = problem()
    curve = {"tv_lambda": 0.9, "delay_steps": 4, "alpha": 1.0, "gamma_min": 0.01}
    actual, _ = run(lambda ps: TVLARS(ps, 0.7, **settings, **curve, foreach=foreach), weights, gradients)
    phis = [phi(t, *curve.values()) for t in range(1, STEPS + 1)]
    assert_close(actual, lars_steps(weights, gradients, 0.7, phis=phis, **as_reference(settings)))


@pytest.mark.parametrize("foreach", PATHS)
def test_tvlars_has_the_released_code_as_a_setting(foreach):
    """q = eta / (0.1 + exp(lambda (s + 1))) ||p|| / ||d|| with s from 0 and both norms in [0, 10]; no phi on biases."""
    weights, gradients = problem()
    weights[0] *= 20  # beyond the clamp
    actual, _ = run(
        lambda ps: TVLARS(
            ps,
            0.7,
            weight_decay=5e-4,
            tv_lambda=0.3,
            delay_steps=0,
            alpha=0.1,
            gamma_min=0.0,
            norm_clamp=(0, 10),
            phi_everywhere=False,
            foreach=foreach,
        ),
        weights,
        gradients,
    )
    phis = [1 / (0.1 + math.exp(0.3 * (s + 1))) for s in range(STEPS)]
    expected = lars_steps(weights, gradients, 0.7, weight_decay=5e-4, clamp=(0, 10), phis=phis, phi_everywhere=False)
    assert_close(actual, expected)


@pytest.mark.parametrize("foreach", PATHS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-3},
        {"weight_decay": 0.1, "bias_correction": False, "exclude_1d": False, "norm_clamp": (0, 2)},
    ],
    ids=str,
)
def test_lamb_is_its_formula(settings, foreach):
    weights, gradients = problem()
    actual, _ = run(lambda ps: LAMB(ps, 0.03, **settings, foreach=foreach), weights, gradients)
    assert_close(actual, lamb_steps(weights, gradients, 0.03, **as_reference(settings)))
