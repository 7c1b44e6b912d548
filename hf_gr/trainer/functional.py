"""The functional second pass (`gr_second_pass_kind=functional`) around the passes of a trainer.

`Trainer` runs forward and backward in one method. In both passes its `accelerator.backward` is shadowed: in the first
one to record the gradients of the logits, in the second one to start from them instead of the loss, which is computed
for the log only.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from ..optim.second_passes import OutputGradients, refusal
from .part import Host


class FunctionalPass:
    """Does nothing with `gr_second_pass_kind=full`."""

    def __init__(self, trainer: Host):
        self._trainer = trainer
        self._outputs = OutputGradients()

    @property
    def _is_on(self) -> bool:
        return self._trainer.gr_args.gr_second_pass_kind == "functional"

    def check(self) -> None:
        """Raise `ValueError` for a trainer whose logits cannot be reached."""
        trainer = self._trainer
        if not self._is_on:
            return
        if trainer.args.torch_compile:
            raise refusal("with torch_compile, the gradient of the logits stays inside the compiled graph")

    def forget(self) -> None:
        """End the window."""
        self._outputs.forget()

    @contextmanager
    def first(self, model: nn.Module) -> Iterator[None]:
        """Around a micro-batch in pass 1. Raises `ValueError` for a loss that is not of the logits alone."""

        def record(edges: list[GradientEdge], backward: Callable[..., None], loss: Tensor, **kwargs: Any) -> None:
            self._outputs.record(loss, lambda: backward(loss, **kwargs), edges)

        with self._backward_by(record, model):
            yield

    @contextmanager
    def second(self, model: nn.Module) -> Iterator[None]:
        """Around all micro-batches in pass 2."""

        def replay(edges: list[GradientEdge], backward: Callable[..., None], loss: Tensor, **kwargs: Any) -> None:
            self._outputs.replay(edges)
            edges.clear()

        with self._backward_by(replay, model):
            yield

    @contextmanager
    def _backward_by(self, function: Callable[..., None], model: nn.Module) -> Iterator[None]:
        if not self._is_on:
            yield
            return
        accelerator = self._trainer.accelerator
        plain = accelerator.backward
        try:
            with self._outputs.of(accelerator.unwrap_model(model)) as edges:
                vars(accelerator)["backward"] = lambda loss, **kwargs: function(edges, plain, loss, **kwargs)
                yield
        finally:
            vars(accelerator).pop("backward", None)
