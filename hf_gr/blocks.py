"""Large tensors in parts: what is done to a part in several passes is then done in the processor's cache."""

from collections.abc import Iterable

from torch import Tensor

#: Elements at a time, on a CPU (a matrix of ViT-Ti, 192 x 768, in one piece) and elsewhere.
CPU_BLOCK, GPU_BLOCK = 9 * 2**14, 2**24


def in_blocks(*tensors: Tensor, size: int | None = None) -> Iterable[tuple[Tensor, ...]]:
    """The tensors, of one shape, cut into equal flat parts; whole if small, or if their layouts do not allow it."""
    if size is None:
        size = CPU_BLOCK if tensors[0].device.type == "cpu" else GPU_BLOCK
    if tensors[0].numel() <= size or not all(t.is_contiguous() for t in tensors):
        return [tensors]
    return zip(*(t.view(-1).split(size) for t in tensors), strict=True)
