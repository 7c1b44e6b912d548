import copy
import math

import pytest
import torch
from torch import nn
from torch.optim import SGD

from hf_gr import IRE
from hf_gr.trainer.guards import DivergenceGuard


def acting() -> tuple[IRE, DivergenceGuard]:
    p = nn.Parameter(torch.zeros(3))
    ire = IRE(SGD([p], lr=1.0), kappa=4.0, gamma=1.0)
    guard = DivergenceGuard(ire)
    p.grad = torch.ones(3)
    for _ in range(20):
        assert not guard.observe(1.0)  # before the first mask
    ire.update_mask()
    return ire, guard


def test_kappa_is_halved_when_the_loss_diverges():
    ire, guard = acting()
    assert not guard.observe(2.9)
    assert guard.observe(4.0)
    assert ire.kappa_in_force == 2.0
    assert not any(guard.observe(4.0) for _ in range(9))  # the next ten steps may tell
    assert guard.observe(4.0)
    assert ire.kappa_in_force == 1.0
    other, its_guard = acting()
    other.load_state_dict(copy.deepcopy(ire.state_dict()))
    assert other.kappa_in_force == 1.0
    assert [its_guard.observe(4.0) for _ in range(12)] == [guard.observe(4.0) for _ in range(12)]


def test_a_state_without_losses_starts_the_guard_anew():
    ire, guard = acting()
    state = ire.state_dict()
    assert state["ire"]["losses"] == {"mean": 1.0, "count": 20, "mean_at_start": None, "wait": 0}
    del state["ire"]["losses"]
    ire.load_state_dict(state)
    assert not guard.observe(100.0)  # the first loss is no divergence
    assert ire.state_dict()["ire"]["losses"]["mean"] == 100.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_kappa_is_halved_when_the_loss_is_not_finite(value):
    ire, guard = acting()
    assert guard.observe(value)
    assert not guard.observe(1.0)  # and the mean has not been spoilt
    assert ire.kappa_in_force == 2.0


def test_noise_around_a_small_loss_is_no_divergence():
    _, guard = acting()
    for _ in range(300):
        assert not guard.observe(0.001)
    assert not guard.observe(0.3)
    assert not guard.observe(0.9)


def test_divergence_before_ire_acts_is_not_its_fault():
    ire, guard = acting()
    ire.active = False
    assert not guard.observe(100.0)
