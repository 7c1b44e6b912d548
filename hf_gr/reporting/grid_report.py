"""What a grid of runs says: a tidy table, a table for people with the published numbers beside it, and pictures."""

import csv
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from .comparison import first_reached
from .grid import Run
from .grid_file import Grid
from .plots import COLORS, make_logarithmic
from .record import History

#: What arms are compared at, besides at equal steps -> its key in the log.
EQUAL_COSTS = {"passes": "train_passes", "seconds": "train_seconds"}
#: What a run's row of the tidy table has besides its coordinates and the metrics of its last evaluation.
COSTS = ("train_seconds", "train_passes", "train_tokens", "peak_memory_bytes")
#: Pixels that matplotlib can draw, a little below 2 ** 16.
LARGEST_PICTURE = 65_000
PUBLISHED_COLUMNS = ("model", "dataset", "optimizer", "method", "mean", "std")


def require_metric(grid: Grid, run: Run) -> None:
    """Raise `ValueError` if the results of a finished run do not have the grid's metric."""
    results = run.results()
    if grid.metric not in results:
        found = ", ".join(sorted(key for key in results if key.startswith("eval_")))
        raise ValueError(
            f"metric={grid.metric!r}: {run.folder} does not have it. Change it in the grid to one of "
            f"{found or 'none'}, and give the command again: finished runs are kept."
        )


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
    seeds or more); the metric at equal passes and at equal seconds, which is that of the last evaluation within what
    the cheapest arm took on average, on a schedule made for more; the costs; and the published numbers, marked as such.
    What does not come from all seeds says from how many.
    """
    unit = " (%)" if grid.percent else ""
    metric = grid.metric.removeprefix("eval_")
    head = [*grid.axes, "", f"{metric}{unit}, mean ± std", "each seed", f"against {grid.baseline}", "p",
            *(f"{metric}{unit} at equal {cost}" for cost in EQUAL_COSTS), *EQUAL_COSTS]  # fmt: skip
    known = _published(grid, published)
    if grid.published:
        head.append("published, **not ours**")
    lines = [_row(head), "|---" * len(head) + "|"]
    for at, group in _by(runs, grid.axes):
        arms = {arm: list(members) for (arm,), members in _by(group, ["arm"])}
        limits = {key: min(_mean_cost(members, key) for members in arms.values()) for key in EQUAL_COSTS.values()}
        for arm, members in arms.items():
            cells = [*at, arm, *_cells(grid, members, arms.get(grid.baseline, []), limits)]
            if grid.published:
                cells.append(known(dict(zip(grid.axes, at, strict=True)), arm))
            lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def table_like_the_papers(grid: Grid, runs: Sequence[Run], published: Path | None = None) -> str:
    """The same numbers as a paper prints them: models (the first axis) and arms down, the other axes across."""
    first, *others = grid.axes
    known = _published(grid, published)
    columns = [at for at, _ in _by(runs, others)]
    lines = [_row([first, "", *(", ".join(map(str, at)) for at in columns)]), "|---" * (2 + len(columns)) + "|"]
    for (value, arm), group in _by(runs, [first, "arm"]):
        cells = dict(_by(group, others))
        row = []
        for at in columns:
            cell = _mean_and_std([_metric(grid, run) for run in cells[at]], len(grid.seeds)) if at in cells else ""
            beside = known({first: value, **dict(zip(others, at, strict=True))}, arm)
            row.append(f"{cell}<br>published: {beside}" if beside else cell)
        lines.append(_row([value, arm, *row]))
    return "\n".join(lines) + "\n"


def _cells(grid: Grid, members: Sequence[Run], baseline: Sequence[Run], limits: dict[str, float]) -> list[str]:
    values = {run.point["seed"]: _metric(grid, run) for run in members}
    reference = {run.point["seed"]: _metric(grid, run) for run in baseline}
    shared = [] if members is baseline else sorted(set(values) & set(reference))
    common = [seed for seed in shared if math.isfinite(values[seed] - reference[seed])]
    differences = [values[seed] - reference[seed] for seed in common]
    p = ""
    if len(common) > 1:
        same = max(differences) == min(differences)  # the test divides by their spread
        p = "" if same else f"{stats.ttest_rel([values[s] for s in common], [reference[s] for s in common]).pvalue:.2g}"
    seeds = len(grid.seeds)
    return [
        _mean_and_std(list(values.values()), seeds),
        ", ".join(f"{value:.4g}" for value in values.values()),
        f"{_mean(differences):+.3g}{_share(differences, seeds)}" if differences else "",
        p,
        *(_mean_within(grid, members, key, limit) for key, limit in limits.items()),
        *("" if math.isinf(cost := _mean_cost(members, key)) else f"{cost:,.0f}" for key in limits),
    ]


def _mean_cost(members: Sequence[Run], key: str) -> float:
    """Infinite where the script does not count it."""
    costs = [run.results().get(key) for run in members]
    return math.inf if None in costs else _mean(costs)


def _mean_within(grid: Grid, members: Sequence[Run], key: str, limit: float) -> str:
    """Of the last evaluation of each run that is within a cost, with a little leeway: logs are not written every
    moment. Empty where no run has one; where only some have one it says so, as these may be the quickest."""
    found = []
    for run in members:
        evaluations = [e for e in run.history() if grid.metric in e and key in e and e[key] <= 1.02 * limit]
        found += [_as_float(e[grid.metric]) for e in evaluations[-1:]]
    scale = 100 if grid.percent else 1
    return f"{scale * _mean(_finite(found)):.4g}{_share(found, len(grid.seeds))}" if found else ""


def _by(runs: Iterable[Run], names: Iterable[str]) -> list[tuple[tuple[Any, ...], list[Run]]]:
    groups: dict[tuple[Any, ...], list[Run]] = {}
    names = list(names)
    for run in runs:
        groups.setdefault(tuple(run.point[name] for name in names), []).append(run)
    return list(groups.items())


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _mean(values: Iterable[float]) -> float:
    """NaN of no values."""
    values = list(values)
    return statistics.mean(values) if values else math.nan


def _mean_and_std(values: Sequence[float], seeds: int) -> str:
    finite = _finite(values)
    spread = f" ± {statistics.stdev(finite):.2g}" if len(finite) > 1 else ""
    return f"{_mean(finite):.4g}{spread}{_share(values, seeds)}"


def _share(values: Sequence[float], seeds: int) -> str:
    """How many seeds a number comes from, where that is not all of them."""
    count = len(_finite(values))
    return "" if count == seeds else f" ({count} of {seeds} seeds)"


def explanation(grid: Grid) -> str:
    """What the columns of `markdown_table` are, for people."""
    lines = [
        f"Mean and standard deviation over the seeds, p of a paired t-test against {grid.baseline}. At equal passes "
        "and seconds: the last evaluation within what the cheapest arm took on average, of runs whose schedule was "
        "made for more. Passes: forward and backward passes over the batch of a step, until the end. (2 of 3 seeds): "
        "the others have not finished, are not finite (nan, inf), or have no evaluation within that cost."
    ]
    if grid.published:
        lines.append("Published numbers are the paper's, for the model, data and optimizer in brackets.")
    return " ".join(lines) + "\n"


def _published(grid: Grid, path: Path | None) -> Callable[[dict[str, Any], str], str]:
    """(values of the axes, arm) -> the paper's number, as text; empty where there is none."""
    if path is None or grid.published is None:
        return lambda at, arm: ""
    known = {
        (row["model"], row["dataset"], row["optimizer"], row["method"]): (
            row["mean"]
            + (f" ± {row['std']}" if row["std"] else "")
            + f" ({row['model']}, {row['dataset']}, {row['optimizer']})"
        )
        for row in _read_published(path)
    }
    return lambda at, arm: known.get(_published_key(grid, at, arm), "")


def check_published(grid: Grid, path: Path) -> None:
    """Raise `ValueError` if the file of published numbers, or a name that the grid looks up in it, is not there."""
    rows = _read_published(path)
    for key, columns in (("arms", ("method",)), ("names", ("model", "dataset", "optimizer"))):
        there = {row[column] for row in rows for column in columns}
        if missing := sorted(set(grid.published[key].values()) - there):
            raise ValueError(
                f"published.{key}: {', '.join(missing)} is not in the column {' or '.join(columns)} of {path}. "
                f"Write it as it is there: {', '.join(sorted(there))}."
            )


def _read_published(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"published.file={path}: it cannot be read ({error}). Give a CSV beside the grid.") from error
    if missing := sorted(set(PUBLISHED_COLUMNS) - set(reader.fieldnames or [])):
        raise ValueError(f"published.file={path}: it has no column {', '.join(missing)}. Add it.")
    if not all(row[column] is not None for row in rows for column in PUBLISHED_COLUMNS):
        raise ValueError(f"published.file={path}: a row has fewer values than there are columns. Complete it.")
    return rows


def _published_key(grid: Grid, at: dict[str, Any], arm: str) -> tuple[str, str, str, str]:
    names = grid.published["names"]
    what = {**(grid.published_like or {}), **at}
    model, dataset, optimizer = (names.get(str(what.get(key)), "") for key in ("model", "dataset_name", "optim"))
    return model, dataset, optimizer, grid.published["arms"].get(arm, "")


# ---- Pictures ----


def plot_arms(grid: Grid, runs: Sequence[Run], path: Path) -> None:
    """A row of panels for each combination of the axes, with the mean of each arm over its seeds: the metric against
    steps and against seconds, with its range; ||g1||, with GR and without; and the warmups, where there are any.

    A dotted line is what the baseline ends with, and beside it stands how much sooner the quickest other arm is there.
    """
    groups = _by(runs, grid.axes)
    has_gr = any("gr_lambda" in entry for run in runs for entry in run.history())
    columns = 4 if has_gr else 3
    figure = Figure(figsize=(4.6 * columns, 4.2 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), columns, squeeze=False)
    for row, (at, members) in zip(panels, groups, strict=True):
        arms = {arm: [run.history() for run in of_arm] for (arm,), of_arm in _by(members, ["arm"])}
        colors = dict(zip(arms, COLORS * (1 + len(arms) // len(COLORS)), strict=False))
        _plot_metric(row[0], grid, arms, colors, "step", "optimizer step")
        _plot_metric(row[1], grid, arms, colors, "train_seconds", "seconds of training")
        _plot_norms(row[2], arms, colors)
        if has_gr:
            _plot_warmups(row[3], arms, colors)
        for axis in row:
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].legend(frameon=False)
        row[0].set_title(
            ", ".join(f"{n} = {v}" for n, v in zip(grid.axes, at, strict=True)), loc="left", fontsize="medium"
        )
    figure.savefig(path, dpi=min(120, LARGEST_PICTURE / figure.get_figheight()))


Histories = dict[str, list[History]]


def _plot_metric(axis: Axes, grid: Grid, arms: Histories, colors: dict[str, str], against: str, xlabel: str) -> None:
    scale = 100 if grid.percent else 1
    curves = {}
    for arm, histories in arms.items():
        x, y = _curves(histories, grid.metric, against)
        if len(x):
            y = scale * y
            curves[arm] = x, y.mean(axis=0)
            axis.plot(*curves[arm], color=colors[arm], label=arm, linewidth=1.2)
            axis.fill_between(x, y.min(axis=0), y.max(axis=0), color=colors[arm], alpha=0.08)
    # The end of the curves is what matters, and is the smallest part of a linear axis.
    axis.set(xlabel=xlabel, ylabel=_label(grid))
    make_logarithmic(axis)
    if grid.baseline in curves:
        _plot_speedup(axis, curves, colors, grid.baseline)


def _plot_speedup(
    axis: Axes, curves: dict[str, tuple[np.ndarray, np.ndarray]], colors: dict[str, str], baseline: str
) -> None:
    target = float(curves[baseline][1][-1])
    if not math.isfinite(target):
        axis.set_title(f"{baseline} ends with {target}", loc="right", fontsize="small", color="gray")
        return
    axis.axhline(target, color="gray", linestyle=":", linewidth=0.8)
    reached = {arm: first_reached(x, y, target) for arm, (x, y) in curves.items()}
    own = reached.pop(baseline)
    best = min(reached, key=reached.__getitem__, default=None)
    if best is None:
        return
    if np.isinf(reached[best]):
        text = f"none reaches the end of {baseline}"
    else:
        text = f"{best}: {own / reached[best]:.2f} x the speed of {baseline}"
        axis.plot([reached[best], own], [target, target], color=colors[best], linewidth=2.5, alpha=0.6)
    axis.set_title(text, loc="right", fontsize="small", color=colors[best] if np.isfinite(reached[best]) else "gray")


def _plot_norms(axis: Axes, arms: Histories, colors: dict[str, str]) -> None:
    for arm, histories in arms.items():
        # Without GR there is one gradient, and it is called otherwise.
        key = "gr_grad_norm" if any("gr_grad_norm" in entry for entry in histories[0]) else "grad_norm"
        x, y = _curves(histories, key, "step")
        if len(x):
            axis.plot(x, y.mean(axis=0), color=colors[arm], label=arm, linewidth=1.2)
    axis.set(xlabel="optimizer step", ylabel=r"$\|g_1\|$")
    make_logarithmic(axis)


def _plot_warmups(axis: Axes, arms: Histories, colors: dict[str, str]) -> None:
    end, width = 0.0, 1.5 + len(arms)
    for arm, histories in arms.items():
        width -= 1  # so that curves that coincide can all be seen
        for key, style in (("gr_lambda", "-"), ("gr_r", ":")):
            x, y = _curves(histories, key, "step")
            if len(x):
                y = y.mean(axis=0)
                axis.plot(x, y, style, color=colors[arm], drawstyle="steps-pre", linewidth=width)
                changes = np.flatnonzero(np.diff(y))
                end = max(end, x[changes[-1] + 1] if len(changes) else 0)
    axis.set(xlabel="optimizer step", ylabel=r"$\lambda_t$ (lines), $r_t$ (dots)")
    axis.set_ylim(bottom=0)
    if 0 < 3 * end < axis.get_xlim()[1]:
        axis.set_xlim(0, 3 * end)  # nothing happens after that


def _label(grid: Grid) -> str:
    return grid.metric.removeprefix("eval_") + (" (%)" if grid.percent else "")


def _curves(histories: Sequence[Sequence[dict[str, float]]], key: str, against: str) -> tuple[np.ndarray, np.ndarray]:
    """x, averaged over the runs, and y of each run; the entries that all runs have."""
    xs, ys = [], []
    for history in histories:
        points = [(entry[against], entry[key]) for entry in history if key in entry and against in entry]
        xs.append([x for x, _ in points])
        ys.append([y for _, y in points])
    count = min(map(len, xs))
    return np.mean([x[:count] for x in xs], axis=0), np.array([y[:count] for y in ys], dtype=float)


def plot_sensitivity(grid: Grid, runs: Sequence[Run], path: Path) -> None:
    """The metric against the one axis, with its standard deviation over seeds: how much the choice matters."""
    (name,) = grid.axes
    values = grid.axes[name]
    numbers = [_as_number(value) for value in values]
    positions = list(range(len(values))) if None in numbers else numbers
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axis = figure.subplots()
    for ((arm,), members), color in zip(_by(runs, ["arm"]), COLORS * 3, strict=False):
        cells = {value: _finite(_metric(grid, run) for run in cell) for (value,), cell in _by(members, [name])}
        there = [i for i, value in enumerate(values) if value in cells]
        means = [_mean(cells[values[i]]) for i in there]
        spread = [statistics.stdev(cells[values[i]]) if len(cells[values[i]]) > 1 else 0 for i in there]
        axis.errorbar(
            [positions[i] for i in there], means, spread, color=color, label=arm, marker="o", capsize=3, linewidth=1.2
        )
    axis.set(xlabel=name, ylabel=_label(grid))
    if None not in numbers and min(numbers) > 0 and max(numbers) >= 10 * min(numbers):
        axis.set_xscale("log")
        axis.minorticks_off()
    axis.set_xticks(positions, [str(value) for value in values])
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _as_number(value: Any) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _metric(grid: Grid, run: Run) -> float:
    return _as_float(run.results()[grid.metric]) * (100 if grid.percent else 1)


def _as_float(value: float | None) -> float:
    """JSON has no NaN; some write null for it."""
    return math.nan if value is None else float(value)


def plot_heat_map(grid: Grid, runs: Sequence[Run], path: Path) -> None:
    """The metric over two axes, averaged over seeds: one panel per arm."""
    first, second = grid.axes
    groups = _by(runs, ["arm"])
    figure = Figure(figsize=(5 * len(groups), 4), layout="constrained")
    for axis, ((arm,), members) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        values = np.full((len(grid.axes[first]), len(grid.axes[second])), np.nan)
        for (a, b), cell in _by(members, [first, second]):
            where = grid.axes[first].index(a), grid.axes[second].index(b)
            values[where] = _mean(_finite(_metric(grid, run) for run in cell))
        image = axis.imshow(values, cmap="viridis")
        for (row, column), value in np.ndenumerate(values):
            color = "black" if image.norm(value) > 0.6 else "white"
            axis.text(column, row, "" if np.isnan(value) else f"{value:.4g}", ha="center", va="center", color=color)
        axis.set(title=arm, xlabel=second, ylabel=first)
        axis.set_xticks(range(values.shape[1]), [str(value) for value in grid.axes[second]])
        axis.set_yticks(range(values.shape[0]), [str(value) for value in grid.axes[first]])
        figure.colorbar(image, ax=axis, label=_label(grid))
    figure.savefig(path, dpi=120)
