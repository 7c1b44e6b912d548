"""Plots of a run, from its `log_history` and layer statistics alone."""

import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..errors import extra
from .record import History

with extra("report"):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

PICTURE, LAYER_PICTURE = "curves.png", "layer_statistics.png"
LAYER_TABLE = "layer_statistics.parquet"
# Color-blind safe (Okabe and Ito, 2008).
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
COLORS = (BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9", "#000000")


def plot_curves(log_history: History, path: str | Path) -> None:
    """Loss, error, gradient norms, schedules, memorization, the gauge of r, diagnostics and flat coordinates against
    the optimizer step, as one PNG.

    Values that the run did not log are left out, such as the error of a language model, or ||g2|| without GR.

    Args:
        log_history: `TrainerState.log_history`.
        path: where to write the picture.
    """
    panels = [plot for plot, prefix in PANELS if any(key.startswith(prefix) for entry in log_history for key in entry)]
    rows = 1 if len(panels) == 3 else 2
    columns = math.ceil(len(panels) / rows)
    figure = Figure(figsize=(3 + 4 * columns, 4 if rows == 1 else 7), layout="constrained")
    axes = figure.subplots(rows, columns).flatten().tolist()
    for unused in axes[len(panels) :]:
        unused.remove()
    for axis, plot in zip(axes, panels, strict=False):
        plot(axis, log_history)
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.3)
        axis.spines["top"].set_visible(False)
        if axis.get_lines() and axis.get_legend() is None:
            axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _plot_loss(axis: Axes, log_history: History) -> None:
    _line(axis, log_history, "loss", "training", BLUE)
    _line(axis, log_history, "eval_loss", "evaluation", ORANGE)
    axis.set(title="Loss", ylabel="loss")


def _plot_error(axis: Axes, log_history: History) -> None:
    _line(axis, log_history, "eval_error", "evaluation", ORANGE, scale=100)
    axis.set(title="Classification error", ylabel="error (%)")
    axis.set_ylim(bottom=0)


def _plot_neighbors(axis: Axes, log_history: History) -> None:
    _line(axis, log_history, "eval_knn_error", "evaluation", ORANGE, scale=100)
    axis.set(title="Error of the nearest neighbors", ylabel="error (%)")
    axis.set_ylim(bottom=0)


def _plot_norms(axis: Axes, log_history: History) -> None:
    if not _line(axis, log_history, "gr_grad_norm", r"$\|g_1\|$ at $\theta$", BLUE):
        _line(axis, log_history, "grad_norm", r"$\|g\|$", BLUE)
    _line(axis, log_history, "gr_perturbed_grad_norm", r"$\|g_2\|$ at $\theta + r\,d$", ORANGE)
    axis.set(title="Gradient norm before clipping", ylabel="norm")
    make_logarithmic(axis)


def _plot_memorization(axis: Axes, log_history: History) -> None:
    _line(axis, log_history, "train_accuracy_right_labels", "right labels", BLUE, scale=100)
    _line(axis, log_history, "train_accuracy_wrong_labels", "wrong labels, memorized", ORANGE, scale=100)
    axis.set(title="Training labels that the model predicts", ylabel="share (%)", ylim=(0, 102))


def _plot_gauge(axis: Axes, log_history: History) -> None:
    _line(axis, log_history, "gr_linearity", r"$(L_2 - L_1)\ /\ (r\ g_1 \cdot d)$", PURPLE)
    axis.axhline(1, color="gray", linewidth=0.8, linestyle="--", label="if the loss were linear")
    axis.set(title="Rise of the loss within r", ylabel="relative to a linear loss")


def _plot_adaptive_rates(axis: Axes, log_history: History) -> None:
    _line(axis, log_history, "adaptive_lr_spread", "spread over coordinates", BLUE)
    _line(axis, log_history, "adaptive_lr_change", "change in one step", ORANGE)
    axis.set(title="Adaptive learning rates", ylabel=r"in units of $\log \psi$")
    make_logarithmic(axis)


def _plot_stability(axis: Axes, log_history: History) -> None:
    _line(axis, log_history, "preconditioned_sharpness", r"$\lambda_{\max}(P^{-1} H)$", BLUE)
    _line(axis, log_history, "stability_threshold", "edge of stability", ORANGE, linestyle="--")
    axis.set(title="Sharpness as Adam sees it", ylabel="eigenvalue")
    make_logarithmic(axis)


def _plot_cosine(axis: Axes, log_history: History) -> None:
    _line(axis, log_history, "gr_cosine", r"cosine of $g_1$ and $g_2$", GREEN)
    axis.set(title="Both gradients", ylabel="cosine")
    axis.set_ylim(top=1.02)


def _plot_flat_coordinates(axis: Axes, log_history: History) -> None:
    kinds = sorted({key for entry in log_history for key in entry if key.startswith("ire_flat_fraction_")})
    for key, color in zip(kinds, COLORS * 2, strict=False):
        _line(axis, log_history, key, key.removeprefix("ire_flat_fraction_"), color)
    axis.set(title="Flat coordinates by kind of layer", ylabel="fraction", ylim=(0, 1))
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))  # six curves leave no room inside


def _plot_schedules(axis: Axes, log_history: History) -> None:
    """The learning rate and, on a second axis, lambda_t and r_t."""
    _line(axis, log_history, "learning_rate", "learning rate", GREEN)
    with_phi = [entry for entry in log_history if "tvlars_phi" in entry]
    scaled = [{**entry, "scaled": entry["learning_rate"] * entry["tvlars_phi"]} for entry in with_phi]
    _line(axis, scaled, "scaled", r"learning rate $\times\ \varphi_t$", ORANGE)
    axis.set(title="Schedules", ylabel="learning rate")
    axis.set_ylim(bottom=0)
    curves = axis.get_lines()
    if any("gr_lambda" in entry for entry in log_history):
        gr_axis = axis.twinx()
        _line(gr_axis, log_history, "gr_r", r"$r_t$", PURPLE, drawstyle="steps-pre", linewidth=5, alpha=0.3)
        _line(gr_axis, log_history, "gr_lambda", r"$\lambda_t$", PURPLE, drawstyle="steps-pre")
        gr_axis.set_ylabel(r"$\lambda_t$, $r_t$")
        gr_axis.set_ylim(bottom=0)
        curves = [*curves, *gr_axis.get_lines()]
    # Below the axes: the curves of a warmup and a decay leave no corner free.
    axis.legend(handles=list(curves), frameon=False, ncols=3, loc="upper right", bbox_to_anchor=(1, -0.14))


#: Draws a panel of `plot_curves` -> what the name of a logged value must begin with for it to be there.
PANELS = (
    (_plot_loss, ""),
    (_plot_error, "eval_error"),
    (_plot_neighbors, "eval_knn_error"),
    (_plot_norms, ""),
    (_plot_schedules, ""),
    (_plot_memorization, "train_accuracy_wrong_labels"),
    (_plot_gauge, "gr_linearity"),
    (_plot_adaptive_rates, "adaptive_lr_spread"),
    (_plot_stability, "preconditioned_sharpness"),
    (_plot_cosine, "gr_cosine"),
    (_plot_flat_coordinates, "ire_flat_fraction_"),
)


#: Kind of a layer's statistic -> its title.
LAYER_KINDS = {
    "weight_norm": r"Weight norm $\|w\|$ (LWN)",
    "gradient_norm": r"Gradient norm $\|g\|$ (LGN)",
    "trust_ratio": r"Trust ratio $\|w\| / \|g\|$ (LNR)",
    "rate": r"Rate $\gamma_t^k = a\, \eta\, \varphi_t\, \|w\| / \|d\|$",
}


def read_layer_statistics(folder: Path) -> dict[str, list]:
    """The table that `LayerStatisticsCallback` wrote. Raises `ValueError` if there is none."""
    try:
        return pq.read_table(folder / LAYER_TABLE).to_pydict()
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(
            f"{folder}: no {LAYER_TABLE} can be read there ({error}). Train with --layer_statistics_steps."
        ) from error


def plot_layer_statistics(runs: Mapping[str, tuple[Mapping[str, list], History]], path: str | Path) -> None:
    """Weight norm, gradient norm, their ratio and the rate of each layer against the optimizer step, with the
    evaluation loss on a second axis, as one PNG. Several runs are rows with equal axes.

    Args:
        runs: name -> columns step, layer, kind and value of `LayerStatisticsCallback.table`, and `log_history`.
        path: where to write the picture.
    """
    curves = {name: _curves_of_layers(table) for name, (table, _) in runs.items()}
    kinds = [kind for kind in LAYER_KINDS if any(map(len, (c for run in curves.values() for c in run[kind].values())))]
    figure = Figure(figsize=(4.7 * len(kinds), 0.4 + 3.6 * len(runs)), layout="constrained")
    axes = figure.subplots(len(runs), len(kinds), squeeze=False, sharex="col", sharey="col")
    depth = Normalize(0, max(1, max(len(run["weight_norm"]) for run in curves.values()) - 1))
    losses = []
    for row, (name, (_, history)) in zip(axes, runs.items(), strict=True):
        for axis, kind in zip(row, kinds, strict=True):
            for i, points in enumerate(curves[name][kind].values()):
                if points:
                    axis.plot(*zip(*points, strict=True), color=colormaps["viridis"](depth(i)), linewidth=0.9)
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
            losses += _add_loss(axis, history, "evaluation loss" if axis is row[-1] else "")
        row[0].set_ylabel(name)
    for first, last, kind in zip(axes[0], axes[-1], kinds, strict=True):
        first.set_title(LAYER_KINDS[kind])
        last.set_xlabel("optimizer step")
    top = max((axis.get_ylim()[1] for axis in losses), default=1)
    for axis in losses:
        axis.set_ylim(0, top)
    bar = figure.colorbar(ScalarMappable(depth, colormaps["viridis"]), ax=axes, ticks=[0, depth.vmax], pad=0.01)
    bar.ax.set_yticklabels(["first\nlayer", "last\nlayer"])
    figure.savefig(path, dpi=120)


def _curves_of_layers(table: Mapping[str, list]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """kind -> layer -> points. The axes are logarithmic: only values above 0 are points."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {kind: {} for kind in LAYER_KINDS}
    for step, layer, kind, value in zip(*(table[key] for key in ("step", "layer", "kind", "value")), strict=True):
        points = curves[kind].setdefault(layer, [])
        if value is not None and value > 0:
            points.append((step, value))
    return curves


def _add_loss(axis: Axes, log_history: History, label: str) -> list[Axes]:
    """Draw the evaluation loss on a second axis, and return that, if the run logged it."""
    if not any("eval_loss" in entry for entry in log_history):
        return []
    second = axis.twinx()
    _line(second, log_history, "eval_loss", "evaluation loss", ORANGE, linestyle="--")
    second.set_ylabel(label, color=ORANGE)
    second.tick_params(axis="y", colors=ORANGE)
    second.spines["top"].set_visible(False)
    return [second]


def make_logarithmic(axis: Axes) -> None:
    """Make the y axis logarithmic, labeled with plain numbers, also between powers of ten if it spans few of them. It
    stays linear if no plotted value is positive and finite."""
    plotted = [float(y) for line in axis.get_lines() for y in np.asarray(line.get_ydata())]
    if not any(0 < y < math.inf for y in plotted):
        return
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    low, high = axis.get_ylim()
    if high < 20 * low:
        axis.yaxis.set_minor_formatter("{x:g}")


def _line(axis: Axes, log_history: list[dict], key: str, label: str, color: str, scale: float = 1, **style) -> bool:
    """Draw one logged value; False if it was never logged. A single point is drawn as a dot."""
    points = [(entry["step"], entry[key] * scale) for entry in log_history if entry.get(key) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), label=label, color=color, marker="o" if len(points) == 1 else "", **style)
    return bool(points)


def require_picture(flag: str, path: Path) -> None:
    """Raise `ValueError` if no picture can be written to `path`."""
    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise ValueError(f"{flag}={path}: not a supported picture format. Use .png, or one of {', '.join(kinds)}.")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{flag}={path}: it cannot be written. Choose a file in a folder that exists and is writable.")
