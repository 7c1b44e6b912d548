"""A step whose gradient is not finite changes nothing, and a run of them ends with an error that says where."""

import math
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .gradient_regularization import gradient_norm
from .optimizer_training import trainable_parameters

if TYPE_CHECKING:
    from .trainer import GRMixin

logger = get_logger(__name__)
#: So many steps in a row are no accident.
PATIENCE = 3


class NonFiniteGuard(TrainerCallback):
    """Skips the steps of a run with GR or IRE whose gradient is infinite or NaN, and stops after `PATIENCE` in a row
    unless `gr_on_nonfinite="skip"`.

    What it looks at is the gradient of all processes, as the optimizer would get it: they decide alike. With a gradient
    scaler (fp16), which skips such steps itself and may well do so until its scale fits, those count that it skips at a
    scale below 1.
    """

    def __init__(self, trainer: "GRMixin"):
        self._trainer = trainer
        self._in_a_row = 0
        self.skipped_steps = 0

    def _is_active(self) -> bool:
        return self._trainer.gr_args.gr_degree != 0 or self._trainer.ire_optimizer is not None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        self._in_a_row = self.skipped_steps = 0
        if not self._is_active() and self._trainer.gr_args.gr_on_nonfinite != "stop":
            logger.warning("gr_on_nonfinite: no effect with gr_lambda=0 and without IRE.")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._trainer.accelerator.scaler is not None or not self._is_active():
            return
        params = trainable_parameters(self._trainer.optimizer)
        if math.isfinite(gradient_norm(params)):
            self._in_a_row = 0
            return
        for p in params:  # optimizers leave out what has no gradient
            p.grad = None
        self._trainer.recorder.segment.skipped_steps += 1
        self._skip(state.global_step + 1)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        accelerator = self._trainer.accelerator
        if accelerator.scaler is None or not self._is_active():
            return
        if not accelerator.optimizer_step_was_skipped:
            self._in_a_row = 0
        elif accelerator.scaler.get_scale() < 1:
            self._skip(state.global_step + 1)

    def _skip(self, step: int) -> None:
        self._in_a_row += 1
        self.skipped_steps += 1
        if self._trainer.gr_args.gr_on_nonfinite == "stop" and self._in_a_row >= PATIENCE:
            first = step - self._in_a_row + 1
            raise FloatingPointError(
                f"The gradients of steps {first} to {step} are not finite. The model has the weights of step "
                f"{first - 1}, and checkpoints up to that step are good. Look at the examples of these steps, lower "
                "learning_rate or gr_r, or prefer --bf16 to --fp16; with gr_on_nonfinite=skip such steps are left out "
                "for as long as they come."
            )
        logger.warning(f"Step {step}: the gradient is not finite. The step is skipped, the weights stay as they are.")
