"""Whether training diverges under IRE; where it does, kappa is halved."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch.optim import Optimizer

from ..optim.ire import IRE

#: Weight of the newest loss in the running mean, which looks back about 50 steps.
WEIGHT = 0.02


@dataclass
class _Losses:
    """What is remembered of the losses so far; saved in checkpoints under these names."""

    mean: float = 0.0
    count: int = 0
    mean_at_start: float | None = None  # with which IRE started
    wait: int = 0  # steps until kappa may be halved again

    def is_high(self, loss: float, factor: float) -> bool:
        if not math.isfinite(loss):
            return True
        # The small loss of a nearly converged model can jump by `factor` from batch to batch. Only a loss that also
        # exceeds the level at which IRE started counts.
        return (
            self.mean_at_start is not None
            and loss > self.mean_at_start
            and loss - self.mean > (factor - 1) * abs(self.mean)
        )

    def add(self, loss: float) -> None:
        self.count += 1
        self.mean += (loss - self.mean) * max(WEIGHT, 1 / self.count)


class DivergenceGuard:
    """Watches the training loss and halves the `kappa_scale` of an `IRE` when training diverges.

    Its state is saved and loaded with the optimizer's, as "losses" in the part "ire", so that a resumed run decides as
    an uninterrupted one does.

    Args:
        ire: the optimizer; the guard registers hooks on its `state_dict` and `load_state_dict`.
    """

    def __init__(self, ire: IRE):
        self.ire = ire
        self._losses = _Losses()
        ire.register_state_dict_post_hook(self._save, prepend=True)
        ire.register_load_state_dict_pre_hook(self._load)

    def observe(self, loss: float, factor: float = 3.0, cooldown: int = 10) -> bool:
        """Record the loss of a step, and halve kappa if training diverges.

        It diverges if the loss is not finite, or if it exceeds both `factor` times its running mean and the mean with
        which IRE started. After a halving the next `cooldown` steps cannot cause another.

        Returns True if kappa was halved.
        """
        losses = self._losses
        is_acting = self.ire.active and self.ire.has_mask and self.ire.kappa != 0
        if is_acting and losses.mean_at_start is None and losses.count:
            losses.mean_at_start = losses.mean
        losses.wait = max(0, losses.wait - 1)
        is_high = losses.is_high(loss, factor)
        if not is_high:
            losses.add(loss)
        if not (is_high and is_acting) or losses.wait:
            return False
        losses.wait = cooldown
        self.ire.kappa_scale /= 2
        return True

    def _save(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict["ire"]["losses"] = asdict(self._losses)

    def _load(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        self._losses = _Losses(**state_dict.get("ire", {}).get("losses", {}))
