"""One picture of all runs of a grid, beside the curves of its arms. To add one, give it an entry in `PICTURES`."""

import functools
import itertools
import math
import operator
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..analysis.forgetting import Point
from ..errors import extra
from .comparison import finite, grouped, label_of, mean, measure_of, metric_of, name_of
from .forgetting_plots import plot_forgetting
from .grid import Run
from .grid_file import Grid
from .plots import BLUE, COLORS, make_logarithmic
from .record import FRONTIER, read_mapping

with extra("report"):
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.text import Annotation, Text
    from matplotlib.ticker import NullLocator
    from matplotlib.transforms import Bbox, ScaledTranslation

Measure = Callable[[Run], float]


class Picture(NamedTuple):
    """A picture of a grid.

    Attributes:
        draw: `draw(grid, runs, path)` gets the runs `at_every_point`.
        axes: the numbers of axes that it can show.
        help: what it shows.
        with_curves: whether `plot_arms` is drawn as well, with a row of panels for each point of the axes.
    """

    draw: Callable[[Grid, Sequence[Run], Path], None]
    axes: range
    help: str
    with_curves: bool = True


# ---- The metric over one axis, or two ----


def plot_sensitivity(grid: Grid, runs: Sequence[Run], path: Path) -> None:
    """The metric against the only axis, with its standard deviation over seeds, to show how much the choice matters."""
    (name,) = grid.axes
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axis = figure.subplots()
    _plot_over(axis, grid, name, runs, functools.partial(metric_of, grid))
    axis.set(ylabel=label_of(grid))
    axis.legend(frameon=False)
    _set_ticks(axis, name, grid.axes[name])
    figure.savefig(path, dpi=120)


def _plot_over(axis: Axes, grid: Grid, name: str, runs: Iterable[Run], measure: Measure) -> None:
    """Mean and standard deviation of `measure` over the seeds against the axis `name` of the grid: a line for each arm,
    and a band for one that the axis does not change."""
    positions = dict(zip(map(str, grid.axes[name]), _positions(grid.axes[name]), strict=True))
    colors = itertools.cycle(COLORS)
    groups = grouped(runs, ["arm"])
    for number, ((arm,), members) in enumerate(groups):
        color = "gray" if arm == grid.baseline else next(colors)
        cells = {positions[str(value)]: finite(map(measure, cell)) for (value,), cell in grouped(members, [name])}
        points = {x: (mean(values), _std(values)) for x, values in cells.items() if values}
        if points and name in grid.fixed_by(arm):
            level, spread = next(iter(points.values()))
            axis.axhline(level, color=color, linestyle="--", linewidth=1.2, label=arm)
            axis.axhspan(level - spread, level + spread, color=color, alpha=0.15, linewidth=0)
        elif points:
            y, spreads = zip(*points.values(), strict=True)
            bars = axis.errorbar(list(points), y, spreads, color=color, label=arm, marker="o", capsize=3, linewidth=1.2)
            _move(axis, bars.get_children(), 4 * (number - len(groups) / 2))


def _move(axis: Axes, drawn: Iterable[Artist], points: float) -> None:
    """Move what was drawn to the right by so many typographic points, so that equal values of two arms stay visible."""
    offset = ScaledTranslation(points / 72, 0, axis.figure.dpi_scale_trans)
    for artist in drawn:
        artist.set_transform(artist.get_transform() + offset)


def _set_ticks(axis: Axes, name: str, values: Sequence[Any]) -> None:
    positions = _positions(values)
    axis.set(xlabel=name)
    if all(map(_is_number, values)) and min(positions) > 0 and max(positions) >= 10 * min(positions):
        axis.set_xscale("log")
        axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks(positions, [str(value) for value in values])
    _clean(axis)


def _clean(axis: Axes) -> None:
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _positions(values: Sequence[Any]) -> list[float]:
    """Where the values of an axis of the grid are drawn: numbers to scale, others one after the other."""
    return [float(value) for value in values] if all(map(_is_number, values)) else [*map(float, range(len(values)))]


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


def _std(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def plot_heat_map(grid: Grid, runs: Sequence[Run], path: Path) -> None:
    """The metric over two axes, averaged over seeds, and below it each of `also`: a panel for each arm that the axes
    change. One that neither changes, such as the baseline without the method, is a line in the color bar and named in
    the title."""
    rows: dict[str, Measure] = {label_of(grid): functools.partial(metric_of, grid)}
    rows |= {name_of(grid, key): functools.partial(measure_of, key) for key in grid.also}
    swept = [arm for arm in grid.arms if not set(grid.axes) <= grid.fixed_by(arm)]
    figure = Figure(figsize=(5 * max(1, len(swept)), 4 * len(rows)), layout="constrained")
    panels = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for panel, (label, measure) in zip(panels, rows.items(), strict=True):
        _plot_heat_maps(panel, grid, runs, label, measure)
    figure.savefig(path, dpi=120)


def _plot_heat_maps(figure: SubFigure, grid: Grid, runs: Sequence[Run], label: str, measure: Measure) -> None:
    first, second = grid.axes
    fixed, swept = {}, {}
    for (arm,), members in grouped(runs, ["arm"]):
        if {first, second} <= grid.fixed_by(arm):
            fixed[arm] = mean(finite(map(measure, members)))
        else:
            swept[arm] = _means_over(grid, members, measure)
    colors = Normalize(*_range_of([*fixed.values(), *(v for values in swept.values() for v in values.flat)]))
    for axis, (arm, values) in zip(figure.subplots(1, len(swept), squeeze=False)[0], swept.items(), strict=True):
        image = axis.imshow(values, cmap="viridis", norm=colors)
        for (row, column), value in np.ndenumerate(values):
            color = "black" if colors(value) > 0.6 else "white"
            axis.text(column, row, "" if np.isnan(value) else f"{value:.4g}", ha="center", va="center", color=color)
        axis.set(title=arm, xlabel=second, ylabel=first)
        axis.set_xticks(range(values.shape[1]), [str(value) for value in grid.axes[second]])
        axis.set_yticks(range(values.shape[0]), [str(value) for value in grid.axes[first]])
        bar = figure.colorbar(image, ax=axis, label=label)
        for level in fixed.values():
            bar.ax.axhline(level, color="red", linewidth=2)
    if fixed:
        figure.suptitle(", ".join(f"{arm}: {level:.4g}" for arm, level in fixed.items()), color="red", size="medium")


def _means_over(grid: Grid, runs: Sequence[Run], measure: Measure) -> np.ndarray:
    """`measure`, averaged over seeds, at each point of the grid's two axes; NaN where no run has finished."""
    first, second = grid.axes
    values = np.full((len(grid.axes[first]), len(grid.axes[second])), np.nan)
    for (a, b), cell in grouped(runs, [first, second]):
        values[grid.axes[first].index(a), grid.axes[second].index(b)] = mean(finite(map(measure, cell)))
    return values


def _range_of(values: Sequence[float]) -> tuple[float, float]:
    known = finite(values) or [0.0]
    return min(known), max(known)


# ---- The frontier ----

#: Where a name may stand, in typographic points right of and above its point; the first free place is taken.
PLACES = [(x, y) for distance in range(8, 80, 12) for x in (6, -6, 24, -24) for y in (distance, -distance)]
Points = Mapping[str, tuple[float, float]]


def plot_frontier(grid: Grid, runs: Sequence[Run], path: Path) -> None:
    """The metric against the counted passes: a point for each arm, with its standard deviation over seeds, and a line
    for the lowest value that so many passes reach. A panel for each combination of the axes."""
    groups = grouped(runs, grid.axes)
    figure = Figure(figsize=(7.5 * len(groups), 5.5), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    drawn = []
    for axis, (on_axes, members) in zip(panels, groups, strict=True):
        points, spreads = _costs_and_values(grid, members)
        drawn.append((axis, points, _plot_frontier(axis, points, spreads)))
        axis.set(xlabel="forward and backward passes", ylabel=label_of(grid), title=_coordinates(grid.axes, on_axes))
        if grid.baseline in points:
            _add_relative_axis(axis, grid.baseline, points[grid.baseline][0])
    figure.draw_without_rendering()  # until then nothing has a place
    for panel in drawn:
        _write_names(*panel)
    figure.savefig(path, dpi=120)


def _costs_and_values(grid: Grid, runs: Sequence[Run]) -> tuple[Points, Mapping[str, float]]:
    """(passes, metric) of each arm, as means over the seeds, and the standard deviation of the metric."""
    points, spreads = {}, {}
    for (arm,), cell in grouped(runs, ["arm"]):
        values = finite(metric_of(grid, run) for run in cell)
        costs = finite(run.results().get("train_passes", math.nan) for run in cell)
        if values and costs:
            points[arm], spreads[arm] = (mean(costs), mean(values)), _std(values)
    return points, spreads


def _plot_frontier(axis: Axes, points: Points, spreads: Mapping[str, float]) -> list[Any]:
    """Returns the segments (start, end) of all lines."""
    best = frontier(points)
    segments: list[Any] = [((x, y - spreads[arm]), (x, y + spreads[arm])) for arm, (x, y) in points.items()]
    for arm, (x, y) in points.items():
        axis.errorbar([x], [y], [spreads[arm]], color=BLUE if arm in best else "gray", marker="o", capsize=3)
    corners = [points[arm] for arm in best]
    if corners:
        corners.append((max(x for x, _ in points.values()), corners[-1][1]))
        axis.step(*zip(*corners, strict=True), where="post", color=BLUE, linewidth=1, alpha=0.6)
    for (x, y), (next_x, next_y) in itertools.pairwise(corners):
        segments += [((x, y), (next_x, y)), ((next_x, y), (next_x, next_y))]
    axis.margins(x=0.25, y=0.1)
    make_logarithmic(axis)
    _clean(axis)
    return segments


def frontier(points: Points) -> list[str]:
    """The names of the points (cost, value) whose value is lower than that of all that cost no more, cheapest first."""
    lowest, names = math.inf, []
    for name, (_, value) in sorted(points.items(), key=lambda item: item[1]):
        if value < lowest:
            lowest = value
            names.append(name)
    return names


def _coordinates(names: Iterable[str], values: Iterable[Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in zip(names, values, strict=True))


def _add_relative_axis(axis: Axes, name: str, cost: float) -> None:
    times, divided = functools.partial(operator.mul, cost), functools.partial(operator.mul, 1 / cost)
    axis.secondary_xaxis("top", functions=(divided, times)).set_xlabel(f"relative to {name}")


def _write_names(axis: Axes, points: Points, segments: Iterable[Any]) -> None:
    """Write each name near its point, where it covers no segment and no other name, if there is such a place."""
    taken = [Bbox(np.sort(axis.transData.transform(segment), axis=0)).padded(3) for segment in segments]
    line = {"arrowstyle": "-", "color": "gray", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
    for name, point in points.items():
        text = axis.annotate(name, point, (0, 0), textcoords="offset points", arrowprops=line)
        text.set(verticalalignment="center", fontsize="small", in_layout=False)
        boxes = {place: _box_at(text, place) for place in PLACES}
        place = min(PLACES, key=lambda place: _obstacles(axis, boxes[place], taken))
        taken.append(_box_at(text, place))


def _box_at(text: Annotation, place: tuple[int, int]) -> Bbox:
    """Move the text there; returns what it covers, in pixels."""
    text.set(position=place, horizontalalignment="left" if place[0] > 0 else "right")
    text.get_window_extent()  # moves it
    return Text.get_window_extent(text).padded(1)  # without the line to its point


def _obstacles(axis: Axes, box: Bbox, taken: Sequence[Bbox]) -> int:
    """How many it covers; a border of the axis counts for many."""
    inside = Bbox.intersection(box, axis.bbox)
    return box.count_overlaps(taken) + (0 if inside is not None and np.allclose(inside, box) else 100)


# ---- Forgetting ----


def plot_forgetting_of_arms(grid: Grid, runs: Sequence[Run], path: Path) -> None:
    """Pretraining loss against fine-tuning loss, of runs with `final_forgetting`: see `plot_forgetting`."""
    measured = [run for run in runs if (run.folder / FRONTIER).is_file()]
    found = {run.folder: read_mapping(run.folder / FRONTIER) for run in measured}
    arms = {
        arm: [[Point(**point) for point in found[run.folder]["frontier"]] for run in members]
        for (arm,), members in grouped(measured, ["arm"])
    }
    plot_forgetting(arms, path, next((frontier["target_loss"] for frontier in found.values()), None))


# ---- Help or harm ----


def _mean_logged(*keys: str, since: float = 0.0) -> Measure:
    """The mean of a run's logged values of the first of `keys` that it logged, after the share `since` of its steps."""

    def measure(run: Run) -> float:
        history = run.history()
        start = since * max((entry["step"] for entry in history), default=0)
        logged = (finite(e[key] for e in history if key in e and e["step"] > start) for key in keys)
        return mean(next(filter(None, logged), []))

    return measure


_rise = _mean_logged("gr_linearity")
#: What the runs tell of the landscape, for the panels below the metric. Without GR the only gradient has another name.
LANDSCAPE = {
    "rise of the loss within r,\nrelative to a linear loss": _rise,
    "$\\|g_1\\|$, last half": _mean_logged("gr_grad_norm", "grad_norm", since=0.5),
}


def plot_harmful(grid: Grid, runs: Sequence[Run], path: Path) -> None:
    """Where GR helps and where it does harm: the metric against the first axis, a line for each arm, and a band for the
    baseline if the axis does not change it; below, as the runs logged it, how much the loss rises within r, which is 1
    for a linear loss, and ||g1||. A column of panels for each combination of the other axes."""
    name, *others = grid.axes
    groups = grouped(runs, others)
    rows: dict[str, Measure] = {label_of(grid): functools.partial(metric_of, grid)}
    rows |= {label: measure for label, measure in LANDSCAPE.items() if finite(map(measure, runs))}
    figure = Figure(figsize=(7 * len(groups), 4 + 2 * (len(rows) - 1)), layout="constrained")
    heights = [2.2, *[1.0] * (len(rows) - 1)]
    panels = figure.subplots(len(rows), len(groups), squeeze=False, sharex=True, sharey="row", height_ratios=heights)
    for column, (on_others, members) in zip(panels.T, groups, strict=True):
        for axis, (label, measure) in zip(column, rows.items(), strict=True):
            _plot_over(axis, grid, name, members, measure)
            if measure is _rise:
                axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
            else:
                make_logarithmic(axis)
            axis.set(ylabel=label)
            _set_ticks(axis, name if axis is column[-1] else "", grid.axes[name])
        if name in grid.fixed_by(grid.baseline):
            _name_sides(column[0], grid, members)
        column[0].set_title(_coordinates(others, on_others))
        column[0].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)


def _name_sides(axis: Axes, grid: Grid, runs: Sequence[Run]) -> None:
    """Say beside the band of the baseline what it means to be above and below it."""
    values = finite({run.folder: metric_of(grid, run) for run in runs if run.point["arm"] == grid.baseline}.values())
    beside: dict[str, Any] = {"transform": axis.get_yaxis_transform(), "color": "gray", "size": "small"}
    axis.text(1.01, mean(values) + _std(values), "↑ worse", va="bottom", **beside)
    axis.text(1.01, mean(values) - _std(values), "↓ better", va="top", **beside)


PICTURES = {
    "sensitivity": Picture(plot_sensitivity, range(1, 2), "the metric against the axis"),
    "heat_map": Picture(plot_heat_map, range(2, 3), "the metric over two axes", with_curves=False),
    "frontier": Picture(plot_frontier, range(10), "the metric against the passes, and the lowest that they reach"),
    "forgetting": Picture(
        plot_forgetting_of_arms, range(1), "pretraining loss against fine-tuning loss", with_curves=False
    ),
    "harmful": Picture(plot_harmful, range(1, 10), "the metric, the gauge and ||g1|| against the first axis"),
}


def picture_of(grid: Grid) -> str | None:
    """The name of the grid's picture: the one it names, or one for its number of axes, if there is one.

    Raises:
        ValueError: there is no such picture, or it cannot show so many axes.
    """
    axes = len(grid.axes)
    if grid.picture is None:
        return {1: "sensitivity", 2: "heat_map"}.get(axes)
    if grid.picture not in PICTURES:
        choices = ", ".join(f"{name} ({picture.help})" for name, picture in PICTURES.items())
        raise ValueError(f"picture={grid.picture!r}: choose one of {choices}.")
    if axes not in PICTURES[grid.picture].axes:
        raise ValueError(f"picture={grid.picture!r}: it cannot show the {axes} axes of the grid. Choose another.")
    return grid.picture
