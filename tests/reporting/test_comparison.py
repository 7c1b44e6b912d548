"""What comparing two runs says, against curves that are straight lines."""

import math

import pytest
from matplotlib.figure import Figure

from hf_gr.reporting.comparison import common_target, curve, first_reached, speedups
from hf_gr.reporting.comparison_plots import plot_comparison


def run(scale: float, seconds: float) -> list[dict]:
    """A loss of 4 - scale * step."""
    return [
        {"step": s, "loss": 4 - scale * s, "num_input_tokens_seen": 100 * s, "train_seconds": seconds * s}
        for s in range(11)
    ]


def test_speedups_of_straight_lines(tmp_path):
    slow, fast = run(0.1, 1.0), run(0.2, 1.5)
    assert common_target([slow, fast]) == pytest.approx(3.0)
    found = speedups([slow], [fast])
    assert found["steps"] == pytest.approx((10, 5, 2))
    assert found["tokens"] == pytest.approx((1000, 500, 2))
    assert found["seconds"] == pytest.approx((10, 7.5, 10 / 7.5))
    assert "passes" not in found  # not logged
    assert speedups([slow], [fast], target=3.87)["steps"][0] == pytest.approx(1.3)
    assert speedups([slow], [fast], target=1.0)["steps"][:2] == (math.inf, math.inf)
    assert math.isnan(speedups([slow], [fast], target=1.0)["steps"][2])  # neither gets there
    assert speedups([slow, fast], [fast, fast])["steps"] == pytest.approx((7.5, 5, 1.5))


@pytest.mark.parametrize(("tokens", "axes"), [(100, ["steps", "seconds"]), (150, ["steps", "tokens", "seconds"])])
def test_a_picture_does_not_show_the_same_twice(tokens, axes, monkeypatch, tmp_path):
    """Tokens are steps in another unit, unless two runs have different batches."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: figures.append(figure))
    slow, fast = run(0.1, 1.0), [{**e, "num_input_tokens_seen": tokens * e["step"]} for e in run(0.2, 1.5)]
    plot_comparison([slow], [fast], tmp_path / "c.png")
    assert [axis.get_xlabel() for axis in figures[0].axes] == axes


def test_one_lucky_point_does_not_reach_a_smoothed_target():
    lucky = [{"step": s, "loss": 1.0 if s == 2 else 4.0 - 0.1 * s} for s in range(11)]
    assert first_reached(*curve(lucky, "steps"), 3.2) < 2
    assert first_reached(*curve(lucky, "steps", window=5), 3.0) > 2
    x, y = curve(lucky, "steps", window=5)
    assert (x[0], y[0]) == (4, pytest.approx((4 + 3.9 + 1 + 3.7 + 3.6) / 5))
    with pytest.raises(ValueError, match="window=12: the run has logged 'loss' 11 times"):
        curve(lucky, "steps", window=12)
