"""Time and memory, measured side by side: what `costs.py` and other benchmarks share."""

import random
import statistics
import time
import tracemalloc
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Run = Callable[[], object]


def nothing() -> None:
    pass


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleave(
    kinds: Mapping[str, Run], rounds: int, before: Run = nothing, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each kind in each round, after one warm-up. A round runs every kind once, in a new order.

    Args:
        kinds: name -> what is timed.
        rounds: how many.
        before: runs ahead of each kind, outside the clock.
        device: "cuda" waits for the device before the clock is read.
    """
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(rounds + 1):
        for name in random.sample(list(kinds), len(kinds)):
            before()
            synchronize(device)
            start = time.perf_counter()
            kinds[name]()
            synchronize(device)
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


class Ratio(NamedTuple):
    """The median of paired ratios, and the range of their middle half."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def ratio(seconds: Mapping[str, list[float]], of: str, to: str) -> Ratio:
    """The times of one kind by those of another, both of the same round."""
    ratios = sorted(a / b for a, b in zip(seconds[of], seconds[to], strict=True))
    quarter = len(ratios) // 4
    return Ratio(statistics.median(ratios), ratios[quarter], ratios[-1 - quarter])


def peak_bytes(run: Run, existing: Iterable[Tensor], device: str = "cpu", numpy: bool = False) -> int:
    """The peak of what `run` allocates beside the `existing` tensors; with `numpy`, the arrays of NumPy, too."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - start
    live = _LiveBytes(existing)
    if numpy:
        tracemalloc.start()
    try:
        with live:
            run()
    finally:
        tracemalloc.stop()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Bytes of tensors that are created inside the context and still alive, and their peak."""

    def __init__(self, existing: Iterable[Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self._seen = {t.untyped_storage()._cdata for t in existing}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._track(leaf.untyped_storage())
        return out

    def _track(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._seen:
            self._seen.add(key)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes(), key)
        arrays = tracemalloc.get_traced_memory()[0] if tracemalloc.is_tracing() else 0
        self.peak = max(self.peak, self.live + arrays)

    def _free(self, nbytes: int, key: int) -> None:
        self.live -= nbytes
        self._seen.discard(key)
