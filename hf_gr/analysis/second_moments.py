"""The adaptive learning rate of each coordinate, as an optimizer of the Adam family has it at this moment.

The paper's explanation of why gradient regularization can do harm ("When Will Gradient Regularization Be Harmful?",
Zhao et al., ICML 2024, Section 4) is about

    psi = 1 / (sqrt(v') + eps),    v' = v / (1 - beta2^t),

the factor by which the optimizer multiplies the coordinate's momentum. Both statistics here are of log psi, so that
neither a scaled loss nor the learning rate changes them.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

#: Where optimizers keep their second moment, the first that there is -> whether they divide it by 1 - beta2^t.
SECOND_MOMENTS = {"max_exp_avg_sq": True, "exp_avg_sq": True, "square_avg": False}


def preconditioner(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> list[Tensor | None]:
    """1 / psi = sqrt(v') + eps for each of `params`, of its shape; None for one without a second moment of its shape.

    A coordinate that never had a gradient has v = 0 and eps.
    """
    return [v if v is None else v.sqrt_().add_(eps) for v, eps in _second_moments(optimizer, params)]


@torch.no_grad()
def log_rates(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> list[Tensor]:
    """log psi of all coordinates that have had a gradient, NaN for the others, in one vector for each of `params`; of
    sharded ones, what this process holds. Empty for one without a second moment."""
    rates = []
    for v, eps in _second_moments(optimizer, params):
        if v is None:
            rates.append(torch.empty(0))
            continue
        local = v.to_local() if hasattr(v, "to_local") else v
        rates.append(torch.where(local > 0, -local.sqrt().add_(eps).log_(), math.nan).flatten())
    return rates


@torch.no_grad()
def _second_moments(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor]
) -> Iterator[tuple[Tensor | None, float]]:
    """(v', eps) of each of `params`, v' in memory of its own; None where the optimizer keeps none of its shape."""
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    for p in params:
        state, group = optimizer.state.get(p, {}), groups[p]
        name = next((name for name in SECOND_MOMENTS if getattr(state.get(name), "shape", None) == p.shape), None)
        correction = _correction(name, state, group)
        v = None if name is None or correction is None else state[name].float() / correction
        yield v, group.get("eps", 0.0)


def _correction(name: str | None, state: dict[str, Any], group: dict[str, Any]) -> float | None:
    """What v is divided by; None if that is not known."""
    if name is None or "grad_avg" in state:  # RMSprop of centered gradients
        return None
    if not SECOND_MOMENTS[name] or not group.get("bias_correction", True):
        return 1.0
    return 1 - group["betas"][1] ** float(state["step"]) if "betas" in group and "step" in state else None


def sums_of(rates: Sequence[Tensor], earlier: Sequence[Tensor] | None = None) -> Tensor:
    """(n, sum x, sum x^2) over the coordinates x of `rates`, and the same of their changes since `earlier`, all zeros
    without it. Sums of several processes may be added: see `statistics_of`."""
    return torch.cat([_sums(rates), _sums([a - b for a, b in zip(rates, earlier or (), strict=bool(earlier))])])


def _sums(vectors: Sequence[Tensor]) -> Tensor:
    total = torch.zeros(3, dtype=torch.float64)
    for vector in vectors:
        known = vector[vector.isfinite()].double()
        total += torch.stack([torch.tensor(float(known.numel())), known.sum().cpu(), known.square().sum().cpu()])
    return total


def statistics_of(sums: Tensor) -> dict[str, float]:
    """`adaptive_lr_spread`, the standard deviation of log psi over the coordinates, and `adaptive_lr_change`, the root
    mean square of its change; either is left out where nothing was summed."""
    n, total, squares, changed, _, changes = sums.tolist()
    found = {}
    if n:
        found["adaptive_lr_spread"] = math.sqrt(max(0.0, squares / n - (total / n) ** 2))
    if changed:
        found["adaptive_lr_change"] = math.sqrt(changes / changed)
    return found
