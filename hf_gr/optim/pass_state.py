"""What a pass over a model changes or depends on besides weights and gradients: random generators and buffers."""

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


@contextmanager
def preserve_buffers(model: nn.Module) -> Iterator[None]:
    """Undo, at the end, what the body writes to buffers: the running statistics and counters of normalization layers
    and the like, which the first pass has updated and the second must not.

    Integer buffers of more than one element are skipped: they are constants, such as the packed weights of quantized
    models, which are too large to copy.
    """
    saved = [(b, b.detach().clone()) for b in model.buffers() if b.is_floating_point() or b.numel() == 1]
    try:
        yield
    finally:
        with torch.no_grad():
            for b, value in saved:
                b.copy_(value)
