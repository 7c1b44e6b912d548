"""TVLARS: LARS with the schedule phi in place of a warmup."""

import logging
import math
from collections.abc import Iterable

from torch import Tensor

from ._layerwise import Group, LayerwiseOptimizer
from .lars import LARS

logger = logging.getLogger(__name__)


def time_varying_factor(
    step: float, tv_lambda: float, delay_steps: float, alpha: float = 1.0, gamma_min: float = 0.0
) -> float:
    """phi_t = 1 / (alpha + exp(tv_lambda (t - delay_steps))) + gamma_min, the schedule of TVLARS.

    It starts near 1/alpha, falls through 1/(alpha + 1) at `delay_steps`, and ends at gamma_min.

    Args:
        step: t, the number of the optimizer step, from 1.
        tv_lambda: lambda, how fast it falls, in 1/steps.
        delay_steps: d_e, when it falls.
    """
    # Further out exp overflows or is 0.
    psi = min(max(tv_lambda * (step - delay_steps), -700.0), 700.0)
    return 1 / (alpha + math.exp(psi)) + gamma_min


def check_time_varying(tv_lambda: float, delay_steps: float, alpha: float, gamma_min: float | None) -> None:
    """Raise `ValueError` for an argument of `time_varying_factor` that is out of its range."""
    if not (math.isfinite(tv_lambda) and tv_lambda > 0):
        raise ValueError(f"tv_lambda={tv_lambda}: must be > 0, the rate at which the step falls, in 1/steps.")
    if not (math.isfinite(delay_steps) and delay_steps >= 0):
        raise ValueError(f"delay_steps={delay_steps}: must be >= 0, the step around which the learning rate falls.")
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"alpha={alpha}: must be >= 0; the schedule starts near 1/alpha.")
    if gamma_min is not None and not (math.isfinite(gamma_min) and gamma_min >= 0):
        raise ValueError(f"gamma_min={gamma_min}: the floor of the schedule must be >= 0.")


CITATION = """\
@article{do2023revisiting,
  title  = {Revisiting LARS for Large Batch Training Generalization of Neural Networks},
  author = {Do, Khoi and Nguyen, Duong and Nguyen, Hoa and Tran-Thanh, Long and Tran, Nguyen-Hoang and Pham, Quoc-Viet},
  year   = {2023},
  url    = {https://arxiv.org/abs/2309.14053}
}"""


class TVLARS(LARS):
    """Time-varying LARS: no warmup; the steps start long, to leave sharp minima, and fall along a logistic curve.

        phi_t = 1 / (alpha + exp(tv_lambda (t - delay_steps))) + gamma_min
        q     = phi_t trust_coefficient ||w|| / ||d||

    and else as in `LARS`; where LARS has q = 1, q is phi_t. t counts the optimizer's steps from 1 and is saved with its
    state. No other schedule is needed: keep the learning rate constant.

    The code released with the paper differs from its formula. It is the setting `alpha=0.1, delay_steps=0,
    gamma_min=0, norm_clamp=(0, 10), phi_everywhere=False`.

    Args:
        tv_lambda: lambda, how fast phi falls, in 1/steps; the one value that the paper tunes. With
            tv_lambda * delay_steps below 1 phi never starts high; 5 is a good start.
        delay_steps: d_e, the step at which phi is 1 / (alpha + 1).
        alpha: phi starts near 1 / alpha.
        gamma_min: floor of phi. The paper has 0.001 batch / 256 for a learning rate that is not scaled with the batch:
            None is that in `GRTrainer`, which knows the batch, and 0.001 with its `lr_scaling="linear"`, so that the
            rate ends at a thousandth of its peak, as that of LARS with warmup does; 0 elsewhere.
        phi_everywhere: whether phi also multiplies the steps that have no trust ratio, those of norms and biases and
            of layers whose weights or gradients are all 0.

    The others are those of `LARS`.
    """

    help = "time-varying LARS: the schedule phi in place of a warmup"
    latex = (
        r"\mu \leftarrow m\, \mu + \phi_t\, \eta \frac{\|w\|}{\|d\|}\, d, \qquad w \leftarrow w - a\, \mu, \qquad "
        r"d = g + W w, \qquad \phi_t = \frac{1}{\alpha + e^{\lambda (t - d_e)}} + \gamma_{min}"
    )
    citation = f"{CITATION}\n{LARS.citation}"
    symbols = {
        **LARS.symbols,
        "tv_lambda": "lambda",
        "delay_steps": "d_e",
        "alpha": "alpha",
        "gamma_min": "gamma_min",
    }
    _has_warned = False

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[Group],
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        nesterov: bool = False,
        exclude_1d: bool = True,
        bias_lr_scale: float = 1.0,
        norm_clamp: tuple[float, float] | None = None,
        *,
        tv_lambda: float,
        delay_steps: float,
        alpha: float = 1.0,
        gamma_min: float | None = None,
        phi_everywhere: bool = True,
        foreach: bool = False,
    ):
        LayerwiseOptimizer.__init__(
            self,
            params,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            trust_coefficient=trust_coefficient,
            nesterov=nesterov,
            exclude_1d=exclude_1d,
            bias_lr_scale=bias_lr_scale,
            norm_clamp=norm_clamp,
            foreach=foreach,
            tv_lambda=tv_lambda,
            delay_steps=delay_steps,
            alpha=alpha,
            gamma_min=gamma_min,
            phi_everywhere=phi_everywhere,
            step=0,
        )

    def _check(self, group: Group) -> None:
        super()._check(group)
        check_time_varying(*(group[key] for key in ("tv_lambda", "delay_steps", "alpha", "gamma_min")))

    def phi(self, group: Group, step: int | None = None) -> float:
        """phi_t of a parameter group, at its current step or another."""
        return time_varying_factor(
            group["step"] if step is None else step,
            group["tv_lambda"],
            group["delay_steps"],
            group["alpha"],
            group["gamma_min"] or 0.0,
        )

    def _begin(self, group: Group) -> None:
        """Count, and warn of a phi that changes nothing; once, for the first group."""
        group["step"] += 1
        if group is not self.param_groups[0]:
            return
        product = group["tv_lambda"] * group["delay_steps"]
        if group["step"] == 1 and product < 1:
            logger.warning(
                f"TVLARS: tv_lambda * delay_steps is {product:.3g}, below 1: phi starts at {self.phi(group):.3g}, "
                "far below its upper bound of 1/alpha. Raise one of them; 5 is a good start for their product."
            )
        if not self._has_warned and not group["gamma_min"] and (phi := self.phi(group)) < 1e-4:
            self._has_warned = True
            logger.warning(
                f"TVLARS: phi is {phi:.1e} at step {group['step']} and has no floor: training all but stops here. Set "
                "gamma_min, lower tv_lambda, or raise delay_steps."
            )

    def _factors(self, group: Group) -> tuple[float, float]:
        phi = self.phi(group)
        return phi * group["trust_coefficient"], phi if group["phi_everywhere"] else 1.0
