"""Counts what makes a GPU wait: operations whose result the host reads. A CPU pays nothing for them and shows them.

    with HostReads() as reads:
        optimizer.step()
    assert reads.by_caller == {}

Operations of which a number or the size of the result travels to the host are seen by dispatch; `tolist` and `numpy`,
which on a CPU dispatch nothing, by a patch. A copy from a device to the CPU cannot be told apart here: run on the meta
device, which has no values, what must not copy either.
"""

import sys
from collections import Counter
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READING = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "_unique2",
}


class HostReads(TorchDispatchMode):
    """Within, counts the reads, and the calls of each operation.

    Attributes:
        by_caller: "operation at file:line" -> how many; the line is the innermost one outside torch.
        operations: operation -> how many calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_caller: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self._patches = [patch.object(torch.Tensor, name, self._counted(name)) for name in ("tolist", "numpy")]

    @property
    def total(self) -> int:
        return self.by_caller.total()

    def __enter__(self) -> "HostReads":
        for one in self._patches:
            one.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for one in self._patches:
            one.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.operations[name] += 1
        by_flags = name in ("index", "index_put", "index_put_") and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        )
        if name in READING or by_flags:
            self._count(name)
        return func(*args, **(kwargs or {}))

    def _counted(self, name: str) -> Any:
        method = getattr(torch.Tensor, name)

        def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._count(name)
            return method(tensor, *args, **kwargs)

        return read

    def _count(self, name: str) -> None:
        frame: Any = sys._getframe(2)
        while frame.f_back and ("/torch/" in frame.f_code.co_filename or "contextlib" in frame.f_code.co_filename):
            frame = frame.f_back
        file = "/".join(frame.f_code.co_filename.split("/")[-2:])
        self.by_caller[f"{name} at {file}:{frame.f_lineno}"] += 1


def take_the_way_of_a_gpu(monkeypatch: Any) -> None:
    """IRE chooses without NumPy, thresholds digit by digit, and counts that are tensors until the end; on the CPU."""
    statistics = sys.modules["hf_gr.optim.order_statistics"]
    monkeypatch.setattr("hf_gr.optim._cpu.suits_numpy", lambda _: False)
    monkeypatch.setattr(statistics, "count_true", lambda flags: flags.sum())
    monkeypatch.setattr(statistics, "kth_smallest", None)
    monkeypatch.setattr(statistics, "is_ordinary", lambda _: False)
