"""Curves that compare runs: two groups, or the arms of a grid."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import extra
from .comparison import common_target, curve, grouped, label_of, speedups
from .grid import Run
from .grid_file import Grid
from .plots import BLUE, COLORS, ORANGE, make_logarithmic
from .record import History

with extra("report"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Below matplotlib's limit on the height in pixels, 2 ** 16.
LARGEST_PICTURE = 65_000
#: More panels than these are drawn in rows of three, to be legible on a page.
MOST_COLUMNS = 6


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
    logged_axes = list(speedups(baseline, candidate, target, metric, window))
    target = common_target([*baseline, *candidate], metric, window) if target is None else target
    if "tokens" in logged_axes and _are_proportional([*baseline, *candidate], ("tokens", "steps"), metric, window):
        logged_axes.remove("tokens")  # the same picture twice
    figure = Figure(figsize=(4.5 * len(logged_axes), 4), layout="constrained")
    figure.suptitle(f"{names[0]} ({len(baseline)} runs) and {names[1]} ({len(candidate)}): {metric}")
    for axis, name in zip(figure.subplots(1, len(logged_axes), squeeze=False)[0], logged_axes, strict=True):
        for runs, color, label in ((baseline, BLUE, names[0]), (candidate, ORANGE, names[1])):
            for i, run in enumerate(runs):
                _draw(axis, *curve(run, name, metric, window), color=color, linewidth=1, label=None if i else label)
        axis.axhline(target, color="gray", linestyle="--", linewidth=0.8)
        axis.set(xlabel=name, ylabel=metric)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _are_proportional(runs: Sequence[History], axes: tuple[str, str], metric: str, window: int) -> bool:
    """Whether, to within a percent, one axis is the same multiple of the other in all runs."""
    one, other = (np.concatenate([curve(run, axis, metric, window)[0] for run in runs]) for axis in axes)
    return bool(np.allclose(one, other * one.sum() / other.sum(), rtol=0.01))


def plot_arms(grid: Grid, runs: Sequence[Run], path: Path) -> None:
    """Panels for each combination of the axes, with the mean of each arm over its seeds: the metric against steps and
    against seconds, with its range; ||g1||, with and without GR; and, if there are any, the warmups, the wrong labels
    that were memorized, and what `gr_diagnostics_steps` logged.

    A metric of the test set is measured only at the end; the curves show the same metric on the validation part. A
    dotted line marks the baseline's final value. Curves of a single point are drawn as dots.
    """
    groups = grouped(runs, grid.axes)
    logged = {key for run in runs for entry in run.history() for key in entry}
    further = [draw for key, draw in FURTHER_PANELS.items() if key in logged]
    count = 3 + len(further)
    columns = count if count <= MOST_COLUMNS else 3
    rows = -(-count // columns)
    figure = Figure(figsize=(4.6 * columns, 4.2 * rows * len(groups)), layout="constrained")
    panels = figure.subplots(rows * len(groups), columns, squeeze=False).reshape(len(groups), rows * columns)
    for row, (on_axes, members) in zip(panels, groups, strict=True):
        arms = {arm: [run.history() for run in cell] for (arm,), cell in grouped(members, ["arm"])}
        colors = dict(zip(arms, COLORS * (1 + len(arms) // len(COLORS)), strict=False))
        _plot_metric(row[0], grid, arms, colors, "step", "optimizer step")
        _plot_metric(row[1], grid, arms, colors, "train_seconds", "seconds of training")
        _plot_norms(row[2], arms, colors)
        for axis, draw in zip(row[3:count], further, strict=True):
            draw(axis, arms, colors)
        for axis in row[:count]:
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        for axis in row[count:]:
            axis.remove()
        row[0].legend(frameon=False)
        if on_axes:
            row[0].set_title(", ".join(f"{n} = {v}" for n, v in zip(grid.axes, on_axes, strict=True)))
    figure.savefig(path, dpi=min(120, LARGEST_PICTURE / figure.get_figheight()))


Histories = dict[str, list[History]]


def _plot_metric(axis: Axes, grid: Grid, arms: Histories, colors: dict[str, str], against: str, xlabel: str) -> None:
    scale = 100 if grid.percent else 1
    metric, ylabel = grid.metric, label_of(grid)
    if metric.startswith("test_"):
        metric, ylabel = metric.replace("test_", "eval_", 1), ylabel.replace("test", "validation", 1)
    curves = {}
    for arm, histories in arms.items():
        x, y = _curves(histories, metric, against)
        if len(x):
            y = scale * y
            curves[arm] = x, y.mean(axis=0)
            width = 3.0 if arm == grid.baseline else 1.2  # visible below an arm that is the same but for its end
            _draw(axis, *curves[arm], color=colors[arm], label=arm, linewidth=width)
            axis.fill_between(x, y.min(axis=0), y.max(axis=0), color=colors[arm], alpha=0.08)
    # The end of the curves matters most, and is hardest to see on a linear axis.
    axis.set(title=f"{ylabel}, mean and range over seeds".capitalize(), xlabel=xlabel, ylabel=ylabel)
    make_logarithmic(axis)
    if grid.baseline in curves:
        axis.axhline(float(curves[grid.baseline][1][-1]), color="gray", linestyle=":", linewidth=0.8)


def _plot_norms(axis: Axes, arms: Histories, colors: dict[str, str]) -> None:
    for arm, histories in arms.items():
        # Without GR the only gradient is logged under another name.
        key = "gr_grad_norm" if any("gr_grad_norm" in entry for entry in histories[0]) else "grad_norm"
        x, y = _curves(histories, key, "step")
        if len(x):
            _draw(axis, x, y.mean(axis=0), color=colors[arm], label=arm)
    axis.set(title="Gradient norm", xlabel="optimizer step", ylabel=r"$\|g_1\|$")
    make_logarithmic(axis)


def _plot_warmups(axis: Axes, arms: Histories, colors: dict[str, str]) -> None:
    end, width = 0.0, 1.5 + len(arms)
    for arm, histories in arms.items():
        width -= 1  # so that coinciding curves all stay visible
        for key, style in (("gr_lambda", "-"), ("gr_r", ":")):
            x, y = _curves(histories, key, "step")
            if len(x):
                y = y.mean(axis=0)
                _draw(axis, x, y, linestyle=style, color=colors[arm], drawstyle="steps-pre", linewidth=width)
                changes = np.flatnonzero(np.diff(y))
                end = max(end, x[changes[-1] + 1] if len(changes) else 0)
    axis.set(title="Warmup", xlabel="optimizer step", ylabel=r"$\lambda_t$ (lines), $r_t$ (dots)")
    axis.set_ylim(bottom=0)
    if 0 < 3 * end < axis.get_xlim()[1]:
        axis.set_xlim(0, 3 * end)  # nothing happens after that


def _plot_memorization(axis: Axes, arms: Histories, colors: dict[str, str]) -> None:
    for arm, histories in arms.items():
        x, y = _curves(histories, "train_accuracy_wrong_labels", "step")
        if len(x):
            _draw(axis, x, 100 * y.mean(axis=0), color=colors[arm])
    axis.set(title="Wrong labels memorized", xlabel="optimizer step", ylabel="share of the wrong labels (%)")
    axis.set_ylim(bottom=0)


def _plot_logged(axis: Axes, arms: Histories, colors: dict[str, str], *, key: str, title: str, ylabel: str) -> None:
    """The mean over the seeds of a logged value, on a logarithmic axis unless it may be negative."""
    for arm, histories in arms.items():
        x, y = _curves(histories, key, "step")
        if len(x):
            _draw(axis, x, y.mean(axis=0), color=colors[arm])
    axis.set(title=title, xlabel="optimizer step", ylabel=ylabel)
    if key == "gr_cosine":
        axis.set_ylim(top=1)
    else:
        make_logarithmic(axis)


def _logged(key: str, title: str, ylabel: str) -> Callable[..., None]:
    return partial(_plot_logged, key=key, title=title, ylabel=ylabel)


#: A logged value -> the panel of it.
FURTHER_PANELS: dict[str, Callable[..., None]] = {
    "gr_lambda": _plot_warmups,
    "train_accuracy_wrong_labels": _plot_memorization,
    "grad_norm_epoch_mean": _logged("grad_norm_epoch_mean", "Gradient norm, means of epochs", r"$\|g_1\|$"),
    "adaptive_lr_spread": _logged(
        "adaptive_lr_spread", "Adaptive learning rates: spread over coordinates", r"standard deviation of $\log \psi$"
    ),
    "adaptive_lr_change": _logged(
        "adaptive_lr_change", "Adaptive learning rates: change in one step", r"root mean square of $\Delta \log \psi$"
    ),
    "preconditioned_sharpness": _logged(
        "preconditioned_sharpness", "Largest eigenvalue of the preconditioned Hessian", r"$\lambda_{\max}(P^{-1} H)$"
    ),
    "gr_cosine": _logged("gr_cosine", "Both gradients", r"cosine of $g_1$ and $g_2$"),
}


def _draw(axis: Axes, x: np.ndarray, y: np.ndarray, *, linewidth: float = 1.2, **style: Any) -> None:
    """A curve, or a dot if it has only one point."""
    axis.plot(x, y, marker="o" if len(x) == 1 else "", linewidth=linewidth, **style)


def _curves(histories: Sequence[Sequence[dict[str, float]]], key: str, against: str) -> tuple[np.ndarray, np.ndarray]:
    """x, averaged over the runs, and y of each run, up to the length of the shortest."""
    xs, ys = [], []
    for history in histories:
        points = [(entry[against], entry[key]) for entry in history if key in entry and against in entry]
        xs.append([x for x, _ in points])
        ys.append([y for _, y in points])
    count = min(map(len, xs))
    return np.mean([x[:count] for x in xs], axis=0), np.array([y[:count] for y in ys], dtype=float)
