"""LARS, TVLARS and LAMB: optimizers that choose the size of the step for each layer, for large batches; torch alone.

All three move a layer w along a direction u by a length that follows the size of the layer: the trust ratio
||w|| / ||u||. They differ in u (SGD with momentum, or Adam) and in what multiplies the ratio:

    LARS     "Large Batch Training of Convolutional Networks", You, Gitman and Ginsburg, arXiv:1708.03888
    TVLARS   "Revisiting LARS for Large Batch Training Generalization of Neural Networks", Do et al., arXiv:2309.14053
    LAMB     "Large Batch Optimization for Deep Learning: Training BERT in 76 Minutes", You et al., arXiv:1904.00962

A layer is a parameter with at least two dimensions. Norms and biases, which have one, are told by that and by nothing
else: they take the optimizer's plain step, without ratio and without weight decay, unless `exclude_1d` is False. (Some
implementations take a weight decay of zero for the sign of a bias, and are plain SGD wherever there is no decay.)

State and arithmetic of parameters in half precision are float32; what is stored in the parameter is rounded.
"""

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adam import adam
from torch.optim.sgd import sgd

logger = logging.getLogger(__name__)

Group = dict[str, Any]


def time_varying_factor(
    step: float, tv_lambda: float, delay_steps: float, alpha: float = 1.0, gamma_min: float = 0.0
) -> float:
    """phi_t = 1 / (alpha + exp(tv_lambda (t - delay_steps))) + gamma_min, the schedule of TVLARS.

    It starts near 1/alpha, falls through 1/(alpha + 1) at `delay_steps`, and ends at gamma_min.

    Args:
        step: t, the number of the optimizer step, from 1.
        tv_lambda: lambda, how fast it falls, in 1/steps.
        delay_steps: d_e, when it falls.
    """
    # Further out exp overflows or is 0.
    psi = min(max(tv_lambda * (step - delay_steps), -700.0), 700.0)
    return 1 / (alpha + math.exp(psi)) + gamma_min


def check_time_varying(tv_lambda: float, delay_steps: float, alpha: float, gamma_min: float | None) -> None:
    """Raise `ValueError` for an argument of `time_varying_factor` that is out of its range."""
    if not (math.isfinite(tv_lambda) and tv_lambda > 0):
        raise ValueError(f"tv_lambda={tv_lambda}: must be > 0, the rate at which the step falls, in 1/steps.")
    if not (math.isfinite(delay_steps) and delay_steps >= 0):
        raise ValueError(f"delay_steps={delay_steps}: must be >= 0, the step around which the learning rate falls.")
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"alpha={alpha}: must be >= 0; the schedule starts near 1/alpha.")
    if gamma_min is not None and not (math.isfinite(gamma_min) and gamma_min >= 0):
        raise ValueError(f"gamma_min={gamma_min}: the floor of the schedule must be >= 0.")


class _LayerwiseOptimizer(Optimizer):
    """What the three have in common: the loop over groups, and two ways of computing the same step.

    One layer after the other, through torch's fused kernels, is faster on a CPU. All layers together is faster on a
    GPU, where no number then travels to the host.
    """

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
            if hasattr(p, "device_mesh"):
                raise ValueError(f"{name} takes the norm of whole layers, and cannot where they are sharded (DTensor).")
        if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
            raise ValueError(f"lr={group['lr']}: a tensor must have one element. Give groups for several rates.")
        for key in ("lr", "weight_decay"):
            if not 0 <= group[key] < math.inf:
                raise ValueError(f"{key}={group[key]}: must be >= 0, and finite.")
        clamp = group["norm_clamp"]
        if clamp is not None and not (len(clamp) == 2 and 0 <= clamp[0] < clamp[1]):
            raise ValueError(f"norm_clamp={clamp}: give None, or (low, high) with 0 <= low < high.")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step. `closure`, if there is one, computes the loss and the gradients first; its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._begin(group)
            layers, others, together = [], [], {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:  # RuntimeError, as torch's own
                    raise RuntimeError(
                        f"{type(self).__name__} cannot read sparse gradients. Use sparse=False in embeddings."
                    )
                moments = self._prepare_state(p, group)
                is_layer = p.ndim > 1 or not group["exclude_1d"]
                if not group["foreach"] and _suits_fused_kernels(p, p.grad, *moments):
                    (layers if is_layer else others).append(p)
                else:
                    alike = (is_layer, p.device, p.dtype, self.state[p].get("step"))
                    together.setdefault(alike, []).append(p)
            self._step_each(layers, others, group)
            for (is_layer, *_), params in together.items():
                dtype = _precision(params[0])
                weights, grads = [p.to(dtype) for p in params], [p.grad.to(dtype) for p in params]
                self._step_together(weights, grads, [self.state[p] for p in params], group, is_layer)
                if weights[0] is not params[0]:
                    torch._foreach_copy_(params, weights)
        return loss

    # `step` is not to be overridden: torch wraps it once per class, and a hook would then run once for each of them.
    def _begin(self, group: Group) -> None:
        """Called at each step."""

    def _prepare_state(self, p: Tensor, group: Group) -> list[Tensor]:
        """Make the state of a parameter that has none; the tensors in it, in the precision in which `p` is updated."""
        state = self.state[p]
        if not state:
            state.update({key: torch.zeros_like(p, dtype=_precision(p)) for key in self._moments(group)})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dtype != _precision(p):  # `p` was cast since
                state[key] = value.to(_precision(p))
        return [value for value in state.values() if isinstance(value, Tensor)]

    def _moments(self, group: Group) -> tuple[str, ...]:
        """The names of the tensors that are kept of each parameter."""
        raise NotImplementedError

    def _step_each(self, layers: list[Tensor], others: list[Tensor], group: Group) -> None:
        """The layers one by one; the others take the plain step."""
        raise NotImplementedError

    def _step_together(
        self, weights: list[Tensor], grads: list[Tensor], states: list[dict], group: Group, are_layers: bool
    ) -> None:
        """Parameters of one device and type, at one step; a plain step if they are not layers."""
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
                    self.state[p][key] = state_dict["state"][index][key].to(p.device, _precision(p))


class LARS(_LayerwiseOptimizer):
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
        ValueError: an argument is out of its range, a parameter is complex or sharded.
        RuntimeError: a gradient is sparse.
    """

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

    def _step_each(self, layers: list[Tensor], others: list[Tensor], group: Group) -> None:
        factor, otherwise = self._factors(group)
        lr, weight_decay, clamp = float(group["lr"]), group["weight_decay"], group["norm_clamp"]
        if others:
            self._sgd(others, group, otherwise, 0.0, lr * group["bias_lr_scale"])
        for p in layers:
            w_norm, d_norm = _norms_with_decay(p, p.grad, weight_decay)
            ratio = _ratio(w_norm, d_norm, clamp, clamp)
            self._sgd([p], group, otherwise if ratio is None else factor * ratio, weight_decay, lr)

    def _sgd(self, params: list[Tensor], group: Group, q: float, weight_decay: float, lr: float) -> None:
        """SGD with momentum along q (g + weight_decay w), in one pass."""
        momentum, nesterov = group["momentum"], group["nesterov"]
        grads = [p.grad for p in params]
        # torch's Nesterov has the gradient without q in its step. And 1 - dampening, below, is q rounded at 1.
        if nesterov or q < torch.finfo(torch.float64).eps / torch.finfo(params[0].dtype).eps:
            directions = torch._foreach_add(grads, params, alpha=weight_decay)
            torch._foreach_mul_(directions, q)
            self._descend(params, directions, [self.state[p] for p in params], group, lr)
            return
        sgd(
            params,
            grads,
            [self.state[p].get("momentum_buffer") for p in params],
            fused=True,
            weight_decay=weight_decay,
            momentum=momentum,
            lr=lr if momentum else lr * q,
            # The new direction enters the buffer with the factor 1 - dampening.
            dampening=1 - q if momentum else 0.0,
            nesterov=False,
            maximize=False,
        )

    def _step_together(
        self, weights: list[Tensor], grads: list[Tensor], states: list[dict], group: Group, are_layers: bool
    ) -> None:
        lr, clamp = float(group["lr"]), group["norm_clamp"]
        factor, otherwise = self._factors(group)
        if not are_layers:
            directions = grads if otherwise == 1 else torch._foreach_mul(grads, otherwise)
            self._descend(weights, directions, states, group, lr * group["bias_lr_scale"])
            return
        directions = torch._foreach_add(grads, weights, alpha=group["weight_decay"])
        factors = _factors(_norms(weights), _norms(directions), clamp, clamp, factor, otherwise)
        torch._foreach_mul_(directions, list(factors.unbind()))
        self._descend(weights, directions, states, group, lr)

    def _descend(
        self, weights: list[Tensor], directions: list[Tensor], states: list[dict], group: Group, lr: float
    ) -> None:
        """SGD with momentum along `directions`."""
        momentum = group["momentum"]
        if momentum:
            buffers = [state["momentum_buffer"] for state in states]
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, directions)
            directions = torch._foreach_add(directions, buffers, alpha=momentum) if group["nesterov"] else buffers
        torch._foreach_add_(weights, directions, alpha=-lr)


class TVLARS(LARS):
    """Time-varying LARS: no warmup; the steps start long, to leave sharp minima, and fall along a logistic curve.

        phi_t = 1 / (alpha + exp(tv_lambda (t - delay_steps))) + gamma_min
        q     = phi_t trust_coefficient ||w|| / ||d||

    and else as in `LARS`; where LARS has q = 1, q is phi_t. t counts the optimizer's steps from 1 and is saved with its
    state. No other schedule is needed: keep the learning rate constant.

    The code released with the paper differs from its formula. It is the setting `alpha=0.1, delay_steps=0,
    gamma_min=0, norm_clamp=(0, 10), phi_everywhere=False`.

    Args:
        tv_lambda: lambda, how fast phi falls, in 1/steps; the one value that the paper tunes. With
            tv_lambda * delay_steps below 1 phi never starts high; 5 is a good start.
        delay_steps: d_e, the step at which phi is 1 / (alpha + 1).
        alpha: phi starts near 1 / alpha.
        gamma_min: floor of phi. The paper has 0.001 batch / 256 for a learning rate that is not scaled with the batch:
            None is that in `GRTrainer`, which knows the batch, and 0.001 with its `lr_scaling="linear"`, so that the
            rate ends at a thousandth of its peak, as that of LARS with warmup does; 0 elsewhere.
        phi_everywhere: whether phi also multiplies the steps that have no trust ratio, those of norms and biases and
            of layers whose weights or gradients are all 0.

    The others are those of `LARS`.
    """

    _has_warned = False

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
        tv_lambda: float,
        delay_steps: float,
        alpha: float = 1.0,
        gamma_min: float | None = None,
        phi_everywhere: bool = True,
        foreach: bool = False,
    ):
        _LayerwiseOptimizer.__init__(
            self,
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
            tv_lambda=tv_lambda,
            delay_steps=delay_steps,
            alpha=alpha,
            gamma_min=gamma_min,
            phi_everywhere=phi_everywhere,
            step=0,
        )

    def _check(self, group: Group) -> None:
        super()._check(group)
        check_time_varying(*(group[key] for key in ("tv_lambda", "delay_steps", "alpha", "gamma_min")))

    def phi(self, group: Group, step: int | None = None) -> float:
        """phi_t of a parameter group, at its current step or another."""
        return time_varying_factor(
            group["step"] if step is None else step,
            group["tv_lambda"],
            group["delay_steps"],
            group["alpha"],
            group["gamma_min"] or 0.0,
        )

    def _begin(self, group: Group) -> None:
        """Count, and warn of a phi that changes nothing; once, for the first group."""
        group["step"] += 1
        if group is not self.param_groups[0]:
            return
        product = group["tv_lambda"] * group["delay_steps"]
        if group["step"] == 1 and product < 1:
            logger.warning(
                f"TVLARS: tv_lambda * delay_steps is {product:.3g}, below 1: phi starts at {self.phi(group):.3g}, "
                "far below its upper bound of 1/alpha. Raise one of them; 5 is a good start for their product."
            )
        if not self._has_warned and not group["gamma_min"] and (phi := self.phi(group)) < 1e-4:
            self._has_warned = True
            logger.warning(
                f"TVLARS: phi is {phi:.1e} at step {group['step']} and has no floor: training all but stops here. Set "
                "gamma_min, lower tv_lambda, or raise delay_steps."
            )

    def _factors(self, group: Group) -> tuple[float, float]:
        phi = self.phi(group)
        return phi * group["trust_coefficient"], phi if group["phi_everywhere"] else 1.0


class LAMB(_LayerwiseOptimizer):
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
        ValueError: an argument is out of its range, a parameter is complex or sharded.
        RuntimeError: a gradient is sparse.
    """

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
        self, weights: list[Tensor], grads: list[Tensor], states: list[dict], group: Group, are_layers: bool
    ) -> None:
        c, eps = self._corrections(group, states[0]["step"])
        directions = self._adam_directions(grads, states, group["betas"], eps)
        if are_layers:
            torch._foreach_add_(directions, weights, alpha=group["weight_decay"] / c)
            factors = _factors(_norms(weights), _norms(directions) * c, group["norm_clamp"], None, 1.0, 1.0)
            torch._foreach_mul_(directions, list(factors.unbind()))
        torch._foreach_add_(weights, directions, alpha=-float(group["lr"]) * c)

    @staticmethod
    def _adam_directions(
        grads: list[Tensor], states: list[dict], betas: tuple[float, float], eps: float
    ) -> list[Tensor]:
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

    def _step_each(self, layers: list[Tensor], others: list[Tensor], group: Group) -> None:
        lr = float(group["lr"])
        if others:
            self._adam_(others, others, group, lr)
        # One piece of memory for all: fresh memory would cost more than the arithmetic.
        scratch = layers[0].new_empty(max(p.numel() for p in layers)) if layers else None
        for p in layers:
            if scratch.dtype != p.dtype:
                scratch = p.new_empty(scratch.numel())
            # From zero and with lr = 1, Adam goes to -u.
            negative_u = scratch[: p.numel()].view(p.shape).zero_()
            self._adam_([negative_u], [p], group, 1.0)
            if group["weight_decay"]:
                negative_u.add_(p, alpha=-group["weight_decay"])
            ratio = _ratio(_norm(p), _norm(negative_u), group["norm_clamp"], None)
            p.add_(negative_u, alpha=lr * (1.0 if ratio is None else ratio))

    def _adam_(self, targets: list[Tensor], params: list[Tensor], group: Group, lr: float) -> None:
        """Move `targets` by the step of Adam for `params`, in one pass."""
        states = [self.state[p] for p in params]
        # After 1e9 steps nothing is left to correct.
        completed = [state["step"] - 1.0 if group["bias_correction"] else 1e9 for state in states]
        adam(
            targets,
            [p.grad for p in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [torch.tensor(steps, device="cpu") for steps in completed],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=lr,
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )


# ---- Norms and their ratio ----


def _ratio(w_norm: float, u_norm: float, w_clamp: tuple | None, u_clamp: tuple | None) -> float | None:
    """||w|| / ||u|| after clamping; None where one of them is 0, and 0 where one is not finite: such a layer stays."""
    w_norm, u_norm = (
        norm if clamp is None else min(max(norm, clamp[0]), clamp[1])
        for norm, clamp in ((w_norm, w_clamp), (u_norm, u_clamp))
    )
    if not (math.isfinite(w_norm) and math.isfinite(u_norm)):
        return 0.0
    return w_norm / u_norm if w_norm > 0 and u_norm > 0 else None


def _factors(
    w_norms: Tensor, u_norms: Tensor, w_clamp: tuple | None, u_clamp: tuple | None, factor: float, otherwise: float
) -> Tensor:
    """`factor` times the same ratios, for vectors of norms; `otherwise` where there is none."""
    w_norms = w_norms if w_clamp is None else w_norms.clamp(*w_clamp)
    u_norms = u_norms if u_clamp is None else u_norms.clamp(*u_clamp)
    ratios = torch.where((w_norms > 0) & (u_norms > 0), factor * (w_norms / u_norms), otherwise)
    return torch.where(w_norms.isfinite() & u_norms.isfinite(), ratios, 0.0)


def _norms(tensors: list[Tensor]) -> Tensor:
    """The norms as one vector."""
    return torch.stack(torch._foreach_norm(tensors))


def _precision(p: Tensor) -> torch.dtype:
    """In which a parameter is updated."""
    return torch.promote_types(p.dtype, torch.float32)


def _suits_fused_kernels(*tensors: Tensor) -> bool:
    """Whether all are on the CPU, in single precision or all in double, and in the same order in memory."""
    dtype = tensors[0].dtype
    return dtype in (torch.float32, torch.float64) and all(
        t.is_cpu and t.is_contiguous() and t.dtype == dtype for t in tensors
    )


def _norm(t: Tensor) -> float:
    t = t.view(-1)
    return math.sqrt(torch.dot(t, t).item())  # faster than the norm


def _norms_with_decay(w: Tensor, g: Tensor, weight_decay: float) -> tuple[float, float]:
    """||w|| and ||g + weight_decay w||, the latter without the sum itself."""
    if weight_decay == 0:
        return _norm(w), _norm(g)
    w, g = w.view(-1), g.view(-1)
    ww, gg = torch.dot(w, w).item(), torch.dot(g, g).item()
    square = gg + 2 * weight_decay * torch.dot(g, w).item() + weight_decay**2 * ww
    if not square > 0.01 * (gg + weight_decay**2 * ww):  # what is left of such a difference is rounding
        return math.sqrt(ww), _norm(torch.add(g, w, alpha=weight_decay))
    return math.sqrt(ww), math.sqrt(square)
