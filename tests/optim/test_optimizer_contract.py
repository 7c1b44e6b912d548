"""Every optimizer of the library keeps what torch's own keep; see `optimizer_contract`."""

import pytest
import torch

import helpers.optimizer_checks_interface
import helpers.optimizer_checks_training  # noqa: F401
from helpers.optimizer_contract import CHECKS
from hf_gr import IRE, LAMB, LARS, TVLARS, Muon
from hf_gr.optim import OPTIMIZERS


def tvlars(params, lr=0.5, **settings):
    return TVLARS(params, lr, tv_lambda=0.1, delay_steps=50, **settings)


def around(make):
    """IRE with a mask, so that it acts."""

    def wrapped(params, **settings):
        ire = IRE(make(params, **settings), kappa=1.0, mask="uniform")
        ire.update_mask()
        return ire

    return wrapped


OURS = {
    "LARS": lambda params, lr=0.5, **settings: LARS(params, lr, **settings),
    "LARS Nesterov": lambda params, lr=0.5, **settings: LARS(params, lr, nesterov=True, **settings),
    "LARS foreach": lambda params, lr=0.5, **settings: LARS(params, lr, foreach=True, **settings),
    "TVLARS": tvlars,
    "LAMB": lambda params, lr=0.01, **settings: LAMB(params, lr, **settings),
    "LAMB foreach": lambda params, lr=0.01, **settings: LAMB(params, lr, foreach=True, **settings),
    "Muon": lambda params, lr=0.1, **settings: Muon(params, lr, **settings),
    "IRE around AdamW": around(lambda params, lr=0.01, **settings: torch.optim.AdamW(params, lr, **settings)),
    "IRE around fused AdamW": around(
        lambda params, lr=0.01, **settings: torch.optim.AdamW(params, lr, fused=True, **settings)
    ),
    "IRE around SGD": around(lambda params, lr=0.01, **settings: torch.optim.SGD(params, lr, momentum=0.9, **settings)),
    "IRE around LAMB": around(lambda params, lr=0.01, **settings: LAMB(params, lr, **settings)),
}


def test_every_optimizer_of_the_table_is_among_them():
    made = {type(make([torch.nn.Parameter(torch.ones(2, 2))])) for make in OURS.values()}
    assert {*OPTIMIZERS.values(), IRE} <= made


#: What does not hold, and why.
EXCEPT = {
    "a gradient that appears late finds a new optimizer's state": {"TVLARS": "phi goes by the steps of the run"},
    **{
        check: {"IRE around fused AdamW": "so is fused AdamW alone: it reads memory in its order"}
        for check in (
            "the loss falls, non-contiguous parameters",
            "non-contiguous is as contiguous",
            "a gradient in another layout is read in its order",
            "an expanded gradient is read as what it shows",
        )
    },
}


def cases():
    for name in OURS:
        for check in CHECKS:
            reason = EXCEPT.get(check, {}).get(name)
            marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
            yield pytest.param(name, check, marks=marks, id=f"{name}: {check}")


@pytest.mark.parametrize(("name", "check"), list(cases()))
def test_contract(name, check):
    CHECKS[check](OURS[name])
