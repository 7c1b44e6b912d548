"""What differs per device in the tests of `tests/gpu`. On a CPU a stand-in takes the place of what only CUDA has."""

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.host_reads import HostReads

AVAILABLE: dict[str, Callable[[], bool]] = {
    "cpu": lambda: True,
    "cuda": torch.cuda.is_available,
    "mps": torch.backends.mps.is_available,
}


@contextmanager
def never_waiting(device: str) -> Iterator[None]:
    """Fails where the host waits for the device, or, if that is not CUDA, reads a number that it would wait for."""
    if device != "cuda":
        with HostReads() as reads:
            yield
        assert not reads.by_caller, dict(reads.by_caller)
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits(device: str, function: Callable[[], Any]) -> Counter[str]:
    """Where, and how often, the host waits for the device in `function()`; as above where that is not CUDA."""
    if device != "cuda":
        with HostReads() as reads:
            function()
        return reads.by_caller
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{w.filename}:{w.lineno}" for w in caught if "synchronizing" in str(w.message))


def extra_memory(device: str, function: Callable[[], Any]) -> int:
    """Bytes that are allocated at the peak of `function()`, less those allocated before it."""
    if device != "cuda":
        with LiveBytes() as live:
            function()
        return live.peak
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() - before


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are allocated within less those of tensors that are freed, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._watch((args, kwargs), is_new=False)
        result = func(*args, **(kwargs or {}))
        self._watch(result, is_new=True)
        return result

    def _watch(self, tensors: Any, is_new: bool) -> None:
        for storage in (t.untyped_storage() for t in tree_leaves(tensors) if isinstance(t, Tensor)):
            key, size = storage._cdata, storage.nbytes()
            if key in self._known:
                continue
            self._known.add(key)
            self.live += size * is_new
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
