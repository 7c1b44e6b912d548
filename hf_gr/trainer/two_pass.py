"""Gradient regularization in a trainer: the first pass, and the second at the end of a step.

One optimizer step, with gradient accumulation over a window of micro-batches:

1. (lambda_t, r_t) follow from `state.global_step`. If either is 0, the step is a plain one.
2. Each micro-batch runs as usual and is recorded: references to its inputs, and the state of the random generators.
3. After the last one, `.grad` holds g1 of the whole step. theta is perturbed, the recorded window is replayed, theta
   is restored, and `.grad` holds (1 - lambda/r) g1 + (lambda/r) g2. All of this happens inside `training_step`, so
   `Trainer` then clips and steps as usual.

An ascent that does not need g1 (`momentum`) takes one pass: each micro-batch runs at the perturbed weights, and theta
is restored after it; with `gr_momentum_r` so do the steps between regularized ones. With `gr_reuse` these add what the
last second gradient added.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from transformers.trainer_utils import IntervalStrategy

from ..optim.ascents import ASCENTS, first_moment
from ..optim.gr_warmup import GRStrength
from ..optim.gradient_regularization import (
    HALF_PRECISION,
    Perturbation,
    add_gradients_,
    clip_factor,
    gradient_cosine,
    gradient_norm,
    gradients_set_aside,
    has_direction,
    in_float32,
    scale_gradients_,
)
from ..optim.gradient_reuse import GradientReuse
from ..optim.pass_state import RNGState, preserve_buffers
from ..optim.radius_rules import RADIUS_RULES
from .compatibility import refuse_unsupported
from .diagnostics import Diagnostics
from .functional import FunctionalPass
from .gauge import Gauge
from .layerwise import trainable_parameters
from .part import Host, Part, innermost
from .recording import Recorder
from .replay import MicroBatch, attributes_set_aside, prepare_inputs_replaced

#: The file of a checkpoint with the state of `gr_reuse`.
REUSE_STATE = "gr_reuse.pt"

logger = get_logger(__name__)  # logs once, not once per process


class TwoPass(Part):
    """The update rule of gradient regularization around a trainer's plain step."""

    def __init__(self, trainer: Host, recorder: Recorder, diagnostics: Diagnostics):
        super().__init__(trainer)
        self._recorder = recorder
        self._diagnostics = diagnostics
        self._window: list[MicroBatch] = []
        self._perturbation: Perturbation | None = None
        self._reuse: GradientReuse | None = None
        self._scratch: dict[int, Tensor] = {}  # of the perturbations
        self._norms: list[Tensor] = []
        self._logs: dict[str, Tensor | float] = {}
        self._name_of_norm = "gr_grad_norm"  # of the one gradient of a step of one pass
        self._gauge = Gauge(trainer)
        self._functional = FunctionalPass(trainer)

    def check(self) -> None:
        if self._flags.is_active:
            refuse_unsupported(self._trainer, "gr_lambda")
            self._functional.check()
        trains_half = any(p.requires_grad and p.dtype in HALF_PRECISION for p in self._trainer.model.parameters())
        if self._flags.gr_half_precision_weights and not (self._flags.is_active and trains_half):
            logger.warning("gr_half_precision_weights: no effect without GR, or without such weights to train.")

    # ---- Schedule ----

    def warmup_steps(self, num_training_steps: int) -> int:
        """T_w of a run of `num_training_steps` optimizer steps."""
        return self._flags.get_gr_warmup_steps(
            self._trainer.args.get_warmup_steps(num_training_steps), num_training_steps
        )

    def strength(self, step: int | None = None) -> GRStrength:
        """(lambda_t, r_t) of the step that follows `step` completed ones; by default, of the current one."""
        return self._at(step)[0]

    def passes(self, step: int | None = None) -> int:
        """Forward and backward passes of that step."""
        gr, ascent = self._at(step)
        return ASCENTS[ascent].passes if gr.is_active else 1

    def _at(self, step: int | None = None) -> tuple[GRStrength, str]:
        state = self._trainer.state
        step = state.global_step if step is None else step
        return self._flags.gr_at(step, self.warmup_steps(state.max_steps))

    def plan(self, num_training_steps: int) -> None:
        gr, args = self._flags, self._trainer.args
        gr.check_gr_arguments()
        if not gr.is_active:
            return
        warmup_steps = self.warmup_steps(num_training_steps)
        if gr.gr_warmup != "none":
            self._check_warmup_steps(warmup_steps, num_training_steps)
        self.warn_of_unused_flags("gr_")
        shards = args.world_size * (args.gradient_accumulation_steps if gr.gr_scope == "micro" else 1)
        if gr.gr_scope != "global" and shards == 1:
            logger.warning(f"gr_scope='{gr.gr_scope}' is the same as 'global' here: there is nothing to divide.")
        logger.info(
            f"  Gradient regularization: r = {gr.gr_r}, lambda = {gr.gr_degree}, warmup '{gr.gr_warmup}' over "
            f"{warmup_steps} of {num_training_steps} steps"
        )

    def _check_warmup_steps(self, warmup_steps: int, num_training_steps: int) -> None:
        gr = self._flags
        if warmup_steps == 0:
            logger.warning(
                f"gr_warmup='{gr.gr_warmup}' has no effect, because the learning-rate warmup that it follows has no "
                "steps: GR acts at full strength from the first step. Set warmup_steps or gr_warmup_steps, or "
                "gr_warmup='none'."
                if gr.gr_warmup_steps is None
                else f"gr_warmup='{gr.gr_warmup}' has no effect with gr_warmup_steps={gr.gr_warmup_steps}."
            )
        # With zero-warmup, a warmup of exactly the whole run also leaves no step for GR.
        elif warmup_steps + (gr.gr_warmup == "zero") > num_training_steps:
            never = "GR would never act" if gr.gr_warmup == "zero" else "GR would never reach its full strength"
            if gr.gr_warmup_steps is not None:
                raise ValueError(
                    f"gr_warmup_steps={gr.gr_warmup_steps} is {warmup_steps} steps, as long as the whole run of "
                    f"{num_training_steps} or longer: with gr_warmup='{gr.gr_warmup}' {never}. Make it shorter, or "
                    "train longer."
                )
            logger.warning(
                f"The learning-rate warmup of {warmup_steps} steps, which gr_warmup='{gr.gr_warmup}' follows, is as "
                f"long as the whole run of {num_training_steps} or longer: {never}. Set gr_warmup_steps."
            )

    # ---- One step ----

    def step(
        self,
        one_pass: Callable[..., Tensor],
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        """Run `one_pass`, the trainer's own `training_step`; at the end of an accumulation window, the second pass."""
        gr, ascent = self._at()
        takes_one_pass = ASCENTS[ascent].passes == 1
        if self._follows_momentum() and not self._has_moments(model) and takes_one_pass:
            gr = GRStrength(0.0, gr.r_t)
        self._name_of_norm = "gr_perturbed_grad_norm" if gr.is_active and takes_one_pass else "gr_grad_norm"
        if not gr.is_active:
            self._logs = {"gr_lambda": gr.lambda_t, "gr_r": gr.r_t} if self._flags.is_active else {}
            loss = one_pass(model, inputs, num_items_in_batch)
            self._add_reused(model)
            return loss
        try:
            if takes_one_pass:
                return self._perturbed_step(one_pass, model, inputs, num_items_in_batch, gr, ascent)
            return self._regularized_step(one_pass, model, inputs, num_items_in_batch, gr)
        except BaseException:
            self.reset()
            raise

    def _follows_momentum(self) -> bool:
        return self._flags.is_active and (self._flags.gr_passes == 1 or self._flags.gr_momentum_r != 0)

    def _has_moments(self, model: nn.Module) -> bool:
        """Whether there is a momentum to follow. Raises `ValueError` if the optimizer, having stepped, keeps none."""
        optimizer = innermost(self._trainer.optimizer)
        if optimizer is None:
            return False
        if any(first_moment(optimizer, p) is not None for p in self._parameters(model)):
            return True
        if self._recorder.segment.steps > self._recorder.segment.skipped_steps:
            gr = self._flags
            flag, instead = ("gr_ascent", "gradient") if gr.gr_passes == 1 else ("gr_momentum_r", "0")
            raise ValueError(
                f"{flag}={getattr(gr, flag)!r}: {type(optimizer).__name__} as it is set keeps no first moment to "
                f"follow. Use an optimizer with momentum, such as adamw_torch, or {flag}={instead}."
            )
        return False

    def _perturbed_step(
        self,
        one_pass: Callable[..., Tensor],
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None,
        gr: GRStrength,
        ascent: str,
    ) -> Tensor:
        """One micro-batch at theta + r d, of which only the gradient remains. Its inputs are prepared at theta."""
        params, optimizer = self._parameters(model), innermost(self._trainer.optimizer)
        perturbation = self._perturbation = Perturbation(params, ascent, optimizer, self._scratch)
        prepare = self._trainer._prepare_inputs
        is_prepared = False

        def prepare_at_theta(inputs: Any) -> Any:
            nonlocal is_prepared
            perturbation.restore()
            prepared, is_prepared = prepare(inputs), True
            perturbation.apply(gr.r_t)
            return prepared

        try:
            with prepare_inputs_replaced(self._trainer, prepare_at_theta):
                loss = one_pass(model, inputs, num_items_in_batch)
        finally:
            perturbation.restore()
        if not is_prepared:
            raise ValueError(
                f"gr_ascent={ascent!r}: {type(self._trainer).__name__} has a training_step that does not call "
                "_prepare_inputs, where the weights are perturbed. Call it there, or use gr_ascent=gradient."
            )
        self._logs = {"gr_lambda": gr.lambda_t, "gr_r": gr.r_t}
        self._diagnostics.first_norm = math.nan
        if self._trainer.accelerator.sync_gradients:
            segment = self._recorder.segment
            if ascent == self._flags.gr_ascent:
                segment.regularized_steps += 1
            else:
                segment.momentum_steps += 1
        return loss

    def _add_reused(self, model: nn.Module) -> None:
        """In a plain step with `gr_reuse`: add what the second gradient of the last regularized step added."""
        if self._reuse is None or not self._reuse.has_kept or not self._trainer.accelerator.sync_gradients:
            return
        params = self._parameters(model)
        with in_float32(params):
            norm = gradient_norm(params)
            self._reuse.add_(self._flags.gr_reuse * self._flags.gr_degree / self._flags.gr_r, norm)
        self._recorder.count("reused_steps", self._reuse.is_ready & norm.isfinite())

    def _regularized_step(
        self,
        one_pass: Callable[..., Tensor],
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None,
        gr: GRStrength,
    ) -> Tensor:
        trainer, accelerator, scope = self._trainer, self._trainer.accelerator, self._flags.gr_scope
        ends_window = accelerator.sync_gradients
        params = self._parameters(model)
        earlier_grads = None
        if scope == "micro":  # the direction is of this micro-batch alone: earlier gradients are set aside
            earlier_grads = [p.grad for p in params]
            for p in params:
                p.grad = None

        micro_batch = MicroBatch(
            copy.copy(inputs),
            num_items_in_batch,
            trainer.current_gradient_accumulation_steps,
            RNGState.capture(trainer.args.device),
        )
        self._window.append(micro_batch)
        synchronized = nullcontext() if scope == "global" else accelerator.no_sync(model)
        with synchronized, micro_batch.recorded(trainer), self._functional.first(model):
            loss = one_pass(model, inputs, num_items_in_batch)
        self._gauge.add_loss(-loss)

        if ends_window or scope == "micro":
            # Parameters that the optimizer does not train keep their first-pass gradients, which clipping counts.
            trained = set(params)
            untrained = [p for p in model.parameters() if p.grad is not None and p not in trained]
            with in_float32([*params, *untrained]), gradients_set_aside(untrained):
                self._second_pass(one_pass, model, params, earlier_grads, gr, ends_window)
            self._window.clear()
            self._functional.forget()
        return loss

    def _parameters(self, model: nn.Module) -> list[Tensor]:
        """The parameters the optimizer trains; before it is created, all trainable ones of the model."""
        if self._trainer.optimizer is None:
            return [p for p in model.parameters() if p.requires_grad]
        return trainable_parameters(self._trainer.optimizer)

    def _second_pass(
        self,
        one_pass: Callable[..., Tensor],
        model: nn.Module,
        params: list[Tensor],
        earlier_grads: list[Tensor | None] | None,
        gr: GRStrength,
        ends_window: bool,
    ) -> None:
        """Turn the g1 in `.grad` into (1 - lambda/r) g1 + (lambda/r) g2, added to `earlier_grads`."""
        norm = gradient_norm(params)
        scale = self._gradient_scale(norm)
        clip = clip_factor(norm, self._flags.gr_clip * scale) if self._flags.gr_clip else 1.0
        rule = RADIUS_RULES[self._flags.gr_radius_rule]
        points = has_direction(norm)
        radius = rule.function(gr.r_t, norm * clip / scale, self._flags.gr_r_max)
        radius = torch.where(points, radius, gr.r_t) if isinstance(radius, Tensor) else radius
        self._norms.append(norm / scale)
        self._logs = {"gr_lambda": gr.g2_weight * radius, "gr_r": radius}
        ratio = gr.grad_scale and gr.grad_scale * clip
        g2_norm = self._run_perturbed(one_pass, model, params, earlier_grads, radius, norm, ratio, scale)
        if g2_norm is not None:
            self._logs["gr_perturbed_grad_norm"] = g2_norm / scale
        if ends_window:  # until then the sum keeps the factor r/lambda
            scale_gradients_(params, gr.g2_weight)
            # Where each process has a direction of its own, the step counts whatever this one has.
            self._recorder.count("regularized_steps", points if self._flags.gr_scope == "global" else True)
            self._logs["gr_grad_norm"] = self._diagnostics.first_norm = torch.stack(self._norms).mean()
            self._norms.clear()
            self._gauge.end_step()

    def _gradient_scale(self, like: Tensor) -> Tensor | float:
        """What a gradient scaler has multiplied the gradients by."""
        scaler = self._trainer.accelerator.scaler
        return 1.0 if scaler is None else scaler.scale(torch.ones_like(like))  # `get_scale` would wait for it

    def _run_perturbed(
        self,
        one_pass: Callable[..., Tensor],
        model: nn.Module,
        params: list[Tensor],
        earlier_grads: list[Tensor | None] | None,
        radius: Tensor | float,
        norm: Tensor,
        ratio: Tensor | float,
        scale: Tensor | float,
    ) -> Tensor | None:
        """Turn the g1 in `.grad`, of this norm, into ratio g1 + g2, added to `earlier_grads`; g2 is clipped first.
        Returns ||g2||, times the scale of the gradients, or None if it is not known."""
        perturbation = self._perturbation = Perturbation(params, self._flags.gr_ascent, scratch=self._scratch)
        reuse = self._reuse_for(params)
        is_diagnosed = self._flags.gr_scope == "global" and self._diagnostics.is_due
        first = [None if p.grad is None else p.grad.clone() for p in params] if is_diagnosed else None
        try:
            if reuse is not None:
                reuse.keep_first()
            perturbation.apply(radius, norm, ratio)
            self._gauge.add_rise(radius * perturbation.slope / scale)
            if earlier_grads is not None:
                add_gradients_(params, earlier_grads)
            g2_norm = self._add_second(one_pass, model, params, self._flags.gr_clip * scale)
            if reuse is not None:
                reuse.keep_second()
            if first is not None:
                self._diagnostics.cosine = gradient_cosine(params, first, ratio)
            if g2_norm is not None or not self._is_log_due():
                return g2_norm
            if self._flags.gr_scope == "global":
                return perturbation.second_gradient_norm(ratio)
            return gradient_norm(params) if isinstance(ratio, float) and ratio == 0 else None
        finally:
            perturbation.restore()

    def _is_log_due(self) -> bool:
        """Whether the step under way may be logged."""
        args, state = self._trainer.args, self._trainer.state
        step = state.global_step + 1
        return args.logging_strategy != IntervalStrategy.STEPS or (
            step % state.logging_steps == 0 or (args.logging_first_step and step == 1)
        )

    def _add_second(
        self, one_pass: Callable[..., Tensor], model: nn.Module, params: list[Tensor], max_norm: Tensor | float
    ) -> Tensor | None:
        """Add g2 to `.grad`, clipped to `max_norm` with `gr_clip`. Returns ||g2|| as it was before, if measured."""
        if not self._flags.gr_clip:
            self._replay(one_pass, model)
            return None
        first = [p.grad for p in params]
        for p in params:
            p.grad = None
        self._replay(one_pass, model)
        norm = gradient_norm(params)
        scale_gradients_(params, clip_factor(norm, max_norm))
        add_gradients_(params, first)
        return norm

    def _reuse_for(self, params: list[Tensor]) -> GradientReuse | None:
        if self._flags.gr_reuse != 0 and self._reuse is None:
            self._reuse = GradientReuse(params)
        return self._reuse

    def _replay(self, one_pass: Callable[..., Tensor], model: nn.Module) -> None:
        """Run the recorded window again, with the same inputs, randomness and synchronization."""
        trainer, accelerator = self._trainer, self._trainer.accelerator
        *_, last = self._window
        gradient_state = accelerator.gradient_state
        after = RNGState.capture(trainer.args.device)
        accumulation_steps, sync = trainer.current_gradient_accumulation_steps, gradient_state.sync_gradients
        trainer.gr_second_pass = True
        try:
            with (
                preserve_buffers(model),
                attributes_set_aside(trainer, trainer.gr_first_pass_only),
                self._functional.second(model),
            ):
                for micro_batch in self._window:
                    is_last = micro_batch is last
                    micro_batch.rng_state.restore()
                    trainer.current_gradient_accumulation_steps = micro_batch.gradient_accumulation_steps
                    gradient_state._set_sync_gradients(is_last and sync)
                    # The context in which `Trainer` called this step decides whether the last one communicates.
                    synchronized = nullcontext() if is_last else accelerator.no_sync(model)
                    with synchronized, micro_batch.replayed(trainer):
                        loss = one_pass(model, copy.copy(micro_batch.inputs), micro_batch.num_items_in_batch)
                    self._gauge.add_loss(loss)
        finally:
            trainer.gr_second_pass = False
            trainer.current_gradient_accumulation_steps = accumulation_steps
            gradient_state._set_sync_gradients(sync)
            after.restore()

    def reset(self) -> None:
        """Forget the window and what is reused, and restore theta if an interruption left it perturbed."""
        if self._perturbation is not None:
            self._perturbation.restore()
            self._perturbation = None
        self._window.clear()
        self._scratch.clear()
        self._norms.clear()
        self._gauge.forget_step()
        self._reuse = None
        self._functional.forget()

    # ---- Around the step ----

    @contextmanager
    def unperturbed(self) -> Iterator[None]:
        """Within the context the weights are unperturbed, even in a signal handler during a second pass."""
        with nullcontext() if self._perturbation is None else self._perturbation.suspended():
            yield

    def logs(self, logs: dict[str, float]) -> dict[str, float]:
        if not self._logs:
            return {}
        norm = {self._name_of_norm: logs["grad_norm"]} if "grad_norm" in logs else {}
        return norm | {name: float(value) for name, value in self._logs.items()} | self._gauge.take()

    # ---- Checkpoints ----

    def save(self, folder: str) -> None:
        """Write what a resumed run needs to continue bitwise, besides what `Trainer` writes."""
        if self._flags.is_active and self._flags.gr_reuse != 0 and self._trainer.args.should_save:
            state = self._reuse_for(trainable_parameters(self._trainer.optimizer))
            assert state is not None
            torch.save(state.state_dict(), Path(folder, REUSE_STATE))

    def load(self, folder: str) -> None:
        """Raises `ValueError` if `gr_reuse` is on and the checkpoint has nothing to reuse."""
        if not self._flags.is_active or self._flags.gr_reuse == 0:
            return
        path = Path(folder, REUSE_STATE)
        if not path.is_file():
            raise ValueError(
                f"gr_reuse={self._flags.gr_reuse}: {folder} was written without gr_reuse and has no {REUSE_STATE}. "
                "Resume with gr_reuse=0, or start a new run."
            )
        reuse = self._reuse_for(trainable_parameters(self._trainer.optimizer))
        assert reuse is not None
        reuse.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
