"""The base class of a trainer's parts: each is one method, with its own state, called from the trainer's hooks."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from transformers import Trainer, TrainerControl

from ..config import GRArguments
from ..optim.ire import IRE

logger = get_logger(__name__)

if TYPE_CHECKING:

    class Host(Trainer):
        """What `GRMixin` offers its parts, in addition to `Trainer`."""

        # transformers declares these optional; once the trainer is built, they are set.
        args: Any
        model: Any
        optimizer: Any
        push_in_progress: Any

        script_args: tuple[Any, ...]
        further_facts: Mapping[str, Any]
        evaluated_dataset: Any
        recorder: Any
        parts: Any
        gr: Any
        ire: Any
        layerwise: Any
        nonfinite_guard: Any
        gr_first_pass_only: tuple[str, ...]
        gr_second_pass: bool

        def costs(self) -> dict[str, float]: ...

        @property
        def gr_args(self) -> GRArguments: ...

        @property
        def ire_optimizer(self) -> IRE | None: ...

        def ire_sampled_losses(
            self, model: nn.Module, inputs: dict[str, Any], generator: torch.Generator
        ) -> Tensor: ...

else:
    Host = Trainer


def log_entry(trainer: "Host", control: TrainerControl, values: dict[str, float]) -> None:
    """Log an entry of its own from a callback. `Trainer` takes any entry for the one that is due, and would then leave
    out that with the loss."""
    is_due = control.should_log
    if values:
        trainer.log(values)
    control.should_log = is_due


def innermost(optimizer: Any) -> Any:
    """The optimizer itself, without the wrappers of accelerate and IRE; None before it is created."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    return optimizer.base_optimizer if isinstance(optimizer, IRE) else optimizer


class Part:
    """One method inside a trainer.

    Args:
        trainer: the trainer, not built yet: its attributes may be used only from `check` on.
    """

    def __init__(self, trainer: "Host"):
        self._trainer = trainer

    @property
    def _flags(self) -> GRArguments:
        return self._trainer.gr_args

    def check(self) -> None:
        """Called once the trainer is built. Raises `ValueError` if the method does not support it."""

    def plan(self, num_training_steps: int) -> None:
        """Called once the number of steps is known. Raises `ValueError` for settings that make no sense with it."""

    def warn_of_unused_flags(self, prefix: str) -> None:
        """Warn of flags with this prefix that were set but have no effect, given the others."""
        for message in self._flags.flags_without_effect(prefix):
            logger.warning(message)

    def save(self, folder: str) -> None:
        """Add to the checkpoint in `folder` what the method needs to continue bitwise."""

    def load(self, folder: str) -> None:
        """Restore it. Raises `ValueError` if the checkpoint lacks it."""

    def logs(self, logs: dict[str, float]) -> dict[str, float]:
        """The values to log with the training loss, as of that step."""
        return {}
