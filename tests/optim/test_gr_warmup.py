"""The schedules against numbers worked out by hand from Eq. 10-15."""

import pytest

from hf_gr.optim.gr_warmup import GR_WARMUPS, gr_strength


def strengths(warmup, steps=6, **kwargs):
    settings = {"r": 0.1, "lambda_": 0.08, "warmup_steps": 4, **kwargs}
    return [tuple(gr_strength(step, warmup=warmup, **settings)) for step in range(steps)]


def test_no_warmup():
    assert strengths("none", 2) == [(0.08, 0.1)] * 2


def test_r_warmup_ramps_both_from_one_over_t_w():
    # t/T_w = 1/4, 2/4, 3/4, 1, 1: the first step already moves (the released code starts at 0).
    expected = [(0.02, 0.025), (0.04, 0.05), (0.06, 0.075), (0.08, 0.1), (0.08, 0.1), (0.08, 0.1)]
    assert strengths("r") == [pytest.approx(pair) for pair in expected]


def test_r_warmup_of_sam_has_lambda_equal_to_r_exactly():
    assert all(lambda_t == r_t for lambda_t, r_t in strengths("r", 50, lambda_=0.1, warmup_steps=37))


def test_lambda_warmup_ramps_the_degree_alone():
    expected = [(0.02, 0.1), (0.04, 0.1), (0.06, 0.1), (0.08, 0.1), (0.08, 0.1), (0.08, 0.1)]
    assert strengths("lambda") == [pytest.approx(pair) for pair in expected]


def test_zero_warmup_is_plain_up_to_and_including_t_w():
    # Eq. 14: t <= T_w, that is the first four steps; the box of Algorithm 1 would make it three.
    assert [lambda_t for lambda_t, _ in strengths("zero")] == [0, 0, 0, 0, 0.08, 0.08]


@pytest.mark.parametrize("warmup", GR_WARMUPS)
def test_every_warmup_ends_at_full_strength_and_never_falls(warmup):
    values = strengths(warmup, 20, warmup_steps=13)
    assert values[13:] == [(0.08, 0.1)] * 7
    assert values == sorted(values)
    assert strengths(warmup, 3, warmup_steps=0) == [(0.08, 0.1)] * 3


def test_interval_counts_from_the_end_of_the_warmup():
    active = [
        gr_strength(s, r=0.1, lambda_=0.1, warmup="zero", warmup_steps=2, interval=3).is_active for s in range(10)
    ]
    assert active == [False, False, True, False, False, True, False, False, True, False]


def test_interval_leaves_the_ramp_alone():
    active = [gr_strength(s, r=0.1, lambda_=0.1, warmup="r", warmup_steps=3, interval=2).is_active for s in range(7)]
    assert active == [True, True, True, True, False, True, False]


def test_zero_degree_is_not_active():
    assert not gr_strength(5, r=0.1, lambda_=0.0, warmup="none", warmup_steps=0).is_active
