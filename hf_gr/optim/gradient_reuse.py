"""Reuse of the second gradient in the plain steps between regularized ones (LookSAM).

"Towards Efficient and Scalable Sharpness-Aware Minimization", Liu et al., CVPR 2022: what the second gradient adds,

    v = g2 - (g1 . g2 / ||g1||^2) g1,

changes slowly, and stands in for a second pass: a plain step takes g1 + alpha ||g1|| v / ||v||. All products and norms
are over all parameters as one vector, as in the paper; code in circulation takes them tensor by tensor.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .ascents import NORM_EPS, as_tensor, length

CITATION = """\
@inproceedings{liu2022towards,
  title     = {Towards Efficient and Scalable Sharpness-Aware Minimization},
  author    = {Liu, Yong and Mai, Siqi and Chen, Xiangning and Hsieh, Cho-Jui and You, Yang},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2022},
  url       = {https://arxiv.org/abs/2203.02714}
}"""


class GradientReuse:
    """v / ||v|| of the last regularized step: one more copy of the parameters.

    Args:
        params: the trained parameters.

    Attributes:
        has_kept: whether there was a regularized step.
        is_ready: whether its v points anywhere; a tensor on the device. If not, v is 0.
    """

    def __init__(self, params: Sequence[Tensor]):
        self._params = list(params)
        self._kept: list[Tensor | None] = []  # g1 during a regularized step, v / ||v|| afterwards
        self.has_kept = False
        self.is_ready = torch.tensor(False)

    @torch.no_grad()
    def keep_first(self) -> None:
        """Remember the g1 in `.grad`."""
        self.has_kept = False
        self._kept = [None if p.grad is None else p.grad.detach().clone() for p in self._params]

    @torch.no_grad()
    def keep_second(self) -> None:
        """Compute v from `.grad`, which holds g2, or any sum of it and a multiple of g1.

        A parameter without a first gradient is left out of v.
        """
        both = zip(self._kept, (p.grad for p in self._params), strict=True)
        pairs = [(g1, g) for g1, g in both if g1 is not None and g is not None]
        product = sum((torch.sum(g1 * g).to(pairs[0][0].device) for g1, g in pairs), torch.zeros(()))
        along = torch.where(product != 0, product / length(g1 for g1, _ in pairs) ** 2, 0.0)
        for g1, p in zip(self._kept, self._params, strict=True):
            if g1 is not None:
                g1.mul_(-along.to(g1.device))
                if p.grad is not None:
                    g1.add_(p.grad)
        norm = length(v for v in self._kept if v is not None)
        # Of parallel gradients nothing but rounding is left, and that is no direction.
        rounding = max((100 * torch.finfo(g.dtype).eps for _, g in pairs), default=0.0) * length(g for _, g in pairs)
        self.is_ready = (rounding < norm) & norm.isfinite()
        for v in self._kept:
            if v is not None:
                v.div_((norm + NORM_EPS).to(v.device)).masked_fill_(~self.is_ready.to(v.device), 0.0)
        self.has_kept = True

    @torch.no_grad()
    def add_(self, alpha: float, norm: Tensor | float) -> None:
        """`.grad += alpha ||g1|| v / ||v||` for the g1 in `.grad`, of which `norm` is the norm, unless that is not
        finite."""
        norm = as_tensor(norm)
        size = torch.where(norm.isfinite(), alpha * norm, 0.0)
        for p, v in zip(self._params, self._kept, strict=True):
            if p.grad is not None and v is not None:
                p.grad.addcmul_(v.to(p.grad.dtype), size.to(p.grad))

    def state_dict(self) -> dict[str, Any]:
        """v / ||v||, by the position of each parameter; empty before the first regularized step."""
        kept = enumerate(self._kept) if self.is_ready else ()
        return {"directions": {i: v for i, v in kept if v is not None}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises `ValueError`, and changes nothing, if the state is of other parameters."""
        directions: dict[int, Tensor] = state["directions"]
        for i, v in directions.items():
            if i >= len(self._params) or v.shape != self._params[i].shape:
                raise ValueError(
                    f"The state of gr_reuse has a direction of shape {tuple(v.shape)} for parameter {i}, which does "
                    "not fit this model. Resume with the model that wrote the checkpoint."
                )
        self.has_kept = bool(directions)
        self.is_ready = torch.tensor(self.has_kept)
        self._kept = (
            [directions[i].to(p.device) if i in directions else None for i, p in enumerate(self._params)]
            if directions
            else []
        )
