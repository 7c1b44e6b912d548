"""`GRTrainer`: `transformers.Trainer` with gradient regularization, IRE and the optimizers of hf_gr.

Each hook of `Trainer` is overridden once, here; the work is done in the parts, one file per method.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput

from ..analysis.curvature import QUANTITIES
from ..analysis.estimates import Estimate
from ..config import GRArguments
from ..optim.ire import IRE
from .checkpoints import explain_failed_save, load_weights, require_same_names
from .compatibility import refuse_separate_processes
from .costs import Costs
from .diagnostics import Diagnostics
from .flat_coordinates import FlatCoordinates, sampled_losses
from .guards import NonFiniteGuard
from .layerwise import Layerwise, OnClassOrInstance, get_optimizer_cls_and_kwargs
from .process_groups import end_cleanly
from .recording import Recorder
from .resuming import ResumeCheck, prepare_to_resume, same_optimizer_required
from .sharpness import FixedBatches, recorded_sharpness
from .two_pass import TwoPass
from .uploads import Uploads

if TYPE_CHECKING:
    from .part import Host
else:
    Host = object

logger = get_logger(__name__)  # logs once, not once per process


class GRMixin(Host):
    """Gradient regularization, IRE and the optimizers of hf_gr for any `Trainer`:
    `class MyTrainer(GRMixin, Seq2SeqTrainer)`.

    Its flags are those of `GRArguments`, read from `args`; if `args` has none (a plain `TrainingArguments`), the
    defaults apply. `compute_loss` runs twice per micro-batch: `gr_second_pass` is True in the second run, and what it
    counts in the attributes named in `gr_first_pass_only` counts once.

    Logged with the training loss, as of that step:

    - `gr_lambda`, `gr_r`, `gr_grad_norm` (||g1||) and `gr_perturbed_grad_norm` (||g2||). `loss` is from the first pass,
      `grad_norm` is the norm of the combined gradient. With `gr_scope="local"` or `"micro"`, `gr_grad_norm` is from the
      main process (averaged over its micro-batches), and ||g2||, which is then available only mixed with g1, is logged
      only for lambda = r. `gr_sharpness` and `gr_linearity`, means over the regularized steps since the last log, tell
      how the loss rises within r; see `hf_gr.trainer.gauge`.
    - `ire_kappa` (0 before the start), `ire_flat_fraction`, the same per kind of layer
      (`ire_flat_fraction_embedding`, `_attention`, `_mlp`, `_norm`, `_bias`, ...), and `ire_mask_overlap`, the Jaccard
      index of the last two masks.
    - `tvlars_phi`, beside the learning rate that it multiplies.
    - with `gr_diagnostics_steps`, in entries of their own, what `hf_gr.trainer.diagnostics` lists.
    - `train_seconds`, excluding evaluation, and `train_passes`, the forward and backward passes over a step's batch so
      far, including those of GR and of IRE's estimates. Evaluation logs contain them too, and `evaluated_examples`.
    """

    #: Attributes in which `compute_loss` and `training_step` of trl and sentence-transformers count and collect
    #: metrics. The second pass leaves them unchanged. A subclass may name others.
    gr_first_pass_only: tuple[str, ...] = (
        "_metrics",
        "_stored_metrics",
        "_total_train_tokens",
        "_step",
        "_current_train_step_time",
        "accum_loss_components",
    )
    #: True during the second pass of a step.
    gr_second_pass = False
    #: Dataclasses with further arguments of the run, recorded like those of the trainer. A `dataset_name` among them
    #: names the training data.
    script_args: tuple[Any, ...] = ()
    #: What a subclass adds to the record of the run; see `Record.further`.
    further_facts: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, *args, **kwargs):
        self._default_gr_args = GRArguments()
        # `Trainer` sets this in `train()`; a `training_step` outside of it is a window of one.
        self.current_gradient_accumulation_steps = 1
        self.recorder = Recorder(self)
        self.diagnostics = Diagnostics(self)
        self.gr = TwoPass(self, self.recorder, self.diagnostics)
        self.ire = FlatCoordinates(self, self.recorder)
        self.layerwise = Layerwise(self)
        self.nonfinite_guard = NonFiniteGuard(self, self.recorder)
        self._costs = Costs(self, self.recorder)
        self._uploads = Uploads(self)
        self.parts = (self.layerwise, self.gr, self._costs, self.ire, self.nonfinite_guard, self.diagnostics)
        super().__init__(*args, **kwargs)
        #: The dataset evaluated last, its name if it is one of several, or all of them as a dict.
        self.evaluated_dataset: Any = None
        end_cleanly(self)
        refuse_separate_processes(self)
        for part in self.parts:
            part.check()
        self.add_callback(ResumeCheck(self))

    @property
    def gr_args(self) -> GRArguments:
        """The flags in force."""
        return self.args if isinstance(self.args, GRArguments) else self._default_gr_args

    @property
    def ire_optimizer(self) -> IRE | None:
        """The optimizer, if it is `IRE`; None before it is created."""
        return self.ire.optimizer

    ire_sampled_losses = sampled_losses

    def costs(self) -> dict[str, float]:
        """The costs of training: seconds, passes, peak memory in bytes, and tokens if they were counted."""
        return self._costs.total()

    def sharpness(
        self,
        batches: int = 8,
        quantities: Sequence[str] = tuple(QUANTITIES),
        dataset: Any = None,
        method: str | None = None,
        **options: Mapping[str, Any],
    ) -> dict[str, Estimate]:
        """How sharp the loss is at the current weights, as values with their standard errors, by name:

        - `sam`: the rise of the loss along the gradient, within r = 0.05; `average`: its mean rise under noise of 5 %
          on each weight;
        - `trace` and `top`: the trace and the largest eigenvalue of the Hessian of the trainable parameters.

        The loss is `compute_loss` in evaluation mode and in float32, the mean over the first batches, which are the
        same at every call. Nothing of the run changes. With several processes, all of them call it. The run's record
        keeps the last measurement, and the card shows it. See `hf_gr.analysis.curvature`.

        Args:
            batches: over all processes, of `per_device_eval_batch_size`; rounded up to a multiple of the processes.
            quantities: which of them, cheapest first. `sam` takes 3 passes over the batches, `average` 32 pairs without
                gradients, `trace` 32 products of the Hessian of about two passes each, and `top` often more.
            dataset: what to measure on, or the name of an evaluation dataset. By default the training data, of whose
                loss the weights are a minimum; without training data, the evaluation data.
            method: how products of the Hessian are computed, `exact` or `difference`. By default `exact`, and
                `difference` under FSDP and for models that cannot be differentiated twice.
            options: further arguments of one of the functions, by name: `sam={"r": 0.1}, trace={"num_samples": 100}`.
        """
        return recorded_sharpness(self, FixedBatches.of(self, batches, dataset), quantities, method, options)

    def planned_passes(self) -> list[float]:
        """The passes of each step of the run, as `costs` will count them unless a step is skipped. Known once training
        has begun."""
        return self._costs.planned()

    # ---- Optimizer and schedule ----

    @OnClassOrInstance
    def get_optimizer_cls_and_kwargs(  # type: ignore[override]  # static there, an instance method in subclasses
        self, args: TrainingArguments, model: nn.Module | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """As in `Trainer`, plus the optimizers of hf_gr."""
        return get_optimizer_cls_and_kwargs(super().get_optimizer_cls_and_kwargs, args, model)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As in `Trainer`; all parameters with `decay_norms_and_biases`."""
        if self.layerwise.decays_everything():
            return [name for name, _ in model.named_parameters()]
        return super().get_decay_parameter_names(model)

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """As in `Trainer`, with the learning rate scaled by `lr_scaling`, and wrapped in `IRE` with `ire_kappa`."""
        self.gr_args.check_optimizer_arguments()  # a hyperparameter search sets attributes
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        self.optimizer = self.ire.wrap(self.layerwise.scale(optimizer, is_new))
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """As in `Trainer`, plus the schedule `time_varying`. The number of steps is first known here."""
        for part in self.parts:
            part.plan(num_training_steps)
        schedule = self.layerwise.schedule(num_training_steps, self.optimizer if optimizer is None else optimizer)
        if schedule is None:
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler, self._created_lr_scheduler = schedule, True
        return schedule

    # ---- One step ----

    def get_batch_samples(self, *args, **kwargs) -> tuple[list, Tensor | int | None]:
        """As in `Trainer`; before the step, IRE chooses coordinates if it is due."""
        batch_samples, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        self.ire.choose(batch_samples)
        return batch_samples, num_items_in_batch

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As in `Trainer`, plus the second pass at the end of an accumulation window."""
        one_pass = self._costs.counted(super().training_step)
        self.diagnostics.see(inputs)
        loss = self.gr.step(one_pass, model, inputs, num_items_in_batch)
        self.ire.observe(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.nonfinite_guard.norm_before_clipping = norm
        return norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As in `Trainer`, including the second pass and IRE's estimate."""
        flops = super().floating_point_ops(inputs)
        flops += int(flops * self.ire.probed_fraction)
        return flops * self.gr.passes()

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As in `Trainer`, with the parts' values added to the training loss, and the costs to both losses."""
        if "loss" in logs:
            for part in self.parts:
                logs |= part.logs(logs)
        with self._costs.entry(logs) as entry:
            super().log(entry, *args, **kwargs)

    # ---- Around the steps ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As in `Trainer`, but a checkpoint to resume from is checked first: a truncated one changes nothing.

        `True` selects the last complete one in `output_dir`; later incomplete ones are named in warnings. A run may
        resume with a different number of processes, with a warning, and from an earlier checkpoint than the last:
        later ones are then moved out of its way.
        """
        checkpoint = prepare_to_resume(self, resume_from_checkpoint)
        self.recorder.resumed_from = checkpoint
        try:
            output = super().train(checkpoint, *args, **kwargs)
        finally:
            self.recorder.finish()
            self.gr.reset()
        self.ire.tell()
        self.nonfinite_guard.require_trained()
        return output

    def evaluate(self, eval_dataset: Any = None, *args, **kwargs) -> dict[str, float]:
        """As in `Trainer`; the dataset is remembered for the card."""
        metrics = super().evaluate(eval_dataset, *args, **kwargs)
        self.evaluated_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return metrics

    def _evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Evaluation during training: stops the clock even if a subclass replaces `evaluate`."""
        with self.recorder.clock_stopped():
            return super()._evaluate(*args, **kwargs)

    def evaluation_loop(self, *args, **kwargs) -> EvalLoopOutput:
        with self._costs.during_evaluation():
            return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs) -> tuple:
        """As in `Trainer`; the examples are counted."""
        result = super().prediction_step(model, inputs, *args, **kwargs)
        self._costs.count_examples(inputs)
        return result

    # ---- Checkpoints ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`, but never the perturbed weights, even if a signal handler saves during a second pass.

        Under FSDP, the weights are gathered into a model that `from_pretrained` can load, even if checkpoints are
        sharded; `Trainer` would write nothing.
        """
        is_checkpoint = _internal_call and output_dir is not None
        with ExitStack() as stack:
            stack.enter_context(self.gr.unperturbed())
            if self.is_fsdp_enabled and not is_checkpoint:
                plugin = self.accelerator.state.fsdp_plugin
                stack.callback(plugin.set_state_dict_type, plugin.state_dict_type)
                plugin.set_state_dict_type("FULL_STATE_DICT")
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in `Trainer`, but the record is written first, so that every complete checkpoint contains it."""
        run = self._get_output_dir(trial=trial)
        folder = f"{run}/{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.nonfinite_guard.look()
        self.nonfinite_guard.require_finite_weights()
        with explain_failed_save(folder):
            self.recorder.write(run, folder)
            for part in self.parts:
                part.save(folder)
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """As in `Trainer`, then wait: the trainer state, written next, means that all processes have saved theirs."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load every weight, under its name in memory; raises if one is missing or unknown."""
        target = self.model if model is None else model
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or not load_weights(target, resume_from_checkpoint):
            # Some trainers override it with the folder as the only parameter.
            super()._load_from_checkpoint(resume_from_checkpoint, *(() if model is None else (model,)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in `Trainer`, but raises before training starts if the state is of another class of optimizer."""
        with same_optimizer_required(self.optimizer):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            for part in self.parts:
                part.load(checkpoint)

    def _load_best_model(self) -> None:
        """Load the best checkpoint as strictly as one to resume from."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            best = str(self.state.best_model_checkpoint)
            logger.info(f"Loading best model from {best}.")
            if not load_weights(self.model, best):
                super()._load_best_model()
        self.recorder.best_step = self.state.best_global_step

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """If `Trainer` itself loads a checkpoint, names that do not match are an error, not a warning."""
        ignored = getattr(self.model, "_keys_to_ignore_on_save", None) or ()
        require_same_names("the checkpoint", set(load_result.missing_keys) - set(ignored), load_result.unexpected_keys)
        super()._issue_warnings_after_load(load_result)

    # ---- The Hub ----

    def init_hf_repo(self, *args, **kwargs) -> None:
        """As in `Trainer`; problems with creating the repository or its card are reported before training."""
        from ..reporting import card  # noqa: F401  needs the extra `report`

        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:
            name = self.args.hub_model_id or Path(self.args.output_dir).resolve().name
            raise ValueError(
                f"push_to_hub=True: the repository {name!r} can be neither found nor created on the Hub ({error}). Log "
                "in with `hf auth login`, or give hub_token, a token with write access; hub_model_id sets the name."
            ) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._uploads.push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, *args, **kwargs) -> None:
        """Write `README.md`, which describes this run, to the output folder. Same arguments as in `Trainer`."""
        if self.is_world_process_zero():
            from ..reporting.card import write_card  # and matplotlib with it

            self.recorder.publish(*args, **kwargs)
            write_card(self.args.output_dir)


class GRTrainer(GRMixin, Trainer):
    """`transformers.Trainer` with gradient regularization, IRE and the optimizers of hf_gr; see `GRMixin`."""
