"""What the papers' explanations are about, logged while a run trains and without changing it.

Every `gr_diagnostics_steps` optimizer steps, one log entry with

- `adaptive_lr_spread` and `adaptive_lr_change`: of the adaptive learning rates of Adam and RMSprop, over all
  coordinates; see `hf_gr.analysis.second_moments`. The change is that of this one step.
- `gr_cosine`: the cosine of g1 and g2, in a regularized step of two passes with `gr_scope=global`.

And at the end of each epoch `grad_norm_epoch_mean`, the mean of ||g1|| over its steps, with and without GR: Figures 2
and 4 of the GR paper. (Steps that a gradient scaler skips are left out, and those of an ascent of one pass, which has
no g1. After resuming within an epoch, the mean is over the rest of it.)
"""

import math
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..analysis.second_moments import log_rates, statistics_of, sums_of
from ..optim.ascents import as_float
from .layerwise import innermost, trainable_parameters
from .part import Host, Part


class Diagnostics(Part, TrainerCallback):
    """Collects them. The other parts report what they alone know: `first_norm` and `cosine`.

    Attributes:
        first_norm: ||g1|| of the step under way, if it is a regularized one; NaN if that has no g1.
        cosine: the cosine of its g1 and g2, if known.
    """

    def __init__(self, trainer: Host):
        super().__init__(trainer)
        self.first_norm: float | None = None
        self.cosine: float | None = None
        self._earlier: list[Tensor] | None = None
        self._norms: list[float] = []

    def check(self) -> None:
        if self._flags.gr_diagnostics_steps:
            self._trainer.add_callback(self)

    @property
    def is_due(self) -> bool:
        """Whether the step under way is one of those that are looked at."""
        steps = self._flags.gr_diagnostics_steps
        return steps > 0 and (self._trainer.state.global_step + 1) % steps == 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._forget_step()
        self._norms.clear()

    def _forget_step(self) -> None:
        self.first_norm = self.cosine = self._earlier = None

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        norm = self._trainer.nonfinite_guard.norm_before_clipping if self.first_norm is None else self.first_norm
        if norm is not None and math.isfinite(norm := as_float(norm)):
            self._norms.append(norm)
        if self.is_due:
            self._earlier = self._log_rates()

    def _log_rates(self) -> list[Tensor]:
        return log_rates(innermost(self._trainer.optimizer), trainable_parameters(self._trainer.optimizer))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._earlier is not None and not self._trainer.accelerator.optimizer_step_was_skipped:
            sums = sums_of(self._log_rates(), self._earlier if any(map(len, self._earlier)) else None)
            found = statistics_of(self._trainer.accelerator.reduce(sums.to(args.device), "sum"))
            if self.cosine is not None:
                found["gr_cosine"] = self.cosine
            self._log(control, found)
        self._forget_step()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._norms:
            self._log(control, {"grad_norm_epoch_mean": sum(self._norms) / len(self._norms)})
        self._norms.clear()

    def _log(self, control: TrainerControl, found: dict[str, float]) -> None:
        """Log an entry of its own. To `Trainer`, any entry is the one that is due, and it would skip the loss."""
        is_loss_due = control.should_log
        if found:
            self._trainer.log(found)
        control.should_log = is_loss_due
