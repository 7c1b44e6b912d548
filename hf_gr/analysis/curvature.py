"""How sharp a loss is at a model's weights: trace and largest eigenvalue of its Hessian, and how it rises around them.

The loss is L(theta) = the mean of `loss_fn(model, batch)` over `batches`, each of which counts the same, and theta are
the trainable parameters: of LoRA, the adapters. All functions measure in evaluation mode, and leave the model as they
found it, bit for bit, also after an error: weights, gradients, buffers, modes and random generators.

    from hf_gr.analysis import hessian_trace

    hessian_trace(model, lambda model, batch: model(**batch).loss, batches)  # Estimate(value=..., standard_error=...)

A product H v of the Hessian and a vector is computed in one of two ways (`method`):

- `exact`: by differentiating g . v once more (Pearlmutter, 1994). It needs operations that autograd can differentiate
  twice; of PyTorch's attention kernels, the one named MATH, which is used for it.
- `difference`: (g(theta + s v) - g(theta - s v)) / (2 s), two plain passes, for any model. Its relative error was 5e-5
  to 1e-3 in float32 where it was measured; see `difference_scale`.

The standard errors are those of the random draws. How the values depend on the choice of batches is not in them. And a
flat minimum is not a promise: across models, sharpness and generalization are hardly correlated (Andriushchenko et al.,
"A modern look at the relationship between sharpness and generalization", ICML 2023, arXiv:2302.07011).
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from ..optim.ascents import ASCENTS, as_float, length
from ..optim.gradient_regularization import HALF_PRECISION, gradient_norm, gradients_set_aside, scale_gradients_
from ..optim.pass_state import RNGState, preserve_buffers
from .estimates import Estimate

METHODS = ("exact", "difference")

#: Passed over several times; of equal weight.
Batches = Sequence[Any] | DataLoader
LossFunction = Callable[[nn.Module, Any], Tensor]
#: The mean of a tensor over the processes, each of which has as many batches as the others.
Reduce = Callable[[Tensor], Tensor]


def alone(tensor: Tensor) -> Tensor:
    """The mean over one process."""
    return tensor


def hessian_trace(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    num_samples: int = 32,
    generator: torch.Generator | None = None,
    *,
    method: str = "exact",
    reduce: Reduce = alone,
) -> Estimate:
    """tr(H), by the estimator of Hutchinson (1990): the mean of z . H z over random vectors z of signs.

    Its standard error is the standard deviation over the draws by the square root of their number. (Of one draw, NaN.)

    Args:
        num_samples: draws of z, with a product of the Hessian each.
        generator: of the draws; by default one with the seed 0, so that models of one architecture get the same.
        method: how products are computed, `exact` or `difference`.
        reduce: with several processes, the mean of a tensor over them. They need equal generators.
    """
    _require_count("num_samples", num_samples)
    generator = generator or torch.Generator().manual_seed(0)
    with _measured(model, loss_fn, batches, reduce) as loss:
        draws = []
        for _ in range(num_samples):
            z = [_like(p, _signs(p.shape, generator)) for p in loss.params]
            draws.append(_dot(z, loss.product(z, method)))
    return _mean(draws)


def top_hessian_eigenvalue(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    *,
    preconditioner: Sequence[Tensor] | None = None,
    tolerance: float = 1e-3,
    max_products: int = 1000,
    generator: torch.Generator | None = None,
    method: str = "exact",
    reduce: Reduce = alone,
) -> Estimate:
    """The largest eigenvalue of H, or of P^-1 H, by ARPACK's implicitly restarted Lanczos method (needs scipy).

    `standard_error` is a bound here: the norm of H v - value v with the unit vector v found. Some eigenvalue is as
    close as that to `value`, and close to a well-separated one much closer.

    Args:
        preconditioner: the diagonal of P, positive, as one tensor for each trainable parameter. For Adam, P is
            sqrt(v-hat) + eps, and lambda_max(P^-1 H) what decides over its stability (Cohen et al., 2022,
            arXiv:2207.14484). It is computed as that of the symmetric P^-1/2 H P^-1/2.
        tolerance: the bound at which to stop, relative to the value.
        max_products: stop after about as many products of the Hessian. Without convergence, value and bound are NaN,
            with a warning.
        generator: of the start vector; by default one with the seed 0.
        method: how products are computed, `exact` or `difference`.
        reduce: with several processes, the mean of a tensor over them. They need equal generators.
    """
    _require_count("max_products", max_products)
    generator = generator or torch.Generator().manual_seed(0)
    with _measured(model, loss_fn, batches, reduce) as loss:
        scales = None if preconditioner is None else _inverse_roots(loss.params, preconditioner)

        def product(x: np.ndarray) -> np.ndarray:
            v = _scaled(_unflatten(torch.from_numpy(x.copy()), loss.params), scales)
            return _flatten(_scaled(loss.product(v, method), scales)).numpy()

        start = _flatten([torch.randn(p.shape, generator=generator, device=generator.device) for p in loss.params])
        start = start.to(max((p.dtype for p in loss.params), key=lambda dtype: dtype.itemsize))
        return _top_eigenvalue(product, start.numpy(), tolerance, max_products)


def sam_sharpness(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    r: float = 0.05,
    *,
    adaptive: bool = False,
    reduce: Reduce = alone,
) -> Estimate:
    """L(theta + r d) - L(theta), where d is the unit vector along the gradient of all batches: SAM's sharpness.

    Nothing is drawn at random, so the standard error is 0.

    Args:
        r: the radius.
        adaptive: d is that of ASAM, T^2 g / ||T g|| with T = |theta| + 0.01, with r about 0.5 to 2.
        reduce: with several processes, the mean of a tensor over them.
    """
    _require_positive("r", r)
    with _measured(model, loss_fn, batches, reduce) as loss:
        for p, g in zip(loss.params, loss.gradient(), strict=True):
            p.grad = g
        ascent = ASCENTS["adaptive" if adaptive else "gradient"]
        directions, size = ascent.direction(loss.params, gradient_norm(loss.params), None)
        before = loss.value()
        return Estimate(loss.value(cast(list[Tensor], list(directions)), r / as_float(size)) - before, 0.0)


def average_sharpness(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    sigma: float = 0.05,
    num_samples: int = 32,
    generator: torch.Generator | None = None,
    *,
    adaptive: bool = True,
    reduce: Reduce = alone,
) -> Estimate:
    """E L(theta + sigma |theta| z) - L(theta) with z ~ N(0, 1) for each weight; for small sigma, half of
    sigma^2 times the trace of |theta| H |theta|.

    Each draw is used with both signs, which cancels the slope of the loss.

    Args:
        sigma: the size of the noise: of each weight's absolute value, or as it is.
        num_samples: draws of z, with two passes without gradients each.
        generator: of the draws; by default one with the seed 0, so that models of one architecture get the same.
        adaptive: whether the noise of a weight is in proportion to it. Without, a factor that moves between two layers
            changes the result, although not the function that the model computes.
        reduce: with several processes, the mean of a tensor over them. They need equal generators.
    """
    _require_positive("sigma", sigma)
    _require_count("num_samples", num_samples)
    generator = generator or torch.Generator().manual_seed(0)
    with _measured(model, loss_fn, batches, reduce) as loss:
        before = loss.value()
        draws = []
        for _ in range(num_samples):
            z = [_like(p, torch.randn(p.shape, generator=generator, device=generator.device)) for p in loss.params]
            if adaptive:
                z = [noise * p.detach().abs() for noise, p in zip(z, loss.params, strict=True)]
            draws.append((loss.value(z, sigma) + loss.value(z, -sigma)) / 2 - before)
    return _mean(draws)


#: By the names that `measure`, `trainer.sharpness` and the command line use; cheapest first.
QUANTITIES: dict[str, Callable[..., Estimate]] = {
    "sam": sam_sharpness,
    "average": average_sharpness,
    "trace": hessian_trace,
    "top": top_hessian_eigenvalue,
}
#: Those with products of the Hessian.
CURVATURES = ("trace", "top")


def measure(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    quantities: Sequence[str] = tuple(QUANTITIES),
    method: str | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    reduce: Reduce = alone,
) -> dict[str, Estimate]:
    """Several of `QUANTITIES`, by name.

    Args:
        method: how products of the Hessian are computed. None is `exact`, and `difference` for a model that cannot be
            differentiated twice, with a warning.
        options: further arguments of the functions, by name.
    """
    options = options or {}
    check_quantities(quantities, options)
    found = {}
    for name in quantities:
        function, arguments = QUANTITIES[name], {"reduce": reduce, **options.get(name, {})}
        if name not in CURVATURES:
            found[name] = function(model, loss_fn, batches, **arguments)
            continue
        try:
            found[name] = function(model, loss_fn, batches, method=method or "exact", **arguments)
        except NotTwiceDifferentiable as error:
            if method is not None:
                raise
            warnings.warn(f"Central differences are used: {error}", stacklevel=2)
            method = "difference"
            found[name] = function(model, loss_fn, batches, method=method, **arguments)
    return found


def check_quantities(quantities: Sequence[str], options: Mapping[str, Any]) -> None:
    """Raise `ValueError` for an unknown name, or options of a quantity that is not measured."""
    for name in quantities:
        if name not in QUANTITIES:
            raise ValueError(f"quantities: {name!r} is unknown. Choose from {', '.join(QUANTITIES)}.")
    if unused := [name for name in options if name not in quantities]:
        raise ValueError(f"{unused[0]}={options[unused[0]]}: {unused[0]!r} is not among the quantities. Add it.")


# ---- The loss as a function of the weights ----


class _Loss:
    """L as a function of theta, with its gradient and the products of its Hessian, at theta or at theta + an offset.

    Every pass draws the same random numbers, should `loss_fn` draw any.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction, batches: Batches, reduce: Reduce):
        self.params = [p for p in model.parameters() if p.requires_grad]
        self._model, self._loss_fn, self._batches, self._reduce = model, loss_fn, batches, reduce
        _check(self.params, batches)
        self._theta = [_local(p.detach()).clone() for p in self.params]
        self.rng_state = RNGState.capture(self.params[0].device)

    @torch.no_grad()
    def value(self, offsets: list[Tensor] | None = None, scale: float = 0.0) -> float:
        """L(theta + scale * offsets)."""
        with self._moved(offsets, scale):
            mean = torch.stack(list(self._losses())).mean()
            return as_float(self._reduce(mean))

    def gradient(self, offsets: list[Tensor] | None = None, scale: float = 0.0) -> list[Tensor]:
        """The gradient of L at theta + scale * offsets."""
        self._drop_gradients()
        self._add_gradient(offsets, scale)
        return self._take_gradients()

    def _add_gradient(self, offsets: list[Tensor] | None, scale: float) -> None:
        """Add it to the gradients that are there."""
        with self._moved(offsets, scale):
            for loss in self._losses():
                (loss / len(self._batches)).backward()

    def product(self, v: list[Tensor], method: str) -> list[Tensor]:
        """H v."""
        if method not in METHODS:
            raise ValueError(f"method={method!r} is unknown. Use one of {', '.join(METHODS)}.")
        return self._exact_product(v) if method == "exact" else self._difference(v)

    def _exact_product(self, v: list[Tensor]) -> list[Tensor]:
        self._drop_gradients()
        with sdpa_kernel(SDPBackend.MATH), _explained():
            for loss in self._losses():
                mean = loss / len(self._batches)
                grads = torch.autograd.grad(mean, self.params, create_graph=True, materialize_grads=True)
                slope = torch.stack([(g * x).sum() for g, x in zip(grads, v, strict=True)]).sum()
                if slope.requires_grad:  # else the loss is linear
                    # `autograd.grad` would not reach, and so be silent about, what is differentiable only once.
                    slope.backward()
        return self._take_gradients()

    def _difference(self, v: list[Tensor]) -> list[Tensor]:
        scale = difference_scale(self.params, v)
        if scale == math.inf:  # v is 0
            return [torch.zeros_like(p) for p in self.params]
        self._drop_gradients()
        self._add_gradient(v, -scale)
        scale_gradients_(self.params, -1.0)
        self._add_gradient(v, scale)
        scale_gradients_(self.params, 1 / (2 * scale))
        return self._take_gradients()

    def _drop_gradients(self) -> None:
        for p in self.params:
            p.grad = None

    def _take_gradients(self) -> list[Tensor]:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        self._drop_gradients()
        return [self._reduce(g) for g in grads]

    def _losses(self) -> Iterator[Tensor]:
        self.rng_state.restore()
        for batch in self._batches:
            loss = self._loss_fn(self._model, batch)
            if loss.numel() != 1:
                raise ValueError(f"loss_fn: a loss of shape {tuple(loss.shape)}. Return one number, such as its mean.")
            if torch.is_grad_enabled() and not loss.requires_grad:
                raise ValueError(
                    "loss_fn: the loss does not depend on a trainable parameter. Unfreeze one that it uses."
                )
            yield loss.squeeze()

    @contextmanager
    def _moved(self, offsets: list[Tensor] | None, scale: float) -> Iterator[None]:
        self._reshard()
        if offsets is not None:
            with torch.no_grad():
                for p, offset in zip(self.params, offsets, strict=True):
                    _local(p.detach()).add_(_local(offset), alpha=scale)
        try:
            yield
        finally:
            self._reshard()
            self.restore_weights()

    def _reshard(self) -> None:
        """A pass without a backward leaves FSDP2's root gathered, and the next one would not see that weights moved."""
        for module in self._model.modules():
            if hasattr(module, "reshard"):
                cast(Any, module).reshard()

    @torch.no_grad()
    def restore_weights(self) -> None:
        for p, theta in zip(self.params, self._theta, strict=True):
            _local(p.detach()).copy_(theta)


def difference_scale(params: Sequence[Tensor], v: Sequence[Tensor]) -> float:
    """s of a central difference along v: the coordinate that moves most moves by a share of the typical weight,

        s max|v_i| = 0.1 eps^(1/3) (1 + ||theta||) / sqrt(N),

    which is 5e-4 of it in float32 (eps = 1.2e-7). The error from the fourth derivatives grows with s^2, that from
    rounding with eps / s, which is where the cube root comes from. A bound on the coordinates, not on ||s v||, is good
    for both kinds of vectors that occur: random signs, and eigenvectors, which a few coordinates dominate.
    Infinite if v is 0.
    """
    count = sum(p.numel() for p in params)
    eps = max(torch.finfo(p.dtype).eps for p in params)
    largest = max(max(as_float(x.max()), -as_float(x.min())) for x in v)
    size = 0.1 * eps ** (1 / 3) * (1 + as_float(length(params))) / math.sqrt(count)
    return size / largest if largest > 0 else math.inf


@contextmanager
def _measured(model: nn.Module, loss_fn: LossFunction, batches: Batches, reduce: Reduce) -> Iterator[_Loss]:
    """L in evaluation mode. Afterwards everything is as it was."""
    loss = _Loss(model, loss_fn, batches, reduce)
    modes = [(module, module.training) for module in model.modules()]
    with gradients_set_aside(model.parameters()), preserve_buffers(model), torch.enable_grad():
        try:
            model.eval()
            yield loss
        finally:
            loss.restore_weights()
            loss.rng_state.restore()
            for module, mode in modes:
                module.training = mode


class NotTwiceDifferentiable(ValueError):
    """The model has an operation for which autograd knows no second derivative."""


#: What PyTorch says of an operation without one, of a function that forbids it, of reentrant checkpointing, and of
#: compiled code.
_NO_SECOND_DERIVATIVE = (
    "is not implemented",
    "once_differentiable",
    "is not compatible with .grad",
    "support double backward",
)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in _NO_SECOND_DERIVATIVE):
            raise
        raise NotTwiceDifferentiable(
            f"method='exact': the model has an operation that cannot be differentiated twice ({error}). Use "
            "method='difference', or another attention: model.set_attn_implementation('eager')."
        ) from error


# ---- Vectors: one tensor for each parameter, or one flat tensor ----


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _like(p: Any, value: Tensor) -> Tensor:
    """`value`, whole on every process, on the device and in the type of `p`, and sharded as it is."""
    value = value.to(p.device, p.dtype)
    if not hasattr(p, "placements"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)


def _signs(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, tuple(shape), generator=generator, device=generator.device).mul_(2).sub_(1)


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(as_float((x * y).sum()) for x, y in zip(a, b, strict=True))


def _scaled(v: list[Tensor], scales: Sequence[Tensor] | None) -> list[Tensor]:
    return v if scales is None else [x * scale for x, scale in zip(v, scales, strict=True)]


def _flatten(v: Sequence[Tensor]) -> Tensor:
    whole = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in v]
    return torch.cat([x.detach().reshape(-1).cpu() for x in whole])


def _unflatten(flat: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([p.numel() for p in params])
    return [_like(p, part.view(p.shape)) for p, part in zip(params, parts, strict=True)]


# ---- Estimates ----


def _mean(draws: list[float]) -> Estimate:
    values = np.array(draws)
    count = len(values)
    error = values.std(ddof=1) / math.sqrt(count) if count > 1 and np.isfinite(values).all() else math.nan
    return Estimate(float(values.mean()), float(error))


def _top_eigenvalue(
    product: Callable[[np.ndarray], np.ndarray], start: np.ndarray, tolerance: float, max_products: int
) -> Estimate:
    try:
        from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
    except ModuleNotFoundError:
        from ..errors import extra  # imports transformers

        with extra("analysis"):
            raise

    count = len(start)
    first = product(start)
    if count == 1:
        return Estimate(float(first[0] / start[0]), 0.0)
    if not np.isfinite(first).all():
        return Estimate(math.nan, math.nan)
    operator = LinearOperator((count, count), matvec=product, dtype=start.dtype)
    try:
        # A restart of ARPACK keeps half of its 20 vectors.
        (value,), vectors = eigsh(
            operator, k=1, which="LA", v0=start, tol=tolerance, maxiter=math.ceil(max_products / 10)
        )
    except ArpackNoConvergence:
        warnings.warn(
            f"top_hessian_eigenvalue: no convergence within {max_products} products. Set a larger tolerance, or more "
            "max_products.",
            stacklevel=3,
        )
        return Estimate(math.nan, math.nan)
    vector = vectors[:, 0]
    return Estimate(float(value), float(np.linalg.norm(product(vector) - value * vector)))


# ---- Checks ----


def _check(params: list[nn.Parameter], batches: Batches) -> None:
    if not params:
        raise ValueError("model: it has no trainable parameter. Set requires_grad on those to measure.")
    for p in params:
        if p.dtype in HALF_PRECISION:
            raise ValueError(
                f"model: trainable parameters in {str(p.dtype).removeprefix('torch.')}, in which curvature is lost to "
                "rounding. Load it with dtype=torch.float32."
            )
    if not hasattr(batches, "__len__"):
        raise ValueError("batches: they are passed over several times. Give a list.")
    if not len(batches):
        raise ValueError("batches: there are none. Give at least one.")


def _inverse_roots(params: list[nn.Parameter], preconditioner: Sequence[Tensor]) -> list[Tensor]:
    """P^-1/2."""
    shapes = [tuple(p.shape) for p in params]
    if [tuple(x.shape) for x in preconditioner] != shapes:
        raise ValueError("preconditioner: its shapes are not those of the trainable parameters, in their order.")
    if not all((x > 0).all() for x in preconditioner):
        raise ValueError("preconditioner: it has values that are not positive. Add eps to it.")
    return [x.to(p.device, p.dtype).rsqrt() for p, x in zip(params, preconditioner, strict=True)]


def _require_count(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value}: give at least 1.")


def _require_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value}: give a number above 0.")
