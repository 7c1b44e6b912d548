"""LARS: SGD with momentum and a learning rate for each layer. See `_layerwise`."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from . import _cpu
from ._layerwise import Group, LayerwiseOptimizer, State, Tensors, norms, trust_factors
from ._sharding import Layout

CITATION = """\
@article{you2017large,
  title  = {Large Batch Training of Convolutional Networks},
  author = {You, Yang and Gitman, Igor and Ginsburg, Boris},
  year   = {2017},
  url    = {https://arxiv.org/abs/1708.03888}
}"""


class LARS(LayerwiseOptimizer):
    """Layer-wise adaptive rate scaling: SGD with momentum, with a learning rate for each layer.

        d  = g + weight_decay w
        q  = trust_coefficient ||w|| / ||d||        (1 if one of the norms is 0; 0 if one overflows)
        mu = momentum mu + q d
        w  = w - lr mu                              (with Nesterov: w - lr (q d + momentum mu))

    for each layer w with gradient g; norms and biases have d = g, q = 1 and the learning rate lr bias_lr_scale. This is
    the form that is in use. The paper has ||g|| + weight_decay ||w|| in the denominator, and lr inside the buffer mu,
    which differs where lr changes.

    Args:
        params: parameters or groups of them.
        lr: learning rate. It multiplies the ratio: with the trust coefficient of 0.001 it is of the order of 1, for
            batches of thousands more.
        momentum: in [0, 1).
        weight_decay: coefficient of the L2 penalty on layers.
        trust_coefficient: eta, the length of a step of lr = 1 relative to the layer.
        nesterov: take Nesterov's momentum.
        exclude_1d: leave parameters of less than two dimensions out. False treats them as layers.
        bias_lr_scale: factor of the learning rate of those that are left out (0.024 in Barlow Twins).
        norm_clamp: (low, high), between which both norms are clamped. The released code of TVLARS has (0, 10), which
            takes the normalization away from large gradients; hence None.
        foreach: treat the layers together on a CPU, too, where one by one is faster. Elsewhere they always are.

    Raises:
        ValueError: an argument is out of its range, a parameter is complex, or a DTensor of partial sums.
        RuntimeError: a gradient is sparse.
    """

    help = "layer-wise adaptive rate scaling: SGD with momentum and a trust ratio for each layer"
    latex = (
        r"\mu \leftarrow m\, \mu + \eta \frac{\|w\|}{\|d\|}\, d, \qquad w \leftarrow w - a\, \mu, \qquad d = g + W w"
    )
    citation = CITATION
    symbols = {"momentum": "m", "trust_coefficient": "eta"}

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[Group],
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        nesterov: bool = False,
        exclude_1d: bool = True,
        bias_lr_scale: float = 1.0,
        norm_clamp: tuple[float, float] | None = None,
        *,
        foreach: bool = False,
    ):
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            trust_coefficient=trust_coefficient,
            nesterov=nesterov,
            exclude_1d=exclude_1d,
            bias_lr_scale=bias_lr_scale,
            norm_clamp=norm_clamp,
            foreach=foreach,
        )

    def _check(self, group: Group) -> None:
        super()._check(group)
        if "tv_lambda" in group.keys() - self.defaults.keys():
            raise ValueError(f"tv_lambda: these are the settings of TVLARS, and {type(self).__name__} has no phi.")
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum={group['momentum']}: must be in [0, 1).")
        if group["nesterov"] and group["momentum"] == 0:
            raise ValueError("nesterov=True has no effect with momentum=0. Leave one of them out.")
        if not 0 < group["trust_coefficient"] < math.inf:
            raise ValueError(f"trust_coefficient={group['trust_coefficient']}: must be > 0.")
        if not 0 <= group["bias_lr_scale"] < math.inf:
            raise ValueError(f"bias_lr_scale={group['bias_lr_scale']}: must be >= 0.")
        if group["bias_lr_scale"] != 1 and not group["exclude_1d"]:
            raise ValueError(
                f"bias_lr_scale={group['bias_lr_scale']} has no effect with exclude_1d=False: norms and biases are "
                "treated as layers. Leave one of them out."
            )

    def _moments(self, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _factors(self, group: Group) -> tuple[float, float]:
        """What multiplies the trust ratio, and what stands for the product where there is no ratio."""
        return group["trust_coefficient"], 1.0

    def _step_each(self, layers: list[Tensor], others: list[Tensor], group: Group) -> list[float]:
        return _cpu.step_lars(layers, others, self.state, group, *self._factors(group))

    def _step_together(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        states: list[State],
        group: Group,
        are_layers: bool,
        layout: Layout,
    ) -> Tensors:
        lr, clamp = float(group["lr"]), group["norm_clamp"]
        factor, otherwise = self._factors(group)
        if not are_layers:
            scaled = grads if otherwise == 1 else torch._foreach_mul(grads, otherwise)
            self._descend(weights, scaled, states, group, lr * group["bias_lr_scale"])
            return []
        directions = torch._foreach_add(grads, weights, alpha=group["weight_decay"])
        w_norms, d_norms = norms(layout, weights, directions)
        factors = trust_factors(w_norms, d_norms, clamp, clamp, factor, otherwise).unbind()
        torch._foreach_mul_(directions, list(factors))
        self._descend(weights, directions, states, group, lr)
        return factors

    def _descend(
        self, weights: list[Tensor], directions: Tensors, states: list[State], group: Group, lr: float
    ) -> None:
        """SGD with momentum along `directions`."""
        momentum = group["momentum"]
        if momentum:
            buffers = [state["momentum_buffer"] for state in states]
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, directions)
            directions = torch._foreach_add(directions, buffers, alpha=momentum) if group["nesterov"] else buffers
        torch._foreach_add_(weights, directions, alpha=-lr)
