"""LARS, TVLARS and LAMB: optimizers that choose the size of the step for each layer, for large batches; torch alone.

All three move a layer w along a direction u by a length that follows the size of the layer: the trust ratio
||w|| / ||u||. They differ in u (SGD with momentum, or Adam) and in what multiplies the ratio:

    LARS     "Large Batch Training of Convolutional Networks", You, Gitman and Ginsburg, arXiv:1708.03888
    TVLARS   "Revisiting LARS for Large Batch Training Generalization of Neural Networks", Do et al., arXiv:2309.14053
    LAMB     "Large Batch Optimization for Deep Learning: Training BERT in 76 Minutes", You et al., arXiv:1904.00962

A layer is a parameter with at least two dimensions. Norms and biases have one and are recognized by nothing else: they
take the optimizer's plain step, without trust ratio or weight decay, unless `exclude_1d` is False. (Some
implementations recognize a bias by its weight decay of zero, and are plain SGD wherever there is no decay.)

Half-precision parameters have their state and arithmetic in float32; only the stored parameter is rounded.

Sharded parameters (DTensor, as FSDP2 makes them) take the same steps: the squares of the norms are summed over the
processes, in one all-reduce per step and parameter group, and each process updates its part. Their state is sharded as
they are.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import _cpu
from ._sharding import Layout, layout_of, local_grad, part_like, require_parts, sum_over_parts_
from .tensors import local

Group = dict[str, Any]
State = dict[str, Any]
Tensors = list[Tensor] | tuple[Tensor, ...]


class LayerwiseOptimizer(Optimizer):
    """What the three have in common: the loop over groups, and two ways of computing the same step.

    One layer after the other, through torch's fused kernels, is faster on a CPU. All layers together is faster on a
    GPU, where no number then travels to the host.
    """

    #: What `--help` and the docs say of it, its equation, its BibTeX, and the symbols of its settings in the equation.
    help: ClassVar[str]
    latex: ClassVar[str]
    citation: ClassVar[str]
    symbols: ClassVar[dict[str, str]]
    #: A dict here gets, at each step, layer -> what the step multiplied its direction by: lr, the trust ratio and, of
    #: TVLARS, phi.
    rates: dict[Tensor, Any] | None = None

    def __init__(self, params: Iterable[Tensor] | Iterable[Group], **defaults: Any):
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check(group)
        except ValueError:
            del self.param_groups[-1]
            raise

    def _check(self, group: Group) -> None:
        """Raise `ValueError` for what cannot be trained, or for a setting out of its range."""
        name = type(self).__name__
        for p in group["params"]:
            if p.is_complex():
                raise ValueError(f"{name} takes real parameters, and one is {p.dtype}. Use torch.view_as_real.")
            require_parts(p, name)
        if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
            raise ValueError(f"lr={group['lr']}: a tensor must have one element. Give groups for several rates.")
        for key in ("lr", "weight_decay"):
            if not 0 <= group[key] < math.inf:
                raise ValueError(f"{key}={group[key]}: must be >= 0, and finite.")
        clamp = group["norm_clamp"]
        if clamp is not None and not (len(clamp) == 2 and 0 <= clamp[0] < clamp[1]):
            raise ValueError(f"norm_clamp={clamp}: give None, or (low, high) with 0 <= low < high.")

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step. `closure`, if there is one, computes the loss and the gradients first; its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._begin(group)
            layers: list[Tensor] = []
            others: list[Tensor] = []
            together: dict[tuple[Any, ...], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:  # RuntimeError, as torch's own
                    raise RuntimeError(
                        f"{type(self).__name__} cannot read sparse gradients. Use sparse=False in embeddings."
                    )
                moments = self._prepare_state(p, group)
                is_layer, layout = p.ndim > 1 or not group["exclude_1d"], layout_of(p)
                if layout is None and not group["foreach"] and _cpu.suits_fused_kernels(p, p.grad, *moments):
                    (layers if is_layer else others).append(p)
                else:
                    alike = (is_layer, layout, p.device, p.dtype, self.state[p].get("step"))
                    together.setdefault(alike, []).append(p)
            self._record(layers, group, self._step_each(layers, others, group))
            for (is_layer, layout, *_), params in together.items():
                self._record(params if is_layer else [], group, self._step_parts(params, group, is_layer, layout))
        return loss

    def _step_parts(self, params: list[Tensor], group: Group, are_layers: bool, layout: Layout) -> Tensors:
        """`_step_together`, on what this process holds of the parameters."""
        dtype, parts = precision(params[0]), [local(p) for p in params]
        weights, grads = [part.to(dtype) for part in parts], [local_grad(p).to(dtype) for p in params]
        states = [{key: local(value) for key, value in self.state[p].items()} for p in params]
        factors = self._step_together(weights, grads, states, group, are_layers, layout)
        if weights[0] is not parts[0]:
            torch._foreach_copy_(parts, weights)
        return factors

    def _record(self, layers: list[Tensor], group: Group, factors: Iterable[Any]) -> None:
        if self.rates is not None:
            self.rates.update((p, float(group["lr"]) * factor) for p, factor in zip(layers, factors, strict=False))

    # `step` is not to be overridden: torch wraps it once per class, and a hook would then run once for each of them.
    def _begin(self, group: Group) -> None:
        """Called at each step."""

    def _prepare_state(self, p: Tensor, group: Group) -> list[Tensor]:
        """Make the state of a parameter that has none; the tensors in it, in the precision in which `p` is updated."""
        state = self.state[p]
        if not state:
            state.update({key: torch.zeros_like(p, dtype=precision(p)) for key in self._moments(group)})
        dtype, tensors = precision(p), []
        for key, value in state.items():
            if isinstance(value, Tensor):
                if value.dtype != dtype:  # `p` was cast since
                    value = state[key] = value.to(dtype)
                tensors.append(value)
        return tensors

    def _moments(self, group: Group) -> tuple[str, ...]:
        """The names of the state tensors of each parameter."""
        raise NotImplementedError

    def _step_each(self, layers: list[Tensor], others: list[Tensor], group: Group) -> list[float]:
        """The layers one by one; the others take the plain step. Returns what multiplied lr for each layer."""
        raise NotImplementedError

    def _step_together(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        states: list[State],
        group: Group,
        are_layers: bool,
        layout: Layout,
    ) -> Tensors:
        """Parameters of one device, type and layout, at one step; a plain step if they are not layers. Returns what
        multiplied lr for each layer."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but the state stays float32 where the parameters are not.

        Raises:
            ValueError: the state is of another optimizer or of other parameters, or has a setting out of its range.
                Nothing is loaded then.
        """
        loaded: dict[str, Any] = {}

        def look(_: Optimizer, final: dict[str, Any]) -> None:  # after all other hooks, which may have replaced it
            self._check_state_dict(final)
            loaded.update(final)

        look_handle = self.register_load_state_dict_pre_hook(look)
        restore_handle = self.register_load_state_dict_post_hook(lambda _: self._restore(loaded), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            look_handle.remove()
            restore_handle.remove()

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        name = type(self).__name__
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            # torch adds settings to `defaults` alone; `foreach` changes no result.
            if lacking := sorted((self.defaults.keys() & own.keys()) - saved.keys() - {"foreach"}):
                raise ValueError(
                    f"The state to be loaded is not of {name}: its groups have no {', '.join(lacking)}. Make the "
                    "optimizer that it was saved from, or start without it."
                )
            self._check({**saved, "params": own["params"]})
            for p, index in zip(own["params"], saved["params"], strict=False):
                state = state_dict["state"].get(index, {})
                expected = set(self._moments(saved))
                if state and state.keys() - {"step"} != expected:
                    raise ValueError(
                        f"The state to be loaded is not of {name}: it has {', '.join(map(str, state))} of a parameter, "
                        f"and not {', '.join(sorted(expected)) or 'nothing'}. Make the one that it was saved from."
                    )
                if any(state[key].shape != p.shape for key in state.keys() & expected):
                    raise ValueError(
                        f"The state to be loaded is of other parameters: number {index} has the shape {tuple(p.shape)} "
                        "here and another one there. Load it into an optimizer of the same model."
                    )

    def _restore(self, state_dict: dict[str, Any]) -> None:
        """Take the tensors once more, as torch has cast them to the type of the parameters."""
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            own.setdefault("foreach", self.defaults["foreach"])
            for p, index in zip(own["params"], saved["params"], strict=True):
                for key in self.state[p].keys() & set(self._moments(own)) if p in self.state else ():
                    value = part_like(p, state_dict["state"][index][key].to(p.device))
                    self.state[p][key] = value.to(precision(p))


# ---- Norms and their ratio ----


def trust_factors(
    w_norms: Tensor, u_norms: Tensor, w_clamp: _cpu.Clamp, u_clamp: _cpu.Clamp, factor: float, otherwise: float
) -> Tensor:
    """`factor` ||w|| / ||u|| after clamping, for vectors of norms.

    `otherwise` where one of the norms is 0; 0 where one is not finite: such a layer stays.
    """
    w_norms = w_norms if w_clamp is None else w_norms.clamp(*w_clamp)
    u_norms = u_norms if u_clamp is None else u_norms.clamp(*u_clamp)
    ratios = torch.where((w_norms > 0) & (u_norms > 0), factor * (w_norms / u_norms), otherwise)
    return torch.where(w_norms.isfinite() & u_norms.isfinite(), ratios, 0.0)


def norms(layout: Layout, *lists: Tensors) -> tuple[Tensor, ...]:
    """The norms of each list as a vector; of parts, those of the wholes, in one all-reduce for all lists."""
    found = torch.stack(torch._foreach_norm([t for tensors in lists for t in tensors])).view(len(lists), -1)
    if layout is not None:  # a square may overflow where the norm does not
        found = sum_over_parts_(found.double().square_(), layout).sqrt_().to(found.dtype)
    return found.unbind()


def precision(p: Tensor) -> torch.dtype:
    """The type in which a parameter is updated."""
    return torch.promote_types(p.dtype, torch.float32)
