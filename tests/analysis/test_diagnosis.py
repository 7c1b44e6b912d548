"""The diagnosis of a run: every verdict of every rule, on records and logs made for it."""

import math
import re

import numpy as np
import pytest

from hf_gr.analysis import adaptive_lr_variation
from hf_gr.analysis.diagnosis import (
    Part,
    Run,
    _pace,
    diagnose,
    did_the_norm_fall,
    did_the_rates_move_early,
    is_near_the_edge,
    is_r_in_the_band,
    was_active_early,
    were_steps_skipped,
    would_zero_warmup_matter,
)

ADAM = {"betas": [0.9, 0.999], "eps": 1e-8}
GR = {"warmup_steps": 0.1, "gr_lambda": 0.1, "gr_r": 0.1, "gr_warmup": "none", "gr_interval": 1}
ZERO = {**GR, "gr_warmup": "zero", "gr_warmup_steps": 100}
OFF = {"warmup_steps": 100, "gr_lambda": 0}


def a_run(settings=GR, log=(), steps=1000, **changes) -> Run:
    given = {"optimizer": "AdamW", "optimizer_settings": ADAM, **changes}
    return Run(given.pop("parts", [Part(1, steps, settings)]), list(log), 1000, **given)


def a_log(steps=range(10, 1001, 10), **values) -> list[dict]:
    """An entry every ten steps; a value may be a function of the step."""
    return [{"step": t} | {k: v(t) if callable(v) else v for k, v in values.items()} for t in steps]


def check(finding, verdict, *patterns):
    assert finding.verdict == verdict, finding
    for pattern in patterns:
        assert re.search(pattern, finding.sentence), finding.sentence
    assert finding.sentence.endswith(".") and "nan" not in finding.sentence


# ---- Was GR active early? ----


@pytest.mark.parametrize(
    ("settings", "verdict", "pattern"),
    [
        (GR, "yes", "in 100 of the 100 warmup steps, at full strength, while the second moments of AdamW were young"),
        ({**ZERO, "gr_warmup": "r"}, "yes", "in 100 of the 100 .* on average at 50% of"),
        ({**ZERO, "gr_warmup": "lambda"}, "yes", "in 100 of the 100 .* on average at 50% of"),
        (ZERO, "no", "in 0 of the 100 warmup steps. It acted from step 101 on, in 810 of 1000 steps"),
        ({**ZERO, "gr_warmup_steps": 1000}, "no", "in 0 of the 100 warmup steps. It acted in no step"),
        ({**ZERO, "gr_warmup_steps": 40}, "yes", "in 60 of the 100"),
        ({**GR, "gr_interval": 5}, "yes", "in 20 of the 100 warmup steps, at full"),
        ({**GR, "gr_interval": 5, "gr_momentum_r": 0.4}, "yes", "in 100 of the 100"),
        ({**GR, "warmup_steps": 0}, "yes", "in 50 of the first 50 steps"),
        ({**ZERO, "warmup_steps": 3, "gr_warmup_steps": 3}, "yes", "in 47 of the first 50 steps"),
        ({**GR, "gr_ascent": "momentum"}, "yes", "in 100 of the 100"),
        (OFF, "no", r"off \(gr_lambda = 0\) in all 1000 recorded steps"),
        ({**OFF, "ire_kappa": 2.0}, "no", r"off \(gr_lambda = 0\) in all 1000 recorded steps"),
        ({**GR, "gr_warmup": "mine"}, "cannot tell", "gr_warmup=mine is not one of"),
    ],
)
def test_was_active_early(settings, verdict, pattern):
    check(was_active_early(a_run(settings, regularized_steps=810)), verdict, pattern)


def test_flags_that_the_log_contradicts():
    """A callback, say, has turned GR off at first."""
    run = a_run(GR, a_log(grad_norm=1.0, gr_lambda=lambda t: 0.1 * (t > 100)))
    check(was_active_early(run), "cannot tell", "flags say so for 100 of the 100 .* none of the 10 log entries")
    assert would_zero_warmup_matter(run) is None
    agreeing = a_run(GR, a_log(grad_norm=1.0, gr_lambda=0.1))
    check(was_active_early(agreeing), "yes", "in 100 of the 100")
    between = a_run({**GR, "gr_interval": 3}, a_log(steps=range(2, 1000, 3), grad_norm=1.0, gr_lambda=0.0))
    check(was_active_early(between), "yes", "in 34 of the 100")


@pytest.mark.parametrize(
    ("optimizer", "settings", "pattern"),
    [
        ("SGD", {"momentum": 0.9}, "SGD keeps no second moments"),
        ("TVLARS", {}, "keeps no second moments"),
        ("Lion", {"betas": [0.9, 0.99]}, "keeps no second moments"),
        ("Adafactor", {}, "were young"),
        ("AdamW", {}, "were young"),
        ("Mine", {"betas": [0.9, 0.95]}, "were young"),
        ("Mine", {}, "is not known"),
    ],
)
def test_optimizers_with_and_without_a_second_moment(optimizer, settings, pattern):
    check(was_active_early(a_run(optimizer=optimizer, optimizer_settings=settings)), "yes", pattern)


def test_a_resumed_run():
    """Other settings after step 60; and a checkpoint whose first steps nobody recorded."""
    switched_on = a_run(parts=[Part(1, 60, OFF), Part(61, 1000, GR)])
    check(was_active_early(switched_on), "yes", "in 40 of the 100 warmup steps")
    unrecorded = a_run(parts=[Part(1, 60, None), Part(61, 1000, GR)])
    check(was_active_early(unrecorded), "cannot tell", "first steps are not in run.json")
    assert would_zero_warmup_matter(unrecorded) is None
    later = a_run(parts=[Part(1, 500, OFF), Part(501, 1000, None)])
    check(was_active_early(later), "no", r"off \(gr_lambda = 0\) in all 500 recorded steps")
    check(was_active_early(a_run(parts=[])), "cannot tell")


# ---- Did the norm fall? ----


def falling(gamma, scale=0.5):
    return a_log(grad_norm=lambda t: scale * math.exp(-gamma * t / 2) * (1.02 if t % 20 else 1))


def test_a_falling_norm():
    finding = did_the_norm_fall(a_run(OFF, falling(0.05)))
    check(finding, "yes", "fell, .*gamma = 0.05 per step.*10 logged norms")
    numbers = re.search(r"varies by ([\d.]+)% of its mean, against ([\d.]+)%", finding.sentence)
    shown, steady = map(float, numbers.groups())
    assert shown == pytest.approx(100 * adaptive_lr_variation(100, 0.05, 0.999), abs=0.1)  # gamma has an error as well
    assert steady == pytest.approx(100 * adaptive_lr_variation(100, 0, 0.999), abs=0.05)
    check(did_the_norm_fall(a_run(OFF, falling(0))), "no", "neither fell nor rose")
    check(did_the_norm_fall(a_run(OFF, falling(-0.05))), "no", "rose, .*gamma = -0.05")


def test_clipping_hides_a_falling_norm_from_the_optimizer():
    log = falling(0.05, scale=1e3)
    check(did_the_norm_fall(a_run(OFF, log)), "yes", "gamma = 0.05 .*AdamW gets gamma = 0, as 10 of them were .* to 1")
    without = a_run({**OFF, "max_grad_norm": 0}, log)
    assert "clipped" not in did_the_norm_fall(without).sentence


def test_where_the_approximation_fails_its_value_is_a_bound():
    check(did_the_norm_fall(a_run(OFF, falling(0.6))), "yes", "by at least ")


def test_a_falling_norm_without_second_moments():
    run = a_run(OFF, falling(0.05), optimizer="SGD", optimizer_settings={})
    check(did_the_norm_fall(run), "yes", "SGD keeps no second moments that this could disturb")
    adafactor = did_the_norm_fall(a_run(OFF, falling(0.05), optimizer="Adafactor", optimizer_settings={}))
    assert "Eq. 9" not in adafactor.sentence


def test_a_log_with_too_few_norms():
    log = [*a_log(steps=range(25, 1001, 25), grad_norm=1.0), {"step": 99, "grad_norm": math.nan}]
    check(did_the_norm_fall(a_run(OFF, log)), "cannot tell", "in 4 of the 100 .* 5 are needed.*--logging_steps 10")
    assert did_the_norm_fall(a_run(OFF, log, steps=4)) is None


# ---- r ----


@pytest.mark.parametrize(
    ("values", "verdict", "pattern"),
    [
        ({"gr_linearity": 1.03}, "yes", r"linear band: .*rises 1.03 times .*of 75 log entries"),
        ({"gr_linearity": lambda t: 0.1 if t <= 250 else 1.0}, "yes", "rises 1.00 times"),
        ({"gr_linearity": 1.0, "gr_grad_norm": 2.0, "gr_perturbed_grad_norm": 2.02}, "yes", "too small .* is 1.01"),
        ({"gr_linearity": 1.0, "gr_grad_norm": 2.0, "gr_perturbed_grad_norm": 2.4}, "yes", "Good and failed"),
        ({"gr_linearity": 0.5}, "no", "outside of the linear band: .*0.50.*Good and failed"),
        ({"gr_linearity": 1.6}, "no", "outside of the linear band: .*1.60"),
        ({"gr_linearity": 4.0}, "no", "Curvature dominates: .*4.00"),
        ({}, "cannot tell", "gr_linearity is not logged"),
    ],
)
def test_the_gauge(values, verdict, pattern):
    check(is_r_in_the_band(a_run(log=a_log(**values))), verdict, pattern)


def test_the_gauge_where_there_is_none():
    assert is_r_in_the_band(a_run(OFF)) is None
    check(is_r_in_the_band(a_run({**GR, "gr_ascent": "momentum"})), "cannot tell", "one pass")


# ---- The second moments, and zero-warmup ----


def pace(early, late):
    """`adaptive_lr_change` that many times as large as with steady gradients, up to step 100 and then."""
    return a_log(adaptive_lr_change=lambda t: (early if t <= 100 else late) * 0.001 / (1 - 0.999**t) / math.sqrt(2))


def test_did_the_rates_move_early():
    check(did_the_rates_move_early(a_run(log=pace(1.5, 1.0))), "no", r"moved 1.5 times .*\(10 and 50 log entries\)")
    check(did_the_rates_move_early(a_run(OFF, pace(6.0, 2.0))), "yes", "moved 3 times")
    check(did_the_rates_move_early(a_run()), "cannot tell", "--gr_diagnostics_steps 10")
    assert did_the_rates_move_early(a_run(ZERO)) is None
    assert did_the_rates_move_early(a_run(log=pace(6.0, 2.0), optimizer="SGD", optimizer_settings={})) is None


def test_steady_gradients_have_a_pace_of_one():
    """The baseline, against the second moments of independent Gaussian gradients."""
    draws = np.random.default_rng(0).standard_normal((60, 20_000)) ** 2
    v, log = np.zeros(20_000), []
    for t, square in enumerate(draws, start=1):
        earlier, v = v / (1 - 0.99 ** max(t - 1, 1)), 0.99 * v + 0.01 * square
        if t in (30, 60):
            change = np.log(v / (1 - 0.99**t) / earlier) / 2
            log.append({"step": t, "adaptive_lr_change": np.sqrt(np.mean(change**2))})
    run = a_run(log=log, optimizer_settings={"betas": [0.9, 0.99]})
    assert _pace(run, 2, 60) == pytest.approx([1, 1], abs=0.1)  # first order in w = 0.04 and 0.02


@pytest.mark.parametrize(
    ("loss", "gauge", "verdict", "pattern"),
    [
        (
            lambda t: 2.3 - t * 1e-5,
            0.1,
            "yes",
            "the start: .*from 2.3 to 2.299 .*0.10 times.*--gr_warmup_steps 100",
        ),
        (lambda t: 2.3 - t * 1e-3, 0.1, "cannot tell", "from 2.29 to 2.2 .*no clear sign"),
        (2.3, 1.0, "cannot tell", "1.00 times .*no clear sign"),
        (math.nan, 1.0, "cannot tell", "have 0 log entries with a loss and 10 with gr_linearity"),
    ],
)
def test_would_zero_warmup_matter(loss, gauge, verdict, pattern):
    check(would_zero_warmup_matter(a_run(log=a_log(loss=loss, gr_linearity=gauge))), verdict, pattern)


def test_zero_warmup_where_it_changes_nothing():
    check(would_zero_warmup_matter(a_run(ZERO)), "no", "nothing: 0 of the 100")
    assert would_zero_warmup_matter(a_run(OFF)) is None


# ---- Stability, skipped steps ----


def test_the_edge_of_stability():
    def of(ratio):
        return a_run(log=a_log(preconditioned_sharpness=lambda t: ratio * t * 38, stability_threshold=38 * 1000))

    check(is_near_the_edge(of(0.5)), "no", r"at most 0.5 .*\(step 1000; 100 log entries\)")
    check(is_near_the_edge(of(1.0)), "yes", "at most 1 .*; 21 of them reach 0.8")
    check(is_near_the_edge(a_run()), "cannot tell", "--gr_diagnostics_steps 10")
    assert is_near_the_edge(a_run(optimizer="SGD", optimizer_settings={})) is None
    assert is_near_the_edge(a_run({**OFF, "ire_kappa": 1.0})) is None  # not measured then


def test_skipped_steps():
    check(were_steps_skipped(a_run(skipped_steps=3)), "yes", "3 of 1000")
    assert were_steps_skipped(a_run()) is None


def test_rules_that_do_not_apply_say_nothing():
    findings = diagnose(a_run(OFF, falling(0.05), optimizer="SGD", optimizer_settings={}))
    assert [finding.verdict for finding in findings] == ["no", "yes"]
    assert len(diagnose(a_run(skipped_steps=1))) == 7
