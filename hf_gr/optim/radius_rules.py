"""Radius rules: the radius of a regularized step from r_t, which the warmup gives, and ||g1||.

A rule is a function `f(r_t, norm, r_max) -> radius`. The degree follows the radius, so that lambda / r stays what the
user and the warmup set. The norm is the one that the ascent divides by, reduced over all processes with
`gr_scope=global`, so that all of them take the same radius. It is a 0-dimensional tensor, which a rule must not read: a
GPU would have to wait.

To add a rule, write the function and give it an entry in `RADIUS_RULES`.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class RadiusRule(NamedTuple):
    """A rule: its function, what `--help` says of it, its equation, and the BibTeX of its source. `is_capped` rules
    read r_max."""

    function: Callable[[float, Tensor, float], Tensor | float]
    help: str
    latex: str
    citation: str = ""
    is_capped: bool = True


def fixed(r_t: float, norm: Tensor, r_max: float) -> Tensor | float:
    """r_t itself: SAM, and the GR paper."""
    return r_t


def gradient(r_t: float, norm: Tensor, r_max: float) -> Tensor | float:
    """min(r_t ||g1||, r_max), so that theta moves by r_t g1.

    To first order in r the step is then along the gradient of L + lambda/2 ||grad L||^2, the penalty on the squared
    norm (Karakida et al., ICML 2023; the remark in section 2.1 of the GR paper).
    """
    return (r_t * norm).clamp(max=r_max)


def loss(r_t: float, norm: Tensor, r_max: float) -> Tensor | float:
    """min(r_t / ||g1||, r_max), so that the loss rises by r_t, to first order: r has the unit of the loss."""
    return (r_t / norm).clamp(max=r_max)


KARAKIDA_CITATION = """\
@inproceedings{karakida2023understanding,
  title     = {Understanding Gradient Regularization in Deep Learning: Efficient Finite-Difference Computation and Implicit Bias},
  author    = {Karakida, Ryo and Takase, Tomoumi and Hayase, Tomohiro and Osawa, Kazuki},
  booktitle = {International Conference on Machine Learning},
  year      = {2023},
  url       = {https://arxiv.org/abs/2210.02720}
}"""  # noqa: E501

RADIUS_RULES: dict[str, RadiusRule] = {
    "fixed": RadiusRule(fixed, "r itself", r"r_t", is_capped=False),
    "gradient": RadiusRule(
        gradient,
        "r times the gradient norm, which penalizes the squared norm",
        r"\min\left(r_t \|g_1\|, r_{\max}\right)",
        KARAKIDA_CITATION,
    ),
    "loss": RadiusRule(
        loss,
        "r divided by the gradient norm, so that r is a rise of the loss",
        r"\min\left(\frac{r_t}{\|g_1\|}, r_{\max}\right)",
    ),
}
