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
from typing import Any

import torch
from torch import Tensor

from .ascents import ASCENTS, as_float

CITATION = """\
@inproceedings{zhao2024when,
  title     = {When Will Gradient Regularization Be Harmful?},
  author    = {Zhao, Yang and Zhang, Hao and Hu, Xiuyuan},
  booktitle = {International Conference on Machine Learning},
  year      = {2024},
  url       = {https://arxiv.org/abs/2406.09723}
}"""
HALF_PRECISION = (torch.float16, torch.bfloat16)


def grad_of(p: Tensor) -> Tensor:
    """`.grad` of a parameter that has one."""
    assert p.grad is not None
    return p.grad


def gradient_norm(params: Iterable[Tensor]) -> float:
    """||g||_2 over the `.grad` of all `params`, taken as one vector; 0.0 if none of them has a gradient.

    Of sharded parameters (DTensor) it is the norm of the whole, for which the processes communicate.
    """
    return _total_norm([p.grad for p in params if p.grad is not None])


@torch.no_grad()
def _total_norm(tensors: list[Tensor]) -> float:
    return as_float(torch.nn.utils.get_total_norm(tensors)) if tensors else 0.0


@torch.no_grad()
def gradient_cosine(params: Iterable[Tensor], first: Iterable[Tensor | None], ratio: float = 0.0) -> float | None:
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
    local = [part for t in tensors if (part := _local(t.detach())).numel() > 0]
    return not local or math.isfinite(torch.nn.utils.get_total_norm(local, norm_type=math.inf))


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of a sharded tensor, as memory that can be written to; else the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def clip_factor(norm: float, max_norm: float) -> float:
    """What a gradient of this norm is multiplied by so that its norm is at most `max_norm`; 0 is no bound.

    A norm that is not finite is not clipped: a factor of 0 would hide the overflow.
    """
    return max_norm / norm if 0 < max_norm < norm < math.inf else 1.0


@torch.no_grad()
def scale_gradients_(params: Iterable[Tensor], factor: float) -> None:
    """`.grad *= factor`, in place. A factor of 0 writes zeros: a gradient that is present stays present."""
    if factor == 1:
        return
    for p in params:
        if p.grad is not None:
            p.grad.zero_() if factor == 0 else p.grad.mul_(factor)


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

    Attributes:
        slope: g1 . d, the rise of the loss per unit of r to first order; ||g1|| for `gradient`.
    """

    def __init__(self, params: Iterable[Tensor], ascent: str = "gradient", optimizer: Any = None):
        self._ascent = ASCENTS[ascent]
        self._optimizer = optimizer
        self._params = [p for p in params if p.grad is not None or self._ascent.passes == 1]
        self._moved: list[tuple[Tensor, Tensor]] = []  # with theta
        self._dropped: list[Tensor] = []
        self._step_per_grad = 0.0
        self._follows_gradient = True
        self.slope = 0.0

    @torch.no_grad()
    def apply(self, radius: float, norm: float = math.nan, grad_scale: float = 1.0) -> None:
        """Move the parameters by `radius` along d; `norm` is ||g|| over all parameters that share the radius.

        The gradients are multiplied by `grad_scale` on the way, while each is in the processor's cache. With 0, which
        is SAM, they are dropped: autograd then need not add to them, and their memory pays for the copy of theta.
        """
        directions, length = self._ascent.direction(self._params, norm, self._optimizer)
        self._step_per_grad = radius / length
        self._follows_gradient = True
        slopes: list[Tensor] = []
        for p, direction in zip(self._params, directions, strict=True):
            grad = p.grad
            if direction is not None:
                theta = _local(p.detach())
                self._moved.append((p, theta.clone()))
                theta.add_(_local(direction), alpha=self._step_per_grad)
                if direction is not grad:
                    self._follows_gradient = False
                    if grad is not None and self._ascent.passes > 1:
                        slopes.append(torch.sum(direction * grad))
            if grad is None or grad_scale == 1:
                continue
            if grad_scale == 0:
                p.grad = None
                self._dropped.append(p)
            else:
                _local(grad).mul_(grad_scale)
        self.slope = norm if self._follows_gradient else sum(map(as_float, slopes)) / length

    @torch.no_grad()
    def restore(self) -> None:
        """Write theta back, bit for bit. Harmless when nothing is perturbed; repeats what an interruption cut short.

        A parameter whose gradient was dropped and that the second pass did not reach gets the gradient 0: the optimizer
        would skip one without.
        """
        for p, theta in self._moved:
            _local(p.detach()).copy_(theta)
        for p in self._dropped:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        self._moved, self._dropped = [], []

    @contextmanager
    @torch.no_grad()
    def suspended(self) -> Iterator[None]:
        """Within, the parameters are theta. Nothing happens when nothing is perturbed."""
        moved = [(_local(p.data), theta) for p, theta in self._moved]
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
    def second_gradient_norm(self, ratio: float) -> float | None:
        """||g2||, where `.grad` holds ratio * g1 + g2 and theta is still perturbed. Follow with `restore`.

        For ratio != 0, g1 is recovered from the step that theta really took: in float32 the relative error stays below
        1e-3 for ratios up to 1e3. The perturbed parameters serve as scratch space, which saves another copy of them.
        None if theta moved along something else than g1, which then cannot be recovered.
        """
        if ratio == 0:
            return gradient_norm(self._params)
        if not self._follows_gradient:
            return None
        for p, theta in self._moved:
            _local(p.detach()).sub_(theta).mul_(-ratio / self._step_per_grad).add_(_local(grad_of(p)))
        return _total_norm([p.detach() for p in self._params])
