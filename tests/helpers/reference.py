"""GR, IRE, LARS, TVLARS and LAMB written out slowly, from the papers and without any code of hf_gr."""

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn


def strength(strategy: str, t: int, warmup_steps: int, r: float, lambda_: float) -> tuple[float, float]:
    """(lambda_t, r_t) at the 1-based step t: Eq. 11, 13, 15."""
    w = min(1.0, t / warmup_steps)
    if strategy == "none":
        return lambda_, r
    if strategy == "r":
        return w * lambda_, w * r
    if strategy == "lambda":
        return w * lambda_, r
    if strategy == "zero":
        return (0.0 if t <= warmup_steps else lambda_), r
    raise AssertionError(strategy)


def flat_gradient(model: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])


def regularized_gradient(model: nn.Module, loss_of: Callable, lambda_t: float, r_t: float) -> Tensor:
    """(1 - lambda/r) g1 + (lambda/r) g2 as one flat vector, g2 at a perturbed deep copy of the model."""
    g1 = flat_gradient(model, loss_of(model))
    if lambda_t == 0 or r_t == 0 or g1.norm() == 0:
        return g1
    perturbed = copy.deepcopy(model)
    offset = 0
    with torch.no_grad():
        for p in perturbed.parameters():
            p += r_t * (g1[offset : offset + p.numel()] / g1.norm()).view_as(p)
            offset += p.numel()
    g2 = flat_gradient(perturbed, loss_of(perturbed))
    return (1 - lambda_t / r_t) * g1 + (lambda_t / r_t) * g2


def train(
    model: nn.Module,
    window_losses: list[Callable],
    make_optimizer: Callable,
    *,
    strategy: str,
    warmup_steps: int,
    r: float,
    lambda_: float,
    max_grad_norm: float,
) -> list[Tensor]:
    """The path of the weights: one flat vector before the first step and after each. `window_losses[k](model)` is the
    loss of the whole optimizer step k."""
    optimizer = make_optimizer(model.parameters())
    path = [torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()]
    for t, loss_of in enumerate(window_losses, start=1):
        g = regularized_gradient(model, loss_of, *strength(strategy, t, warmup_steps, r, lambda_))
        g = g * min(1.0, max_grad_norm / (g.norm().item() + 1e-6))
        offset = 0
        for p in model.parameters():
            p.grad = g[offset : offset + p.numel()].view_as(p).clone()
            offset += p.numel()
        optimizer.step()
        path.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone())
    return path


def sampled_label_gradient(model: nn.Module, batches_per_rank: list[list[dict]], seed: int, step: int) -> list[Tensor]:
    """Gradient of the mean of -log p(y|x) over the labels of all batches of all ranks, y drawn from the model.

    Each rank draws from a generator of its own, which is seeded as hf_gr seeds it.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for rank, batches in enumerate(batches_per_rank):
        state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state) // 2)
        for batch in batches:
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            logits, labels = model(**inputs).logits, batch["labels"]
            if logits.dim() == 3:  # a language model predicts the next token
                logits, labels = logits[:, :-1], labels[:, 1:]
            log_p, counts = logits.flatten(0, -2).log_softmax(dim=-1), labels.flatten() != -100
            race = torch.empty_like(log_p).exponential_(generator=generator)
            sampled = (log_p.detach().exp() / race).argmax(dim=-1)
            total = total - log_p.gather(1, sampled[:, None])[counts].sum()
            count += counts.sum()
    model.train(was_training)
    return list(torch.autograd.grad(total / count, list(model.parameters())))


def flat_masks(estimate: list[Tensor], gamma: float) -> list[Tensor]:
    """The floor(gamma N) coordinates with the smallest square, and all that are equal to the largest of them."""
    values = torch.cat([g.reshape(-1) for g in estimate]).abs()
    threshold = values.sort().values[int(gamma * len(values)) - 1]
    return [g.abs() <= threshold for g in estimate]


# ---- LARS, TVLARS and LAMB, written from their formulas, one number after the other ----


def phi(t: int, tv_lambda: float, delay_steps: float, alpha: float, gamma_min: float) -> float:
    return 1 / (alpha + math.exp(tv_lambda * (t - delay_steps))) + gamma_min


def lars_steps(
    weights: list[Tensor],
    gradients: list[list[Tensor]],
    lr: float,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    eta: float = 1e-3,
    nesterov: bool = False,
    bias_lr_scale: float = 1.0,
    clamp: tuple[float, float] | None = None,
    phis: list[float] | None = None,
    phi_everywhere: bool = True,
) -> list[Tensor]:
    """The weights after as many steps as there are lists of gradients."""
    weights = [w.clone() for w in weights]
    buffers = [torch.zeros_like(w) for w in weights]
    for t, grads in enumerate(gradients):
        factor = 1.0 if phis is None else phis[t]
        for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
            is_layer = w.dim() > 1
            d = g + weight_decay * w if is_layer else g
            q = factor if phi_everywhere else 1.0
            if is_layer:
                w_norm, d_norm = w.norm().item(), d.norm().item()
                if clamp is not None:
                    w_norm, d_norm = (min(max(n, clamp[0]), clamp[1]) for n in (w_norm, d_norm))
                if w_norm > 0 and d_norm > 0:
                    q = factor * eta * w_norm / d_norm
            buffers[i] = momentum * buffers[i] + q * d
            step = q * d + momentum * buffers[i] if nesterov else buffers[i]
            weights[i] = w - lr * (1.0 if is_layer else bias_lr_scale) * step
    return weights


def lamb_steps(
    weights: list[Tensor],
    gradients: list[list[Tensor]],
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    bias_correction: bool = True,
    exclude_1d: bool = True,
    clamp: tuple[float, float] | None = None,
) -> list[Tensor]:
    weights = [w.clone() for w in weights]
    m = [torch.zeros_like(w) for w in weights]
    v = [torch.zeros_like(w) for w in weights]
    for t, grads in enumerate(gradients, start=1):
        for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g
            v[i] = betas[1] * v[i] + (1 - betas[1]) * g * g
            m_hat = m[i] / (1 - betas[0] ** t) if bias_correction else m[i]
            v_hat = v[i] / (1 - betas[1] ** t) if bias_correction else v[i]
            u = m_hat / (v_hat.sqrt() + eps)
            ratio = 1.0
            if w.dim() > 1 or not exclude_1d:
                u = u + weight_decay * w
                w_norm, u_norm = w.norm().item(), u.norm().item()
                if clamp is not None:
                    w_norm = min(max(w_norm, clamp[0]), clamp[1])
                if w_norm > 0 and u_norm > 0:
                    ratio = w_norm / u_norm
            weights[i] = w - lr * ratio * u
    return weights
