"""`GRTrainer`: `transformers.Trainer` with gradient regularization, and with IRE (`ire_training.py`).

One optimizer step, with gradient accumulation over a window of micro-batches:

1. (lambda_t, r_t) follow from `state.global_step`. If one is 0, this is `Trainer.training_step` and nothing else.
2. Each micro-batch runs as always and is recorded: references to its inputs, and the state of the random generators.
3. After the last one `.grad` holds g1 of the whole step. theta is perturbed, the recorded window is replayed, theta
   is restored, and `.grad` holds (1 - lambda/r) g1 + (lambda/r) g2. All inside `training_step`, so that `Trainer`
   goes on to clip and step as it always does.
"""

import copy
import math
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from ..config import GRArguments
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
from .checkpoints import (
    check_checkpoint,
    explain_failed_save,
    last_complete_checkpoint,
    load_weights,
    require_same_names,
    set_later_checkpoints_aside,
    warn_of_earlier_run,
    warn_of_other_processes,
)
from .compatibility import refuse_unsupported
from .costs import CostMixin
from .flat_coordinates import IREMixin
from .layerwise import OptimizerMixin, trainable_parameters
from .nonfinite import NonFiniteGuard
from .process_groups import end_cleanly
from .replay import InputCheck, MicroBatch, RNGState, attributes_set_aside, preserve_buffers
from .resuming import ResumeCheck, refuse_other_run, same_optimizer_required
from .uploads import UploadMixin

logger = get_logger(__name__)  # speaks once, not once per process


class GRMixin(CostMixin, IREMixin, OptimizerMixin, UploadMixin):
    """Gradient regularization, IRE and the optimizers of hf_gr for any `Trainer`:
    `class MyTrainer(GRMixin, Seq2SeqTrainer)`.

    Its flags are those of `GRArguments`, read from `args`; if `args` has none (a plain `TrainingArguments`), their
    defaults apply. What `compute_loss` does runs twice per micro-batch; `gr_second_pass` tells it when, and what
    it counts in the attributes named in `gr_first_pass_only` counts once.

    Logged with the training loss, as they were at that step: `gr_lambda`, `gr_r`, `gr_grad_norm` (||g1||) and
    `gr_perturbed_grad_norm` (||g2||). `loss` is that of the first pass, `grad_norm` the norm of the combined gradient.
    With `gr_scope="local"` or `"micro"`, `gr_grad_norm` is that of the main process (averaged over its micro-batches),
    and ||g2||, which is then known only together with g1, is logged only for lambda = r.
    """

    #: Attributes in which `compute_loss` counts, or collects what is logged, in trl and sentence-transformers. The
    #: second pass leaves them as they are. A subclass may name others.
    gr_first_pass_only: tuple[str, ...] = (
        "_metrics",
        "_stored_metrics",
        "_total_train_tokens",
        "accum_loss_components",
    )

    def __init__(self, *args, **kwargs):
        self._default_gr_args = GRArguments()
        # `Trainer` sets it in `train()`; a `training_step` called without that is a window of one.
        self.current_gradient_accumulation_steps = 1
        super().__init__(*args, **kwargs)
        self.gr_second_pass = False
        #: What the last evaluation was of: a data set, the name of one of several, or all of them as a dict.
        self.evaluated_dataset: Any = None
        self._gr_window: list[MicroBatch] = []
        self._gr_perturbation: Perturbation | None = None
        self._gr_norms: list[float] = []
        self._gr_input_check = InputCheck(self)
        self._gr_logs: dict[str, float] = {}
        end_cleanly(self)
        self.nonfinite_guard = NonFiniteGuard(self)
        self.add_callback(self.nonfinite_guard)
        self.add_callback(ResumeCheck(self))
        if self.gr_args.gr_degree != 0:
            refuse_unsupported(self, "gr_lambda")
        if self.gr_args.gr_half_precision_weights and (
            self.gr_args.gr_degree == 0
            or not any(p.requires_grad and p.dtype in HALF_PRECISION for p in self.model.parameters())
        ):
            logger.warning("gr_half_precision_weights: no effect without GR, or without such weights to train.")

    @property
    def gr_args(self) -> GRArguments:
        """The flags that are in force."""
        return self.args if isinstance(self.args, GRArguments) else self._default_gr_args

    # ---- Schedule ----

    def gr_warmup_steps(self, num_training_steps: int) -> int:
        """T_w of a run of `num_training_steps` optimizer steps."""
        return self.gr_args.get_gr_warmup_steps(self.args.get_warmup_steps(num_training_steps), num_training_steps)

    def _gr_strength(self) -> GRStrength:
        return self.gr_args.gr_strength(self.state.global_step, self.gr_warmup_steps(self.state.max_steps))

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """As in `Trainer`; the GR warmup is checked here, where the number of steps is first known."""
        gr = self.gr_args
        gr.check_gr_arguments()
        if gr.gr_degree != 0:
            warmup_steps = self.gr_warmup_steps(num_training_steps)
            if gr.gr_warmup != "none":
                self._check_gr_warmup_steps(warmup_steps, num_training_steps)
            elif gr.gr_warmup_steps:
                logger.warning(f"gr_warmup_steps={gr.gr_warmup_steps} has no effect with gr_warmup='none'.")
            shards = self.args.world_size * (self.args.gradient_accumulation_steps if gr.gr_scope == "micro" else 1)
            if gr.gr_scope != "global" and shards == 1:
                logger.warning(f"gr_scope='{gr.gr_scope}' is the same as 'global' here: there is nothing to divide.")
            logger.info(
                f"  Gradient regularization: r = {gr.gr_r}, lambda = {gr.gr_degree}, warmup '{gr.gr_warmup}' over "
                f"{warmup_steps} of {num_training_steps} steps"
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def _check_gr_warmup_steps(self, warmup_steps: int, num_training_steps: int) -> None:
        gr = self.gr_args
        if warmup_steps == 0:
            logger.warning(
                f"gr_warmup='{gr.gr_warmup}' has no effect, because the learning-rate warmup that it follows has no "
                "steps: GR acts at full strength from the first step. Set warmup_steps or gr_warmup_steps, or say "
                "gr_warmup='none'."
                if gr.gr_warmup_steps is None
                else f"gr_warmup='{gr.gr_warmup}' has no effect with gr_warmup_steps={gr.gr_warmup_steps}."
            )
        # With zero-warmup a warmup of just the whole run leaves no step for GR either.
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

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """`Trainer.training_step`, and at the end of an accumulation window the second pass."""
        gr = self._gr_strength()
        if not gr.is_active:
            self._gr_logs = {"gr_lambda": gr.lambda_t, "gr_r": gr.r_t} if self.gr_args.gr_degree != 0 else {}
            return super().training_step(model, inputs, num_items_in_batch)
        try:
            return self._gr_training_step(model, inputs, num_items_in_batch, gr)
        except BaseException:
            self._gr_reset()
            raise

    def _gr_training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None, gr: GRStrength
    ) -> Tensor:
        scope = self.gr_args.gr_scope
        ends_window = self.accelerator.sync_gradients
        params = self._gr_parameters(model)
        earlier_grads = None
        if scope == "micro":  # the direction is that of this micro-batch alone: what came before it is set aside
            earlier_grads = [p.grad for p in params]
            for p in params:
                p.grad = None

        self._gr_window.append(
            MicroBatch(
                copy.copy(inputs),
                num_items_in_batch,
                self.current_gradient_accumulation_steps,
                RNGState.capture(self.args.device),
            )
        )
        synchronized = nullcontext() if scope == "global" else self.accelerator.no_sync(model)
        with synchronized, self._gr_input_check.during(is_second=False):
            loss = super().training_step(model, inputs, num_items_in_batch)

        if ends_window or scope == "micro":
            # What the model has and the optimizer does not train keeps the gradient of the first pass, for clipping.
            trained = set(params)
            others = [p for p in model.parameters() if p.grad is not None and p not in trained]
            with in_float32([*params, *others]), gradients_set_aside(others):
                self._gr_second_pass(model, params, earlier_grads, gr, ends_window)
            self._gr_window.clear()
            self._gr_input_check.forget()
        return loss

    def _gr_parameters(self, model: nn.Module) -> list[Tensor]:
        """Those that the optimizer trains; before there is one, all trainable ones of the model."""
        if self.optimizer is None:
            return [p for p in model.parameters() if p.requires_grad]
        return trainable_parameters(self.optimizer)

    def _gr_second_pass(
        self,
        model: nn.Module,
        params: list[Tensor],
        earlier_grads: list[Tensor | None] | None,
        gr: GRStrength,
        ends_window: bool,
    ) -> None:
        """Turn the g1 in `.grad` into (1 - lambda/r) g1 + (lambda/r) g2, added to `earlier_grads`."""
        norm = gradient_norm(params)
        # Without a direction g2 is g1. A g1 that is not finite is left for the gradient scaler, or the user, to see.
        has_direction = 0 < norm < math.inf
        self._gr_norms.append(norm)
        self._gr_logs = {"gr_lambda": gr.lambda_t, "gr_r": gr.r_t}
        is_global = self.gr_args.gr_scope == "global"
        # A global norm is the same on all processes, which skip the second pass together. Where it differs between
        # them, the other processes are waiting for this one in the reduction of g2.
        if has_direction or not is_global:
            ratio = (gr.r_t - gr.lambda_t) / gr.lambda_t
            perturbation = self._gr_perturbation = Perturbation(params)
            try:
                if has_direction:
                    perturbation.apply(gr.r_t, norm, grad_scale=ratio)
                if earlier_grads is not None:
                    add_gradients_(params, earlier_grads)
                self._gr_replay(model)
                if is_global:
                    self._gr_logs["gr_perturbed_grad_norm"] = perturbation.second_gradient_norm(ratio)
                elif ratio == 0:
                    self._gr_logs["gr_perturbed_grad_norm"] = gradient_norm(params)
            finally:
                perturbation.restore()
            if ends_window:  # until then the sum keeps the factor r/lambda
                scale_gradients_(params, gr.lambda_t / gr.r_t)
                self.recorder.segment.regularized_steps += 1
        if ends_window:
            self._gr_logs["gr_grad_norm"] = sum(self._gr_norms) / len(self._gr_norms)
            self._gr_norms.clear()
            if self.accelerator.scaler is not None:
                for key in self._gr_logs.keys() - {"gr_lambda", "gr_r"}:
                    self._gr_logs[key] /= self.accelerator.scaler.get_scale()

    def _gr_replay(self, model: nn.Module) -> None:
        """Run the recorded window again, as it ran: same inputs, randomness and synchronization."""
        *earlier, last = self._gr_window
        gradient_state = self.accelerator.gradient_state
        after = RNGState.capture(self.args.device)
        accumulation_steps, sync = self.current_gradient_accumulation_steps, gradient_state.sync_gradients
        self.gr_second_pass = True
        try:
            with (
                preserve_buffers(model),
                attributes_set_aside(self, self.gr_first_pass_only),
                self._gr_input_check.during(is_second=True),
            ):
                for micro_batch in (*earlier, last):
                    is_last = micro_batch is last
                    micro_batch.rng_state.restore()
                    self.current_gradient_accumulation_steps = micro_batch.gradient_accumulation_steps
                    gradient_state._set_sync_gradients(is_last and sync)
                    # Whether the last one communicates, the context that `Trainer` called this step in has decided.
                    with nullcontext() if is_last else self.accelerator.no_sync(model):
                        super().training_step(model, copy.copy(micro_batch.inputs), micro_batch.num_items_in_batch)
        finally:
            self.gr_second_pass = False
            self.current_gradient_accumulation_steps = accumulation_steps
            gradient_state._set_sync_gradients(sync)
            after.restore()
        self._gr_input_check.is_done = True

    def _gr_reset(self) -> None:
        """Forget the window. theta is restored once more, in case the first time was interrupted."""
        if self._gr_perturbation is not None:
            self._gr_perturbation.restore()
            self._gr_perturbation = None
        self._gr_window.clear()
        self._gr_norms.clear()
        self._gr_input_check = InputCheck(self)

    # ---- Around the step ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As in `Trainer`. A checkpoint to resume from is checked first: one that is cut short changes nothing.

        With `True` it is the last complete one in `output_dir`; later ones that are not complete are named. A run may
        resume with another number of processes, which a warning says, and from an earlier checkpoint than the last: the
        later ones are then moved out of its way.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint=True: there is no complete checkpoint in {self.args.output_dir!r}. Start "
                    "without it, or give the folder of one."
                )
        elif resume_from_checkpoint and not self.is_deepspeed_enabled:
            check_checkpoint(resume_from_checkpoint)
        if resume_from_checkpoint:
            refuse_other_run(self, resume_from_checkpoint)
        self._check_checkpoints_ahead(resume_from_checkpoint or None)
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._gr_reset()
        self.nonfinite_guard.require_trained()
        return output

    def _check_checkpoints_ahead(self, resume_from: str | None) -> None:
        self.accelerator.wait_for_everyone()  # to read what is there, before the main process moves any of it
        if not self.args.should_save:
            return
        if resume_from and not (self.is_deepspeed_enabled or self.args.save_on_each_node):
            warn_of_other_processes(resume_from, self.args.world_size)
        if self.args.save_strategy != SaveStrategy.NO:
            if resume_from:
                set_later_checkpoints_aside(self.args.output_dir, resume_from)
            else:
                warn_of_earlier_run(self.args.output_dir)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`: the weights, and not the perturbed ones, even for a signal handler amid a second pass.

        Under FSDP they are gathered into one model that `from_pretrained` loads, whatever parts checkpoints are made
        of; `Trainer` would write nothing.
        """
        is_checkpoint = _internal_call and output_dir is not None
        with ExitStack() as stack:
            if self._gr_perturbation is not None:
                stack.enter_context(self._gr_perturbation.suspended())
            if self.is_fsdp_enabled and not is_checkpoint:
                plugin = self.accelerator.state.fsdp_plugin
                stack.callback(plugin.set_state_dict_type, plugin.state_dict_type)
                plugin.set_state_dict_type("FULL_STATE_DICT")
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = f"{self._get_output_dir(trial=trial)}/{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.nonfinite_guard.require_finite_weights()
        with explain_failed_save(folder):
            super()._save_checkpoint(model, trial)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.nonfinite_guard.norm_before_clipping = norm
        return norm

    def _save_rng_state(self, output_dir: str) -> None:
        """As in `Trainer`. The state of the run, which is written next, says that all processes have written theirs."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As in `Trainer`, with the values of gradient regularization beside the training loss."""
        if "loss" in logs and self._gr_logs:
            logs.update(self._gr_logs)
            if "grad_norm" in logs:  # a plain step has only g1
                logs.setdefault("gr_grad_norm", logs["grad_norm"])
        super().log(logs, *args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As in `Trainer`, with the second pass counted."""
        return super().floating_point_ops(inputs) * (2 if self._gr_strength().is_active else 1)

    # ---- Checkpoints and card ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load every weight, under the name it has in memory; a weight that is missing or unknown raises."""
        target = self.model if model is None else model
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or not load_weights(target, resume_from_checkpoint):
            # Other trainers' own take the folder alone.
            super()._load_from_checkpoint(resume_from_checkpoint, *(() if model is None else (model,)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in `Trainer`; the state of another class of optimizer raises before the training starts."""
        with same_optimizer_required(self.optimizer):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        """Load the best checkpoint with the same care as one that is resumed from."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            logger.info(f"Loading best model from {self.state.best_model_checkpoint}.")
            if not load_weights(self.model, self.state.best_model_checkpoint):
                super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Where `Trainer` itself loads a checkpoint, names that do not match are an error, not a warning."""
        ignored = getattr(self.model, "_keys_to_ignore_on_save", None) or ()
        require_same_names("the checkpoint", set(load_result.missing_keys) - set(ignored), load_result.unexpected_keys)
        super()._issue_warnings_after_load(load_result)

    def init_hf_repo(self, *args, **kwargs) -> None:
        """As in `Trainer`; what keeps the repository from being made is said before the training, not after."""
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:
            name = self.args.hub_model_id or Path(self.args.output_dir).resolve().name
            raise ValueError(
                f"push_to_hub=True: the repository {name!r} can be neither found nor made on the Hub ({error}). Log in "
                "with `hf auth login`, or give hub_token, a token that may write; hub_model_id is the name."
            ) from error

    def evaluate(self, eval_dataset: Any = None, *args, **kwargs) -> dict[str, float]:
        """As in `Trainer`; the card says of what it was."""
        metrics = super().evaluate(eval_dataset, *args, **kwargs)
        self.evaluated_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return metrics

    def create_model_card(self, *args, **kwargs) -> None:
        """Write `README.md` into the output folder: what this run did. Takes the arguments of `Trainer`'s."""
        if self.is_world_process_zero():
            from ..reporting.card import write_model_card  # the card imports the trainer's wing

            write_model_card(self, *args, **kwargs)


class GRTrainer(GRMixin, Trainer):
    """`transformers.Trainer` with gradient regularization, IRE and the optimizers of hf_gr; see `GRMixin`."""
