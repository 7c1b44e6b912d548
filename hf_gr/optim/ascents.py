"""Ascents: where gradient regularization takes its second gradient, theta + r d with a direction d of length 1.

An ascent is a function `f(params, norm, optimizer) -> (directions, length)`. It gets the parameters that have a
gradient, with g1 in their `.grad`, norm = ||g1|| over all parameters that share the radius, and the optimizer, if there
is one. It returns a direction for each parameter, or None for one that stays where it is, and a length that they are
all divided by: d = directions / length. The directions may come from a generator: a block of them is used before the
next is asked for. Norms and lengths are 0-dimensional tensors on the device, and no ascent may read them: a GPU would
have to wait.

An ascent that does not need g1, such as `momentum`, has `passes=1`: the step is then the gradient at theta + r d alone,
and `f` gets all parameters, whatever is in their `.grad`.

To add an ascent, write the function and give it an entry in `ASCENTS`: the command line, the validation, the update
rule, the model card, the docs and the tests read that table.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .tensors import blocks_of, grad_of

#: Added to the length that divides a direction. The released code of GR adds nothing: a zero gradient becomes NaN.
NORM_EPS = 1e-12
#: eta of ASAM, its published value: weights near 0 still move.
ADAPTIVE_ETA = 0.01
#: Where optimizers keep their first moment: the Adam family, and SGD with momentum.
FIRST_MOMENTS = ("exp_avg", "momentum_buffer")

Directions = tuple[Iterable[Tensor | None], Tensor]


class Ascent(NamedTuple):
    """An ascent: its function, what `--help` says of it, d as an equation, the BibTeX of its source, how many passes
    over a batch a regularized step takes, and whether d = M g1 / sqrt(g1 . M g1) with a positive diagonal M: the slope
    g1 . d is then the length."""

    direction: Callable[[Sequence[Tensor], Tensor, Any], Directions]
    help: str
    latex: str
    citation: str
    passes: int = 2
    is_metric: bool = False


def gradient(params: Sequence[Tensor], norm: Tensor, optimizer: Any = None) -> Directions:
    """d = g1 / ||g1||, the direction in which the loss climbs fastest."""
    return (p.grad for p in params), norm + NORM_EPS


def adaptive(params: Sequence[Tensor], norm: Tensor, optimizer: Any = None) -> Directions:
    """d = T^2 g1 / ||T g1|| with T = |theta| + eta, for every parameter: ASAM, Kwon et al., ICML 2021, Eq. 3 and 4.

    Multiplying a weight by a constant, and what follows it by the inverse, does not change r. So r is not that of SAM,
    but some ten times as large: 0.5 to 2.
    """
    return _scaled(params, lambda p: True)


def adaptive_weights(params: Sequence[Tensor], norm: Tensor, optimizer: Any = None) -> Directions:
    """`adaptive` with T = 1 for biases and the scales of norms, the parameters with at most one dimension."""
    return _scaled(params, lambda p: p.ndim > 1)


def _scaled(params: Sequence[Tensor], is_scaled: Callable[[Tensor], bool]) -> Directions:
    """T^2 g1 and ||T g1||, where T is 1 for parameters that are not scaled.

    On a GPU, where a call costs more than its arithmetic, T is kept from one to the other. A block of it is given back
    when it has been used, so that the copies of theta can have its memory.
    """
    kept: list[list[Tensor]] = []

    def once(block: list[Tensor]) -> Sequence[Tensor]:
        scales = _scales(block)
        if _is_kept(block):
            kept.append(scales)
        return torch._foreach_mul(scales, [grad_of(p) for p in block])

    def twice(block: list[Tensor]) -> Sequence[Tensor]:
        scales = kept.pop(0) if kept else _scales(block)
        torch._foreach_mul_(scales, scales)
        torch._foreach_mul_(scales, [grad_of(p) for p in block])
        return scales

    def gradients(block: list[Tensor], scaled: Callable[[list[Tensor]], Sequence[Tensor]]) -> list[Tensor | None]:
        chosen = [p for p in block if p.grad is not None and is_scaled(p)]
        changed = dict(zip(chosen, scaled(chosen), strict=True)) if chosen else {}
        return [changed.get(p, p.grad) for p in block]

    norms: list[Tensor] = []
    for block in blocks_of(params):
        if present := [g for g in gradients(block, once) if g is not None]:
            norms += torch._foreach_norm(present)
    return chain.from_iterable(gradients(block, twice) for block in blocks_of(params)), _total(norms) + NORM_EPS


def _is_kept(block: list[Tensor]) -> bool:
    """Whether T of these parameters is."""
    return not block[0].is_cpu


def _scales(params: list[Tensor]) -> list[Tensor]:
    """T."""
    scales = list(torch._foreach_abs([p.detach() for p in params]))
    torch._foreach_add_(scales, ADAPTIVE_ETA)
    return scales


def momentum(params: Sequence[Tensor], norm: Tensor, optimizer: Any) -> Directions:
    """d = -m / ||m|| with m the optimizer's first moment, one vector over all parameters: MSAM, Becker et al., 2024.

    m is a mean of gradients, so theta moves along the coming update. (The bias correction of Adam is one factor, and
    drops out.) A parameter that has no moment yet stays.
    """
    moments = [first_moment(optimizer, p) for p in params]
    return moments, -(length(m for m in moments if m is not None) + NORM_EPS)


def first_moment(optimizer: Any, p: Tensor) -> Tensor | None:
    """m of one parameter; None if the optimizer keeps none of its shape, as after a projection, or has not begun to."""
    state = optimizer.state.get(p, {})
    moments = (state[key] for key in FIRST_MOMENTS if state.get(key) is not None)
    return next((m for m in moments if m.shape == p.shape), None)


def length(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of all tensors as one vector; 0 if there are none. Of a generator, a block is in memory at a time."""
    blocks = [tensors] if isinstance(tensors, list) else blocks_of(tensors)
    with torch.no_grad():
        norms = [norm for block in blocks if block for norm in torch._foreach_norm(block)]
    return _total(norms)


@torch.no_grad()
def _total(norms: list[Tensor]) -> Tensor:
    if not norms:
        return torch.zeros(())
    return whole(torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms])))


def whole(value: Tensor) -> Tensor:
    """A 0-dimensional tensor, reduced over all processes if it is sharded."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def as_tensor(value: Tensor | float) -> Tensor:
    """A number as a 0-dimensional tensor in double precision; a tensor as it is."""
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def as_float(value: Tensor | float) -> float:
    """Of one element, reduced over all processes if it is sharded. A GPU has to finish its work first."""
    return float(whole(value) if isinstance(value, Tensor) else value)


SAM_CITATION = """\
@inproceedings{foret2021sharpness,
  title     = {Sharpness-Aware Minimization for Efficiently Improving Generalization},
  author    = {Foret, Pierre and Kleiner, Ariel and Mobahi, Hossein and Neyshabur, Behnam},
  booktitle = {International Conference on Learning Representations},
  year      = {2021},
  url       = {https://arxiv.org/abs/2010.01412}
}"""
ASAM_CITATION = """\
@inproceedings{kwon2021asam,
  title     = {ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks},
  author    = {Kwon, Jungmin and Kim, Jeongseop and Park, Hyunseo and Choi, In Kwon},
  booktitle = {International Conference on Machine Learning},
  year      = {2021},
  url       = {https://arxiv.org/abs/2102.11600}
}"""
MSAM_CITATION = """\
@article{becker2024momentum,
  title   = {Momentum-SAM: Sharpness Aware Minimization without Computational Overhead},
  author  = {Becker, Marlon and Altrock, Frederick and Risse, Benjamin},
  journal = {arXiv preprint arXiv:2401.12033},
  year    = {2024},
  url     = {https://arxiv.org/abs/2401.12033}
}"""

ASCENTS: dict[str, Ascent] = {
    "gradient": Ascent(gradient, "along the gradient, as in SAM", r"\frac{g_1}{\|g_1\|}", SAM_CITATION, is_metric=True),
    "adaptive": Ascent(
        adaptive,
        "each coordinate scaled by its weight (ASAM), with r about 0.5 to 2",
        r"\frac{T^2 g_1}{\|T g_1\|}, \ T = |\theta| + 0.01",
        ASAM_CITATION,
        is_metric=True,
    ),
    "adaptive_weights": Ascent(
        adaptive_weights,
        "as adaptive, with biases and norms left unscaled",
        r"\frac{T^2 g_1}{\|T g_1\|}, \ T = |\theta| + 0.01 \ \mathrm{or} \ 1",
        ASAM_CITATION,
        is_metric=True,
    ),
    "momentum": Ascent(
        momentum,
        "along the optimizer's momentum (MSAM), in one pass, with a larger r",
        r"\frac{-m}{\|m\|}",
        MSAM_CITATION,
        passes=1,
    ),
}
