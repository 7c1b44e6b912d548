"""How much a model forgets of its first dataset when it is fine-tuned on a second one.

The comparison is at equal fine-tuning loss, not at equal steps: a model that learns the second dataset more slowly
would otherwise seem to forget less.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import COUNT, NOT_NEGATIVE, POSITIVE, check_ranges


class Point(NamedTuple):
    """Both held-out losses after `step` steps of fine-tuning. `step` is a fraction where it was interpolated."""

    step: float
    finetuning_loss: float
    pretraining_loss: float


@dataclass(frozen=True)
class FineTuning:
    """How a model is fine-tuned: AdamW with a fresh state and a fixed learning rate.

    Args:
        target_loss: the fine-tuning loss to stop at; None: only `max_steps` ends it.
        max_steps: it ends there at the latest.
        eval_steps: both losses are measured every so many steps, before the first and after the last.
        max_grad_norm: the gradient is clipped to this norm; 0: it is not.
        seed: of dropout.

    Raises:
        ValueError: a value is out of range.
    """

    target_loss: float | None = None
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_steps: int = 500
    eval_steps: int = 20
    seed: int = 0

    def __post_init__(self):
        check_ranges(
            self, {"target_loss": POSITIVE, "learning_rate": POSITIVE, "max_steps": COUNT, "eval_steps": COUNT}
        )
        check_ranges(self, {"weight_decay": NOT_NEGATIVE, "max_grad_norm": NOT_NEGATIVE})


def frontier(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    evaluate: Callable[[nn.Module], tuple[float, float]],
    how: FineTuning,
) -> Iterator[Point]:
    """Fine-tune a copy of `model`; yields both losses each time they are measured.

    Ends with the first point whose fine-tuning loss is at most the target or not finite. `model` and the random number
    generators stay as they are.

    Args:
        loss: `loss(model, batch)`, in training mode.
        batches: of the second dataset; begun again at their end.
        evaluate: (fine-tuning loss, pretraining loss) on held-out data, in evaluation mode.
    """
    model = copy.deepcopy(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=how.learning_rate, weight_decay=how.weight_decay)
    stream = _repeated(batches)
    for step in range(how.max_steps + 1):
        if step:
            model.train()
            with torch.random.fork_rng():
                torch.manual_seed(how.seed + step)
                loss(model, next(stream)).backward()
            if how.max_grad_norm:
                nn.utils.clip_grad_norm_(parameters, how.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        if step % how.eval_steps == 0 or step == how.max_steps:
            with torch.no_grad():
                point = Point(step, *evaluate(model.eval()))
            yield point
            if not math.isfinite(point.finetuning_loss) or has_reached(point, how.target_loss):
                return


def _repeated(batches: Iterable[Any]) -> Iterator[Any]:
    """Unlike `itertools.cycle`, keeps no batches, and a loader shuffles them anew."""
    return itertools.chain.from_iterable(itertools.repeat(batches))


def has_reached(point: Point, target: float | None) -> bool:
    return target is not None and point.finetuning_loss <= target


def at_target(points: Sequence[Point], target: float) -> Point | None:
    """Where the frontier first reaches `target`, linear between the two measured points around it.

    None, if no two points are around it: it is not reached, or was before the first step. Nothing is extrapolated.
    """
    for before, after in itertools.pairwise(points):
        if after.finetuning_loss <= target < before.finetuning_loss:
            share = (before.finetuning_loss - target) / (before.finetuning_loss - after.finetuning_loss)
            return Point(*(a + share * (b - a) for a, b in zip(before, after, strict=True)))
    return None


def forgetting(points: Sequence[Point], target: float) -> float | None:
    """The pretraining loss at equal fine-tuning loss minus that before fine-tuning,

        L_pretraining(theta at L_finetuning = target) - L_pretraining(theta_0),

    or None without a value at the target; see `at_target`. ("Sharpness-aware pretraining mitigates catastrophic
    forgetting", arXiv:2605.02105, compares so.)
    """
    reached = at_target(points, target)
    return None if reached is None else reached.pretraining_loss - points[0].pretraining_loss


def common_target(frontiers: Iterable[Sequence[Point]]) -> float:
    """The lowest fine-tuning loss that all frontiers reach: the highest of their minima."""
    return max(
        min((p.finetuning_loss for p in points if math.isfinite(p.finetuning_loss)), default=math.inf)
        for points in frontiers
    )
