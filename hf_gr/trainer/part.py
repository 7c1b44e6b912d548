"""What the parts of a trainer have in common. Each is one method, with its own state, called from the hooks."""

from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from transformers import Trainer

from ..config import GRArguments
from ..optim.ire import IRE

logger = get_logger(__name__)

if TYPE_CHECKING:

    class Host(Trainer):
        """What a part sees of `GRMixin` beside what every trainer has."""

        # As they are once the trainer is built; transformers declares that each may be missing.
        args: Any
        model: Any
        optimizer: Any
        push_in_progress: Any

        script_args: tuple[Any, ...]
        recorder: Any
        parts: Any
        gr: Any
        ire: Any
        layerwise: Any
        gr_first_pass_only: tuple[str, ...]
        gr_second_pass: bool

        @property
        def gr_args(self) -> GRArguments: ...

        @property
        def ire_optimizer(self) -> IRE | None: ...

        def ire_sampled_losses(
            self, model: nn.Module, inputs: dict[str, Any], generator: torch.Generator
        ) -> Tensor: ...

else:
    Host = Trainer


class Part:
    """One method inside a trainer.

    Args:
        trainer: the trainer, which is still to be built: until `check` only its identity is known.
    """

    def __init__(self, trainer: "Host"):
        self._trainer = trainer

    @property
    def _flags(self) -> GRArguments:
        return self._trainer.gr_args

    def check(self) -> None:
        """The trainer is built. Raises `ValueError` if the method is not known to be right in it."""

    def plan(self, num_training_steps: int) -> None:
        """The number of steps is known. Raises `ValueError` for settings that make no sense in such a run."""

    def warn_of_idle_flags(self, prefix: str) -> None:
        """Name the flags with this prefix that were set and that, as others are set, change nothing."""
        for message in self._flags.flags_without_effect(prefix):
            logger.warning(message)

    def logs(self, logs: dict[str, float]) -> dict[str, float]:
        """What to log beside the training loss, as it was at that step."""
        return {}
