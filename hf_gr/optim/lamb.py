"""LAMB: Adam with a trust ratio for each layer. See `_layerwise`."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from . import _cpu
from ._layerwise import Group, LayerwiseOptimizer, State, Tensors, norms, trust_factors
from ._sharding import Layout

CITATION = """\
@inproceedings{you2020large,
  title     = {Large Batch Optimization for Deep Learning: Training BERT in 76 Minutes},
  author    = {You, Yang and Li, Jing and Reddi, Sashank and Hseu, Jonathan and Kumar, Sanjiv and Bhojanapalli, \
Srinadh and Song, Xiaodan and Demmel, James and Keutzer, Kurt and Hsieh, Cho-Jui},
  booktitle = {International Conference on Learning Representations},
  year      = {2020},
  url       = {https://arxiv.org/abs/1904.00962}
}"""


class LAMB(LayerwiseOptimizer):
    """Adam with a trust ratio for each layer.

        m = beta1 m + (1 - beta1) g,    v = beta2 v + (1 - beta2) g^2
        u = m' / (sqrt(v') + eps) + weight_decay w,    m' = m / (1 - beta1^t),  v' = v / (1 - beta2^t)
        w = w - lr ||w|| / ||u|| u                      (ratio 1 if one of the norms is 0; 0 if one overflows)

    for each layer w with gradient g; norms and biases take the step of Adam. t counts, for each parameter, the steps in
    which it had a gradient. With `bias_correction=False` m' = m and v' = v. The code released with TVLARS has
    `bias_correction=False, exclude_1d=False, norm_clamp=(0, 10)` (and no ratio at all in its self-supervised runs).

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: beta1 and beta2, in [0, 1).
        eps: added to the root; > 0.
        weight_decay: of layers, inside the ratio, as in the paper.
        bias_correction: correct the moments for their start at zero, as the paper does.
        exclude_1d: leave parameters of less than two dimensions out. False treats them as layers.
        norm_clamp: (low, high), between which ||w|| is clamped, the function phi of the paper.
        foreach: treat the layers together on a CPU, too, where one by one is faster. Elsewhere they always are.

    Raises:
        ValueError: an argument is out of its range, a parameter is complex, or a DTensor of partial sums.
        RuntimeError: a gradient is sparse.
    """

    help = "Adam with a trust ratio for each layer"
    latex = r"w \leftarrow w - a\, \frac{\|w\|}{\|d\|}\, d, \qquad d = \frac{\hat m}{\sqrt{\hat v} + \epsilon} + W w"
    citation = CITATION
    symbols = {"betas": "beta_1, beta_2", "eps": "epsilon"}

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[Group],
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        exclude_1d: bool = True,
        norm_clamp: tuple[float, float] | None = None,
        *,
        foreach: bool = False,
    ):
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            bias_correction=bias_correction,
            exclude_1d=exclude_1d,
            norm_clamp=norm_clamp,
            foreach=foreach,
        )

    def _check(self, group: Group) -> None:
        super()._check(group)
        if not (len(group["betas"]) == 2 and all(0 <= beta < 1 for beta in group["betas"])):
            raise ValueError(f"betas={group['betas']}: give two numbers in [0, 1).")
        if not 0 < group["eps"] < math.inf:
            raise ValueError(f"eps={group['eps']}: must be > 0.")

    def _moments(self, group: Group) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _prepare_state(self, p: Tensor, group: Group) -> list[Tensor]:
        """And count the step."""
        moments = super()._prepare_state(p, group)
        self.state[p]["step"] = self.state[p].get("step", 0) + 1
        return moments

    def _restore(self, state_dict: dict[str, Any]) -> None:
        super()._restore(state_dict)
        for group in self.param_groups:
            for p in group["params"]:
                if p in self.state:  # steps were once counted by group
                    self.state[p]["step"] = int(self.state[p].get("step", group.get("step", 0)))

    def _corrections(self, group: Group, step: int) -> tuple[float, float]:
        """(c, eps') such that the step of Adam, m' / (sqrt(v') + eps), is c m / (sqrt(v) + eps')."""
        if not group["bias_correction"]:
            return 1.0, group["eps"]
        correction1, correction2 = (1 - beta**step for beta in group["betas"])
        return math.sqrt(correction2) / correction1, group["eps"] * math.sqrt(correction2)

    def _step_together(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        states: list[State],
        group: Group,
        are_layers: bool,
        layout: Layout,
    ) -> Tensors:
        c, eps = self._corrections(group, states[0]["step"])
        directions = self._adam_directions(grads, states, group["betas"], eps)
        factors: Tensors = []
        if are_layers:
            torch._foreach_add_(directions, weights, alpha=group["weight_decay"] / c)
            clamp = group["norm_clamp"]
            w_norms, u_norms = norms(layout, weights, directions)
            factors = trust_factors(w_norms, u_norms * c, clamp, None, 1.0, 1.0).unbind()
            torch._foreach_mul_(directions, list(factors))
        torch._foreach_add_(weights, directions, alpha=-float(group["lr"]) * c)
        return factors

    @staticmethod
    def _adam_directions(grads: list[Tensor], states: list[State], betas: tuple[float, float], eps: float) -> Tensors:
        """Update the moments; m / (sqrt(v) + eps) of each parameter."""
        exp_avgs, exp_avg_sqs = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
        torch._foreach_lerp_(exp_avgs, grads, 1 - betas[0])
        torch._foreach_mul_(exp_avg_sqs, betas[1])
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, value=1 - betas[1])
        directions = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_add_(directions, eps)
        torch._foreach_reciprocal_(directions)
        torch._foreach_mul_(directions, exp_avgs)
        return directions

    def _step_each(self, layers: list[Tensor], others: list[Tensor], group: Group) -> list[float]:
        return _cpu.step_lamb(layers, others, self.state, group)
