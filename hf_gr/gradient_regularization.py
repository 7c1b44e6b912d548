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

from collections.abc import Iterable

import torch
from torch import Tensor

#: Added to the norm that divides g1. The released code adds nothing and turns a zero gradient into NaN.
NORM_EPS = 1e-12


def gradient_norm(params: Iterable[Tensor]) -> float:
    """||g||_2 over the `.grad` of all `params`, taken as one vector; 0.0 if none of them has a gradient."""
    grads = [p.grad for p in params if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0


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
            p.grad = grad if p.grad is None else p.grad.add_(grad)


class Perturbation:
    """theta -> theta + r g / ||g||, and exactly back.

    theta is copied before it moves and copied back afterwards: subtracting what was added would leave a rounding error
    that piles up over the steps. The storage of a parameter is never replaced, and parameters without a gradient are
    neither moved nor copied.

    Args:
        params: the trainable parameters, with g in their `.grad`.
    """

    def __init__(self, params: Iterable[Tensor]):
        self._params = [p for p in params if p.grad is not None]
        self._theta: list[Tensor] = []
        self._step_per_grad = 0.0

    @torch.no_grad()
    def apply(self, radius: float, norm: float, grad_scale: float = 1.0) -> None:
        """Move the parameters by `radius` along g; `norm` is ||g|| over all parameters that share the radius.

        The gradients are multiplied by `grad_scale` on the way, while each is in the processor's cache. With 0, which
        is SAM, they are dropped: autograd then need not add to them, and their memory pays for the copy of theta.
        """
        self._step_per_grad = radius / (norm + NORM_EPS)
        for p in self._params:
            self._theta.append(p.detach().clone())
            p.add_(p.grad, alpha=self._step_per_grad)
            if grad_scale == 0:
                p.grad = None
            else:
                p.grad.mul_(grad_scale)

    @torch.no_grad()
    def restore(self) -> None:
        """Write theta back, bit for bit. Harmless when nothing is perturbed; repeats what an interruption cut short.

        A parameter whose gradient was dropped and that the second pass did not reach gets the gradient 0: the optimizer
        would skip one without.
        """
        for p, theta in zip(self._params, self._theta, strict=False):
            p.copy_(theta)
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        self._theta = []

    @torch.no_grad()
    def second_gradient_norm(self, ratio: float) -> float:
        """||g2||, where `.grad` holds ratio * g1 + g2 and theta is still perturbed. Follow with `restore`.

        For ratio != 0, g1 is recovered from the step that theta really took: in float32 the relative error stays below
        1e-3 for ratios up to 1e3. The perturbed parameters serve as scratch space, which saves another copy of them.
        """
        if ratio == 0:
            return gradient_norm(self._params)
        for p, theta in zip(self._params, self._theta, strict=True):
            p.sub_(theta).mul_(-ratio / self._step_per_grad).add_(p.grad)
        return float(torch.nn.utils.get_total_norm(self._params)) if self._params else 0.0
