"""GR warmups: how the degree and the radius of gradient regularization grow at the start of training.

An adaptive optimizer estimates its second moments during the first steps; regularizing the gradient there makes that
estimate worse. The warmups of "When Will Gradient Regularization Be Harmful?" (Zhao et al., ICML 2024) therefore hold
GR back for the T_w steps in which the learning rate warms up. (The learning-rate warmup of transformers is one step
behind: at step t its factor is (t - 1)/T_w, 0 at the first one, where a ramp here has t/T_w.)

Every warmup is a pure function of the step: `f(t, T_w) -> (lambda_scale, r_scale)`, t = 1, 2, ... counting optimizer
steps, so a resumed run continues on the same schedule without any state. To add one, write the function and give it an
entry in `GR_WARMUPS`: the command line, the validation, the model card, the docs and the tests read that table.
"""

from collections.abc import Callable
from typing import NamedTuple


class Warmup(NamedTuple):
    """A GR warmup: its function, what `--help` says of it, and its equation on the model card."""

    function: Callable[[int, int], tuple[float, float]]
    help: str
    latex: str


class GRStrength(NamedTuple):
    """What GR does at one step: the degree `lambda_t` and the radius `r_t` of Algorithm 1."""

    lambda_t: float
    r_t: float

    @property
    def is_active(self) -> bool:
        """Whether the step needs a second pass. With lambda_t = 0 or r_t = 0 the regularized gradient is g1 itself."""
        return self.lambda_t != 0 and self.r_t != 0

    @property
    def grad_scale(self) -> float:
        """r_t/lambda_t - 1, what g1 is multiplied by before g2 is added to it."""
        return (self.r_t - self.lambda_t) / self.lambda_t

    @property
    def g2_weight(self) -> float:
        """lambda_t/r_t, what the sum of both is multiplied by."""
        return self.lambda_t / self.r_t


def _ramp(t: int, warmup_steps: int) -> float:
    """w(t) = min(t / T_w, 1). The first step already has 1/T_w: the released code starts at 0 and lags one step."""
    return min(t / warmup_steps, 1.0) if warmup_steps > 0 else 1.0


def no_warmup(t: int, warmup_steps: int) -> tuple[float, float]:
    """Full strength from the first step."""
    return 1.0, 1.0


def r_warmup(t: int, warmup_steps: int) -> tuple[float, float]:
    """Eq. 10-11: r_t = w(t) r. lambda_t ramps with it, so that lambda_t / r_t stays what the user set."""
    w = _ramp(t, warmup_steps)
    return w, w


def lambda_warmup(t: int, warmup_steps: int) -> tuple[float, float]:
    """Eq. 12-13: lambda_t = w(t) lambda, the radius is r throughout."""
    return _ramp(t, warmup_steps), 1.0


def zero_warmup(t: int, warmup_steps: int) -> tuple[float, float]:
    """Eq. 14-15: lambda_t = 0 for t <= T_w, lambda afterwards.

    The box of Algorithm 1 has t < T_w; Eq. 14 and the released code agree on t <= T_w, and so do we.
    """
    return (0.0, 1.0) if t <= warmup_steps else (1.0, 1.0)


GR_WARMUPS: dict[str, Warmup] = {
    "none": Warmup(no_warmup, "full strength from the first step", r"\lambda_t = \lambda, \qquad r_t = r"),
    "r": Warmup(
        r_warmup,
        "radius and degree grow linearly for T_w steps",
        r"r_t = \min\left(\frac{t}{T_w}, 1\right) r, \qquad \lambda_t = \min\left(\frac{t}{T_w}, 1\right) \lambda",
    ),
    "lambda": Warmup(
        lambda_warmup,
        "the degree grows linearly for T_w steps",
        r"\lambda_t = \min\left(\frac{t}{T_w}, 1\right) \lambda, \qquad r_t = r",
    ),
    "zero": Warmup(
        zero_warmup,
        "no GR for T_w steps, full strength afterwards",
        r"\lambda_t = 0 \text{ in the steps } t \le T_w, \text{ then } \lambda_t = \lambda, \qquad r_t = r",
    ),
}


def gr_strength(
    step: int, *, r: float, lambda_: float, warmup: str, warmup_steps: int, interval: int = 1
) -> GRStrength:
    """(lambda_t, r_t) of the optimizer step that follows `step` completed ones.

    Args:
        step: completed optimizer steps, `TrainerState.global_step`; the paper's t is `step + 1`.
        r: radius of the perturbation.
        lambda_: degree of regularization; equal to `r` it is SAM.
        warmup: a key of `GR_WARMUPS`.
        warmup_steps: T_w.
        interval: after the warmup only every `interval`-th step is regularized, beginning with the first; the others
            are plain. 1 is the paper.
    """
    scales = GR_WARMUPS[warmup].function(step + 1, warmup_steps)
    return GRStrength(0.0 if is_between(step, warmup_steps, interval) else scales[0] * lambda_, scales[1] * r)


def is_between(step: int, warmup_steps: int, interval: int) -> bool:
    """Whether the optimizer step that follows `step` completed ones is left out by `interval`."""
    return step > warmup_steps and (step - warmup_steps) % interval != 0
