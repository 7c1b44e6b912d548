"""A gauge of the radius: how much the loss rises from theta to the perturbed weights, and how linearly.

Each regularized step computes the loss of its batch twice. To first order the rise is the slope along the perturbation
times r, so that

    gr_sharpness = L2 - L1,    gr_linearity = (L2 - L1) / (r g1 . d),

with g1 . d = ||g1|| where the perturbation follows g1. About 1 means that the loss is a plane within r, and g2 has
little to add to g1; well above 1, that curvature dominates.
"""

import torch
from torch import Tensor

from .part import Host


class Gauge:
    """The means of both over the regularized steps since the last log, and over the processes."""

    def __init__(self, trainer: Host):
        self._trainer = trainer
        self._sharpness: Tensor | float = 0.0
        self._rise: Tensor | float = 0.0
        self._steps = 0
        self.forget_step()

    def forget_step(self) -> None:
        """Forget the step that is under way."""
        self._step: Tensor | None = None
        self._step_rise: Tensor | float = 0.0

    def add_loss(self, loss: Tensor) -> None:
        """The loss of a micro-batch in the second pass, or minus that in the first."""
        loss = loss.detach().to(torch.promote_types(loss.dtype, torch.float32))
        self._step = loss if self._step is None else self._step + loss

    def add_rise(self, rise: Tensor | float) -> None:
        """The rise of the loss that a perturbation brings to first order."""
        self._step_rise += rise

    def end_step(self) -> None:
        """Count the step. Without a direction to go there was no rise."""
        if isinstance(self._step_rise, Tensor) and self._step is not None:
            rises = (self._step_rise > 0) & self._step_rise.isfinite()
            self._sharpness = self._sharpness + torch.where(rises, self._step, 0.0)
            self._rise = self._rise + torch.where(rises, self._step_rise, 0.0)
        self._steps += 1
        self.forget_step()

    def take(self) -> dict[str, float]:
        """Both values, over the steps since the last call; empty if there were none. All processes call it."""
        if self._steps == 0:
            return {}
        accelerator, steps = self._trainer.accelerator, self._steps
        both = torch.tensor([float(self._sharpness), float(self._rise)], device=accelerator.device)
        sharpness, rise = accelerator.reduce(both, "mean").tolist()
        self._sharpness, self._rise, self._steps = 0.0, 0.0, 0
        return {"gr_sharpness": sharpness / steps} | ({"gr_linearity": sharpness / rise} if rise else {})
