"""The k-th smallest element of many tensors together, and masks of the elements up to it.

Exact, in one pass and with little memory: `torch.kthvalue` needs one tensor, which would be a copy of all gradients.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from . import _cpu

#: Elements compared at a time on a GPU.
GPU_BLOCK = 2**24
#: Tensors of at most this many elements are compared together.
SMALL = 2**12
#: Size of the sample that narrows the search down.
SAMPLE = 3 * 2**15


def in_blocks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The tensors, of one shape, cut into equal flat parts; whole if small, or if their layouts do not allow it."""
    size = _cpu.SCAN_BLOCK if tensors[0].is_cpu else GPU_BLOCK
    if tensors[0].numel() <= size or not all(t.is_contiguous() for t in tensors):
        return [tensors]
    return zip(*(torch.split(t.view(-1), size) for t in tensors), strict=True)


class Scan:
    """Compares and counts absolute values, block by block, in at least single precision.

    On a GPU a count is a 0-dimensional tensor, which causes no synchronization; `to_ints` reads all of them at once.
    """

    def __init__(self, tensors: Iterable[Tensor]):
        self._dtype = torch.float32
        for t in tensors:
            self._dtype = torch.promote_types(self._dtype, t.dtype)
        self._fast = _cpu.Scan(self._dtype)

    def _magnitudes(self, block: Tensor) -> Tensor:
        return block.reshape(-1).abs().to(self._dtype)

    def at_most(self, block: Tensor, bound: float) -> Tensor:
        """|block| <= bound, flat."""
        if _cpu.suits_numpy(block):
            return self._fast.at_most(block, bound)
        return self._magnitudes(block) <= bound

    def just_below(self, bound: float) -> float:
        """The next smaller number of the precision that is compared in."""
        return torch.nextafter(*torch.tensor([bound, -math.inf], dtype=self._dtype)).item()

    def split(self, block: Tensor, low: float, high: float) -> tuple[int | Tensor, Tensor]:
        """How many absolute values are <= low, and those with low < value < high."""
        if _cpu.suits_numpy(block):
            return self._fast.split(block, low, high)
        values = self._magnitudes(block)
        is_low = values <= low
        return count_true(is_low), values[(values < high) & ~is_low]

    def replace(self, mask: Tensor, new: Tensor) -> int | Tensor:
        """Write the flat flags `new` into `mask`. Returns how many are True both before and after."""
        if _cpu.suits_numpy(mask) and mask.is_contiguous():
            return self._fast.replace(mask, new)
        new = new.view(mask.shape)
        common = count_true(new & mask.view(torch.bool))
        mask.copy_(new.view(torch.uint8))
        return common


def count_true(flags: Tensor) -> int | Tensor:
    """How many are True."""
    return _cpu.count_true(flags) if flags.is_cpu else flags.sum()


def to_ints(counts: Sequence[int | Tensor]) -> list[int]:
    """All counts in one transfer, instead of waiting for each."""
    device = next((count.device for count in counts if isinstance(count, Tensor)), None)
    if device is None:
        return [int(count) for count in counts]
    return cast(list[int], torch.stack([torch.as_tensor(count, device=device) for count in counts]).tolist())


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
    if values.is_cpu and values.dtype in (torch.float32, torch.float64):
        return _cpu.kth(values, k)
    return values.kthvalue(k).values.item()


def merge_small(
    sizes: list[Tensor], masks: list[Tensor], thresholds: list[float]
) -> Iterator[tuple[Tensor, Tensor, float, list[Tensor]]]:
    """The same work in fewer pieces: a model has far more norms and biases than matrices.

    Yields values, mask and threshold; and, where the mask is a copy of several, flat views of them.
    """
    small: dict[tuple[torch.device, torch.dtype, float], list[int]] = {}
    for i, (size, mask) in enumerate(zip(sizes, masks, strict=True)):
        if size.numel() > SMALL or not (size.is_contiguous() and mask.is_contiguous()):
            yield size, mask, thresholds[i], []
        else:
            small.setdefault((size.device, size.dtype, thresholds[i]), []).append(i)
    for (_, _, threshold), indices in small.items():
        parts = [masks[i].view(-1) for i in indices]
        yield torch.cat([sizes[i].view(-1) for i in indices]), torch.cat(parts), threshold, parts


def replace_masks(
    scan: Scan,
    masks: list[Tensor],
    values: list[Tensor],
    thresholds: list[float],
    choose: Callable[[Tensor, float], Tensor],
) -> tuple[list[int], int]:
    """Write `choose(values, threshold)`, blockwise, into the masks.

    Returns how many elements of each mask are True now, and how many, over all masks, were also True before.
    """
    common_counts = []
    for value, mask, threshold, parts in merge_small(values, masks, thresholds):
        for block, part in in_blocks(value, mask):
            common_counts.append(scan.replace(part, choose(block, threshold)))
        if parts:
            torch._foreach_copy_(parts, torch.split(mask, [len(part) for part in parts]))
    return to_ints([count_true(mask.view(torch.bool)) for mask in masks]), sum(to_ints(common_counts))


def _bounds(tensors: list[Tensor], quantile: float, total: int) -> tuple[float, float]:
    """Two values between which the quantile lies, by six standard deviations of its rank in a random sample.

    Evenly spaced elements stand in for random ones. If the values repeat with that period, the bounds may miss the
    quantile; `kth_smallest` detects that.
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
