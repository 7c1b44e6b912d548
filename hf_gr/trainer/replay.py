"""Tools to run a micro-batch a second time, with the same randomness and the same model state."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..optim.pass_state import RNGState
from .part import Host


class InputCheck:
    """Checks that a trainer's `_prepare_inputs` returns in the second pass what it returned in the first.

    If it generates, samples or reads from a buffer, it does not, and g2 would be of different data than g1. Only one
    window is checked, as each comparison makes an accelerator wait.
    """

    def __init__(self, trainer: Host):
        self._trainer = trainer
        self._first: list[list[Tensor]] = []
        self.is_done = False

    @contextmanager
    def during(self, is_second: bool) -> Iterator[None]:
        """Watch one of the passes. Raises `ValueError` if the second gets different inputs than the first."""
        if self.is_done:
            yield
            return
        trainer, prepare = self._trainer, self._trainer._prepare_inputs

        def watched(inputs: Any) -> Any:
            prepared = prepare(inputs)
            self._compare(list(_tensors(prepared)), is_second)
            return prepared

        vars(trainer)["_prepare_inputs"] = watched  # shadows the method of the class
        try:
            yield
        finally:
            del vars(trainer)["_prepare_inputs"]

    def forget(self) -> None:
        """End the window, whether or not it had a second pass."""
        self._first.clear()

    def _compare(self, tensors: list[Tensor], is_second: bool) -> None:
        if not is_second:
            self._first.append(tensors)
            return
        expected = self._first.pop(0) if self._first else []
        if len(tensors) != len(expected) or not all(map(_equal, tensors, expected)):
            raise ValueError(
                f"gr_lambda={self._trainer.gr_args.gr_degree}: {type(self._trainer).__name__} prepares other inputs "
                "when a step runs a second time, so the two gradients of GR would be of different data. Make "
                "_prepare_inputs return the same for the same batch (see gr_second_pass), or set gr_lambda=0."
            )


def _tensors(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, Mapping):
        for value in nested.values():
            yield from _tensors(value)
    elif isinstance(nested, list | tuple):
        for value in nested:
            yield from _tensors(value)


def _equal(a: Tensor, b: Tensor) -> bool:
    if a is b or a.data_ptr() == b.data_ptr():  # then a change in place by `compute_loss` is in both
        return a.shape == b.shape
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())


@contextmanager
def attributes_set_aside(owner: Any, names: Iterable[str]) -> Iterator[None]:
    """Within the context, `owner` has copies of the named attributes; afterwards, the unchanged originals."""
    kept = {name: vars(owner)[name] for name in names if name in vars(owner)}
    vars(owner).update({name: _copied(value) for name, value in kept.items()})
    try:
        yield
    finally:
        vars(owner).update(kept)


def _copied(value: Any) -> Any:
    """A copy that shares only its numbers. `copy.deepcopy` would make a call for each of thousands of them."""
    if isinstance(value, dict):
        copied = copy.copy(value)  # a defaultdict stays one
        copied.update({key: _copied(item) for key, item in value.items()})
        return copied
    if isinstance(value, list):
        return [_copied(item) for item in value] if value and isinstance(value[0], dict | list | Tensor) else [*value]
    return value.clone() if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class MicroBatch:
    """One call of `Trainer.training_step`: its arguments, and the run's state on which it depends."""

    inputs: dict[str, Any]
    num_items_in_batch: Tensor | int | None
    gradient_accumulation_steps: int
    rng_state: RNGState
