"""What a grid of runs says: a tidy table, a table for people with the published numbers beside it, and pictures."""

import csv
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from .grid import Grid, Run
from .plots import COLORS

#: What a run's row of the tidy table has besides its coordinates and the metrics of its last evaluation.
COSTS = ("train_seconds", "train_passes", "train_tokens", "peak_memory_bytes")


def write_results(runs: Sequence[Run], path: Path) -> None:
    """One row per finished run: coordinates, metrics, costs. A CSV."""
    rows = []
    for run in runs:
        results = run.results()
        kept = {key: value for key, value in results.items() if key.startswith("eval_") or key in COSTS}
        rows.append({**run.point, **kept})
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def markdown_table(grid: Grid, runs: Sequence[Run], published: Path | None = None) -> str:
    """Mean and standard deviation of each arm at each combination of the axes.

    Beside them: the difference to the baseline over the seeds that both have, with the p-value of a paired t-test (two
    seeds or more); the metric at equal seconds, which is that of the last evaluation within the mean time of the
    quickest arm, on a schedule made for more; the costs; and the published numbers, marked as such.
    """
    unit = " (%)" if grid.percent else ""
    metric = grid.metric.removeprefix("eval_")
    head = [*grid.axes, "", f"{metric}{unit}, mean ± std", "each seed", f"against {grid.baseline}", "p",
            f"{metric}{unit} at equal seconds", "seconds", "passes"]  # fmt: skip
    known = _published(published) if published is not None and grid.published else {}
    if known:
        head.append("published, **not ours**")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for at, group in _by(runs, grid.axes):
        arms = {arm: list(members) for (arm,), members in _by(group, ["arm"])}
        limit = min(_mean(run.results()["train_seconds"] for run in members) for members in arms.values())
        for arm, members in arms.items():
            cells = [*map(str, at), arm, *_cells(grid, members, arms.get(grid.baseline, []), limit)]
            if known:
                cells.append(known.get(_published_key(grid, dict(zip(grid.axes, at, strict=True)), arm), ""))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cells(grid: Grid, members: Sequence[Run], baseline: Sequence[Run], limit: float) -> list[str]:
    scale = 100 if grid.percent else 1
    values = {run.point["seed"]: scale * run.results()[grid.metric] for run in members}
    reference = {run.point["seed"]: scale * run.results()[grid.metric] for run in baseline}
    common = [] if members is baseline else sorted(set(values) & set(reference))
    differences = [values[seed] - reference[seed] for seed in common]
    p = ""
    if len(common) > 1:
        same = max(differences) == min(differences)  # the test divides by their spread
        p = "" if same else f"{stats.ttest_rel([values[s] for s in common], [reference[s] for s in common]).pvalue:.2g}"
    early = [scale * value for run in members if (value := _at_seconds(run, grid.metric, limit)) is not None]
    return [
        _mean_and_std(list(values.values())),
        ", ".join(f"{value:.4g}" for value in values.values()),
        f"{_mean(differences):+.3g}" if differences else "",
        p,
        f"{_mean(early):.4g}" if early else "",
        f"{_mean(run.results()['train_seconds'] for run in members):,.0f}",
        f"{_mean(run.results()['train_passes'] for run in members):,.0f}",
    ]


def _by(runs: Iterable[Run], names: Iterable[str]) -> list[tuple[tuple[Any, ...], list[Run]]]:
    groups: dict[tuple[Any, ...], list[Run]] = {}
    names = list(names)
    for run in runs:
        groups.setdefault(tuple(run.point[name] for name in names), []).append(run)
    return list(groups.items())


def _mean(values: Iterable[float]) -> float:
    return statistics.mean(values)


def _mean_and_std(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{_mean(values):.4g}{spread}"


def _at_seconds(run: Run, metric: str, limit: float) -> float | None:
    """The last evaluation of a run that was within so many seconds of training."""
    found = [e[metric] for e in run.history() if metric in e and e.get("train_seconds", np.inf) <= 1.02 * limit]
    return found[-1] if found else None


def _published(path: Path) -> dict[tuple[str, str, str, str], str]:
    with path.open(newline="", encoding="utf-8") as file:
        return {
            (row["model"], row["dataset"], row["optimizer"], row["method"]): f"{row['mean']} ± {row['std']}"
            for row in csv.DictReader(file)
        }


def _published_key(grid: Grid, at: dict[str, Any], arm: str) -> tuple[str, str, str, str]:
    names = grid.published["names"]
    what = {**(grid.published_like or {}), **at}
    model, dataset, optimizer = (names.get(str(what.get(key)), "") for key in ("model", "dataset_name", "optim"))
    return model, dataset, optimizer, grid.published["arms"].get(arm, "")


# ---- Pictures ----


def plot_arms(grid: Grid, runs: Sequence[Run], path: Path) -> None:
    """The metric against steps and seconds, with its range over the seeds, and the gradient norm; means of each arm."""
    scale = 100 if grid.percent else 1
    label = grid.metric.removeprefix("eval_") + (" (%)" if grid.percent else "")
    panels = [
        (grid.metric, "step", "optimizer step", scale),
        (grid.metric, "train_seconds", "seconds of training", scale),
        ("gr_grad_norm", "step", "optimizer step", 1),
    ]
    if not any("gr_grad_norm" in entry for run in runs for entry in run.history()):
        panels[2] = ("grad_norm", "step", "optimizer step", 1)
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, (key, against, xlabel, factor) in zip(axes, panels, strict=True):
        for ((arm,), members), color in zip(_by(runs, ["arm"]), COLORS * 3, strict=False):
            fallback = "grad_norm" if key == "gr_grad_norm" else key  # without GR there is one gradient
            x, y = _mean_curve([run.history() for run in members], key, fallback, against)
            if len(x):
                axis.plot(x, factor * y.mean(axis=0), color=color, label=arm, linewidth=1.2)
                if key == grid.metric:
                    axis.fill_between(x, factor * y.min(axis=0), factor * y.max(axis=0), color=color, alpha=0.08)
        # The end of the curves is what matters, and is the smallest part of a linear axis.
        axis.set(xlabel=xlabel, ylabel=label if key == grid.metric else r"$\|g_1\|$", yscale="log")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)


def _mean_curve(
    histories: Sequence[Sequence[dict[str, float]]], key: str, fallback: str, against: str
) -> tuple[np.ndarray, np.ndarray]:
    """x, averaged over the runs, and y of each run; the entries that all runs have."""
    xs, ys = [], []
    for history in histories:
        name = key if any(key in entry for entry in history) else fallback
        points = [(entry[against], entry[name]) for entry in history if name in entry and against in entry]
        xs.append([x for x, _ in points])
        ys.append([y for _, y in points])
    count = min(map(len, xs))
    return np.mean([x[:count] for x in xs], axis=0), np.array([y[:count] for y in ys], dtype=float)


def plot_heat_map(grid: Grid, runs: Sequence[Run], path: Path) -> None:
    """The metric over two axes, averaged over seeds: one panel per arm."""
    first, second = grid.axes
    groups = _by(runs, ["arm"])
    figure = Figure(figsize=(5 * len(groups), 4), layout="constrained")
    for axis, ((arm,), members) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        values = np.full((len(grid.axes[first]), len(grid.axes[second])), np.nan)
        for (a, b), cell in _by(members, [first, second]):
            where = grid.axes[first].index(a), grid.axes[second].index(b)
            values[where] = _mean(run.results()[grid.metric] for run in cell) * (100 if grid.percent else 1)
            axis.text(where[1], where[0], f"{values[where]:.4g}", ha="center", va="center", color="white")
        image = axis.imshow(values, cmap="viridis")
        axis.set(title=arm, xlabel=second, ylabel=first)
        axis.set_xticks(range(values.shape[1]), [str(value) for value in grid.axes[second]])
        axis.set_yticks(range(values.shape[0]), [str(value) for value in grid.axes[first]])
        figure.colorbar(image, ax=axis, label=grid.metric.removeprefix("eval_") + (" (%)" if grid.percent else ""))
    figure.savefig(path, dpi=120)
