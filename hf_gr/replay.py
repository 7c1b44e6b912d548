"""What it takes to run a micro-batch a second time and get the same randomness and the same model state."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RNGState:
    """The states of the random generators a forward pass can draw from: Python, NumPy, torch on the CPU and on the
    training device."""

    python: Any
    numpy: Any
    cpu: Tensor
    device: Tensor | None
    device_name: torch.device

    @classmethod
    def capture(cls, device: torch.device) -> "RNGState":
        on_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), on_device, device)

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.get_device_module(self.device_name).set_rng_state(self.device, self.device_name)


@dataclass(frozen=True)
class MicroBatch:
    """One call of `Trainer.training_step`: its arguments, and the state of the run that it depends on."""

    inputs: dict[str, Any]
    num_items_in_batch: Tensor | int | None
    gradient_accumulation_steps: int
    rng_state: RNGState


@contextmanager
def preserve_buffers(model: nn.Module) -> Iterator[None]:
    """Undo, at the end, what the body writes to the buffers: the running statistics and counters of normalization
    layers and their like, which the first pass has updated and the second must not.

    Integer buffers of more than one element are left out. They are constants, among them the packed weights of
    quantized models, which nobody wants to have twice.
    """
    saved = [(b, b.detach().clone()) for b in model.buffers() if b.is_floating_point() or b.numel() == 1]
    try:
        yield
    finally:
        with torch.no_grad():
            for b, value in saved:
                b.copy_(value)
