"""Pictures of theory: what is drawn, against the formula."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from hf_gr.analysis import adaptive_lr_variance, adaptive_lr_variation
from hf_gr.cli import command
from hf_gr.reporting.theory_figures import FIGURES


@pytest.mark.parametrize("name", FIGURES)
def test_from_the_command_line(name, tmp_path):
    command.main(["figure", name, str(tmp_path / "figure.png")])
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match=r"^picture=.*\.jpg2"):
        command.main(["figure", name, str(tmp_path / "figure.jpg2")])


def test_a_figure_that_is_not_there():
    with pytest.raises(ValueError, match="adaptive-lr"):
        command.main(["figure", "adaptive-rl", "figure.png"])


def test_both_panels_show_their_formula(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    FIGURES["adaptive-lr"].draw(tmp_path / "figure.png")
    for axis, formula in zip(figures[0].axes, (adaptive_lr_variance, adaptive_lr_variation), strict=False):
        image = axis.collections[0]
        t, gamma = (image.get_coordinates()[..., i] for i in range(2))
        shown = image.get_array()
        row, column = shown.shape[0] // 4, shown.shape[1] - 1
        t, gamma = round(t[row, column : column + 2].mean()), gamma[row : row + 2, column].mean()
        assert (t, gamma) == (200, pytest.approx(0.125)) and shown[row, column] == pytest.approx(formula(t, gamma))
        assert np.all(np.isfinite(shown))
