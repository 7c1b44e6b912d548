"""Pictures of theory, which need no run. To add one, give it an entry in `FIGURES`."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..analysis.adaptive_lr import RELIABLE_SAMPLES, closed_variance, effective_samples
from ..errors import extra

with extra("report"):
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure


class TheoryFigure(NamedTuple):
    """A picture, and what it shows."""

    draw: Callable[[Path], None]
    help: str


def plot_adaptive_lr(path: Path) -> None:
    """Figure 3 of the GR paper: the variance of Adam's adaptive learning rate by Eq. 9 over the step t and the decay
    rate gamma of the gradients, and beside it the coefficient of variation, which does not depend on their scale.

    Lines connect equal values. Where the approximation behind both fails, the panels are hatched.
    """
    t, gamma = np.meshgrid(np.arange(5.0, 201.0), np.linspace(0, 0.5, 201))
    samples = effective_samples(t, gamma)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = {
        r"$\mathrm{Var}(\psi)$ by Eq. 9, $\sigma_1 = 1$": (closed_variance(t, gamma), (0.01, 0.03, 0.1, 0.3, 1, 3, 10)),
        r"$\mathrm{CV}(\psi) = \sqrt{1\,/\,2n}$": (np.sqrt(1 / (2 * samples)), (0.05, 0.07, 0.1, 0.15, 0.2, 0.3)),
    }
    for axis, (title, (values, levels)) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        image = axis.pcolormesh(t, gamma, values, norm=LogNorm(), cmap="viridis", rasterized=True)
        axis.clabel(axis.contour(t, gamma, values, levels, colors="white", linewidths=0.8), fmt="%g")
        axis.contourf(t, gamma, samples, (0, RELIABLE_SAMPLES), colors="none", hatches=["///"])
        axis.set(title=title, xlabel="step $t$", ylabel=r"decay rate $\gamma$")
        figure.colorbar(image, ax=axis, format="%g", ticks=levels).minorticks_off()
    figure.suptitle(f"hatched: n < {RELIABLE_SAMPLES}, where the approximation fails", size="small", color="gray")
    figure.savefig(path, dpi=120)


FIGURES = {
    "adaptive-lr": TheoryFigure(plot_adaptive_lr, "variance of Adam's adaptive learning rate, Figure 3 of the GR paper")
}
