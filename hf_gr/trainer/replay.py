"""Tools to run a micro-batch a second time, with the same randomness and the same model state."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..optim.pass_state import RNGState
from .part import Host


@contextmanager
def prepare_inputs_replaced(trainer: Host, function: Callable[[Any], Any]) -> Iterator[None]:
    """Within the context, `trainer._prepare_inputs` is `function`."""
    own = vars(trainer).get("_prepare_inputs")
    vars(trainer)["_prepare_inputs"] = function  # shadows the method of the class
    try:
        yield
    finally:
        if own is None:
            del vars(trainer)["_prepare_inputs"]
        else:
            vars(trainer)["_prepare_inputs"] = own


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
    """One call of `Trainer.training_step`: its arguments, and the run's state on which it depends.

    The trainer's `_prepare_inputs` may generate text or read from a buffer, and would return something else in the
    second pass. So it runs in the first pass alone, and `prepared` has what it returned, and the random state after it.
    """

    inputs: dict[str, Any]
    num_items_in_batch: Tensor | int | None
    gradient_accumulation_steps: int
    rng_state: RNGState
    prepared: list[tuple[Any, RNGState]] = field(default_factory=list)

    def recorded(self, trainer: Host) -> AbstractContextManager[None]:
        """The context of the first pass."""
        prepare = trainer._prepare_inputs

        def recording(inputs: Any) -> Any:
            prepared = prepare(inputs)
            self.prepared.append((copy.copy(prepared), RNGState.capture(trainer.args.device)))
            return prepared

        return prepare_inputs_replaced(trainer, recording)

    def replayed(self, trainer: Host) -> AbstractContextManager[None]:
        """The context of the second pass."""
        recorded = iter(self.prepared)

        def replaying(inputs: Any) -> Any:
            prepared, rng_state = next(recorded)
            rng_state.restore()
            return copy.copy(prepared)

        return prepare_inputs_replaced(trainer, replaying)
