"""What a script prints of its run: what it is about to do and what that costs, and one line per log.

On a terminal there is also a progress bar over the passes, whose estimate of the time left thus knows of the second
passes to come.
"""

import sys
import time
from typing import Any, NamedTuple

from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy

from ..trainer.recording import model_facts
from ..trainer.trainer import GRTrainer

#: Logged with the training loss -> its label and format.
TRAINING = {
    "loss": ("loss", ".4g"),
    "learning_rate": ("lr", ".2e"),
    "grad_norm": ("|g|", ".3g"),
    "gr_grad_norm": ("|g1|", ".3g"),
    "gr_perturbed_grad_norm": ("|g2|", ".3g"),
    "ire_kappa": ("kappa", ".3g"),
    "tvlars_phi": ("phi", ".3g"),
    "train_accuracy_wrong_labels": ("wrong labels learned", ".1%"),
}
#: Not shown with metrics: how fast evaluation was, and what the lines of training show.
LEFT_OUT = ("runtime", "per_second", "epoch", "total_flos", "input_tokens_seen", "evaluated_examples")
SHARES = ("accuracy", "error")


def has_bars(args: TrainingArguments) -> bool:
    """Whether to draw progress bars: not into a file."""
    return not args.disable_tqdm and sys.stderr.isatty()


def talk(trainer: GRTrainer, model: str | None, data: str) -> None:
    """Let `trainer` print the run in the way of this module, instead of that of transformers."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Console(trainer, model, data))


def metrics_line(metrics: dict[str, Any]) -> str:
    """`loss 1.996  error 2.50 %` of the metrics of an evaluation or of training."""
    shown = {}
    for key, value in metrics.items():
        name = key.partition("_")[2] if key.startswith(("eval_", "test_", "train_")) else key
        if not key.endswith(LEFT_OUT) and isinstance(value, int | float):
            shown[name] = _as_text(name, value)
    return "  ".join(f"{name} {value}" for name, value in shown.items())


def _as_text(name: str, value: float) -> str:
    if name.endswith(SHARES):
        return f"{100 * value:.2f} %"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"


class Begin(NamedTuple):
    """The state as training begins; a resumed run has steps and passes already."""

    step: int
    passes: float
    training_seconds: float
    seconds: float


class Console(ProgressCallback):
    """Prints the run of a script.

    Args:
        model: the name of its preset or checkpoint, if it has one.
        data: a few words on the data.
    """

    def __init__(self, trainer: GRTrainer, model: str | None, data: str):
        super().__init__()
        self._trainer, self._model, self._data = trainer, model, data
        self._planned: list[float] = []
        self._begin = Begin(0, 0.0, 0.0, 0.0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._planned = self._trainer.planned_passes()
        self._begin = Begin(state.global_step, *self._costs(), time.perf_counter())
        if not state.is_world_process_zero:
            return
        facts = model_facts(self._trainer.model, has_processor=True)
        is_whole = facts.trainable_parameters == facts.parameters
        trained = "" if is_whole else f", {facts.trainable_parameters:,} of them trained"
        name = f"{self._model}, " if self._model else ""
        print(f"Model: {name}{facts.class_name} with {facts.parameters:,} parameters{trained}.")
        print(f"Data: {self._data}.")
        print(f"Method: {self._trainer.gr_args.describe_method()}.")
        print(f"Cost: {cost_of(self._trainer, self._planned)}.", flush=True)
        self.training_bar = tqdm(
            total=sum(self._planned),
            initial=sum(self._planned[: state.global_step]),
            bar_format="{desc}|{bar}| {elapsed}, {remaining} left",
            dynamic_ncols=True,
            disable=not has_bars(args),
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.training_bar is not None:
            self.training_bar.set_description_str(f"step {state.global_step:,}/{state.max_steps:,} ", refresh=False)
            self.training_bar.update(self._planned[state.global_step - 1])

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *_: Any, **kwargs: Any
    ) -> None:
        if has_bars(args):
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        is_by_epoch = args.logging_strategy == IntervalStrategy.EPOCH
        when = f"epoch {state.epoch:<4.4g}" if is_by_epoch else f"step {state.global_step:<7,}"
        if "loss" in logs:
            self._print(f"{when} {self._training_line(logs)}  {self._time(state)}")
        elif any(key.startswith("eval_") for key in logs):
            self._print(f"{when} eval  {metrics_line({k: v for k, v in logs.items() if k.startswith('eval_')})}")

    def _print(self, line: str) -> None:
        tqdm.write(line)  # above the bar
        sys.stdout.flush()

    def _training_line(self, logs: dict[str, Any]) -> str:
        skipped = ("grad_norm",) if "gr_grad_norm" in logs else ()  # that of the combined gradient
        return "  ".join(
            f"{label} {logs[key]:{form}}"
            for key, (label, form) in TRAINING.items()
            if isinstance(logs.get(key), int | float) and key not in skipped
        )

    def _costs(self) -> tuple[float, float]:
        costs = self._trainer.recorder
        return costs.passes, costs.seconds

    def _time(self, state: TrainerState) -> str:
        elapsed = time.perf_counter() - self._begin.seconds
        left = self._seconds_left(state, elapsed)
        clock = tqdm.format_interval
        return f"{clock(elapsed)}, {clock(left)} left" if state.global_step < state.max_steps else clock(elapsed)

    def _seconds_left(self, state: TrainerState, elapsed: float) -> float:
        """Training by the passes that are left; evaluations and checkpoints by the steps."""
        passes, training = (now - then for now, then in zip(self._costs(), self._begin[1:3], strict=True))
        steps = state.global_step - self._begin.step
        if not (passes and steps):
            return 0.0
        return training / passes * sum(self._planned[state.global_step :]) + (elapsed - training) / steps * (
            state.max_steps - state.global_step
        )


def cost_of(trainer: GRTrainer, planned: list[float]) -> str:
    """What the method costs: its passes, by the plan that the trainer counts by, against those without it."""
    flags, steps, total = trainer.gr_args, len(planned), sum(planned)
    parts = []
    if flags.is_active:
        first = next((step for step in range(steps) if trainer.gr.strength(step).is_active), steps)
        parts.append(f"GR at r = {flags.gr_r:g} from step {first + 1:,} of {steps:,}")
    if trainer.ire_optimizer is not None:
        parts.append(f"IRE at kappa = {flags.ire_kappa:g} from step {trainer.ire.start_step(steps) + 1:,} of {steps:,}")
    if not parts:
        return f"{steps:,} steps of one pass each"
    them = "them" if len(parts) > 1 else "it"
    compared = f"{total / steps:.3g} times those of" if total > steps else "as many as"
    return f"{', '.join(parts)}: {total:,.10g} passes, {compared} training without {them}"
