"""Comparisons of runs: how much sooner one group reaches a loss than another, and the tables of a grid, with published
numbers beside ours. Plots are in `comparison_plots.py` and `grid_pictures.py`."""

import csv
import itertools
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import extra
from .grid import Run
from .grid_file import Grid, identity
from .record import History, read_history

with extra("report"):
    from scipy import stats

#: Measure of training -> its key in the log.
AXES = {
    "steps": "step",
    "tokens": "num_input_tokens_seen",
    "passes": "train_passes",
    "seconds": "train_seconds",
}
#: Cost at which arms of a grid are compared, besides equal steps -> its key in the log.
EQUAL_COSTS = {"passes": "train_passes", "seconds": "train_seconds"}
#: Columns of the tidy table besides a run's coordinates: these, and whatever begins with one of `MEASURES`.
COSTS = ("train_seconds", "train_passes", "train_tokens", "peak_memory_bytes")
MEASURES = ("eval_", "test_", "sharpness_", "forgetting", "train_wrong_labels", "train_accuracy_", "correlation_")
NAME_COLUMNS = ("model", "dataset", "optimizer")
PUBLISHED_COLUMNS = (*NAME_COLUMNS, "method", "mean", "std")

# ---- Two groups of runs ----


def curve(history: History, axis: str, metric: str = "loss", window: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of one run: `metric` against `axis`, each point the mean of the `window` points up to it.

    Raises:
        ValueError: the run has fewer than `window` points, or none that is finite.
    """
    if window < 1:
        raise ValueError(f"window={window}: a mean needs at least one point. Give 1 or more.")
    points = [(e[AXES[axis]], e[metric]) for e in history if metric in e and AXES[axis] in e]
    if not points:
        found = ", ".join(sorted({key for entry in history for key in entry if key.endswith(("loss", "error"))}))
        raise ValueError(f"metric={metric!r}: the run did not log it. Choose one of {found or 'none, it has no log'}.")
    if len(points) < window:
        raise ValueError(f"window={window}: the run has logged {metric!r} {len(points)} times. Give that or less.")
    x, y = np.array(points, dtype=float).T
    y = np.convolve(y, np.ones(window) / window, mode="valid")
    if not np.isfinite(y).any():
        raise ValueError(f"metric={metric!r}: the run logged no finite value. Leave the run out.")
    return x[window - 1 :], y


def first_reached(x: np.ndarray, y: np.ndarray, target: float) -> float:
    """Where the curve, interpolated linearly, first reaches `target`; infinite if it never does. Non-finite points
    do not reach it and are not used for interpolation."""
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
    """For each axis that all runs logged: (mean where the baseline reaches `target`, the candidate's, their quotient).

    A group has one run per seed; a run that misses the target makes its group's mean infinite. The quotient is NaN if
    neither mean is finite. The target defaults to `common_target`.
    """
    runs = [*baseline, *candidate]
    target = common_target(runs, metric, window) if target is None else target
    result = {}
    for axis, key in AXES.items():
        if all(any(metric in e and key in e for e in run) for run in runs):
            old, new = (
                statistics.mean(first_reached(*curve(run, axis, metric, window), target) for run in group)
                for group in (baseline, candidate)
            )
            result[axis] = (old, new, _quotient(old, new))
    return result


def _quotient(baseline: float, candidate: float) -> float:
    if math.isinf(candidate):
        return math.nan if math.isinf(baseline) else 0.0
    return baseline / candidate if candidate else math.inf


def read_curves(flag: str, folders: Sequence[str], metric: str, window: int) -> list[History]:
    """The logs of the runs in `folders`. Raises `ValueError` if one has no such curve or is given twice."""
    paths = [Path(folder).resolve() for folder in folders]
    if repeated := sorted({str(path) for path in paths if paths.count(path) > 1}):
        raise ValueError(f"{flag}: {', '.join(repeated)} is given twice, and would count as two seeds. Give it once.")
    return [_with_curve(flag, path, metric, window) for path in paths]


def _with_curve(flag: str, folder: Path, metric: str, window: int) -> History:
    history = read_history(folder)
    try:
        curve(history, "steps", metric, window)
    except ValueError as error:
        raise ValueError(f"{flag} {folder}: {error}") from error
    return history


# ---- A grid ----


def at_every_point(grid: Grid, runs: Iterable[Run]) -> list[Run]:
    """The runs in the order of the grid; those that an axis does not change (`Grid.fixed_by`) are repeated at each of
    its values, beside the other arms."""
    orders: dict[str, list] = {**grid.axes, "arm": list(grid.arms)}
    spread = [replace(run, point=point) for run in runs for point in _points_of(grid, run)]
    return sorted(spread, key=lambda run: [order.index(run.point[name]) for name, order in orders.items()])


def _points_of(grid: Grid, run: Run) -> list[dict[str, Any]]:
    ignored = {axis: values for axis, values in grid.axes.items() if run.point[axis] is None}
    values = itertools.product(*ignored.values())
    return [{**run.point, **dict(zip(ignored, some, strict=True))} for some in values]


def require_metric(grid: Grid, run: Run) -> None:
    """Raise `ValueError` if the results of a finished run lack the grid's metric, or another that is to be shown. Those
    of training (`train_*`) depend on the arm: without wrong labels none is memorized."""
    results = measures(run)
    tuned = [("tuned.by", grid.tuned["by"])] if grid.tuned else []
    also = [("also", key) for key in grid.also if not key.startswith("train_")]
    for flag, key in [("metric", grid.metric), *tuned, *also]:
        if key not in results:
            found = ", ".join(sorted(key for key in results if key.startswith(("eval_", "test_"))))
            raise ValueError(
                f"{flag}={key!r}: {run.folder} does not have it. Change it in the grid to one of {found or 'none'}, "
                "and rerun the command: finished runs are kept."
            )


def write_results(runs: Sequence[Run], path: Path) -> None:
    """Write a CSV with a row per finished run: coordinates, metrics, costs."""
    rows = []
    for run in runs:
        kept = {key: value for key, value in measures(run).items() if key.startswith(MEASURES) or key in COSTS}
        rows.append({**run.point, **kept})
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def markdown_table(grid: Grid, runs: Sequence[Run], published: Path | None = None) -> str:
    """Mean and standard deviation of each arm at each combination of the axes.

    Further columns: those of `also`; the difference from the baseline over the seeds that both have, with the p-value
    of a paired t-test (two seeds or more); the metric at the best epoch of each run, and at equal passes and at equal
    seconds, from the last evaluation within the mean cost of the cheapest arm, on a schedule planned for more; the
    costs; and the published numbers, marked as such. A number that does not come from all seeds is followed by their
    count.
    """
    further = [name_of(grid, key) for key in grid.also]
    head = [*grid.axes, "", f"{label_of(grid)}, mean ± std", *further, f"against {grid.baseline}", "p", "best epoch",
            *(f"at equal {cost}" for cost in EQUAL_COSTS), *EQUAL_COSTS]  # fmt: skip
    published_number = _published(grid, published)
    if grid.published:
        head.append("published, **not ours**")
    lines = [_row(head), "|---" * len(head) + "|"]
    for on_axes, group in grouped(runs, grid.axes):
        arms = {arm: list(members) for (arm,), members in grouped(group, ["arm"])}
        limits = {key: min(_mean_cost(members, key) for members in arms.values()) for key in EQUAL_COSTS.values()}
        for arm, members in arms.items():
            cells = [*on_axes, arm, *_cells(grid, members, arms.get(grid.baseline, []), limits)]
            if grid.published:
                cells.append(published_number(dict(zip(grid.axes, on_axes, strict=True)), arm))
            lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def table_like_the_papers(grid: Grid, runs: Sequence[Run], published: Path | None = None) -> str:
    """The same numbers as a paper prints them: models (the first axis) and arms down, the other axes across."""
    first, *across = grid.axes
    published_number = _published(grid, published)
    columns = [column for column, _ in grouped(runs, across)]
    lines = [_row([first, "", *(", ".join(map(str, column)) for column in columns)]), "|---" * (2 + len(columns)) + "|"]
    for (value, arm), group in grouped(runs, [first, "arm"]):
        cells = dict(grouped(group, across))
        row = []
        for column in columns:
            values = [metric_of(grid, run) for run in cells.get(column, [])]
            cell = _mean_and_std(values, len(grid.seeds)) if values else ""
            number = published_number({first: value, **dict(zip(across, column, strict=True))}, arm)
            row.append(f"{cell}<br>published: {number}" if number else cell)
        lines.append(_row([value, arm, *row]))
    return "\n".join(lines) + "\n"


def tuned_table(grid: Grid, runs: Sequence[Run]) -> str:
    """The metric of each arm at its best values of the tuned axes: those with the lowest mean of `tuned.by`, among all
    that have every seed. An arm with more settings had more chances, so their number is in the table."""
    assert grid.tuned is not None
    axes, by = grid.tuned["axes"], grid.tuned["by"]
    others = [axis for axis in grid.axes if axis not in axes]
    head = [*others, "", f"best {', '.join(axes)}", "of", _with_unit(grid, by), f"{label_of(grid)}, mean ± std"]
    lines = [_row(head), "|---" * len(head) + "|"]
    for place, members in grouped(runs, [*others, "arm"]):
        if choice := _choice(grid, place[-1], members):
            best, count, value, chosen = choice
            values = [metric_of(grid, run) for run in chosen]
            lines.append(_row([*place, best, count, f"{value:.4g}", _mean_and_std(values, len(grid.seeds))]))
    return "\n".join(lines) + "\n"


def _choice(grid: Grid, arm: str, members: Sequence[Run]) -> tuple[str, int, float, list[Run]] | None:
    """(the best values of the tuned axes, the number of settings, the mean there of what is chosen by, the runs)."""
    assert grid.tuned is not None
    scale = 100 if grid.percent else 1
    free = [axis for axis in grid.tuned["axes"] if axis not in grid.fixed_by(arm)]
    runs = {run.folder: run for run in members}.values()  # `at_every_point` repeats those that an axis does not change
    settings = [
        (mean(scale * _as_float(measures(run)[grid.tuned["by"]]) for run in group), values, group)
        for values, group in grouped(runs, free)
        if len(group) == len(grid.seeds)
    ]
    settings = [setting for setting in settings if math.isfinite(setting[0])]
    if not settings:
        return None
    value, values, group = min(settings, key=lambda setting: setting[0])
    at = dict(zip(free, values, strict=True))
    return ", ".join(str(at.get(axis, "any")) for axis in grid.tuned["axes"]), len(settings), value, group


def _cells(grid: Grid, members: Sequence[Run], baseline: Sequence[Run], limits: dict[str, float]) -> list[str]:
    values = {run.point["seed"]: metric_of(grid, run) for run in members}
    reference = {run.point["seed"]: metric_of(grid, run) for run in baseline}
    shared = [] if members is baseline else sorted(set(values) & set(reference))
    paired = [seed for seed in shared if math.isfinite(values[seed] - reference[seed])]
    differences = [values[seed] - reference[seed] for seed in paired]
    p = ""
    if len(paired) > 1 and max(differences) > min(differences):  # the test divides by their spread
        p = f"{stats.ttest_rel([values[s] for s in paired], [reference[s] for s in paired]).pvalue:.2g}"
    seeds = len(grid.seeds)
    return [
        _mean_and_std(list(values.values()), seeds),
        *(_mean_and_std_of(key, members, seeds) for key in grid.also),
        f"{mean(differences):+.3g}{_share(differences, seeds)}" if differences else "",
        p,
        _mean_of(grid, (_at_best_epoch(grid, run) for run in members)),
        *(_mean_of(grid, (_within(grid, run, key, limit) for run in members)) for key, limit in limits.items()),
        *("" if math.isinf(cost := _mean_cost(members, key)) else f"{cost:,.0f}" for key in limits),
    ]


def _mean_cost(members: Sequence[Run], key: str) -> float:
    """Infinite if the script does not report this cost."""
    results = [run.results() for run in members]
    return mean(result[key] for result in results) if all(key in result for result in results) else math.inf


def _evaluations(grid: Grid, run: Run) -> History:
    return [entry for entry in run.history() if grid.metric in entry]


def _at_best_epoch(grid: Grid, run: Run) -> list[float]:
    """The lowest value of all evaluations; none if the run was evaluated only once, at its end."""
    evaluations = {entry["step"]: _as_float(entry[grid.metric]) for entry in _evaluations(grid, run)}
    return [min(finite(evaluations.values()), default=math.nan)] if len(evaluations) > 1 else []


def _within(grid: Grid, run: Run, key: str, limit: float) -> list[float]:
    """The value of the last evaluation within `limit`, plus 2%, since logs are written at intervals; none if each cost
    more."""
    affordable = [entry for entry in _evaluations(grid, run) if entry.get(key, math.inf) <= 1.02 * limit]
    return [_as_float(entry[grid.metric]) for entry in affordable[-1:]]


def _mean_of(grid: Grid, values: Iterable[list[float]]) -> str:
    """The mean over the runs that have a value. Empty if none has one; if only some do, their count is shown, because
    they may be the fastest."""
    found = [value for of_run in values for value in of_run]
    scale = 100 if grid.percent else 1
    return f"{scale * mean(finite(found)):.4g}{_share(found, len(grid.seeds))}" if found else ""


def grouped(runs: Iterable[Run], names: Iterable[str]) -> list[tuple[tuple[Any, ...], list[Run]]]:
    """(coordinates, runs) for each combination of `names` among the runs."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    names = list(names)
    for run in runs:
        groups.setdefault(tuple(run.point[name] for name in names), []).append(run)
    return list(groups.items())


def finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def mean(values: Iterable[float]) -> float:
    """NaN if there are no values."""
    values = list(values)
    return statistics.mean(values) if values else math.nan


def _mean_and_std(values: Sequence[float], seeds: int) -> str:
    numbers = finite(values)
    spread = f" ± {statistics.stdev(numbers):.2g}" if len(numbers) > 1 else ""
    return f"{mean(numbers):.4g}{spread}{_share(values, seeds)}"


def measure_of(key: str, run: Run) -> float:
    """NaN if the run does not have it."""
    return _as_float(measures(run).get(key))


def _mean_and_std_of(key: str, members: Sequence[Run], seeds: int) -> str:
    """Empty if no run has it."""
    values = [measure_of(key, run) for run in members if key in measures(run)]
    return _mean_and_std(values, seeds) if values else ""


def _share(values: Sequence[float], seeds: int) -> str:
    """The number of seeds behind a value, unless it is all of them."""
    count = len(finite(values))
    return "" if count == seeds else f" ({count} of {seeds} seeds)"


def explanation(grid: Grid) -> str:
    """A paragraph for readers about the columns of `markdown_table`."""
    lines = [
        f"Mean and standard deviation over the seeds, p of a paired t-test against {grid.baseline}. Best epoch: the "
        "mean of the lowest value that each run had at any of its evaluations, an oracle: the epoch is chosen by the "
        "data that it is judged by. At equal passes and seconds: the last evaluation within the mean cost of the "
        "cheapest arm, of runs whose schedule was planned for more. Passes: forward and backward passes over the batch "
        "of a step, in total. (2 of 3 seeds): the others have not finished, are not finite (nan, inf), or have no "
        "evaluation within that cost. results.csv has each run."
    ]
    if grid.published:
        lines.append("Published numbers are the paper's, for the model, data and optimizer in parentheses.")
    return " ".join(lines) + "\n"


def _published(grid: Grid, path: Path | None) -> Callable[[dict[str, Any], str], str]:
    """(values of the axes, arm) -> the paper's number, as text; empty if there is none."""
    if path is None or grid.published is None:
        return lambda on_axes, arm: ""
    numbers = {_key_of_row(row): _published_text(row) for row in _read_published(path)}
    return lambda on_axes, arm: numbers.get(_published_key(grid, on_axes, arm), "")


def _published_text(row: dict[str, str]) -> str:
    noise = f"label noise {row['label_noise']}" if row.get("label_noise") else ""
    names = ", ".join(filter(None, (row["model"], row["dataset"], row["optimizer"], noise)))
    return row["mean"] + (f" ± {row['std']}" if row["std"] else "") + f" ({names})"


def check_published(grid: Grid, path: Path) -> None:
    """Raise `ValueError` if the file of published numbers, or a name that the grid looks up in it, is missing."""
    rows, published = _read_published(path), grid.published
    assert published is not None
    looked_up = {"arms": (published["arms"], PUBLISHED_COLUMNS[3:4]), "names": (published["names"], NAME_COLUMNS)}
    for key, (names, columns) in looked_up.items():
        available = {row[column] for row in rows for column in columns}
        if missing := sorted(set(names.values()) - available):
            raise ValueError(
                f"published.{key}: {', '.join(missing)} is not in the column {' or '.join(columns)} of {path}. "
                f"Choose one of {', '.join(sorted(available))}."
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


def _key_of_row(row: dict[str, str]) -> tuple[str, ...]:
    return row["model"], row["dataset"], row["optimizer"], identity(row.get("label_noise") or 0), row["method"]


def _published_key(grid: Grid, on_axes: dict[str, Any], arm: str) -> tuple[str, ...]:
    """The `_key_of_row` that is looked up."""
    assert grid.published is not None
    names = grid.published["names"]
    looked_up = {**(grid.published_like or {}), **on_axes}
    model, dataset, optimizer = (names.get(str(looked_up.get(key)), "") for key in ("model", "dataset_name", "optim"))
    return model, dataset, optimizer, identity(on_axes.get("label_noise", 0)), grid.published["arms"].get(arm, "")


def measures(run: Run) -> dict[str, float]:
    """The results of a run, with its last training accuracies and training loss (`loss`), which are only logged."""
    logged = {key: value for entry in run.history() for key, value in entry.items()}
    last = {key: value for key, value in logged.items() if key.startswith("train_accuracy_") or key == "loss"}
    return last | run.results()


def label_of(grid: Grid) -> str:
    """The grid's metric and its unit in tables and pictures."""
    return _with_unit(grid, grid.metric)


def _with_unit(grid: Grid, key: str) -> str:
    return name_of(grid, key) + (" (%)" if grid.percent else "")


def name_of(grid: Grid, key: str) -> str:
    """The words for a key of the results: `eval_error` is the error; beside `test_error`, the validation error."""
    if key == "loss":
        return "training loss"
    evaluation = "validation_" if grid.metric.startswith("test_") else ""
    return re.sub("^eval_", evaluation, key).replace("_", " ")


def metric_of(grid: Grid, run: Run) -> float:
    return _as_float(run.results()[grid.metric]) * (100 if grid.percent else 1)


def _as_float(value: float | None) -> float:
    """JSON has no NaN; some programs write null instead."""
    return math.nan if value is None else float(value)
