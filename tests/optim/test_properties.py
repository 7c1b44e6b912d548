"""What holds for all shapes, types, groups, frozen parts, radii and degrees: examples drawn by hypothesis."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gr import IRE
from hf_gr.optim.gradient_regularization import Perturbation, gradient_norm, in_float32, scale_gradients_

settings.register_profile("hf_gr", deadline=None, max_examples=60, derandomize=True, database=None)
settings.load_profile("hf_gr")

#: Rounding of the sum of a few products, relative to the largest of them.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


class Toy(torch.nn.Module):
    """Parameters of any shapes, with a smooth loss in which all of them meet; some frozen, some unused."""

    def __init__(self, shapes, dtype, frozen, unused, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weights = torch.nn.ParameterList(
            torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
            for shape in [(2, 3), *shapes]
        )
        self.unused = unused
        for i in frozen:
            self.weights[i].requires_grad = False

    def loss(self) -> torch.Tensor:
        used = [w for i, w in enumerate(self.weights) if i not in self.unused]
        mixed = sum((i + 1) * w.sin().sum() for i, w in enumerate(used))
        return mixed.tanh() + sum((w**2).sum() for w in used) / 4

    def flat(self) -> torch.Tensor:
        return torch.cat([w.detach().reshape(-1) for w in self.weights])

    def trainable(self) -> list[torch.Tensor]:
        return [w for w in self.weights if w.requires_grad]


@st.composite
def toys(draw, dtypes=(torch.float32, torch.float64)):
    shapes = draw(st.lists(SHAPES, max_size=4))
    rest = range(1, len(shapes) + 1)  # the first one is always trained
    frozen, unused = (draw(st.sets(st.sampled_from(rest)) if shapes else st.just(set())) for _ in range(2))
    return Toy(shapes, draw(st.sampled_from(dtypes)), frozen, unused, draw(st.integers(0, 2**31)))


RADII = st.floats(1e-2, 1.0)
DEGREES = st.floats(0.05, 3.0)  # lambda / r


def combined(toy: Toy, r: float, lambda_: float) -> list[torch.Tensor]:
    """The recipe of `gradient_regularization`'s docstring; theta must come back bit for bit, in its own storage."""
    params, theta = toy.trainable(), toy.flat()
    storage = [w.data_ptr() for w in toy.weights]
    for p in params:
        p.grad = None
    toy.loss().backward()
    perturbation = Perturbation(params)
    try:
        perturbation.apply(r, gradient_norm(params), grad_scale=(r - lambda_) / lambda_)
        moved = toy.flat()
        toy.loss().backward()
    finally:
        perturbation.restore()
    scale_gradients_(params, lambda_ / r)
    assert torch.equal(toy.flat(), theta) and [w.data_ptr() for w in toy.weights] == storage
    step = (moved.double() - theta.double()).norm().item()
    assert step == pytest.approx(r, rel=1e-3)
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]


def gradients(toy: Toy, **kwargs) -> list[torch.Tensor]:
    return list(torch.autograd.grad(toy.loss(), toy.trainable(), allow_unused=True, materialize_grads=True, **kwargs))


def require_close(found: list[torch.Tensor], expected: list[torch.Tensor], scale: float) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE[a.dtype] * scale)


@given(toys(), RADII, DEGREES)
def test_combination_is_the_formula(toy, r, degree):
    g1 = gradients(toy)
    norm = torch.stack([g.norm() for g in g1]).norm()
    there = copy.deepcopy(toy)
    with torch.no_grad():
        for w, g in zip(there.trainable(), g1, strict=True):
            w += r * g / norm
    g2 = gradients(there)
    expected = [(1 - degree) * a + degree * b for a, b in zip(g1, g2, strict=True)]
    # In float32 theta is rounded where it is perturbed: 2^-24 of its size, of which g2 changes at most tenfold.
    require_close(combined(toy, r, degree * r), expected, scale=10 * (1 + degree) * (1 + norm.item()))


@given(toys((torch.float64,)), RADII, DEGREES, DEGREES, st.floats(-1, 2))
def test_combination_is_linear_in_lambda(toy, r, first, second, share):
    between = share * first + (1 - share) * second
    if between <= 0.01:
        return
    parts = [combined(toy, r, degree * r) for degree in (first, second, between)]
    expected = [share * a + (1 - share) * b for a, b in zip(*parts[:2], strict=True)]
    require_close(parts[2], expected, scale=1e3)


@given(toys((torch.float64,)), st.floats(0.05, 1.0))
def test_error_against_double_backward_falls_linearly_in_r(toy, lambda_):
    """(g2 - g1)/r tends to the gradient of ||g1||: ten times less r, ten times less error."""
    g1 = gradients(toy, create_graph=True)
    norm = torch.stack([(g**2).sum() for g in g1]).sum().sqrt()
    slope = torch.autograd.grad(norm, toy.trainable(), allow_unused=True, materialize_grads=True)
    exact = torch.cat([(g + lambda_ * s).detach().reshape(-1) for g, s in zip(g1, slope, strict=True)])
    errors = []
    for r in (1e-3, 1e-4):
        found = torch.cat([g.reshape(-1) for g in combined(toy, r, lambda_)])
        errors.append((found - exact).norm().item())
    # Where the slope is straight, rounding is all that is left: 1e-16 / r.
    assert errors[1] <= max(0.15 * errors[0], 1e-9)


@given(toys((torch.bfloat16, torch.float16)), RADII)
def test_half_precision_comes_back_exactly(toy, r):
    params, theta = toy.trainable(), toy.flat()
    storage = [w.data_ptr() for w in toy.weights]
    toy.loss().backward()
    before = [None if p.grad is None else p.grad.clone() for p in params]
    with in_float32(params):
        assert all(p.dtype == torch.float32 for p in params)
        perturbation = Perturbation(params)
        perturbation.apply(r, gradient_norm(params))
        step = (toy.flat().double() - theta.double()).norm().item()
        perturbation.restore()
    assert step == pytest.approx(r, rel=1e-4)
    assert torch.equal(toy.flat(), theta) and [w.data_ptr() for w in toy.weights] == storage
    for p, grad in zip(params, before, strict=True):
        assert p.grad is grad is None or torch.equal(p.grad, grad)


@given(toys(), st.data(), st.floats(0.0, 8.0), st.floats(0.51, 1.0))
def test_ire_amplifies_the_step_of_any_groups(toy, data, kappa, gamma):
    """theta_old + (1 + kappa n)(theta_base - theta_old), with the share gamma of all coordinates in n."""
    groups: list[list[torch.Tensor]] = [[], []]
    for p in toy.trainable():
        groups[data.draw(st.integers(0, 1))].append(p)
    groups = [{"params": group, "lr": lr} for group, lr in zip(groups, (0.1, 0.01), strict=True) if group]
    toy.loss().backward()
    params = [p for p in toy.trainable() if p.grad is not None]
    optimizer = IRE(torch.optim.SGD(groups, lr=0.1, momentum=0.9), kappa=kappa, gamma=gamma)
    optimizer.update_mask()
    sizes = [torch.zeros_like(p) if p.grad is None else p.grad.abs() for p in toy.trainable()]
    every = torch.cat([size.reshape(-1) for size in sizes])
    threshold = every.sort().values[int(gamma * every.numel()) - 1]
    flat = torch.cat([p.grad.abs().reshape(-1) for p in params]) <= threshold
    old = torch.cat([p.detach().reshape(-1) for p in params])
    plain = copy.deepcopy(toy)
    twins = dict(zip(toy.trainable(), plain.trainable(), strict=True))
    for p in params:
        twins[p].grad = p.grad.clone()
    torch.optim.SGD([{**g, "params": [twins[p] for p in g["params"]]} for g in groups], lr=0.1, momentum=0.9).step()
    optimizer.step()
    base = torch.cat([twins[p].detach().reshape(-1) for p in params])
    new = torch.cat([p.detach().reshape(-1) for p in params])
    expected = torch.where(flat, old + (1 + kappa) * (base - old), base)
    torch.testing.assert_close(new, expected, rtol=TOLERANCE[new.dtype], atol=TOLERANCE[new.dtype])
