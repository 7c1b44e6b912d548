r"""How far Adam's adaptive learning rate varies while its second moment is young, and how falling gradients add to it.

From "When Will Gradient Regularization Be Harmful?" (Zhao et al., ICML 2024), Section 4. The gradients of one
coordinate are modeled as independent, g_k ~ N(0, sigma_k), with variances that decay at the rate gamma:

    psi_t = sqrt(t / (g_1^2 + ... + g_t^2)),    sigma_k = sigma_1 exp(-gamma (k - 1)).

To first order (the delta method, Lemma 4.1), with S_j = sum_k sigma_k^j,

    Var(psi) = Var(Y) / (4 E(Y)^3) = t S_2 / (2 S_1^3),    Y = (g_1^2 + ... + g_t^2) / t,

and with x = exp(-gamma) the sums give Eq. 9:

    Var(psi) = t / (2 sigma_1) * (1 + x^t) (1 - x)^2 / ((1 + x) (1 - x^t)^2).

For gamma -> 0 this is 1 / (2 t sigma_1), as in RAdam; for large t it grows as t (1 - x)^2 / (2 sigma_1 (1 + x)).

Much of this growth says only that psi grows as gradients shrink, which scale-invariant Adam does not notice. What
matters is the variation of psi relative to its mean, its coefficient of variation:

    CV(psi) = sqrt(1 / (2 n)),    n = S_1^2 / S_2 = tanh(gamma t / 2) / tanh(gamma / 2).

n is the number of gradients that count: t without decay, at most 1 / tanh(gamma / 2) with it. The delta method
underestimates the variance: by 4 to 7 % at n = 50, by 9 to 18 % at 20, by 30 to 60 % at 5.

The exponential average of the real Adam weights g_k^2 by beta2^(t - k). Its w_k sigma_k are a geometric series as
well, with gamma + log(beta2) in place of gamma.

Departures from the paper. It defines sigma_k with exp(-gamma k) but sums exp(-gamma (k - 1)), which we define; with
its definition Eq. 9 would have another factor exp(gamma). Eq. 25 writes sigma_0 for sigma_1, and a line before it
Var = sqrt(1/Y) where psi = sqrt(1/Y) is meant. Theorem 4.3, that the variance grows with gamma, requires
t exp(-gamma (t - 1)) <= 1. It holds without this, for all t >= 2: with <k> the mean of k = 0, ..., t - 1 under weights
exp(-gamma k), which falls in gamma, d log Var / d gamma = 3 <k>_gamma - 2 <k>_(2 gamma) >= <k>_gamma > 0.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .estimates import Estimate

#: At this n the delta method gives 40 % (t = 5, no decay) to 70 % (large t) of the exact variance.
RELIABLE_SAMPLES = 5
#: A line cannot be told from noise with fewer points.
FEWEST_POINTS = 3
_CHUNK = 2**15  # random numbers at a time; they stay in the cache

Numbers = Any  # a number, an array or a tensor


def adaptive_lr_variance(
    t: Numbers,
    gamma: Numbers,
    sigma1: Numbers = 1.0,
    method: str = "closed",
    *,
    beta2: float = 0.999,
    draws: int = 1_000_000,
    seed: int = 0,
) -> Any:
    """The variance of Adam's adaptive learning rate psi after `t` steps; see the module's docstring.

    ```python
    from hf_gr.analysis import adaptive_lr_variance

    adaptive_lr_variance(50, gamma=0.0)  # 0.01
    adaptive_lr_variance(50, gamma=0.1)  # 0.121: twelve times as much with decaying gradients
    adaptive_lr_variance(50, gamma=0.1, method="monte_carlo")  # Estimate(value=0.133, standard_error=0.0003)
    ```

    Args:
        t: number of steps, from 1.
        gamma: decay rate of the variance of the gradients, per step; negative if they grow. `fit_norm_decay` estimates
            it.
        sigma1: variance of the first gradient.
        method: `closed`, Eq. 9; `delta`, Lemma 4.1 by explicit sums; `ema`, the same for the exponential average that
            Adam uses; `monte_carlo`, by simulation, without the approximation of the others.
        beta2: for `ema`.
        draws: for `monte_carlo`, the number of simulated psi; `seed` makes them reproducible.

    Returns:
        A float, or an array or tensor if one was given. `monte_carlo` takes single numbers and returns an `Estimate`;
        its standard error is infinite for t <= 4, where psi has no fourth moment.

    Raises:
        ValueError: for an argument out of its range, and for `monte_carlo` at t <= 2, where the variance is infinite.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: choose one of {', '.join(METHODS)}.")
    steps, rate, first = _checked(t, gamma, sigma1)
    if method == "monte_carlo":
        if steps.ndim or rate.ndim or first.ndim:
            raise ValueError("method='monte_carlo': t, gamma and sigma1 must be single numbers. Call it for each.")
        return _simulate(int(steps), float(rate), float(first), draws, seed)
    decay = beta2 if method == "ema" else 1.0
    _warn_of_few(effective_samples(steps, rate, decay))
    return _like(FORMULAS[method](steps, rate, first, decay), t, gamma, sigma1)


def adaptive_lr_variation(t: Numbers, gamma: Numbers, beta2: float = 1.0) -> Any:
    """The coefficient of variation of psi, its standard deviation relative to its mean: sqrt(1 / (2 n)) with the n of
    `effective_samples`, to first order.

    Unlike the variance it does not depend on the scale of the gradients.

    Args:
        t: as in `adaptive_lr_variance`.
        gamma: as there.
        beta2: 1 for the plain mean of the paper.
    """
    samples = effective_samples(*_checked(t, gamma)[:2], beta2)
    _warn_of_few(samples)
    return _like(np.sqrt(1 / (2 * samples)), t, gamma)


def effective_samples(t: Numbers, gamma: Numbers, beta2: float = 1.0) -> Any:
    """n = S_1^2 / S_2, the number of equally weighted gradients that would estimate the second moment as well.

    Args:
        t: as in `adaptive_lr_variance`.
        gamma: as there.
        beta2: as in `adaptive_lr_variation`.
    """
    steps, rate, _ = _checked(t, gamma)
    shifted = np.abs(rate + math.log(_checked_beta2(beta2)))
    ratio = np.tanh(steps * shifted / 2) / np.tanh(np.where(shifted > 0, shifted, 1) / 2)
    return _like(np.where(shifted > 0, ratio, steps), t, gamma)


def fit_norm_decay(log: Iterable[Mapping[str, Any]], last_step: float = math.inf, key: str = "grad_norm") -> Estimate:
    """gamma of a run, from its log: minus the slope of log ||g||^2 over the steps, by least squares.

    Positive if the norm falls. The standard error is that of independent residuals.

    Args:
        log: `log_history` of a trainer or of its `trainer_state.json`.
        last_step: the last step to use, such as the end of the warmup.
        key: the logged norm. `grad_norm` is that of the gradient which the optimizer gets, before clipping;
            `gr_grad_norm` is ||g1||.

    Raises:
        ValueError: fewer than three steps of these have a norm.
    """
    points = [(entry["step"], entry[key]) for entry in log if key in entry and entry["step"] <= last_step]
    usable = [(step, 2 * math.log(norm)) for step, norm in points if 0 < norm < math.inf]
    if len({step for step, _ in usable}) < FEWEST_POINTS:
        raise ValueError(
            f"{key} is logged in {len(usable)} steps up to {last_step:g}, and a rate takes {FEWEST_POINTS} or more. "
            "Log more often (logging_steps)."
        )
    x, y = np.array(usable, dtype=float).T
    x, y = x - x.mean(), y - y.mean()
    slope = (x @ y) / (x @ x)
    variance = np.sum((y - slope * x) ** 2) / (len(x) - 2) / (x @ x)
    return Estimate(-float(slope), math.sqrt(variance))


# ---- The methods ----


def closed_variance(
    t: np.ndarray, gamma: np.ndarray, sigma1: np.ndarray | float = 1.0, beta2: float = 1.0
) -> np.ndarray:
    """Eq. 9, unchecked, as E(psi)^2 CV^2 = 1 / (E(Y) 2 n). The sums in E(Y) start from their largest term."""
    log_beta2 = math.log(_checked_beta2(beta2))
    mean = _geometric_sum(t, np.abs(gamma + log_beta2)) / _geometric_sum(t, np.array(-log_beta2))
    with np.errstate(over="ignore"):  # the largest term may be infinite, or 0
        largest = sigma1 * np.exp((t - 1) * np.maximum(-gamma, log_beta2))
        return np.divide(1, 2 * effective_samples(t, gamma, beta2) * largest * mean)


def _geometric_sum(t: np.ndarray, rate: np.ndarray) -> np.ndarray:
    """sum_(k < t) exp(-rate k), for rates >= 0."""
    return np.where(rate > 0, np.expm1(-rate * t) / np.expm1(-np.where(rate > 0, rate, 1)), t)


def _by_sums(t: np.ndarray, gamma: np.ndarray, sigma1: np.ndarray, _: float) -> np.ndarray:
    """Lemma 4.1 as it is written."""

    def one(t: float, gamma: float, sigma1: float) -> float:
        sigma = sigma1 * np.exp(-gamma * np.arange(t))
        mean, variance = sigma.mean(), 2 * np.sum(sigma**2) / t**2
        return variance / (4 * mean**3)

    return np.vectorize(one, otypes=[float])(t, gamma, sigma1)


def _simulate(t: int, gamma: float, sigma1: float, draws: int, seed: int) -> Estimate:
    if t <= 2:
        raise ValueError(f"t={t}: the variance of psi is infinite for t <= 2. Give a larger t.")
    if draws != int(draws) or draws < 2:
        raise ValueError(f"draws={draws}: give a whole number of at least 2.")
    generator, weights = torch.Generator().manual_seed(seed), torch.exp(-gamma * torch.arange(t)) * sigma1 / t
    size = max(1, _CHUNK // t)
    sizes = [min(size, draws - start) for start in range(0, draws, size)]
    psi = torch.cat([(torch.randn(size, t, generator=generator).square() @ weights).rsqrt() for size in sizes]).double()
    deviations = (psi - psi.mean()).square()
    standard_error = deviations.std().item() / math.sqrt(draws) if t > 4 else math.inf
    return Estimate(deviations.sum().item() / (draws - 1), standard_error)


FORMULAS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray, float], np.ndarray]] = {
    "closed": closed_variance,
    "delta": _by_sums,
    "ema": closed_variance,
}
METHODS = (*FORMULAS, "monte_carlo")


# ---- Arguments and results ----


def _checked(t: Numbers, gamma: Numbers, sigma1: Numbers = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    steps, rate, first = (_as_array(value) for value in (t, gamma, sigma1))
    if not np.all((steps >= 1) & (steps == np.floor(steps)) & np.isfinite(steps)):
        raise ValueError(f"t={t}: give a number of steps, whole and at least 1.")
    if not np.all(np.isfinite(rate)):
        raise ValueError(f"gamma={gamma}: give a finite decay rate per step.")
    if not np.all((first > 0) & np.isfinite(first)):
        raise ValueError(f"sigma1={sigma1}: give a variance, more than 0.")
    return steps, rate, first


def _checked_beta2(beta2: float) -> float:
    if not 0 < beta2 <= 1:
        raise ValueError(f"beta2={beta2}: must be in (0, 1]; 1 is the plain mean.")
    return beta2


def _as_array(value: Numbers) -> np.ndarray:
    return np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value, dtype=np.float64)


def _like(result: np.ndarray, *inputs: Numbers) -> Any:
    """As a tensor of the type of the first that has one, as an array, or as a float."""
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    if tensors:
        dtype = next((value.dtype for value in tensors if value.is_floating_point()), torch.get_default_dtype())
        return torch.as_tensor(result, dtype=dtype, device=tensors[0].device)
    if np.ndim(result) or any(isinstance(value, np.ndarray) for value in inputs):
        return np.asarray(result)
    return float(result)


def _warn_of_few(samples: Any) -> None:
    fewest = float(np.min(samples))
    if fewest < RELIABLE_SAMPLES:
        warnings.warn(
            f"only {fewest:.2g} gradients count (n, see hf_gr.analysis.effective_samples): below {RELIABLE_SAMPLES} "
            "this approximation underestimates the variance. Use method='monte_carlo' of adaptive_lr_variance.",
            stacklevel=3,
        )
