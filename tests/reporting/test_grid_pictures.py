"""The picture of a grid: what is drawn, against values that are known."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from hf_gr.reporting.comparison import at_every_point
from hf_gr.reporting.grid import Run, expand
from hf_gr.reporting.grid_file import Grid
from hf_gr.reporting.grid_pictures import (
    PICTURES,
    _plot_frontier,
    _write_names,
    frontier,
    picture_of,
    plot_frontier,
    plot_harmful,
    plot_heat_map,
    plot_sensitivity,
)

ARMS = {"off": {"gr_lambda": 0}, "vanilla": {"gr_warmup": "none"}, "zero": {"gr_warmup": "zero"}}


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures instead of their files."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: figures.append(figure))
    return figures


def finish(run: Run, error: float, log: list[dict]) -> None:
    run.folder.mkdir(parents=True)
    passes = 10 if run.point["arm"] == "off" else 20
    (run.folder / "all_results.json").write_text(json.dumps({"eval_error": error, "train_passes": passes}))
    (run.folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))


@pytest.fixture
def swept(tmp_path) -> tuple[Grid, list[Run]]:
    """Errors of 0.2 without GR, r with vanilla GR, and r / 2 with zero-warmup, 0.02 more with seed 1."""
    axes = {"gr_r": [0.1, 0.2, 1.0]}
    grid = Grid("x", ARMS, "off", "eval_error", percent=True, axes=axes, ignores={"off": ["gr_r"]}, seeds=[0, 1])
    runs = expand(grid, tmp_path, tmp_path)
    for run in runs:
        arm, r = run.point["arm"], run.point["gr_r"]
        error = {"off": 0.2, "vanilla": r, "zero": (r or 0) / 2}[arm] + 0.02 * run.point["seed"]
        steps = range(1, 9)
        if arm == "off":
            log = [{"step": step, "grad_norm": 9.0 if step <= 4 else 3.0} for step in steps]
        else:
            log = [{"step": step, "grad_norm": 7.0, "gr_grad_norm": r * step, "gr_linearity": 1 + r} for step in steps]
            log = [log[0], *({k: v for k, v in entry.items() if k != "gr_linearity"} for entry in log[1:3]), *log[3:]]
        finish(run, error, log)
    return grid, at_every_point(grid, runs)


def curves(axis) -> dict[str, dict[float, float]]:
    """The points of each error bar, by its arm."""
    return {bars.get_label(): dict(zip(*map(tuple, bars[0].get_data()), strict=True)) for bars in axis.containers}


def test_help_and_harm_over_the_radius(swept, drawn, tmp_path):
    grid, runs = swept
    plot_harmful(grid, runs, tmp_path / "harmful.png")
    metric, gauge, norm = drawn[0].axes
    found = curves(metric)
    assert found["vanilla"] == pytest.approx({0.1: 11, 0.2: 21, 1.0: 101})
    assert found["zero"] == pytest.approx({0.1: 6, 0.2: 11, 1.0: 51})
    assert curves(gauge)["zero"] == pytest.approx({0.1: 1.1, 0.2: 1.2, 1.0: 2})
    assert curves(norm)["zero"] == pytest.approx({0.1: 0.65, 0.2: 1.3, 1.0: 6.5})  # steps 5 to 8
    assert (metric.get_ylabel(), norm.get_xlabel(), metric.get_xlabel()) == ("error (%)", "gr_r", "")
    # Without GR: a band, not a curve, and ||g|| under its other name.
    bands = {axis: (axis.patches[0].get_y(), axis.patches[0].get_height()) for axis in (metric, norm)}
    assert "off" not in found and bands[metric] == pytest.approx((21 - 2**0.5, 2 * 2**0.5))
    assert bands[norm] == pytest.approx((3, 0)) and not gauge.patches
    sides = {text.get_text(): text.get_position()[1] for text in metric.texts}
    assert sides == pytest.approx({"↑ worse": 21 + 2**0.5, "↓ better": 21 - 2**0.5})


def test_the_other_axes_are_columns(swept, drawn, tmp_path):
    grid, _ = swept
    grid.axes["model"] = ["a", "b"]
    runs = expand(grid, tmp_path / "more", tmp_path)
    for run in runs:
        finish(run, 0.2, [])
    plot_harmful(grid, at_every_point(grid, runs), tmp_path / "harmful.png")
    assert [axis.get_title() for axis in drawn[0].axes] == ["model = a", "model = b"]  # nothing was logged


def test_the_only_axis_and_an_arm_that_it_does_not_change(swept, drawn, tmp_path):
    grid, runs = swept
    plot_sensitivity(grid, runs, tmp_path / "sensitivity.png")
    (axis,) = drawn[0].axes
    assert set(curves(axis)) == {"vanilla", "zero"} and axis.get_xscale() == "log"
    assert [text.get_text() for text in axis.get_xticklabels()] == ["0.1", "0.2", "1.0"]
    assert axis.get_lines()[0].get_ydata() == pytest.approx([21, 21])


def test_a_heat_map_with_the_arm_that_no_axis_changes(drawn, tmp_path):
    """It has no panel: its value is in the title and, as a line, in the color bar, which all panels share. Below the
    metric is what the grid also shows, with colors of its own."""
    axes = {"ire_kappa": [1, 2], "ire_gamma": [0.5, 0.6, 0.8]}
    arms = {"AdamW": {"ire_kappa": 0}, "AdmIRE": {}, "slow": {"learning_rate": 1}}
    grid = Grid("x", arms, "AdamW", "eval_error", axes=axes, ignores={"AdamW": ["ire_gamma"]}, seeds=[0, 1])
    grid.also = ["loss"]
    runs = expand(grid, tmp_path, tmp_path)
    for run in runs:
        kappa, gamma = run.point["ire_kappa"] or 0, run.point["ire_gamma"] or 0
        finish(
            run, 10 * kappa + gamma + run.point["seed"], [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 1.0 + kappa}]
        )
    plot_heat_map(grid, at_every_point(grid, runs), tmp_path / "map.png")
    errors, losses = drawn[0].subfigs
    panels = [axis for axis in errors.axes if axis.images]
    assert [axis.get_title() for axis in panels] == ["AdmIRE", "slow"]
    assert np.asarray(panels[0].images[0].get_array()) == pytest.approx(np.array([[11, 11.1, 11.3], [21, 21.1, 21.3]]))
    assert [figure.get_suptitle() for figure in (errors, losses)] == ["AdamW: 0.5", "AdamW: 1"]
    image = losses.axes[0].images[0]
    assert np.asarray(image.get_array()) == pytest.approx(np.array([[2, 2, 2], [3, 3, 3]]))
    assert image.colorbar.ax.get_ylabel() == "training loss" and (image.norm.vmin, image.norm.vmax) == (1, 3)
    bar = panels[0].images[0].colorbar
    assert (bar.vmin, bar.vmax) == pytest.approx((0.5, 21.3))
    assert any(set(line.get_ydata()) == {0.5} for line in bar.ax.get_lines())
    assert not PICTURES[picture_of(grid)].with_curves  # six rows of curves would show less


def test_the_frontier_has_what_nothing_cheaper_beats():
    points = {"dear": (9, 1.0), "a": (1, 5.0), "b": (2, 3.0), "worse": (3, 4.0), "twin": (1, 6.0), "equal": (4, 3.0)}
    assert frontier(points) == ["a", "b", "dear"]
    assert frontier({}) == []


def test_the_frontier_is_a_step_at_each_of_its_points():
    axis = Figure().subplots()
    _plot_frontier(axis, {"a": (1, 5.0), "b": (2, 3.0), "c": (3, 4.0)}, dict.fromkeys("abc", 0.5))
    (line,) = [line for line in axis.get_lines() if line.get_drawstyle() == "steps-post"]
    assert line.get_xydata().tolist() == [[1, 5], [2, 3], [3, 3]]


def test_the_names_of_close_points_do_not_cover_each_other():
    figure = Figure(figsize=(7, 5))
    axis = figure.subplots()
    points = {f"arm number {i}": (1 + i % 3 / 50, 10 + i / 5) for i in range(9)}
    segments = _plot_frontier(axis, points, dict.fromkeys(points, 0.1))
    figure.draw_without_rendering()
    _write_names(axis, points, segments)
    figure.draw_without_rendering()
    assert [text.get_text() for text in axis.texts] == list(points)
    boxes = [Text.get_window_extent(text) for text in axis.texts]
    assert not any(box.count_overlaps(boxes[:i]) for i, box in enumerate(boxes))
    bars = [axis.transData.transform(segment) for segment in segments]
    for box in boxes:
        for (x, low), (_, high) in bars[: len(points)]:
            assert not (box.x0 < x < box.x1 and low < box.y1 and box.y0 < high)


def test_frontiers_of_a_grid(swept, drawn, tmp_path):
    """A panel for each value of the axis, where zero-warmup is better than none for twice the passes, or is not."""
    grid, runs = swept
    plot_frontier(grid, runs, tmp_path / "frontier.png")
    panels = [axis for axis in drawn[0].axes if axis.get_title()]
    assert [axis.get_title() for axis in panels] == ["gr_r = 0.1", "gr_r = 0.2", "gr_r = 1.0"]
    steps = [next(line for line in axis.get_lines() if line.get_drawstyle() == "steps-post") for axis in panels]
    corners = [[10, 21], [20, 6], [20, 6]], [[10, 21], [20, 11], [20, 11]], [[10, 21], [20, 21]]
    for line, expected in zip(steps, corners, strict=True):
        assert line.get_xydata() == pytest.approx(np.array(expected))
    assert [text.get_text() for text in panels[0].texts] == list(ARMS)
    relative = panels[0].child_axes[0]
    assert relative.get_xlabel() == "relative to off"
    assert relative.get_xlim() == pytest.approx([x / 10 for x in panels[0].get_xlim()])


def test_runs_without_counted_passes_have_no_point(swept, drawn, tmp_path):
    grid, runs = swept
    for run in runs:
        (run.folder / "all_results.json").write_text(json.dumps({"eval_error": 0.1}))
    plot_frontier(grid, runs, tmp_path / "frontier.png")
    assert not any(axis.containers for axis in drawn[0].axes)


@pytest.mark.parametrize("count", range(4))
def test_the_picture_of_so_many_axes(count):
    axes = {name: [1, 2] for name in "abc"[:count]}
    assert picture_of(Grid("x", ARMS, "off", axes=axes)) == [None, "sensitivity", "heat_map", None][count]
    assert picture_of(Grid("x", ARMS, "off", axes=axes, picture="frontier")) == "frontier"


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_is_drawn(name, swept, tmp_path):
    """Also of an unfinished grid, and of runs that diverged."""
    grid, runs = swept
    count = PICTURES[name].axes[0]
    grid.axes = {**grid.axes, "seed": [0, 1]} if count == 2 else grid.axes
    (runs[0].folder / "all_results.json").write_text(json.dumps({"eval_error": None, "train_passes": 3}))
    PICTURES[name].draw(grid, runs[:-3], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_frontiers_of_forgetting(tmp_path, drawn):
    """Thin curves of the runs and their mean at equal steps, as far as all go."""
    grid = Grid("x", {"off": {"gr_lambda": 0}, "on": {}}, "off", picture="forgetting", seeds=[0, 1])
    runs = expand(grid, tmp_path, tmp_path)
    for run in runs:
        finish(run, 0.1, [])
        points = [
            {"step": 5 * i, "finetuning_loss": 6.0 - i, "pretraining_loss": run.point["seed"] + i} for i in range(4)
        ]
        points = points if run.point["seed"] else points[:3]
        (run.folder / "forgetting_frontier.json").write_text(json.dumps({"target_loss": 4.5, "frontier": points}))
    PICTURES["forgetting"].draw(grid, runs, tmp_path / "forgetting.png")
    (axis,) = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}
    assert lines["on"] == lines["off"] == [[6, 0.5], [5, 1.5], [4, 2.5]]
    assert sorted(len(line.get_xdata()) for line in axis.get_lines() if line.get_linewidth() < 0.7) == [3, 3, 4, 4]
    assert lines["target"][0][0] == 4.5 and axis.xaxis_inverted()
