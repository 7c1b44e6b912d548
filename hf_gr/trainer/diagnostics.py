"""What the papers' explanations are about, logged while a run trains and without changing it.

Every `gr_diagnostics_steps` optimizer steps, one log entry with

- `adaptive_lr_spread` and `adaptive_lr_change`: of the adaptive learning rates of Adam and RMSprop, over all
  coordinates; see `hf_gr.analysis.second_moments`. The change is that of this one step.
- `gr_cosine`: the cosine of g1 and g2, in a regularized step of two passes with `gr_scope=global`.

Every tenth time, for Adam, AdamW and RMSprop without IRE, another entry, which costs some fifty passes:

- `preconditioned_sharpness`: the largest eigenvalue of P^-1 H on the batch of the step, after it and in evaluation
  mode, with P = sqrt(v') + eps;
- `stability_threshold`: (2 + 2 beta1) / ((1 - beta1) lr), 38/lr for beta1 = 0.9, with the learning rate of the next
  step. Above it Adam with constant P diverges on a quadratic; full-batch training stays near it ("Adaptive Gradient
  Methods at the Edge of Stability", Cohen et al., 2022, arXiv:2207.14484).

And at the end of each epoch `grad_norm_epoch_mean`, the mean of ||g1|| over its steps, with and without GR: Figures 2
and 4 of the GR paper. (Steps that a gradient scaler skips are left out, and those of an ascent of one pass, which has
no g1. After resuming within an epoch, the mean is over the rest of it.)
"""

import copy
import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, RMSprop
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..analysis.second_moments import log_rates, preconditioner, statistics_of, sums_of
from ..errors import extra
from ..optim.ascents import as_float
from ..optim.gradient_regularization import HALF_PRECISION
from .layerwise import trainable_parameters
from .part import Host, Part, innermost, log_entry
from .sharpness import measure_sharpness

#: Diagnosed steps per measurement of the preconditioned sharpness.
STEPS_PER_SHARPNESS = 10


def _stability(optimizer: Any) -> float | None:
    """The largest stable eigenvalue of P^-1 H; None for an optimizer without one, and at learning rate 0."""
    group = optimizer.param_groups[0]
    if isinstance(optimizer, Adam | AdamW):
        beta1 = float(group["betas"][0])
    elif isinstance(optimizer, RMSprop) and group["momentum"] == 0:
        beta1 = 0.0
    else:
        return None
    rate = float(group["lr"])
    return (2 + 2 * beta1) / ((1 - beta1) * rate) if rate > 0 else None


def _generates(trainer: Host) -> bool:
    """Whether preparing a batch generates text, as in trl's trainers for reinforcement learning."""
    return type(trainer)._prepare_inputs.__module__.startswith("trl.")


class Diagnostics(Part, TrainerCallback):
    """Collects them. The other parts report what they alone know: `first_norm` and `cosine`.

    Attributes:
        first_norm: ||g1|| of the step under way, if it is a regularized one; NaN if that has no g1.
        cosine: the cosine of its g1 and g2, if known.
    """

    def __init__(self, trainer: Host):
        super().__init__(trainer)
        self.first_norm: Tensor | float | None = None
        self.cosine: float | None = None
        self._earlier: list[Tensor] | None = None
        self._batches: list[dict[str, Any]] = []
        self._norms: list[float] = []

    def check(self) -> None:
        if self._flags.gr_diagnostics_steps:
            with extra("analysis"):  # before training, not in the step that needs it
                import scipy.sparse.linalg  # noqa: F401
            self._trainer.add_callback(self)

    @property
    def is_due(self) -> bool:
        """Whether the step under way is one of those that are looked at."""
        steps = self._flags.gr_diagnostics_steps
        return steps > 0 and (self._trainer.state.global_step + 1) % steps == 0

    @property
    def _is_sharpness_due(self) -> bool:
        return (
            self.is_due
            and (self._trainer.state.global_step + 1) % (STEPS_PER_SHARPNESS * self._flags.gr_diagnostics_steps) == 0
            and not _generates(self._trainer)
            and self._trainer.ire_optimizer is None
            and _stability(innermost(self._trainer.optimizer)) is not None
        )

    def see(self, inputs: dict[str, Any]) -> None:
        """The inputs of a micro-batch of the step under way."""
        if self._is_sharpness_due:
            self._batches.append(copy.copy(inputs))

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._forget_step()
        self._norms.clear()

    def _forget_step(self) -> None:
        self.first_norm = self.cosine = self._earlier = None
        self._batches = []

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        norm = self._trainer.nonfinite_guard.norm_before_clipping if self.first_norm is None else self.first_norm
        if norm is not None and math.isfinite(value := as_float(norm)):
            self._norms.append(value)
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
            log_entry(self._trainer, control, found)
            if self._batches:
                log_entry(self._trainer, control, self._sharpness())
        self._forget_step()

    def _sharpness(self) -> dict[str, float]:
        trainer, optimizer = self._trainer, innermost(self._trainer.optimizer)
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        # A parameter that the loss does not use has no state, and nothing in H.
        known = zip(trained, preconditioner(optimizer, trained), strict=True)
        denominators, stability = [torch.ones_like(p) if v is None else v for p, v in known], _stability(optimizer)
        is_half = any(p.dtype in HALF_PRECISION for p in trained)  # in which curvature is lost to rounding
        if stability is None or is_half:
            return {}
        batches = [trainer._prepare_inputs(batch) for batch in self._batches]
        options = {"preconditioner": denominators, "tolerance": 0.02, "max_products": 100}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "top_hessian_eigenvalue: no convergence")
            top = measure_sharpness(trainer, batches, ("top",), options={"top": options})["top"].value
        return {"preconditioned_sharpness": top, "stability_threshold": stability} if math.isfinite(top) else {}

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._norms:
            log_entry(self._trainer, control, {"grad_norm_epoch_mean": sum(self._norms) / len(self._norms)})
        self._norms.clear()
