"""Ascents: where gradient regularization takes its second gradient, theta + r d with a direction d of length 1.

An ascent is a function `f(params, norm) -> (directions, length)`. It gets the parameters, with g1 in their `.grad`, and
norm = ||g1|| over all parameters that share the radius. It returns a direction for each parameter and the length of all
directions as one vector: d = directions / length. The directions may come from a generator: each is used before the
next is asked for, so that only one of them is in memory.

To add an ascent, write the function and give it an entry in `ASCENTS`: the update rule, the model card, the docs and
the tests read that table.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

#: Added to the norm that divides g1. The released code adds nothing and turns a zero gradient into NaN.
NORM_EPS = 1e-12


class Ascent(NamedTuple):
    """An ascent: its function, what the docs say of it, d as an equation, and the BibTeX of its source."""

    direction: Callable[[Sequence[Tensor], float], tuple[Iterable[Tensor], float]]
    help: str
    latex: str
    citation: str


def sam(params: Sequence[Tensor], norm: float) -> tuple[Iterable[Tensor], float]:
    """d = g1 / ||g1||, the direction in which the loss climbs fastest."""
    return (p.grad for p in params if p.grad is not None), norm + NORM_EPS


SAM_CITATION = """\
@inproceedings{foret2021sharpness,
  title     = {Sharpness-Aware Minimization for Efficiently Improving Generalization},
  author    = {Foret, Pierre and Kleiner, Ariel and Mobahi, Hossein and Neyshabur, Behnam},
  booktitle = {International Conference on Learning Representations},
  year      = {2021},
  url       = {https://arxiv.org/abs/2010.01412}
}"""

ASCENTS: dict[str, Ascent] = {
    "sam": Ascent(sam, "along the gradient, as in SAM", r"\frac{g_1}{\|g_1\|}", SAM_CITATION),
}
