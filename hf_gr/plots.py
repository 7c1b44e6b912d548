"""Pictures of a run, drawn from its `log_history` alone."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Colour-blind safe (Okabe and Ito, 2008).
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"


def plot_curves(log_history: list[dict[str, float]], path: str | Path) -> None:
    """Loss, error, gradient norms and schedules against the optimizer step, as one PNG.

    What the run did not log is left out: the error of a language model, ||g2|| of a run without GR.

    Args:
        log_history: `TrainerState.log_history`.
        path: where to write the picture.
    """
    has_error = any("eval_error" in entry for entry in log_history)
    figure = Figure(figsize=(11, 7) if has_error else (14, 4), layout="constrained")
    axes = figure.subplots(2, 2) if has_error else figure.subplots(1, 3)
    loss, *error, norms, schedules = axes.flat

    _line(loss, log_history, "loss", "training", BLUE)
    _line(loss, log_history, "eval_loss", "evaluation", ORANGE)
    loss.set(title="Loss", ylabel="loss")
    if has_error:
        _line(error[0], log_history, "eval_error", "evaluation", ORANGE, scale=100)
        error[0].set(title="Classification error", ylabel="error (%)")
        error[0].set_ylim(bottom=0)

    if not _line(norms, log_history, "gr_grad_norm", r"$\|g_1\|$ at $\theta$", BLUE):
        _line(norms, log_history, "grad_norm", r"$\|g\|$", BLUE)
    _line(norms, log_history, "gr_perturbed_grad_norm", r"$\|g_2\|$ at $\theta + r\,g_1/\|g_1\|$", ORANGE)
    norms.set(title="Gradient norm before clipping", ylabel="norm", yscale="log")

    _line(schedules, log_history, "learning_rate", "learning rate", GREEN)
    schedules.set(title="Schedules", ylabel="learning rate")
    schedules.set_ylim(bottom=0)
    handles = schedules.get_lines()
    if any("gr_lambda" in entry for entry in log_history):
        degree = schedules.twinx()
        _line(degree, log_history, "gr_lambda", r"$\lambda_t$", PURPLE, drawstyle="steps-pre")
        _line(degree, log_history, "gr_r", r"$r_t$", PURPLE, linestyle=":")
        degree.set_ylabel(r"$\lambda_t$, $r_t$")
        degree.set_ylim(bottom=0)
        handles = [*handles, *degree.get_lines()]

    for axis in axes.flat:
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.3)
        axis.spines["top"].set_visible(False)
        if axis is not schedules and axis.get_lines():
            axis.legend(frameon=False)
    if handles:
        # Below the axes: the curves of a warmup and a decay leave no corner free.
        schedules.legend(handles=handles, frameon=False, ncols=3, loc="upper right", bbox_to_anchor=(1, -0.14))
    figure.savefig(path, dpi=120)


def _line(axis: Axes, log_history: list[dict], key: str, label: str, color: str, scale: float = 1, **style) -> bool:
    """Draw one logged value; False if it was never logged. A single point is drawn as a dot."""
    points = [(entry["step"], entry[key] * scale) for entry in log_history if key in entry]
    if points:
        axis.plot(*zip(*points, strict=True), label=label, color=color, marker="o" if len(points) == 1 else "", **style)
    return bool(points)
