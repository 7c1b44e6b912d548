"""The k-th smallest of the elements of many tensors together, and comparing all of them with it.

Exact, in one pass and little memory: `torch.kthvalue` needs them in one tensor, which is a copy of all gradients.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Elements that NumPy is given at a time (a matrix of ViT-Ti, 192 x 768, in one piece), and a GPU.
CPU_BLOCK, GPU_BLOCK = 9 * 2**14, 2**24
#: A tensor of up to so many elements is put together with others.
SMALL = 2**12
#: Size of the sample that narrows the search down.
SAMPLE = 3 * 2**15


def in_blocks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The tensors, of one shape, cut into equal flat parts; whole if small, or if their layouts do not allow it."""
    size = CPU_BLOCK if tensors[0].device.type == "cpu" else GPU_BLOCK
    if tensors[0].numel() <= size or not all(t.is_contiguous() for t in tensors):
        return [tensors]
    return zip(*(t.view(-1).split(size) for t in tensors), strict=True)


class Scan:
    """Compares and counts absolute values, block by block, in at least single precision.

    On a CPU NumPy does it, which compares, counts and selects many elements at a time where torch takes one after the
    other; and the memory of the results, which would cost more to get than to fill, is used again by the next call.
    """

    def __init__(self, tensors: Iterable[Tensor]):
        self._dtype = torch.float32
        for t in tensors:
            self._dtype = torch.promote_types(self._dtype, t.dtype)
        self._values = torch.empty(CPU_BLOCK, dtype=self._dtype)
        self._flags = torch.empty(2, CPU_BLOCK, dtype=torch.bool)

    @staticmethod
    def _fits(block: Tensor) -> bool:
        return block.device.type == "cpu" and block.numel() <= CPU_BLOCK

    def magnitudes(self, block: Tensor) -> Tensor:
        """|block|, flat."""
        block = block.reshape(-1)
        if not self._fits(block):
            return block.abs().to(self._dtype)
        values = self._values[: block.numel()]
        if block.dtype == torch.bfloat16:  # unknown to NumPy
            return values.copy_(block).abs_()
        np.abs(block.numpy(), out=values.numpy())
        return values

    def at_most(self, block: Tensor, bound: float) -> Tensor:
        """|block| <= bound, flat."""
        return self._at_most(self.magnitudes(block), bound)

    def _at_most(self, values: Tensor, bound: float) -> Tensor:
        if not self._fits(values):
            return values <= bound
        flags = self._flags[0, : values.numel()]
        np.less_equal(values.numpy(), bound, out=flags.numpy())
        return flags

    def just_below(self, bound: float) -> float:
        """The next smaller number of the precision that is compared in."""
        return torch.nextafter(*torch.tensor([bound, -math.inf], dtype=self._dtype)).item()

    def split(self, block: Tensor, low: float, high: float) -> tuple[int | Tensor, Tensor]:
        """How many absolute values are <= low, and those with low < value < high."""
        values = self.magnitudes(block)
        is_low = self._at_most(values, low)
        if not self._fits(values):
            return count_true(is_low), values[(values < high) & ~is_low]
        is_between = self._flags[1, : values.numel()].numpy()
        np.less(values.numpy(), high, out=is_between)
        np.greater(is_between, is_low.numpy(), out=is_between)
        return count_true(is_low), torch.from_numpy(values.numpy()[is_between])

    def replace(self, mask: Tensor, new: Tensor) -> int | Tensor:
        """Write the flags `new`, flat, into `mask`. How many of those that are True were so before."""
        if not (self._fits(mask) and mask.is_contiguous()):
            new = new.view(mask.shape)
            common = count_true(new & mask.view(torch.bool))
            mask.copy_(new.view(torch.uint8))
            return common
        old, new, common = (
            mask.view(-1).numpy().view(bool),
            new.numpy().reshape(-1),
            self._flags[1, : new.numel()].numpy(),
        )
        np.logical_and(old, new, out=common)
        np.copyto(old, new)
        return int(np.count_nonzero(common))


def count_true(flags: Tensor) -> int | Tensor:
    """How many are True; on a GPU as a 0-dimensional tensor, which nobody has to wait for."""
    return int(np.count_nonzero(flags.numpy())) if flags.device.type == "cpu" else flags.sum()


def to_ints(counts: list[int | Tensor]) -> list[int]:
    """All of them in one go, instead of waiting for each."""
    device = next((count.device for count in counts if isinstance(count, Tensor)), None)
    if device is None:
        return counts
    return torch.stack([torch.as_tensor(count, device=device) for count in counts]).tolist()


@torch.no_grad()
def kth_smallest(tensors: list[Tensor], k: int) -> float:
    """The k-th smallest (k = 1, 2, ...) absolute value of all elements together; -inf for k = 0. Exact.

    A sample of `SAMPLE` elements gives two bounds between which the value almost surely lies; one pass counts what is
    below and collects what is between, about 2 % of N. The released code copies all N into one tensor.
    """
    if k == 0:
        return -math.inf
    total = sum(t.numel() for t in tensors)
    assert k <= total
    if total <= 4 * SAMPLE:
        return _kth(torch.cat([t.reshape(-1).abs() for t in tensors]), k)
    tensors = [t for t in tensors if t.numel()]
    tensors = [values for values, *_ in merge_small(tensors, tensors, [0.0] * len(tensors))]
    low, high = _bounds(tensors, k / total, total)
    scan = Scan(tensors)
    n_up_to_low, between = [], []
    for (block,) in (block for t in tensors for block in in_blocks(t)):
        count, values = scan.split(block, low, high)
        n_up_to_low.append(count)
        between.append(values)
    del scan  # its memory is for the candidates
    candidates = torch.cat(between)
    del between
    rank = k - sum(to_ints(n_up_to_low))
    if 0 < rank <= candidates.numel():
        return _kth(candidates, rank)
    # Many equal values, such as the zero gradients of tokens that do not occur, can be a bound themselves.
    bound = low if rank <= 0 else high
    scan = Scan(tensors)
    blocks = [block for t in tensors for (block,) in in_blocks(t)]
    n_up_to = sum(to_ints([count_true(scan.at_most(block, bound)) for block in blocks]))
    n_below = sum(to_ints([count_true(scan.at_most(block, scan.just_below(bound))) for block in blocks]))
    return bound if n_below < k <= n_up_to else _kth(torch.cat([t.reshape(-1).abs() for t in tensors]), k)


def _kth(values: Tensor, k: int) -> float:
    """The k-th smallest; may reorder `values`."""
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64):
        array = values.numpy()
        array.partition(k - 1)
        return float(array[k - 1])
    return values.kthvalue(k).values.item()


def merge_small(
    sizes: list[Tensor], masks: list[Tensor], thresholds: list[float]
) -> Iterator[tuple[Tensor, Tensor, float, list[Tensor]]]:
    """The same work in fewer pieces: a model has far more norms and biases than matrices.

    Yields values, mask and threshold; and, where the mask is a copy of several, flat views of them.
    """
    small: dict[Any, list[int]] = {}
    for i, (size, mask) in enumerate(zip(sizes, masks, strict=True)):
        if size.numel() > SMALL or not (size.is_contiguous() and mask.is_contiguous()):
            yield size, mask, thresholds[i], []
        else:
            small.setdefault((size.device, size.dtype, thresholds[i]), []).append(i)
    for (_, _, threshold), indices in small.items():
        parts = [masks[i].view(-1) for i in indices]
        yield torch.cat([sizes[i].view(-1) for i in indices]), torch.cat(parts), threshold, parts


def _bounds(tensors: list[Tensor], quantile: float, total: int) -> tuple[float, float]:
    """Two values between which the quantile lies, by six standard deviations of its rank in a random sample.

    Every so-many-th element stands for a random one: should the values repeat in that rhythm, the bounds may miss the
    quantile, which `kth_smallest` notices.
    """
    parts = []
    for t in tensors:
        stride = max(1, total // SAMPLE)
        # Prime to every dimension, the stride meets rows and columns evenly.
        while math.gcd(stride, t.numel()) > 1:
            stride += 1
        parts.append(t.reshape(-1)[::stride])
    sample = torch.cat(parts).abs_()
    spread = 6 * math.sqrt(quantile * (1 - quantile) * sample.numel()) + 1
    first, last = math.floor(quantile * sample.numel() - spread), math.ceil(quantile * sample.numel() + spread)
    return (
        _kth(sample, first) if first > 0 else -math.inf,
        _kth(sample, last) if last < sample.numel() else math.inf,
    )
