"""Gradients, parts of sharded tensors, and many tensors at a time without a temporary copy of all of them."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

#: Elements of a block: on a CPU few enough to stay in the processor's cache from one operation to the next, on a GPU,
#: where a call costs more than the arithmetic, so many that the calls do not count.
CPU_BLOCK, GPU_BLOCK = 2**17, 2**24


def grad_of(p: Tensor) -> Tensor:
    """`.grad` of a parameter that has one."""
    assert p.grad is not None
    return p.grad


def local(t: Any) -> Any:
    """The part of a DTensor that this process holds, as memory that can be written to; anything else as it is.

    To be called without gradients.
    """
    return t if type(t) in (Tensor, nn.Parameter) or not hasattr(t, "to_local") else t.to_local()


def blocks_of(tensors: Iterable[Tensor], cpu_block: int = CPU_BLOCK) -> Iterator[list[Tensor]]:
    """The tensors in lists for `torch._foreach_...`, of one device and type; a large tensor is a list of its own."""
    block: list[Tensor] = []
    size, limit, kind = 0, 0, None
    for t in tensors:
        if block and (size + t.numel() > limit or (t.device, t.dtype) != kind):
            yield block
            block, size = [], 0
        if not block:
            kind = (t.device, t.dtype)
            limit = cpu_block if t.is_cpu else GPU_BLOCK
        block.append(t)
        size += t.numel()
    if block:
        yield block
