"""Guards against runs that go wrong.

A step with a non-finite gradient changes nothing, and several in a row raise an error that names them; non-finite
weights are never saved in a checkpoint. If training diverges under IRE, kappa is halved.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.logging import get_logger
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..optim.ascents import as_tensor, whole
from ..optim.gradient_regularization import are_finite, gradient_norm
from ..optim.ire import IRE
from .layerwise import trainable_parameters
from .part import Host, Part, innermost
from .recording import Recorder

logger = get_logger(__name__)
#: Consecutive non-finite steps after which training stops.
PATIENCE = 3
#: Steps that may wait to be read in a run that logs rarely or never.
MOST_UNREAD = 500
#: Weight of the newest loss in the running mean, which spans about 50 steps.
WEIGHT = 0.02


class Unread:
    """Numbers of steps that wait on the device until the host reads all of them in one transfer."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, torch.Tensor]] = []

    def add(self, step: int, *numbers: torch.Tensor) -> None:
        self._steps.append((step, torch.stack([number.float() for number in numbers])))

    def read(self) -> list[tuple[int, list[float]]]:
        """The numbers of each step since the last call."""
        if not self._steps:
            return []
        steps, numbers = zip(*self._steps, strict=True)
        self._steps.clear()
        return list(zip(steps, torch.stack(numbers).tolist(), strict=True))

    def clear(self) -> None:
        self._steps.clear()

    @property
    def is_full(self) -> bool:
        """Whether it is time to read them, whatever is logged."""
        return len(self._steps) >= MOST_UNREAD


class NonFiniteGuard(Part, TrainerCallback):
    """In a run with GR or IRE, skips steps whose gradient is infinite or NaN, and stops after `PATIENCE` in a row
    unless `gr_on_nonfinite="skip"`.

    It checks the reduced gradient that the optimizer would use, so all processes decide alike. A gradient scaler (fp16)
    skips such steps itself, and often does until its scale fits: only those it skips at a scale below 1 count.

    On a CPU it sees such a step at once. A GPU would have to wait at each step for the host to look. There the fused
    optimizers of torch skip the step themselves, and the guard looks at the steps that are logged or saved, and at
    least every `MOST_UNREAD`: it stops the run if the last `PATIENCE` steps before that were skipped. Other optimizers
    cannot skip, and are looked after at each step.

    Attributes:
        looks_at_once: whether it looks at each step; by default, on a CPU.
        norm_before_clipping: the gradient norm of this step, if known. If it overflows, clipping makes the gradient 0,
            which looks finite.
        skipped_steps: the number of skipped steps.
    """

    def __init__(self, trainer: Host, recorder: Recorder):
        super().__init__(trainer)
        self._recorder = recorder
        self._in_a_row = self._last_skipped = 0
        self._finite_after = 0  # the last step after which the weights were checked and finite
        self._unread = Unread()  # whether the gradients of steps are finite
        self.looks_at_once = True
        self.norm_before_clipping: torch.Tensor | float | None = None
        self.skipped_steps = 0

    def check(self) -> None:
        self._trainer.add_callback(self)
        self.looks_at_once = self._trainer.args.device.type == "cpu"

    def _is_active(self) -> bool:
        return self._flags.is_active or self._trainer.ire_optimizer is not None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        self._in_a_row = self.skipped_steps = 0
        self._unread.clear()
        self._finite_after = state.global_step
        self.require_finite_weights()
        if not self._is_active() and self._flags.gr_on_nonfinite != "stop":
            logger.warning("gr_on_nonfinite: no effect with gr_lambda=0 and without IRE.")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._trainer.accelerator.scaler is not None or not self._is_active():
            return
        params = trainable_parameters(self._trainer.optimizer)
        is_finite = gradient_norm(params).isfinite()
        if self.norm_before_clipping is not None:
            is_finite &= whole(as_tensor(self.norm_before_clipping)).isfinite().to(is_finite.device)
        self._unread.add(state.global_step + 1, is_finite)
        if not self.looks_at_once and (fused := self._skipping_optimizer()) is not None:
            fused.grad_scale, fused.found_inf = None, (~is_finite).float()  # as a gradient scaler does
        elif not is_finite:
            for p in params:  # optimizers skip parameters without a gradient
                p.grad = None
        if self.looks_at_once:
            self.look()

    def _skipping_optimizer(self) -> Any:
        """The optimizer, if it can skip a step without the host; else None."""
        ire = self._trainer.ire_optimizer
        optimizer = innermost(self._trainer.optimizer)
        # IRE subtracts the decay of a step that it takes to be made.
        is_amplified_whole = ire is None or ire.amplify_weight_decay
        return optimizer if is_amplified_whole and getattr(optimizer, "_step_supports_amp_scaling", False) else None

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        accelerator = self._trainer.accelerator
        if accelerator.scaler is None or not self._is_active():
            vars(innermost(self._trainer.optimizer)).pop("found_inf", None)
            return
        if not accelerator.optimizer_step_was_skipped:
            self._in_a_row = 0
        elif accelerator.scaler.get_scale() < 1:
            self._skip(state.global_step + 1)
            self._stop()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        is_seen = control.should_log or control.should_save or control.should_evaluate or control.should_training_stop
        if is_seen or self._unread.is_full:
            self.look()

    def look(self) -> None:
        """Read which of the steps since the last call were skipped, and stop the run if it has to be."""
        for step, (is_finite,) in self._unread.read():
            if is_finite:
                self._in_a_row = 0
            else:
                self._recorder.segment.skipped_steps += 1
                self._skip(step)
        self._stop()

    def _skip(self, step: int) -> None:
        self._in_a_row += 1
        self._last_skipped = step
        self.skipped_steps += 1
        logger.warning(f"Step {step}: the gradient is not finite. The step is skipped, the weights stay as they are.")

    def _stop(self) -> None:
        """Raise `FloatingPointError` if weights that are not finite caused the last skips, or if these are too many."""
        if self._in_a_row == 0:
            return
        first = self._last_skipped - self._in_a_row + 1
        if self._finite_after < first - 1:
            self.require_finite_weights(done=first - 1)
        if self._flags.gr_on_nonfinite == "stop" and self._in_a_row >= PATIENCE:
            raise FloatingPointError(
                f"The gradients of steps {first} to {self._last_skipped} are not finite. The model has the weights of "
                f"step {first - 1}, and checkpoints up to that step are good. Look at the examples of these steps, "
                "lower learning_rate or gr_r, or prefer --bf16 to --fp16; with gr_on_nonfinite=skip any number of such "
                "steps is skipped."
            )

    def require_finite_weights(self, done: int | None = None) -> None:
        """Raise `FloatingPointError` on all processes if a trainable weight is not finite after `done` steps.

        Without GR and IRE it only warns, as `Trainer` would continue.
        """
        trainer = self._trainer
        if trainer.is_deepspeed_enabled:
            return
        done = trainer.state.global_step if done is None else done
        bad = not are_finite(trainable_parameters(trainer.optimizer))
        if trainer.accelerator.reduce(torch.tensor(float(bad), device=trainer.args.device), "sum").item() == 0:
            self._finite_after = done
            return
        if done > self._finite_after:
            message = (
                f"The weights are not finite after step {done}. After step {self._finite_after} they were, and "
                "checkpoints up to that step are good. Lower learning_rate, weight_decay or ire_kappa."
            )
        else:
            message = f"The weights are not finite before step {done + 1}. Start from other weights."
        if self._is_active():
            raise FloatingPointError(message)
        logger.warning(message)

    def require_trained(self) -> None:
        """At the end of a run, raise `FloatingPointError` unless the weights are finite and some step changed them."""
        self.look()
        self.require_finite_weights()
        steps = self._trainer.state.global_step
        if self._flags.gr_on_nonfinite == "stop" and 0 < steps == self.skipped_steps:
            raise FloatingPointError(
                f"The gradients of all {steps} steps are not finite: nothing was trained. Look at the examples and at "
                "the loss, lower gr_r, or prefer --bf16 to --fp16."
            )


class DivergenceGuard:
    """Watches the training loss and halves the `kappa_scale` of an `IRE` when training diverges.

    Its numbers stay on the device. They are saved and loaded with the optimizer's, as `state_dict["ire"]["losses"]`, so
    that a resumed run decides as an uninterrupted one would.

    Args:
        ire: the optimizer; the guard registers hooks on its `state_dict` and `load_state_dict`.
    """

    def __init__(self, ire: IRE):
        self.ire = ire
        self._losses = _Losses()
        ire.register_state_dict_post_hook(self._save, prepend=True)
        ire.register_load_state_dict_pre_hook(self._load)

    def observe(self, loss: torch.Tensor | float, factor: float = 3.0, cooldown: int = 10) -> torch.Tensor:
        """Record the loss of a step, and halve kappa if training diverges.

        It diverges if the loss is not finite, or exceeds both `factor` times its running mean and the mean at which
        IRE started. After a halving, the next `cooldown` steps cannot cause another.

        Returns whether kappa was halved, as a tensor.
        """
        loss = as_tensor(loss)
        mean, count, start, wait = self._losses.on_device_of(loss)
        is_acting = self.ire.is_acting
        if isinstance(is_acting, torch.Tensor):
            is_acting = is_acting.to(loss.device)
        start = torch.where(start.isnan() & (count > 0) & is_acting, mean, start)
        wait = (wait - 1).clamp(min=0)
        # The small loss of a nearly converged model can jump by `factor` from batch to batch. Only a loss that also
        # exceeds the level at which IRE started counts.
        is_high = ~loss.isfinite() | ((loss > start) & (loss - mean > (factor - 1) * mean.abs()))
        count = count + ~is_high
        mean = torch.where(is_high, mean, mean + (loss - mean) * (1 / count).clamp(min=WEIGHT))
        is_halved = is_high & (wait == 0) & is_acting
        wait = torch.where(is_halved, cooldown, wait)
        self._losses = _Losses(mean, count, start, wait)
        self.ire.kappa_scale = self.ire.kappa_scale * torch.where(is_halved, 0.5, 1.0)
        return is_halved

    def _save(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict["ire"]["losses"] = self._losses.state()

    def _load(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        self._losses = _Losses.of(state_dict.get("ire", {}).get("losses", {}))


@dataclass(frozen=True)
class _Losses:
    """A summary of the losses so far, saved in checkpoints under these names."""

    mean: torch.Tensor | float = 0.0
    count: torch.Tensor | float = 0
    mean_at_start: torch.Tensor | float = math.nan  # the mean when IRE started
    wait: torch.Tensor | float = 0  # steps until kappa may be halved again

    def on_device_of(self, loss: torch.Tensor) -> list[torch.Tensor]:
        return [torch.as_tensor(value, dtype=loss.dtype, device=loss.device) for value in vars(self).values()]

    def state(self) -> dict[str, float | None]:
        mean, count, start, wait = map(float, vars(self).values())
        return {
            "mean": mean,
            "count": int(count),
            "mean_at_start": None if math.isnan(start) else start,
            "wait": int(wait),
        }

    @classmethod
    def of(cls, state: dict[str, float | None]) -> "_Losses":
        return cls(**{name: math.nan if value is None else value for name, value in state.items()})
