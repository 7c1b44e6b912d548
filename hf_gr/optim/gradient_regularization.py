"""Gradient regularization: the update rule, on plain tensors.

The objective L(theta) + lambda ||grad L(theta)|| has, to first order in r, the gradient (Eq. 2 of "When Will Gradient
Regularization Be Harmful?", Zhao et al., ICML 2024)

    g = (1 - lambda/r) g1 + (lambda/r) g2,    g1 = grad L(theta),    g2 = grad L(theta + r g1 / ||g1||),

with both gradients on the same batch. SAM is lambda = r. The released code mixes g1 / ||g1|| instead of g1, which
differs whenever lambda != r; this is the formula of the paper.

Autograd accumulates the second gradient onto the first, so that besides `.grad` only a copy of theta is held (and SAM,
which needs no g1 after the perturbation, has `.grad` free until the second backward pass):

    loss(model).backward()                                      # .grad = g1
    perturbation = Perturbation(params)
    try:
        perturbation.apply(r, gradient_norm(params), grad_scale=(r - lambda_) / lambda_)
        loss(model).backward()                                  # .grad = (r/lambda - 1) g1 + g2
    finally:
        perturbation.restore()
    scale_gradients_(params, lambda_ / r)                       # .grad = (1 - lambda/r) g1 + (lambda/r) g2
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .ascents import ASCENTS, NORM_EPS, as_float, as_tensor, length, whole
from .tensors import blocks_of, grad_of, local

CITATION = """\
@inproceedings{zhao2024when,
  title     = {When Will Gradient Regularization Be Harmful?},
  author    = {Zhao, Yang and Zhang, Hao and Hu, Xiuyuan},
  booktitle = {International Conference on Machine Learning},
  year      = {2024},
  url       = {https://arxiv.org/abs/2406.09723}
}"""
HALF_PRECISION = (torch.float16, torch.bfloat16)


@torch.no_grad()
def gradient_norm(params: Iterable[Tensor]) -> Tensor:
    """||g||_2 over the `.grad` of all `params`, taken as one vector; 0 if none of them has a gradient.

    It stays on the device: nothing waits for it. Of sharded parameters (DTensor) it is the norm of the whole, for which
    the processes communicate.
    """
    return length([p.grad for p in params if p.grad is not None])


@torch.no_grad()
def gradient_cosine(
    params: Iterable[Tensor], first: Iterable[Tensor | None], ratio: Tensor | float = 0.0
) -> float | None:
    """The cosine of g1 and g2, each taken as one vector, where `.grad` holds ratio * g1 + g2 and `first` is g1.

    A gradient that is missing is 0. None if one of both vectors is 0 or not finite.
    """
    products = [0.0, 0.0, 0.0]
    for p, g1 in zip(params, first, strict=True):
        if p.grad is None:
            continue
        g2 = p.grad if g1 is None or ratio == 0 else p.grad - ratio * g1
        pairs = [(g2, g2)] if g1 is None else [(g2, g2), (g1, g1), (g1, g2)]
        for i, (a, b) in enumerate(pairs):
            products[i] += as_float(torch.sum(a.double() * b.double()))
    length = math.sqrt(products[0]) * math.sqrt(products[1])
    return products[2] / length if 0 < length < math.inf else None


@torch.no_grad()
def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no element is infinite or NaN; of sharded tensors, those that this process holds. One reduction."""
    parts = [part for t in tensors if (part := local(t.detach())).numel() > 0]
    return not parts or math.isfinite(torch.nn.utils.get_total_norm(parts, norm_type=math.inf))


def has_direction(norm: Tensor) -> Tensor:
    """Whether a vector of this norm points anywhere. One that is not finite is for a gradient scaler or a guard."""
    return (norm > 0) & norm.isfinite()


def clip_factor(norm: Tensor, max_norm: Tensor | float) -> Tensor:
    """What a gradient of this norm is multiplied by so that its norm is at most `max_norm`.

    A norm that is not finite is not clipped: a factor of 0 would hide the overflow.
    """
    return torch.where((norm > max_norm) & norm.isfinite(), max_norm / norm, 1.0)


@torch.no_grad()
def scale_gradients_(params: Iterable[Tensor], factor: Tensor | float) -> None:
    """`.grad *= factor`, in place. A factor of 0 writes zeros: a gradient that is present stays present."""
    _scale_([p.grad for p in params], factor)


def _scale_(grads: list[Tensor | None], factor: Tensor | float) -> None:
    present = [local(grad) for grad in grads if grad is not None]
    if isinstance(factor, Tensor):
        for block in blocks_of(present):
            torch._foreach_mul_(block, factor.to(block[0].device))
    elif present and factor == 0:
        torch._foreach_zero_(present)
    elif present and factor != 1:
        torch._foreach_mul_(present, factor)


@torch.no_grad()
def add_gradients_(params: Iterable[Tensor], grads: Iterable[Tensor | None]) -> None:
    """`.grad += grad`, pair by pair, where either may be None. The tensors in `grads` may be taken over as `.grad`."""
    for p, grad in zip(params, grads, strict=True):
        if grad is not None:
            p.grad = grad.to(p.dtype) if p.grad is None else p.grad.add_(grad)


@contextmanager
def gradients_set_aside(params: Iterable[Tensor]) -> Iterator[None]:
    """Within, `params` start without gradients; afterwards they have those from before."""
    kept = [(p, p.grad) for p in params]
    for p, _ in kept:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in kept:
            p.grad = grad


@contextmanager
def in_float32(params: Iterable[Tensor]) -> Iterator[None]:
    """Within, the half-precision `params` and their gradients are float32, so that a perturbation finds room in them.

    A step of radius 0.05 leaves three quarters of the coordinates of bfloat16 weights where they are. Afterwards the
    parameters are their own storage again, as it was; the gradients are rounded once.
    """
    halves = [(p, p.data) for p in params if p.dtype in HALF_PRECISION]
    _change_type(halves, [p.data.float() for p, _ in halves])
    try:
        yield
    finally:
        _change_type(halves, [theta for _, theta in halves])


def _change_type(halves: list[tuple[Tensor, Tensor]], values: list[Tensor]) -> None:
    for (p, _), value in zip(halves, values, strict=True):
        grad, p.grad = p.grad, None  # torch allows a gradient of the parameter's own type alone
        p.data = value
        p.grad = None if grad is None else grad.to(value.dtype)


class Perturbation:
    """theta -> theta + r d, and exactly back; d is g / ||g||, or what another ascent makes of g.

    theta is copied before it moves and copied back afterwards: subtracting what was added would leave a rounding error
    that piles up over the steps. The storage of a parameter is never replaced, and parameters that the ascent has no
    direction for are neither moved nor copied.

    Args:
        params: the trainable parameters, with g in their `.grad`.
        ascent: a key of `ASCENTS`.
        optimizer: the optimizer of the parameters, for an ascent that follows its state.
        scratch: keeps the memory of the copies from one perturbation to the next on a CPU, where fresh memory costs
            more than the arithmetic. Elsewhere it is given back.

    Attributes:
        slope: g1 . d, the rise of the loss per unit of r to first order; ||g1|| for `gradient`.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        ascent: str = "gradient",
        optimizer: Any = None,
        scratch: dict[int, Tensor] | None = None,
    ):
        self._ascent = ASCENTS[ascent]
        self._optimizer = optimizer
        self._params = [p for p in params if p.grad is not None or self._ascent.passes == 1]
        self._scratch = {} if scratch is None else scratch
        self._moved: list[tuple[Tensor, Tensor]] = []  # with theta
        self._dropped: list[Tensor] = []
        self._step_per_grad = torch.zeros(())
        self._follows_gradient = True
        self.slope = torch.zeros(())

    @torch.no_grad()
    def apply(self, radius: Tensor | float, norm: Tensor | float = math.nan, grad_scale: Tensor | float = 1.0) -> None:
        """Move the parameters by `radius` along d; `norm` is ||g|| over all parameters that share the radius.

        Where d has no direction, because g is 0 or not finite, finite coordinates stay where they are.

        The gradients are multiplied by `grad_scale` on the way, while each is in the processor's cache. With the number
        0, which is SAM, they are dropped: autograd then need not add to them, and their memory pays for the copy of
        theta.
        """
        norm = as_tensor(norm)
        directions, size = self._ascent.direction(self._params, norm, self._optimizer)
        size = as_tensor(size)
        self._step_per_grad = torch.where(size.isfinite(), radius / size, 0.0)
        self._follows_gradient = True
        slopes: list[Tensor] = []
        remaining = iter(directions)
        for block in blocks_of(self._params):
            moving = [(p, d) for p, d in zip(block, islice(remaining, len(block)), strict=True) if d is not None]
            self._move(moving)
            self._follows_gradient &= all(d is p.grad for p, d in moving)
            if self._ascent.passes > 1 and not self._ascent.is_metric:
                slopes += [torch.sum(d * grad_of(p)).to(size.device) for p, d in moving]
            self._scale_or_drop(block, grad_scale)
        self.slope = size - NORM_EPS if self._ascent.is_metric else whole(sum(slopes, torch.zeros(()))) / size

    def _move(self, moving: list[tuple[Tensor, Tensor]]) -> None:
        if not moving:
            return
        params = [p for p, _ in moving]
        thetas, directions = [local(p) for p in params], [local(d) for _, d in moving]
        copies = [self._memory_for(p, theta) for p, theta in zip(params, thetas, strict=True)]
        torch._foreach_copy_(copies, thetas)
        self._moved += zip(params, copies, strict=True)
        step = self._step_per_grad.to(thetas[0].device, torch.promote_types(thetas[0].dtype, torch.float32))
        if thetas[0].is_cpu:  # without a temporary; on a GPU, one call for each tensor
            torch._foreach_addcmul_(thetas, directions, [step] * len(thetas))
        else:
            torch._foreach_add_(thetas, torch._foreach_mul(directions, step))

    def _memory_for(self, p: Tensor, theta: Tensor) -> Tensor:
        kept = self._scratch.get(id(p))  # nothing but memory: any other of this size would do
        fits = kept is not None and kept.dtype is theta.dtype and kept.shape == theta.shape
        return kept if kept is not None and fits else torch.empty_like(theta)

    def _scale_or_drop(self, block: list[Tensor], grad_scale: Tensor | float) -> None:
        if isinstance(grad_scale, Tensor) or grad_scale != 0:
            _scale_([p.grad for p in block], grad_scale)
            return
        present = [p for p in block if p.grad is not None]
        for p in present:
            p.grad = None
        self._dropped += present

    @torch.no_grad()
    def restore(self) -> None:
        """Write theta back, bit for bit. Harmless when nothing is perturbed; repeats what an interruption cut short.

        A parameter whose gradient was dropped and that the second pass did not reach gets the gradient 0: the optimizer
        would skip one without.
        """
        if self._moved:
            torch._foreach_copy_([local(p) for p, _ in self._moved], [theta for _, theta in self._moved])
        for p in self._dropped:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        self._scratch.update((id(p), theta) for p, theta in self._moved if theta.is_cpu)
        self._moved, self._dropped = [], []

    @contextmanager
    @torch.no_grad()
    def suspended(self) -> Iterator[None]:
        """Within, the parameters are theta. Nothing happens when nothing is perturbed."""
        moved = [(local(p.data), theta) for p, theta in self._moved]
        perturbed = [p.clone() for p, _ in moved]
        # Through `.data`, of which autograd takes no notice: a backward pass may be about to use the same values again.
        for p, theta in moved:
            p.copy_(theta)
        try:
            yield
        finally:
            for (p, _), value in zip(moved, perturbed, strict=True):
                p.copy_(value)

    @torch.no_grad()
    def second_gradient_norm(self, ratio: Tensor | float) -> Tensor | None:
        """||g2||, where `.grad` holds ratio * g1 + g2 and theta is still perturbed. Follow with `restore`.

        For ratio != 0, g1 is recovered from the step that theta really took: in float32 the relative error stays below
        1e-3 for ratios up to 1e3. The perturbed parameters serve as scratch space, which saves another copy of them.
        None if theta moved along something else than g1, which then cannot be recovered.
        """
        if not isinstance(ratio, Tensor) and ratio == 0:
            return gradient_norm(self._params)
        if not self._follows_gradient:
            return None
        step = self._step_per_grad
        factor = torch.where(step != 0, -ratio / step, 0.0)
        copies = dict(self._moved)
        for block in blocks_of(p for p, _ in self._moved):
            thetas = [local(p) for p in block]
            torch._foreach_sub_(thetas, [copies[p] for p in block])
            torch._foreach_mul_(thetas, factor.to(thetas[0].device))
            torch._foreach_add_(thetas, [local(grad_of(p)) for p in block])
        return length(self._params)
