"""Many tensors at a time, without a temporary copy of all of them."""

from collections.abc import Iterable, Iterator

from torch import Tensor

#: Elements of a block: on a CPU few enough to stay in the processor's cache from one operation to the next, on a GPU,
#: where a call costs more than the arithmetic, so many that the calls do not count.
CPU_BLOCK, GPU_BLOCK = 2**17, 2**24


def blocks_of(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in lists for `torch._foreach_...`, of one device and type; a large tensor is a list of its own."""
    block: list[Tensor] = []
    size, limit, kind = 0, 0, None
    for t in tensors:
        if block and (size + t.numel() > limit or (t.device, t.dtype) != kind):
            yield block
            block, size = [], 0
        if not block:
            kind = (t.device, t.dtype)
            limit = CPU_BLOCK if t.is_cpu else GPU_BLOCK
        block.append(t)
        size += t.numel()
    if block:
        yield block
