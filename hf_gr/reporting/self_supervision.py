"""Pictures of Barlow Twins: the views that it compares, and what it makes of them."""

from pathlib import Path

import numpy as np

from ..errors import extra

with extra("report"):
    from matplotlib.figure import Figure

VIEWS, CORRELATION = "views.png", "cross_correlation.png"
#: Rows and columns of the cross-correlation to draw: more are not told apart.
SHOWN = 256


def plot_views(images: np.ndarray, first: np.ndarray, second: np.ndarray, path: str | Path) -> None:
    """Images above their two views, all of (n, height, width, 3) with values from 0 to 1, as one PNG."""
    rows = {"image": images, "first view": first, "second view": second}
    figure = Figure(figsize=(1 + 1.1 * len(images), 3.6), layout="constrained")
    axes = figure.subplots(len(rows), len(images), squeeze=False)
    for row, (title, shown) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(row, shown, strict=True):
            axis.imshow(image.clip(0, 1), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(title)
    figure.savefig(path, dpi=120)


def plot_cross_correlation(c: np.ndarray, path: str | Path) -> None:
    """The cross-correlation matrix (d, d), its first 256 rows and columns if there are more, as one PNG."""
    shown = c[:SHOWN, :SHOWN]
    figure = Figure(figsize=(5.6, 4.8), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shown, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    part = f", the first {SHOWN} of {len(c)}" if len(shown) < len(c) else ""
    axis.set(title="Cross-correlation of two views", xlabel=f"output for the second view{part}")
    axis.set_ylabel("output for the first view")
    figure.colorbar(image, ax=axis)
    figure.savefig(path, dpi=120)
