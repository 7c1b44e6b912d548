"""Gradient regularization in a trainer: the first pass, and the second at the end of a step.

One optimizer step, with gradient accumulation over a window of micro-batches:

1. (lambda_t, r_t) follow from `state.global_step`. If either is 0, the step is a plain one.
2. Each micro-batch runs as usual and is recorded: references to its inputs, and the state of the random generators.
3. After the last one, `.grad` holds g1 of the whole step. theta is perturbed, the recorded window is replayed, theta
   is restored, and `.grad` holds (1 - lambda/r) g1 + (lambda/r) g2. All of this happens inside `training_step`, so
   `Trainer` then clips and steps as usual.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from accelerate.logging import get_logger
from torch import Tensor, nn

from ..optim.gr_warmup import GRStrength
from ..optim.gradient_regularization import (
    HALF_PRECISION,
    Perturbation,
    add_gradients_,
    gradient_norm,
    gradients_set_aside,
    in_float32,
    scale_gradients_,
)
from .compatibility import refuse_unsupported
from .layerwise import trainable_parameters
from .part import Host, Part
from .recording import Recorder
from .replay import InputCheck, MicroBatch, RNGState, attributes_set_aside, preserve_buffers

logger = get_logger(__name__)  # logs once, not once per process


class TwoPass(Part):
    """The update rule of gradient regularization around a trainer's plain step."""

    def __init__(self, trainer: Host, recorder: Recorder):
        super().__init__(trainer)
        self._recorder = recorder
        self._window: list[MicroBatch] = []
        self._perturbation: Perturbation | None = None
        self._norms: list[float] = []
        self._logs: dict[str, float] = {}
        self._input_check = InputCheck(trainer)

    def check(self) -> None:
        if self._flags.is_active:
            refuse_unsupported(self._trainer, "gr_lambda")
        trains_half = any(p.requires_grad and p.dtype in HALF_PRECISION for p in self._trainer.model.parameters())
        if self._flags.gr_half_precision_weights and not (self._flags.is_active and trains_half):
            logger.warning("gr_half_precision_weights: no effect without GR, or without such weights to train.")

    # ---- Schedule ----

    def warmup_steps(self, num_training_steps: int) -> int:
        """T_w of a run of `num_training_steps` optimizer steps."""
        return self._flags.get_gr_warmup_steps(
            self._trainer.args.get_warmup_steps(num_training_steps), num_training_steps
        )

    def strength(self) -> GRStrength:
        """(lambda_t, r_t) of the current step."""
        state = self._trainer.state
        return self._flags.gr_strength(state.global_step, self.warmup_steps(state.max_steps))

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
        gr = self.strength()
        if not gr.is_active:
            self._logs = {"gr_lambda": gr.lambda_t, "gr_r": gr.r_t} if self._flags.is_active else {}
            return one_pass(model, inputs, num_items_in_batch)
        try:
            return self._regularized_step(one_pass, model, inputs, num_items_in_batch, gr)
        except BaseException:
            self.reset()
            raise

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

        self._window.append(
            MicroBatch(
                copy.copy(inputs),
                num_items_in_batch,
                trainer.current_gradient_accumulation_steps,
                RNGState.capture(trainer.args.device),
            )
        )
        synchronized = nullcontext() if scope == "global" else accelerator.no_sync(model)
        with synchronized, self._input_check.during(is_second=False):
            loss = one_pass(model, inputs, num_items_in_batch)

        if ends_window or scope == "micro":
            # Parameters that the optimizer does not train keep their first-pass gradients, which clipping counts.
            trained = set(params)
            untrained = [p for p in model.parameters() if p.grad is not None and p not in trained]
            with in_float32([*params, *untrained]), gradients_set_aside(untrained):
                self._second_pass(one_pass, model, params, earlier_grads, gr, ends_window)
            self._window.clear()
            self._input_check.forget()
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
        # Without a direction g2 = g1. A non-finite g1 is left for the gradient scaler or `NonFiniteGuard` to handle.
        has_direction = 0 < norm < math.inf
        self._norms.append(norm)
        self._logs = {"gr_lambda": gr.lambda_t, "gr_r": gr.r_t}
        is_global = self._flags.gr_scope == "global"
        # A global norm is the same on all processes, which skip the second pass together. Where it differs between
        # them, the other processes are waiting for this one in the reduction of g2.
        if has_direction or not is_global:
            perturbation = self._perturbation = Perturbation(params)
            try:
                if has_direction:
                    perturbation.apply(gr.r_t, norm, gr.grad_scale)
                if earlier_grads is not None:
                    add_gradients_(params, earlier_grads)
                self._replay(one_pass, model)
                if is_global:
                    self._logs["gr_perturbed_grad_norm"] = perturbation.second_gradient_norm(gr.grad_scale)
                elif gr.grad_scale == 0:
                    self._logs["gr_perturbed_grad_norm"] = gradient_norm(params)
            finally:
                perturbation.restore()
            if ends_window:  # until then the sum keeps the factor r/lambda
                scale_gradients_(params, gr.g2_weight)
                self._recorder.segment.regularized_steps += 1
        if ends_window:
            self._log_norms()

    def _log_norms(self) -> None:
        self._logs["gr_grad_norm"] = sum(self._norms) / len(self._norms)
        self._norms.clear()
        scaler = self._trainer.accelerator.scaler
        if scaler is not None:
            for key in self._logs.keys() - {"gr_lambda", "gr_r"}:
                self._logs[key] /= scaler.get_scale()

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
                self._input_check.during(is_second=True),
            ):
                for micro_batch in self._window:
                    is_last = micro_batch is last
                    micro_batch.rng_state.restore()
                    trainer.current_gradient_accumulation_steps = micro_batch.gradient_accumulation_steps
                    gradient_state._set_sync_gradients(is_last and sync)
                    # The context in which `Trainer` called this step decides whether the last one communicates.
                    with nullcontext() if is_last else accelerator.no_sync(model):
                        one_pass(model, copy.copy(micro_batch.inputs), micro_batch.num_items_in_batch)
        finally:
            trainer.gr_second_pass = False
            trainer.current_gradient_accumulation_steps = accumulation_steps
            gradient_state._set_sync_gradients(sync)
            after.restore()
        self._input_check.is_done = True

    def reset(self) -> None:
        """Forget the window, and restore theta if an interruption left it perturbed."""
        if self._perturbation is not None:
            self._perturbation.restore()
            self._perturbation = None
        self._window.clear()
        self._norms.clear()
        self._input_check = InputCheck(self._trainer)

    # ---- Around the step ----

    @contextmanager
    def unperturbed(self) -> Iterator[None]:
        """Within the context the weights are unperturbed, even in a signal handler during a second pass."""
        with nullcontext() if self._perturbation is None else self._perturbation.suspended():
            yield

    def logs(self, logs: dict[str, float]) -> dict[str, float]:
        if not self._logs:
            return {}
        # A plain step has only g1.
        plain = {"gr_grad_norm": logs["grad_norm"]} if "grad_norm" in logs else {}
        return plain | self._logs
