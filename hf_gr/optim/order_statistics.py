"""The k-th smallest element of many tensors together, and masks of the elements up to it.

Exact, and with little memory: `torch.kthvalue` needs one tensor, which would be a copy of all gradients. On a CPU a
sample narrows the search down, and one pass is enough. On a GPU, and where the tensors are sharded (DTensor), the value
is found digit by digit: two passes, no number travels to the host, and the processes add up one histogram per pass.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from . import _cpu
from ._sharding import Layout, layout_of, sum_over_parts_
from .tensors import local

#: Elements compared or counted at a time on a GPU.
GPU_BLOCK = 2**21
#: Tensors of at most this many elements are compared together.
SMALL = 2**12
#: Size of the sample that narrows the search down.
SAMPLE = 3 * 2**15
#: Bits per digit, for one value and for many.
DIGIT, DIGIT_OF_MANY = 16, 11


def in_blocks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The tensors, of one shape, cut into equal flat parts; whole if small, or if their layouts do not allow it."""
    size = _cpu.SCAN_BLOCK if tensors[0].is_cpu else GPU_BLOCK
    if tensors[0].numel() <= size or not all(t.is_contiguous() for t in tensors):
        return [tensors]
    return zip(*(torch.split(t.view(-1), size) for t in tensors), strict=True)


class Scan:
    """Compares and counts absolute values, block by block, in at least single precision.

    On a GPU a count is a 0-dimensional tensor, which causes no synchronization.
    """

    def __init__(self, tensors: Iterable[Tensor]):
        self._dtype = _precision(tensors)

    @cached_property
    def _fast(self) -> _cpu.Scan:
        return _cpu.Scan(self._dtype)

    def _magnitudes(self, block: Tensor) -> Tensor:
        return block.reshape(-1).abs().to(self._dtype)

    def at_most(self, block: Tensor, bound: float | Tensor) -> Tensor:
        """|block| <= bound, flat."""
        if _cpu.suits_numpy(block):
            return self._fast.at_most(block, float(bound))
        return self._magnitudes(block) <= (bound.to(block.device) if isinstance(bound, Tensor) else bound)

    def just_below(self, bound: float) -> float:
        """The next smaller number of the precision that is compared in."""
        return torch.nextafter(*torch.tensor([bound, -math.inf], dtype=self._dtype)).item()

    def split(self, block: Tensor, low: float, high: float) -> tuple[int, Tensor]:
        """How many absolute values are <= low, and those with low < value < high."""
        if _cpu.suits_numpy(block):
            return self._fast.split(block, low, high)
        values = self._magnitudes(block)
        is_low = values <= low
        return int(count_true(is_low)), values[(values < high) & ~is_low]

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


def _precision(tensors: Iterable[Tensor]) -> torch.dtype:
    """The type in which their elements are compared."""
    dtype = torch.float32
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


# ---- The k-th smallest ----


@torch.no_grad()
def kth_smallest_of_each(rows: list[list[Tensor]], ks: list[int]) -> list[float] | list[Tensor]:
    """For each row of tensors the k-th smallest (k = 1, 2, ...) absolute value of all its elements together; -inf for
    k = 0. Exact. On a GPU, and of sharded tensors, 0-dimensional tensors, equal on all processes."""
    if all(is_ordinary(t) for row in rows for t in row):
        return [kth_smallest(row, k) for row, k in zip(rows, ks, strict=True)]
    return list(_kth_by_digits(rows, ks).unbind())


def is_ordinary(t: Tensor) -> bool:
    return t.is_cpu and layout_of(t) is None


def _kth_by_digits(rows: list[list[Tensor]], ks: list[int]) -> Tensor:
    """The bits of floating-point numbers >= 0, read as an integer, have their order. So the highest digit of the k-th
    smallest is that at which the histogram of the highest digits, summed from 0 on, reaches k; and so on among the
    numbers that begin with it."""
    dtype = _precision(t for row in rows for t in row)
    width = DIGIT if len(rows) == 1 else DIGIT_OF_MANY
    device = local(rows[0][0]).device
    ranks = torch.tensor(ks).to(device, non_blocking=True)
    left = ranks[:, None]
    prefixes = torch.zeros(len(rows), dtype=_INTEGERS[dtype], device=device)
    for shift in reversed(range(0, _bits(dtype), width)):
        totals = _digit_counts(rows, dtype, shift, width, prefixes).cumsum(1)
        digits = torch.searchsorted(totals, left).clamp_(max=totals.size(1) - 1)
        left = left - torch.where(digits > 0, totals.gather(1, (digits - 1).clamp_(min=0)), 0)
        prefixes = (prefixes << width) | digits.view(-1).to(prefixes.dtype)
    return torch.where(ranks > 0, prefixes.view(dtype), -math.inf)


_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def _bits(dtype: torch.dtype) -> int:
    """Without the sign."""
    return dtype.itemsize * 8 - 1


def _digit_counts(rows: list[list[Tensor]], dtype: torch.dtype, shift: int, width: int, prefixes: Tensor) -> Tensor:
    """For each row a histogram of the digit at `shift`, of the numbers whose higher digits are the prefix."""
    counts: dict[tuple[torch.device, Layout], Tensor] = {}
    for i, row in enumerate(rows):
        parts: dict[tuple[torch.device, Layout], list[Tensor]] = {}
        for t in row:
            parts.setdefault((t.device, layout_of(t)), []).append(local(t))
        for where, of_row in parts.items():
            if where not in counts:
                counts[where] = torch.zeros(len(rows), 2**width, dtype=torch.int64, device=of_row[0].device)
            prefix = prefixes[i].to(of_row[0].device)
            for block in _shared_blocks(of_row):
                number = block.abs().to(dtype).view(_INTEGERS[dtype])
                is_counted = number >> min(shift + width, _bits(dtype)) == prefix
                counts[where][i].index_add_(0, (number >> shift) & (2**width - 1), is_counted.long())
    summed = [sum_over_parts_(found, layout).to(prefixes.device) for (_, layout), found in counts.items()]
    return torch.stack(summed).sum(0)


def _shared_blocks(tensors: list[Tensor]) -> Iterator[Tensor]:
    """Flat blocks, of which small tensors share one: on a GPU the number of calls is what costs."""
    block: list[Tensor] = []
    for piece in (piece for t in tensors for piece in torch.split(t.reshape(-1), GPU_BLOCK)):
        if block and sum(map(len, block)) + len(piece) > GPU_BLOCK:
            yield torch.cat(block)
            block = []
        block.append(piece)
    yield torch.cat(block) if len(block) > 1 else block[0]


@torch.no_grad()
def kth_smallest(tensors: list[Tensor], k: int) -> float:
    """The same of one row of ordinary tensors, best on a CPU.

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
    rank = k - sum(n_up_to_low)
    if 0 < rank <= candidates.numel():
        return _kth(candidates, rank)
    # Many equal values, such as the zero gradients of tokens that do not occur, can be a bound themselves.
    bound = low if rank <= 0 else high
    scan = Scan(tensors)
    blocks = [block for t in tensors for (block,) in in_blocks(t)]
    n_up_to = sum(int(count_true(scan.at_most(block, bound))) for block in blocks)
    n_below = sum(int(count_true(scan.at_most(block, scan.just_below(bound)))) for block in blocks)
    return bound if n_below < k <= n_up_to else _kth(torch.cat([t.reshape(-1).abs() for t in tensors]), k)


def _kth(values: Tensor, k: int) -> float:
    """The k-th smallest; may reorder `values`."""
    if values.is_cpu and values.dtype in (torch.float32, torch.float64):
        return _cpu.kth(values, k)
    return values.kthvalue(k).values.item()


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


# ---- Masks ----


def merge_small(
    sizes: list[Tensor], masks: list[Tensor], thresholds: Sequence[float | Tensor]
) -> Iterator[tuple[Tensor, Tensor, float | Tensor, list[Tensor]]]:
    """The same work in fewer pieces: a model has far more norms and biases than matrices.

    Yields values, mask and threshold; and, where the mask is a copy of several, flat views of them.
    """
    small: dict[tuple[torch.device, torch.dtype, float | Tensor], list[int]] = {}
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
    thresholds: Sequence[float | Tensor],
    choose: Callable[[Tensor, float | Tensor], Tensor],
    is_chosen: Tensor | None = None,
) -> Tensor:
    """Write `choose(values, threshold)`, blockwise, into the masks; if `is_chosen` is False, leave them as they are.

    Returns, on their device, how many elements of each mask are True now, and at the end how many, over all masks, were
    also True before. Of sharded masks these are the numbers of the wholes.
    """
    groups: dict[Layout, list[int]] = {}
    for i, mask in enumerate(masks):
        groups.setdefault(layout_of(mask), []).append(i)
    counts: dict[int, Tensor] = {}
    common = []
    for layout, indices in groups.items():
        own, sizes = ([local(tensors[i]) for i in indices] for tensors in (masks, values))
        n_common = _replace(scan, own, sizes, [thresholds[i] for i in indices], choose, is_chosen)
        found = _as_vector([*(count_true(mask.view(torch.bool)) for mask in own), n_common])
        *of_masks, of_all = sum_over_parts_(found, layout).unbind()
        counts.update(zip(indices, of_masks, strict=True))
        common.append(of_all)
    return _as_vector([*(counts[i] for i in range(len(masks))), _as_vector(common).sum()])


def _replace(
    scan: Scan,
    masks: list[Tensor],
    values: list[Tensor],
    thresholds: Sequence[float | Tensor],
    choose: Callable[[Tensor, float | Tensor], Tensor],
    is_chosen: Tensor | None,
) -> Tensor:
    """Returns how many elements are True both before and after."""
    common = []
    for value, mask, threshold, parts in merge_small(values, masks, thresholds):
        for block, part in in_blocks(value, mask):
            new = choose(block, threshold)
            if is_chosen is not None:
                new = torch.where(is_chosen.to(part.device), new.view(part.shape), part.view(torch.bool))
            common.append(scan.replace(part, new))
        if parts:
            torch._foreach_copy_(parts, torch.split(mask, [len(part) for part in parts]))
    return _as_vector(common).sum()


def _as_vector(counts: Sequence[int | Tensor]) -> Tensor:
    """All on one device, and without waiting for it."""
    device = next((count.device for count in counts if isinstance(count, Tensor)), None)
    if device is None:
        return torch.tensor(counts, dtype=torch.int64)
    return torch.stack([c.to(device) if isinstance(c, Tensor) else torch.full((), c, device=device) for c in counts])
