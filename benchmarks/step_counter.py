"""Counts what a training step allocates, moves through memory, and communicates.

Nothing is timed, so the load of the machine changes no number.
"""

import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from hf_gr import GRTrainer

#: These do not read what they write to.
OVERWRITING = ("copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_")
COLLECTIVES = {
    "allreduce": "all-reduce",
    "all_reduce": "all-reduce",
    "allgather": "all-gather",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "broadcast": "broadcast",
}


class Collective(NamedTuple):
    """A collective and its payload in bytes: the size of the whole tensor, not of one process's share."""

    kind: str
    bytes: int


class Counter(TorchDispatchMode):
    """Counts what the operations inside the context allocate, move and communicate, including those of the backward
    pass and of DDP's C++ code.

    Attributes:
        live: bytes of the tensors that were created inside the context and are still alive.
        peak: the largest `live` so far.
        moved: bytes read and written; views move nothing.
        collectives: in the order of their calls.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = self.moved = 0
        self.collectives: list[Collective] = []
        self._seen = {tensor.untyped_storage()._cdata for tensor in existing}

    def restart(self) -> None:
        """Count anew, with what is alive."""
        self.peak, self.moved, self.collectives = self.live, 0, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it returns as operations on this process's shares
        kwargs = kwargs or {}
        if func.namespace in ("c10d", "_c10d_functional"):
            kind = next((kind for word, kind in COLLECTIVES.items() if word in str(func)), None)
            if kind is not None:
                self.collectives.append(Collective(kind, max(map(bytes_of, args))))
        out = func(*args, **kwargs)
        for tensor in tensors_in(out):
            self._track(tensor.untyped_storage())
        self.moved += bytes_moved(func, args, kwargs, out)
        return out

    def _track(self, storage: Any) -> None:
        if storage._cdata in self._seen:
            return
        self._seen.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, storage.nbytes(), storage._cdata)

    def _free(self, size: int, key: int) -> None:
        self.live -= size
        self._seen.discard(key)

    def without_moving(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose operations do not count in `moved`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            before = self.moved
            try:
                return function(*args, **kwargs)
            finally:
                self.moved = before

        return call


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def bytes_of(tree: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(tree))


def bytes_moved(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> int:
    """Bytes that an operation reads and writes, according to its schema."""
    schema = func._schema
    name = schema.name.partition("::")[2]
    aliases = [value.alias_info for value in schema.returns if value.alias_info is not None]
    if name.startswith(("empty", "new_empty")) or not all(alias.is_write for alias in aliases):
        return 0
    moved = 0 if aliases else bytes_of(out)
    for i, argument in enumerate(schema.arguments):
        size = bytes_of(args[i] if i < len(args) else kwargs.get(argument.name))
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        # Fused optimizers declare that they write to the gradients, but do so only for a gradient scaler.
        is_written = is_written and not ("fused" in name and argument.name == "grads")
        moved += size * is_written + size * (not (is_written and name in OVERWRITING))
    return moved


def bytes_written() -> int:
    """Bytes that this process has passed to the kernel so far, to gloo's sockets among others (Linux)."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


class Step(NamedTuple):
    """One optimizer step: passes over its batch, peak memory, bytes moved outside of the passes, collectives, and bytes
    passed to the kernel."""

    passes: float
    peak: int
    moved: int
    collectives: list[Collective]
    written: int

    @classmethod
    def of(cls, values: list[Any]) -> "Step":
        """From JSON."""
        step = cls(*values)
        return step._replace(collectives=[Collective(*collective) for collective in step.collectives])


class StepCounter(TrainerCallback):
    """Divides what a counter sees into optimizer steps, each from the end of the one before."""

    def __init__(self, counter: Counter):
        self.steps: list[Step] = []
        self._counter = counter
        self._forwards = self._written = 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.register_forward_pre_hook(self._count_forward)
        self._restart()

    def _count_forward(self, *_: Any) -> None:
        self._forwards += torch.is_grad_enabled()

    def _restart(self) -> None:
        self._counter.restart()
        self._forwards, self._written = 0, bytes_written()

    def on_step_end(self, args, state, control, **kwargs):
        counter, written = self._counter, bytes_written() - self._written
        passes = self._forwards / args.gradient_accumulation_steps
        self.steps.append(Step(passes, counter.peak, counter.moved, counter.collectives, written))
        self._restart()


def count_steps(trainer: GRTrainer) -> list[Step]:
    """Train, and count each optimizer step. The weights are not part of the peak."""
    model: nn.Module = trainer.model
    counter = Counter(model.parameters())
    steps = StepCounter(counter)
    trainer.add_callback(steps)
    trainer.compute_loss = counter.without_moving(trainer.compute_loss)
    trainer.accelerator.backward = counter.without_moving(trainer.accelerator.backward)
    with counter:
        trainer.train()
    return steps.steps
