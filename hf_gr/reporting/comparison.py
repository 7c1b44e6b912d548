"""Comparing two ways of training: how much sooner one of them reaches a loss, in steps, tokens, passes and seconds."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from .plots import BLUE, ORANGE
from .record import History

#: What a run is measured in -> its key in the log.
AXES = {
    "steps": "step",
    "tokens": "num_input_tokens_seen",
    "passes": "train_passes",
    "seconds": "train_seconds",
}


def curve(history: History, axis: str, metric: str = "loss", window: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of one run: `metric` against `axis`, each point the mean of the `window` points up to it.

    Raises:
        ValueError: the run has fewer than `window` points, or none that is finite.
    """
    if window < 1:
        raise ValueError(f"window={window}: a mean needs points. Give 1 or more.")
    points = [(e[AXES[axis]], e[metric]) for e in history if metric in e and AXES[axis] in e]
    if not points:
        found = ", ".join(sorted({key for entry in history for key in entry if key.endswith(("loss", "error"))}))
        raise ValueError(
            f"metric={metric!r}: the run has not logged it. Choose one of {found or 'none, it has no log'}."
        )
    if len(points) < window:
        raise ValueError(f"window={window}: the run has logged {metric!r} {len(points)} times. Give that or less.")
    x, y = np.array(points, dtype=float).T
    y = np.convolve(y, np.ones(window) / window, mode="valid")
    if not np.isfinite(y).any():
        raise ValueError(f"metric={metric!r}: the run has no finite value of it. Leave the run out.")
    return x[window - 1 :], y


def first_reached(x: np.ndarray, y: np.ndarray, target: float) -> float:
    """Where the curve first is at `target` or below, between two points on their line; infinite if nowhere. A
    point that is not finite is not below, and no line begins there."""
    below = np.flatnonzero(y <= target)
    if not len(below):
        return math.inf
    i = below[0]
    if i == 0 or y[i] == target or not np.isfinite(y[i - 1]):
        return float(x[i])
    return float(x[i - 1] + (x[i] - x[i - 1]) * (y[i - 1] - target) / (y[i - 1] - y[i]))


def common_target(runs: Sequence[History], metric: str = "loss", window: int = 1) -> float:
    """The lowest loss that every run reaches: the highest of their minima."""
    return max(float(np.nanmin(curve(run, "steps", metric, window)[1])) for run in runs)


def speedups(
    baseline: Sequence[History],
    candidate: Sequence[History],
    target: float | None = None,
    metric: str = "loss",
    window: int = 1,
) -> dict[str, tuple[float, float, float]]:
    """For each axis that was logged: (mean where the baseline reaches `target`, mean of the candidate, their quotient).

    Several seeds each; a run that does not reach the target makes its mean infinite. The quotient is NaN if neither
    mean is finite. Without a target it is `common_target`.
    """
    runs = [*baseline, *candidate]
    target = common_target(runs, metric, window) if target is None else target
    result = {}
    for axis, key in AXES.items():
        if all(any(metric in e and key in e for e in run) for run in runs):
            means = [
                statistics.mean(first_reached(*curve(run, axis, metric, window), target) for run in group)
                for group in (baseline, candidate)
            ]
            result[axis] = (*means, _quotient(*means))
    return result


def _quotient(baseline: float, candidate: float) -> float:
    if math.isinf(candidate):
        return math.nan if math.isinf(baseline) else 0.0
    return baseline / candidate if candidate else math.inf


def plot_comparison(
    baseline: Sequence[History],
    candidate: Sequence[History],
    path: str | Path,
    names: tuple[str, str] = ("baseline", "candidate"),
    target: float | None = None,
    metric: str = "loss",
    window: int = 1,
) -> None:
    """The curves of all runs against each axis, with the target as a line, as one PNG."""
    axes_found = list(speedups(baseline, candidate, target, metric, window))
    target = common_target([*baseline, *candidate], metric, window) if target is None else target
    figure = Figure(figsize=(4.5 * len(axes_found), 4), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(axes_found), squeeze=False)[0], axes_found, strict=True):
        for runs, color, label in ((baseline, BLUE, names[0]), (candidate, ORANGE, names[1])):
            for i, run in enumerate(runs):
                axis.plot(*curve(run, name, metric, window), color=color, linewidth=1, label=None if i else label)
        axis.axhline(target, color="gray", linestyle="--", linewidth=0.8)
        axis.set(xlabel=name, ylabel=metric)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
