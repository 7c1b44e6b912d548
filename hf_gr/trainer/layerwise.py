"""The optimizers of hf_gr inside `Trainer`: by name, with the learning rate scaled to the batch, and the schedule phi.

Settings that depend on the run, its number of steps and its total batch, are filled in here.
"""

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainingArguments

from ..config import BASE_BATCH_SIZE, TIME_VARYING
from ..optim.tvlars import TVLARS, check_time_varying, time_varying_factor
from ..optimizer_factory import (
    OPTIMIZERS,
    parameters_by_kind,
    parameters_by_trainer,
    settings_by_flags,
    time_varying_settings,
)
from .compatibility import refuse_layer_statistics, refuse_unsupported_optimizer
from .part import Host, Part, innermost

logger = get_logger(__name__)


def trainable_parameters(optimizer: Optimizer) -> list[Tensor]:
    """The parameters `optimizer` trains, in the order of its groups, including those of a loss that has any."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


class OnClassOrInstance:
    """A method that can be called on either: it is static in `Trainer`, and an instance method in some subclasses."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __get__(self, instance: Any, owner: type) -> Callable[..., Any]:
        return MethodType(self._function, owner if instance is None else instance)


def in_steps(tv_lambda: float, delay_steps: float, num_training_steps: int) -> tuple[float, float]:
    """tv_lambda and delay_steps, in steps. A delay below 1 is a fraction of the run, and tv_lambda is then per run."""
    if 0 < delay_steps < 1:
        return tv_lambda / num_training_steps, delay_steps * num_training_steps
    return tv_lambda, delay_steps


class Layerwise(Part):
    """LARS, TVLARS and LAMB by name, the learning rate scaled with the batch, and phi as a schedule.

    Attributes:
        lr_factor: the factor by which the learning rate was multiplied.
    """

    def __init__(self, trainer: Host):
        super().__init__(trainer)
        self.lr_factor = 1.0
        self._created: Any = None
        self._tvlars: TVLARS | None = None
        self._tvlars_settings: list[dict[str, Any]] = []

    def check(self) -> None:
        refuse_unsupported_optimizer(self._trainer)
        if self._flags.layer_statistics_steps:
            refuse_layer_statistics(self._trainer)
            from .layer_statistics import LayerStatisticsCallback  # needs the extra `report`

            self._trainer.add_callback(LayerStatisticsCallback(self._flags.layer_statistics_steps))

    def scale(self, optimizer: Optimizer, is_new: bool) -> Optimizer:
        """`optimizer` with its learning rate times `lr_scaling`'s factor.

        Args:
            is_new: whether the trainer has just created it. One that was given to the trainer is left alone.
        """
        inner, flags = innermost(optimizer), self._flags
        if is_new:
            self._created, self.lr_factor = inner, 1.0
        if flags.decay_norms_and_biases and inner.param_groups[0].get("exclude_1d"):
            raise ValueError(
                f"decay_norms_and_biases=True has no effect on {type(inner).__name__}, which itself excludes norms and "
                "biases. Set optim_args=exclude_1d=False as well, or leave the flag out."
            )
        if inner is not self._created:
            self._refuse_flags_for_given_optimizer()
            return optimizer
        factor = flags.lr_factor(self._batch)
        _scale_learning_rate(inner, factor / self.lr_factor)
        self.lr_factor = factor
        if flags.lr_scaling != "none":
            logger.info(f"  Learning rate: {inner.defaults['lr']:g}, scaled by {self.describe_lr_scaling()}")
        return optimizer

    def _refuse_flags_for_given_optimizer(self) -> None:
        if self._flags.decay_norms_and_biases:
            raise ValueError(
                "decay_norms_and_biases=True has no effect on an optimizer that was given to the trainer ready-made. "
                "Set the weight decay of its parameter groups, or leave the flag out."
            )
        if self._flags.lr_scaling != "none":
            raise ValueError(
                f"lr_scaling={self._flags.lr_scaling!r} has no effect on an optimizer that was given to the trainer "
                "ready-made. Scale its learning rate yourself, or leave lr_scaling out."
            )

    @property
    def _batch(self) -> int:
        return self._trainer.get_total_train_batch_size(self._trainer.args)

    def decays_everything(self) -> bool:
        """Whether weight decay applies to norms and biases too."""
        self.warn_of_unused_flags("decay_")
        return self._flags.decay_norms_and_biases

    def describe_lr_scaling(self) -> str:
        root = " under the root" if self._flags.lr_scaling == "sqrt" else ""
        return f"{self.lr_factor:g} (the total batch of {self._batch:,} / {BASE_BATCH_SIZE}{root})"

    # ---- phi ----

    def schedule(self, num_training_steps: int, optimizer: Optimizer) -> LRScheduler | None:
        """Fill in the settings of TVLARS that depend on the run. Returns the schedule `time_varying`, if it is used."""
        args, inner = self._trainer.args, innermost(optimizer)
        self._tvlars = inner if inner is self._tvlars else None
        is_time_varying = args.lr_scheduler_type == TIME_VARYING and self._trainer.lr_scheduler is None
        if isinstance(inner, TVLARS):
            if is_time_varying:
                raise ValueError(
                    f"lr_scheduler_type={TIME_VARYING!r}: TVLARS has this schedule in itself and would apply it "
                    "twice. Set lr_scheduler_type=constant, or use LARS."
                )
            self._set_tvlars(inner, num_training_steps)
        if not is_time_varying:
            return None
        if args.warmup_steps:
            logger.warning(
                f"warmup_steps={args.warmup_steps}: the learning rate has no warmup with "
                f"lr_scheduler_type={TIME_VARYING!r}."
            )
        # Epoch 0 of a scheduler is step 1 of phi.
        return LambdaLR(optimizer, partial(_phi_of_epoch, **self._time_varying(num_training_steps)))

    def _time_varying(self, num_training_steps: int) -> dict[str, Any]:
        """The arguments of phi as a learning-rate schedule."""
        given = self._trainer.args.lr_scheduler_kwargs or {}
        if unknown := set(given) - {"tv_lambda", "delay_steps", "alpha", "gamma_min"}:
            raise ValueError(
                f"lr_scheduler_kwargs: {', '.join(sorted(unknown))} is unknown to {TIME_VARYING!r}, which supports "
                "tv_lambda, delay_steps, alpha, gamma_min."
            )
        settings: dict[str, Any] = {
            "alpha": 1.0,
            "gamma_min": None,
            **time_varying_settings("lr_scheduler_kwargs", given),
        }
        check_time_varying(**settings)
        settings["tv_lambda"], settings["delay_steps"] = in_steps(
            settings["tv_lambda"], settings["delay_steps"], num_training_steps
        )
        if settings["gamma_min"] is None:
            settings["gamma_min"] = self._default_gamma_min()
        return settings

    def _default_gamma_min(self) -> float:
        """0.001 batch / 256, relative to the unscaled learning rate, which `lr_scaling` may already have scaled."""
        return 1e-3 * self._batch / BASE_BATCH_SIZE / self.lr_factor

    def _set_tvlars(self, optimizer: TVLARS, num_training_steps: int) -> None:
        """Fill in the optimizer's settings that depend on the run, and restart its schedule."""
        if optimizer is not self._tvlars:
            self._tvlars = optimizer
            keys = ("tv_lambda", "delay_steps", "gamma_min", "step")
            self._tvlars_settings = [{key: group[key] for key in keys} for group in optimizer.param_groups]
        for group, settings in zip(optimizer.param_groups, self._tvlars_settings, strict=True):
            group.update(settings)
            group["tv_lambda"], group["delay_steps"] = in_steps(
                group["tv_lambda"], group["delay_steps"], num_training_steps
            )
            if group["gamma_min"] is None:
                group["gamma_min"] = self._default_gamma_min()
        group = optimizer.param_groups[0]
        logger.info(
            f"  TVLARS: phi from {optimizer.phi(group, 1):.3g} to {optimizer.phi(group, num_training_steps):.3g} in "
            f"{num_training_steps} steps, with tv_lambda = {group['tv_lambda']:.3g}, delay_steps = "
            f"{group['delay_steps']:g}, gamma_min = {group['gamma_min']:g}"
        )
        name = getattr(self._trainer.args.lr_scheduler_type, "value", self._trainer.args.lr_scheduler_type)
        if self._trainer.lr_scheduler is None and name != "constant":
            logger.warning(
                f"lr_scheduler_type={name!r} multiplies the learning rate of TVLARS, which has a schedule of its own. "
                "Set lr_scheduler_type=constant for TVLARS as published."
            )

    def logs(self, logs: dict[str, float]) -> dict[str, float]:
        return {} if self._tvlars is None else {"tvlars_phi": self._tvlars.phi(self._tvlars.param_groups[0])}


def get_optimizer_cls_and_kwargs(
    resolve: Callable[..., tuple[Any, dict[str, Any]]], args: TrainingArguments, model: nn.Module | None
) -> tuple[Any, dict[str, Any]]:
    """As `resolve`, the trainer's own method, plus the optimizers of hf_gr."""
    if args.optim not in OPTIMIZERS:
        return resolve(args, model)
    cls = OPTIMIZERS[args.optim]
    return cls, settings_by_flags(args) | parameters_by_kind(cls, model) | parameters_by_trainer(resolve, args, model)


def _phi_of_epoch(epoch: int, **settings: Any) -> float:
    return time_varying_factor(epoch + 1, **settings)


@torch.no_grad()
def _scale_learning_rate(optimizer: Optimizer, factor: float) -> None:
    if factor == 1:
        return
    for settings in (optimizer.defaults, *optimizer.param_groups):
        for key in ("lr", "initial_lr"):
            if key in settings:
                settings[key] = settings[key] * factor
