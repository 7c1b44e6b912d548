"""Fast paths on the CPU. A reader may skip them: each computes what the plain version at its call site computes.

NumPy compares, counts and selects many elements at a time where torch takes one after the other. torch's fused kernels
update a parameter in one pass over memory, and small blocks stay in the processor's cache.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from ._sharding import layout_of
from .tensors import grad_of

Group = dict[str, Any]
State = Mapping[Tensor, dict[str, Any]]

_has_kernels = hasattr(torch, "_fused_sgd_") and hasattr(torch, "_fused_adamw_")

# ---- Order statistics: NumPy ----

#: Elements that NumPy gets at a time; a matrix of ViT-Ti, 192 x 768, in one piece.
SCAN_BLOCK = 9 * 2**14


def suits_numpy(block: Tensor) -> bool:
    return block.is_cpu and block.numel() <= SCAN_BLOCK


class Scan:
    """`order_statistics.Scan` for blocks that `suits_numpy`.

    The memory of the results, which would cost more to get than to fill, is reused by the next call.
    """

    def __init__(self, dtype: torch.dtype):
        self._values = torch.empty(SCAN_BLOCK, dtype=dtype)
        self._flags = torch.empty(2, SCAN_BLOCK, dtype=torch.bool).numpy()

    def magnitudes(self, block: Tensor) -> Tensor:
        block = block.reshape(-1)
        values = self._values[: block.numel()]
        if block.dtype == torch.bfloat16:  # unknown to NumPy
            return values.copy_(block).abs_()
        np.abs(block.numpy(), out=values.numpy())
        return values

    def at_most(self, block: Tensor, bound: float) -> Tensor:
        values = self.magnitudes(block).numpy()
        return torch.from_numpy(np.less_equal(values, bound, out=self._flags[0, : values.size]))

    def split(self, block: Tensor, low: float, high: float) -> tuple[int, Tensor]:
        is_low = self.at_most(block, low).numpy()
        values = self._values[: is_low.size].numpy()
        is_between = np.less(values, high, out=self._flags[1, : values.size])
        np.greater(is_between, is_low, out=is_between)
        return int(np.count_nonzero(is_low)), torch.from_numpy(values[is_between])

    def replace(self, mask: Tensor, new: Tensor) -> int:
        old, flags = mask.view(-1).numpy().view(bool), new.numpy().reshape(-1)
        common = np.logical_and(old, flags, out=self._flags[1, : flags.size])
        np.copyto(old, flags)
        return int(np.count_nonzero(common))


def count_true(flags: Tensor) -> int:
    return int(np.count_nonzero(flags.numpy()))


def kth(values: Tensor, k: int) -> float:
    """The k-th smallest; reorders `values`."""
    array = values.numpy()
    array.partition(k - 1)
    return float(array[k - 1])


# ---- IRE around AdamW: block by block ----

#: Elements that a thread updates at a time: so few that most of what belongs to them stays in its cache, and so many
#: that the calls do not count.
STEP_BLOCK = 2**17


def step_block() -> int:
    """Elements that all threads update at a time."""
    return STEP_BLOCK * torch.get_num_threads()


#: The parameters of one group and what belongs to their update: (p, grad, exp_avg, exp_avg_sq, mask, step) of each.
Block = list[tuple[Tensor, ...]]


def suits_blockwise_adamw(optimizer: Optimizer) -> bool:
    """Whether it is a fused AdamW on the CPU, without hooks on its step, that has already created its state."""
    if type(optimizer) is not AdamW or optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return False
    if hasattr(optimizer, "found_inf"):  # a step that it may skip
        return False
    if any(not g["fused"] or g["amsgrad"] or isinstance(g["lr"], Tensor) for g in optimizer.param_groups):
        return False
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return all(
        (state := optimizer.state.get(p))
        and p.is_cpu
        and layout_of(p) is None
        and p.dtype == params[0].dtype
        and p.is_contiguous()
        and p.grad.is_contiguous()
        and state["exp_avg"].is_contiguous()
        and state["exp_avg_sq"].is_contiguous()
        for p in params
    )


def step_adamw_blockwise(
    optimizer: Optimizer, masks: Mapping[Tensor, Tensor]
) -> Iterator[tuple[Group, list[Tensor], list[Tensor], list[Tensor]]]:
    """Take the step of an optimizer that `suits_blockwise_adamw`.

    Yields, while a block is in the processor's cache, its group, its new parameters, the old ones and the masks as
    numbers, all flat. The last two are overwritten by the next block.
    """
    groups, state = optimizer.param_groups, optimizer.state
    blocks = [(group, block) for group in groups for block in _blocks(group, state, masks)]
    if not blocks:
        return
    torch._foreach_add_([state[p]["step"] for group in groups for p in group["params"] if p.grad is not None], 1.0)
    # One piece of scratch space for all blocks: fresh memory would cost more than the arithmetic.
    largest = max(sum(p.numel() for p, *_ in block) for _, block in blocks)
    scratch = torch.empty(2, largest, dtype=blocks[0][1][0][0].dtype)
    parts_of: dict[tuple[int, ...], list[list[Tensor]]] = {}
    for group, block in blocks:
        params, grads, exp_avgs, exp_avg_sqs, flags, steps = map(list, zip(*block, strict=True))
        flat = [p.view(-1) for p in params]
        sizes = tuple(map(len, flat))
        if sizes not in parts_of:
            parts_of[sizes] = [list(half[: sum(sizes)].split(sizes)) for half in scratch]
        old, numbers = parts_of[sizes]
        torch._foreach_copy_(old, flat)
        _fused_adamw(params, grads, exp_avgs, exp_avg_sqs, steps, group)
        torch._foreach_copy_(numbers, [mask.view(-1) for mask in flags])
        yield group, flat, old, numbers


def _blocks(group: Group, state: State, masks: Mapping[Tensor, Tensor]) -> Iterator[Block]:
    """Small parameters share a block, large ones are cut."""
    block: Block = []
    size, limit = 0, step_block()
    params = [p for p in group["params"] if p.grad is not None]
    for part in (part for p in params for part in _parts(p, state[p], masks.get(p), limit)):
        block.append(part)
        size += part[0].numel()
        if size >= limit:
            yield block
            block, size = [], 0
    if block:
        yield block


def _parts(p: Tensor, state: dict[str, Tensor], mask: Tensor | None, limit: int) -> Iterator[tuple[Tensor, ...]]:
    mask = torch.zeros_like(p, dtype=torch.uint8) if mask is None else mask
    tensors: tuple[Tensor, ...] = (p, grad_of(p), state["exp_avg"], state["exp_avg_sq"], mask)
    if p.numel() <= limit:
        yield (*tensors, state["step"])
        return
    for part in zip(*(torch.split(t.view(-1), limit) for t in tensors), strict=True):
        yield (*part, state["step"])


def _fused_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    group: Group,
) -> None:
    """`adamw(fused=True)` of a step that has been counted, by its private kernel where there is one: the checks of
    `adamw` are felt in small blocks."""
    settings: Group = {key: group[key] for key in ("lr", "weight_decay", "eps", "maximize")}
    settings |= {"beta1": group["betas"][0], "beta2": group["betas"][1], "amsgrad": False}
    if _has_kernels:
        torch._fused_adamw_(params, grads, exp_avgs, exp_avg_sqs, [], steps, **settings)
    else:
        adamw(params, grads, exp_avgs, exp_avg_sqs, [], [step - 1 for step in steps], fused=True, **settings)


# ---- LARS, TVLARS, LAMB: layer by layer ----


def suits_fused_kernels(*tensors: Tensor) -> bool:
    """Whether all are on the CPU, in single precision or all in double, and in the same order in memory."""
    dtype = tensors[0].dtype
    if dtype not in _SMALLEST:
        return False
    for t in tensors:  # noqa: SIM110  a generator would take as long as the checks
        if not (t.is_cpu and t.is_contiguous() and t.dtype == dtype):
            return False
    return True


def step_lars(
    layers: list[Tensor], others: list[Tensor], state: State, group: Group, factor: float, otherwise: float
) -> list[float]:
    """Returns q of each layer."""
    lr, weight_decay, clamp = float(group["lr"]), group["weight_decay"], group["norm_clamp"]
    if others:
        grads, buffers = [grad_of(p) for p in others], [state[p].get("momentum_buffer") for p in others]
        _sgd(others, grads, buffers, group, otherwise, 0.0, lr * group["bias_lr_scale"])
    factors = []
    for p in layers:
        g = grad_of(p)
        w_norm, d_norm = _norms_with_decay(p.ravel(), g.ravel(), weight_decay)
        ratio = _trust_ratio(w_norm, d_norm, clamp, clamp)
        q = otherwise if ratio is None else factor * ratio
        _sgd([p], [g], [state[p].get("momentum_buffer")], group, q, weight_decay, lr)
        factors.append(q)
    return factors


#: The smallest q that is left of 1 - (1 - q), in double precision, to the precision of the parameters.
_SMALLEST = {t: torch.finfo(torch.float64).eps / torch.finfo(t).eps for t in (torch.float32, torch.float64)}


def _sgd(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Any],
    group: Group,
    q: float,
    weight_decay: float,
    lr: float,
) -> None:
    """SGD with momentum along q (g + weight_decay w), in one pass."""
    momentum, nesterov = group["momentum"], group["nesterov"]
    # torch's Nesterov has the gradient without q in its step.
    if nesterov or q < _SMALLEST[params[0].dtype]:
        directions = torch._foreach_add(grads, params, alpha=weight_decay)
        torch._foreach_mul_(directions, q)
        settings = {"momentum": momentum, "dampening": 0.0, "nesterov": nesterov, "maximize": False}
        sgd(params, list(directions), buffers, foreach=True, weight_decay=0.0, lr=lr, **settings)
    elif momentum:  # the new direction enters the buffer with the factor 1 - dampening
        _fused_sgd(params, grads, buffers, weight_decay, momentum, lr, 1 - q)
    else:
        _fused_sgd(params, grads, [], weight_decay, 0.0, lr * q, 0.0)


def _fused_sgd(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Any],
    weight_decay: float,
    momentum: float,
    lr: float,
    dampening: float,
) -> None:
    """`sgd(fused=True)`, by its private kernel where there is one: the checks of `sgd` are felt in small layers."""
    settings: Group = {"weight_decay": weight_decay, "momentum": momentum, "lr": lr, "dampening": dampening}
    if _has_kernels:
        torch._fused_sgd_(params, grads, buffers, nesterov=False, maximize=False, is_first_step=False, **settings)
    else:
        sgd(params, grads, buffers or [None] * len(params), fused=True, nesterov=False, maximize=False, **settings)


def step_lamb(layers: list[Tensor], others: list[Tensor], state: State, group: Group) -> list[float]:
    """Returns the trust ratio of each layer."""
    lr = float(group["lr"])
    if others:
        _adam(others, others, state, group, lr)
    # One piece of memory for all: fresh memory would cost more than the arithmetic.
    scratch = torch.empty(0)
    factors = []
    for p in layers:
        if scratch.numel() < p.numel() or scratch.dtype != p.dtype:
            scratch = p.new_empty(max(layer.numel() for layer in layers))
        # From zero and with lr = 1, Adam goes to -u.
        negative_u = scratch[: p.numel()].view(p.shape).zero_()
        _adam([negative_u], [p], state, group, 1.0)
        if group["weight_decay"]:
            negative_u.add_(p, alpha=-group["weight_decay"])
        ratio = _trust_ratio(_norm(p), _norm(negative_u), group["norm_clamp"], None)
        factors.append(1.0 if ratio is None else ratio)
        p.add_(negative_u, alpha=lr * factors[-1])
    return factors


def _adam(targets: list[Tensor], params: list[Tensor], state: State, group: Group, lr: float) -> None:
    """Move `targets` by the step of Adam for `params`, in one pass."""
    states = [state[p] for p in params]
    # After 1e9 steps nothing is left to correct.
    completed = [s["step"] - 1.0 if group["bias_correction"] else 1e9 for s in states]
    adam(
        targets,
        [grad_of(p) for p in params],
        [s["exp_avg"] for s in states],
        [s["exp_avg_sq"] for s in states],
        [],
        [torch.tensor(steps, device="cpu") for steps in completed],
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=lr,
        weight_decay=0.0,
        eps=group["eps"],
        maximize=False,
    )


Clamp = tuple[float, float] | None


def _trust_ratio(w_norm: float, u_norm: float, w_clamp: Clamp, u_clamp: Clamp) -> float | None:
    """||w|| / ||u|| after clamping; None where one of them is 0, and 0 where one is not finite: such a layer stays."""
    if w_clamp is not None:
        w_norm = min(max(w_norm, w_clamp[0]), w_clamp[1])
    if u_clamp is not None:
        u_norm = min(max(u_norm, u_clamp[0]), u_clamp[1])
    if not (math.isfinite(w_norm) and math.isfinite(u_norm)):
        return 0.0
    return w_norm / u_norm if w_norm > 0 and u_norm > 0 else None


def _norm(t: Tensor) -> float:
    t = t.view(-1)
    return math.sqrt(torch.dot(t, t).item())  # faster than the norm


def _norms_with_decay(w: Tensor, g: Tensor, weight_decay: float) -> tuple[float, float]:
    """||w|| and ||g + weight_decay w||, flat, the latter without the sum itself."""
    ww, gg = torch.dot(w, w).item(), torch.dot(g, g).item()
    if weight_decay == 0:
        return math.sqrt(ww), math.sqrt(gg)
    square = gg + 2 * weight_decay * torch.dot(g, w).item() + weight_decay**2 * ww
    if not square > 0.01 * (gg + weight_decay**2 * ww):  # what is left of such a difference is rounding
        return math.sqrt(ww), _norm(torch.add(g, w, alpha=weight_decay))
    return math.sqrt(ww), math.sqrt(square)
