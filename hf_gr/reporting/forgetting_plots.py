"""The frontier of fine-tuning and forgetting: the loss on the first dataset against that on the second."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..analysis.forgetting import Point
from ..errors import extra
from .plots import COLORS

with extra("report"):
    from matplotlib.figure import Figure


def plot_forgetting(groups: Mapping[str, Sequence[Sequence[Point]]], path: Path, target: float | None = None) -> None:
    """A color for each group of frontiers: thin curves, and if there are several, their mean at equal steps as a thick
    one, as far as all of them go. Fine-tuning goes from right to left."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axis = figure.subplots()
    for (name, frontiers), color in zip(groups.items(), COLORS * (1 + len(groups) // len(COLORS)), strict=False):
        count = min(map(len, frontiers))
        mean = np.mean([frontier[:count] for frontier in frontiers], axis=0)
        axis.plot(mean[:, 1], mean[:, 2], color=color, label=name, linewidth=2, marker="o", markersize=3)
        axis.plot(*mean[0, 1:], color=color, marker="s", markersize=7)
        for frontier in frontiers if len(frontiers) > 1 else ():
            _, x, y = np.transpose(frontier)
            axis.plot(x, y, color=color, linewidth=0.6, alpha=0.6)
    if target is not None:
        axis.axvline(target, color="gray", linestyle="--", linewidth=0.8, label="target")
    axis.set(xlabel="fine-tuning loss (held out)", ylabel="pretraining loss (held out)")
    axis.set_title("Squares: before fine-tuning. Lower is less forgotten.", fontsize="medium")
    axis.invert_xaxis()
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.get_legend_handles_labels()[0]:  # none before a run has finished
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
