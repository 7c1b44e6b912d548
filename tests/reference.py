"""Gradient regularization and IRE written out slowly, from the papers and without any code of hf_gr."""

import copy
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
        generator = torch.Generator().manual_seed(int(state >> 1))
        for batch in batches:
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            logits, labels = model(**inputs).logits, batch["labels"]
            if logits.dim() == 3:  # a language model predicts the next token
                logits, labels = logits[:, :-1], labels[:, 1:]
            log_p = logits[labels != -100].log_softmax(dim=-1)
            race = torch.empty_like(log_p).exponential_(generator=generator)
            sampled = (log_p.detach().exp() / race).argmax(dim=-1)
            total = total - log_p.gather(1, sampled[:, None]).sum()
            count += len(sampled)
    model.train(was_training)
    return list(torch.autograd.grad(total / count, list(model.parameters())))


def flat_masks(estimate: list[Tensor], gamma: float) -> list[Tensor]:
    """The floor(gamma N) coordinates with the smallest square, and all that are equal to the largest of them."""
    values = torch.cat([g.reshape(-1) for g in estimate]).abs()
    threshold = values.sort().values[int(gamma * len(values)) - 1]
    return [g.abs() <= threshold for g in estimate]
