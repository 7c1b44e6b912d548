"""The variance of Adam's adaptive learning rate: Eq. 9 against its sums, exact values and simulations."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from hf_gr.analysis import Estimate, adaptive_lr_variance, adaptive_lr_variation, effective_samples, fit_norm_decay

settings.register_profile("hf_gr", deadline=None, max_examples=60, derandomize=True, database=None)
settings.load_profile("hf_gr")

FEW = "ignore:only .* gradients count"


def exact_variance(t: int, gamma: float) -> float:
    """Without the delta method: E Y^-p = integral of s^(p-1) E exp(-s Y) / Gamma(p) over s, here with s = exp(v)."""
    sigma = np.exp(-gamma * np.arange(t)) / t

    def moment(p: float) -> float:
        def integrand(v: float) -> float:
            return math.exp(p * v - 0.5 * np.log1p(2 * math.exp(v) * sigma).sum())

        return quad(integrand, -60, 80, limit=500)[0] / math.gamma(p)

    return moment(1) - moment(0.5) ** 2


# ---- Closed form ----


@pytest.mark.filterwarnings(FEW)
@pytest.mark.parametrize("gamma", [-0.5, -1e-3, 0.0, 1e-12, 1e-6, 0.02, 0.5, 4.0])
def test_the_closed_form_is_that_of_the_sums(gamma):
    for t in (1, 2, 3, 50, 300):
        closed, delta = (adaptive_lr_variance(t, gamma, 0.3, method) for method in ("closed", "delta"))
        assert closed == pytest.approx(delta, rel=1e-12), t


@pytest.mark.filterwarnings(FEW)
def test_eq_9_as_printed():
    t, gamma, sigma1 = 50, 0.1, 2.0
    x = math.exp(-gamma)
    printed = t / (2 * sigma1) * (1 + x**t) * (1 - x) ** 2 / ((1 + x) * (1 - x**t) ** 2)
    assert adaptive_lr_variance(t, gamma, sigma1) == pytest.approx(printed, rel=1e-12)


@pytest.mark.filterwarnings(FEW)
def test_limits():
    assert adaptive_lr_variance(50, 0.0, 2.0) == 1 / (2 * 50 * 2.0)  # RAdam's
    assert adaptive_lr_variance(50, 1e-9) == pytest.approx(0.01, rel=1e-6)
    x, t = math.exp(-0.1), 100_000
    assert adaptive_lr_variance(t, 0.1) == pytest.approx(t * (1 - x) ** 2 / (2 * (1 + x)), rel=1e-12)
    assert 0 <= adaptive_lr_variance(t, -0.1) < 1e-300  # gradients that grow beyond all bounds
    assert effective_samples(t, 0.1) == pytest.approx(1 / math.tanh(0.05))
    assert adaptive_lr_variance(t, 0.0, method="ema") == pytest.approx(1 / (2 * 1.999 / 0.001), rel=1e-3)


@pytest.mark.filterwarnings(FEW)
@pytest.mark.parametrize(
    ("gamma", "samples", "closed", "monte_carlo"),
    [(0, 50, 0.010, 0.0108), (0.02, 46.2, 0.0169, 0.0182), (0.1, 19.7, 0.121, 0.133), (0.5, 4.1, 2.41, 3.79)],
)
def test_published_example(gamma, samples, closed, monte_carlo):
    """At t = 50; the last column is the exact value that a simulation approaches."""
    assert effective_samples(50, gamma) == pytest.approx(samples, rel=5e-3)
    assert adaptive_lr_variance(50, gamma) == pytest.approx(closed, rel=5e-3)
    assert exact_variance(50, gamma) == pytest.approx(monte_carlo, rel=5e-3)


@pytest.mark.filterwarnings(FEW)
@given(t=st.integers(2, 10_000), gamma=st.floats(0, 4), more=st.floats(1e-3, 4))
@example(t=2, gamma=0.0, more=1e-3)
def test_theorem_4_3_without_its_condition(t, gamma, more):
    """The variance grows with gamma for all t >= 2, at least as fast as exp(integral of <k>) over gamma."""
    low, high = adaptive_lr_variance(t, gamma), adaptive_lr_variance(t, gamma + more)
    k = np.arange(t)
    weights = np.exp(-(gamma + more) * k)
    slowest = (k @ weights) / weights.sum()  # <k>, which falls in gamma
    assert math.log(high / low) >= more * slowest * (1 - 1e-9) - 1e-12  # rounding
    assert high > low


# ---- Variation ----


@pytest.mark.filterwarnings(FEW)
def test_the_variation_does_not_depend_on_scale():
    t, gamma = 80, 0.05
    sigma = np.exp(-gamma * np.arange(t))
    mean = (3.0 * sigma.mean()) ** -0.5
    assert adaptive_lr_variation(t, gamma) == pytest.approx(adaptive_lr_variance(t, gamma, 3.0) ** 0.5 / mean)
    assert effective_samples(t, gamma) == pytest.approx(sigma.sum() ** 2 / (sigma**2).sum())


# ---- The exponential average ----


@pytest.mark.parametrize("gamma", [-0.02, 0.0, 0.001, 0.03])
@pytest.mark.parametrize("beta2", [0.9, 0.999])
def test_ema_against_its_sums(gamma, beta2):
    """gamma = 0.001 all but cancels log(0.999)."""
    t, sigma1 = 200, 0.5
    k = np.arange(1, t + 1)
    weights = (1 - beta2) * beta2 ** (t - k) / (1 - beta2**t)
    sigma = sigma1 * np.exp(-gamma * (k - 1))
    expected = (weights**2 @ (2 * sigma**2)) / (4 * (weights @ sigma) ** 3)
    assert adaptive_lr_variance(t, gamma, sigma1, "ema", beta2=beta2) == pytest.approx(expected, rel=1e-9)
    samples = (weights @ sigma) ** 2 / (weights**2 @ sigma**2)
    assert adaptive_lr_variation(t, gamma, beta2) == pytest.approx((2 * samples) ** -0.5, rel=1e-9)


def test_ema_against_adam():
    """The second moment of torch's Adam, fed with Gaussian gradients that decay."""
    t, gamma, beta2, draws = 120, 0.01, 0.98, 20_000
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(draws, dtype=torch.float64))
    adam = torch.optim.Adam([parameter], betas=(0.9, beta2))
    for k in range(t):
        noise = torch.randn(draws, generator=generator, dtype=torch.float64)
        parameter.grad = math.exp(-gamma * k / 2) * noise
        adam.step()
    psi = (adam.state[parameter]["exp_avg_sq"] / (1 - beta2**t)) ** -0.5
    # With n = 66, the delta method is low by 5 %; the simulation itself has a standard error of 1 %.
    assert psi.var().item() == pytest.approx(adaptive_lr_variance(t, gamma, method="ema", beta2=beta2), rel=0.1)


# ---- Monte Carlo ----


def test_a_million_draws_against_eq_9():
    """The delta method leaves out terms of relative size 4/n, of which n = 81 leaves 5 %."""
    estimate = adaptive_lr_variance(100, 0.01, method="monte_carlo")
    expected, samples = adaptive_lr_variance(100, 0.01), effective_samples(100, 0.01)
    assert expected < estimate.value < expected * (1 + 5 / samples)
    assert estimate.standard_error < 0.002 * expected


@pytest.mark.parametrize(("t", "gamma"), [(12, 0.0), (30, 0.2), (20, -0.1)])
def test_monte_carlo_against_exact_values(t, gamma):
    estimate = adaptive_lr_variance(t, gamma, 0.5, method="monte_carlo", draws=100_000, seed=1)
    assert abs(estimate.value - exact_variance(t, gamma) / 0.5) < 4 * estimate.standard_error
    assert estimate == adaptive_lr_variance(t, gamma, 0.5, method="monte_carlo", draws=100_000, seed=1)


def test_a_variance_without_a_fourth_moment_has_no_standard_error():
    assert adaptive_lr_variance(4, 0.0, method="monte_carlo", draws=100).standard_error == math.inf


# ---- Arguments and results ----


@pytest.mark.filterwarnings("error")
def test_warning_where_the_delta_method_fails():
    adaptive_lr_variance(50, 0.4)
    for function in (adaptive_lr_variance, adaptive_lr_variation):
        with pytest.warns(UserWarning, match=r"only 4\.1 gradients count .*: below 5 .*monte_carlo"):
            function(np.array([50, 60]), 0.5)


@pytest.mark.parametrize("method", ["closed", "delta", "ema"])
def test_types_and_shapes(method):
    t, gamma = [[20], [40]], [0.0, 0.01, 0.1]
    expected = [[adaptive_lr_variance(a, b, method=method) for b in gamma] for (a,) in t]
    assert type(expected[0][0]) is float
    array = adaptive_lr_variance(np.array(t), np.array(gamma), method=method)
    assert isinstance(array, np.ndarray) and np.allclose(array, expected, rtol=1e-14)
    tensor = adaptive_lr_variance(torch.tensor(t), torch.tensor(gamma, requires_grad=True), method=method)
    assert tensor.dtype == torch.float32 and torch.allclose(tensor, torch.tensor(expected))
    assert isinstance(adaptive_lr_variance(np.array(20), 0.1, method=method), np.ndarray)
    assert adaptive_lr_variation(torch.tensor(40), 0.1).shape == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"t": 0}, "t=0: give a number of steps"),
        ({"t": 2.5}, "t=2.5: "),
        ({"t": math.nan}, "t=nan: "),
        ({"gamma": math.inf}, "gamma=inf: "),
        ({"sigma1": 0.0}, "sigma1=0.0: "),
        ({"method": "mc"}, "method='mc': choose one of closed, delta, ema, monte_carlo."),
        ({"method": "ema", "beta2": 0.0}, r"beta2=0.0: must be in \(0, 1\]"),
        ({"method": "monte_carlo", "t": 2}, "t=2: the variance of psi is infinite"),
        ({"method": "monte_carlo", "draws": 1}, "draws=1: "),
        ({"method": "monte_carlo", "gamma": np.array([0.1])}, "must be single numbers"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"^.*{message}"):
        adaptive_lr_variance(**{"t": 50, "gamma": 0.0, **arguments})


# ---- The rate of a run ----


def test_the_rate_of_synthetic_norms():
    generator = np.random.default_rng(0)
    steps = range(5, 201, 5)
    noise = dict(zip(steps, generator.normal(0, 0.1, len(steps)), strict=True))
    log = [{"step": step, "grad_norm": 3 * math.exp(-0.02 * step / 2 + noise[step] / 2)} for step in steps]
    log += [{"step": 100, "eval_loss": 1.0}, {"step": 300, "grad_norm": 1e6}, {"step": 50, "grad_norm": math.nan}]
    estimate = fit_norm_decay(log, last_step=200)
    assert isinstance(estimate, Estimate) and abs(estimate.value - 0.02) < 3 * estimate.standard_error
    # As known from the noise and the steps, up to the sampling of 40 residuals.
    assert estimate.standard_error == pytest.approx(0.1 / (5 * math.sqrt(40 * (40**2 - 1) / 12)), rel=0.4)


def test_the_rate_is_exact_without_noise_and_negative_for_growing_norms():
    log = [{"step": step, "gr_grad_norm": math.exp(0.05 * step)} for step in (1, 2, 5, 9)]
    estimate = fit_norm_decay(log, key="gr_grad_norm")
    assert estimate.value == pytest.approx(-0.1, rel=1e-12) and estimate.standard_error < 1e-12


def test_a_rate_takes_three_steps():
    log = [{"step": 1, "grad_norm": 1.0}, {"step": 2, "grad_norm": 0.0}, {"step": 3, "grad_norm": 1.0}]
    with pytest.raises(ValueError, match=r"grad_norm is logged in 2 steps up to 10, .*logging_steps"):
        fit_norm_decay(log, last_step=10)
