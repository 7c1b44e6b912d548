"""The update rule on plain tensors: closed forms, exact restoring, double backward as the limit."""

import pytest
import torch
from torch import nn

from helpers import devices
from hf_gr.optim.ascents import ASCENTS
from hf_gr.optim.gradient_regularization import Perturbation, gradient_norm, scale_gradients_


def two_pass(params, loss_of, r, lambda_):
    """The recipe of the module's docstring."""
    loss_of().backward()
    perturbation = Perturbation(params)
    try:
        perturbation.apply(r, gradient_norm(params), grad_scale=(r - lambda_) / lambda_)
        loss_of().backward()
        norm = perturbation.second_gradient_norm((r - lambda_) / lambda_)
    finally:
        perturbation.restore()
    scale_gradients_(params, lambda_ / r)
    return norm


@pytest.mark.parametrize("lambda_", [0.05, 0.08, 0.1, 0.25])
def test_quadratic_closed_form(lambda_):
    # L = theta' H theta / 2: g1 = H theta and g2 = g1 + r H g1 / ||g1||, so g = g1 + lambda H g1 / ||g1|| for every r.
    hessian = torch.tensor([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]], dtype=torch.float64)
    theta = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
    g1 = hessian @ theta.detach()
    g2 = g1 + 0.1 * hessian @ g1 / g1.norm()
    norm = two_pass([theta], lambda: theta @ hessian @ theta / 2, r=0.1, lambda_=lambda_)
    torch.testing.assert_close(theta.grad, g1 + lambda_ * hessian @ g1 / g1.norm(), rtol=1e-10, atol=0)
    # g1 is recovered from theta' - theta, which has lost about ten digits of sixteen.
    assert norm == pytest.approx(float(g2.norm()), rel=1e-9)


def test_error_against_double_backward_falls_linearly_in_r():
    # (g2 - g1)/r tends to H g1/||g1||, the gradient of the norm; the difference is of order r.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(16, 5, dtype=torch.float64), torch.randint(0, 3, (16,))
    params = list(model.parameters())

    def loss_of():
        return nn.functional.cross_entropy(model(x), y)

    g1 = torch.autograd.grad(loss_of(), params, create_graph=True)
    norm = torch.sqrt(sum((g**2).sum() for g in g1))
    exact = [a.detach() + 0.1 * b for a, b in zip(g1, torch.autograd.grad(norm, params), strict=True)]
    errors = []
    for r in (1e-2, 1e-3, 1e-4):
        model.zero_grad()
        two_pass(params, loss_of, r=r, lambda_=0.1)
        errors.append(sum(((p.grad - g) ** 2).sum() for p, g in zip(params, exact, strict=True)).sqrt().item())
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_restore_is_exact_and_keeps_the_storage(dtype):
    torch.manual_seed(0)
    params = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in [(7, 5), (1,), (), (3, 2, 4)]]
    for p in params:
        p.grad = torch.randn_like(p)
    theta, storage = [p.detach().clone() for p in params], [p.data_ptr() for p in params]
    perturbation = Perturbation(params)
    perturbation.apply(0.3, gradient_norm(params))
    step = torch.cat([(p.detach() - t).reshape(-1) for p, t in zip(params, theta, strict=True)])
    assert step.norm().item() == pytest.approx(0.3, rel=1e-5)
    perturbation.restore()
    assert all(torch.equal(p, t) for p, t in zip(params, theta, strict=True))
    assert [p.data_ptr() for p in params] == storage
    perturbation.restore()
    assert all(torch.equal(p, t) for p, t in zip(params, theta, strict=True))


@pytest.mark.parametrize("ascent", ["adaptive", "adaptive_weights"])
def test_scales_that_are_kept_are_those_computed_again(ascent, monkeypatch):
    """As on a GPU, where T of all blocks waits for the length; here on a CPU, with several blocks."""
    moved = []
    for is_kept in (False, True):
        monkeypatch.setattr("hf_gr.optim.ascents._is_kept", lambda _, is_kept=is_kept: is_kept)
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape)) for shape in ((300, 400), (7,), (500, 300), (3,), (2, 5))]
        for p in params[:3] + params[4:]:
            p.grad = torch.randn_like(p)
        Perturbation(params, ascent).apply(0.5, gradient_norm(params))
        moved.append(torch.cat([p.detach().flatten() for p in params]))
        directions, _ = ASCENTS[ascent].direction(params, torch.ones(()), None)
        assert [d is None for d in directions] == [p.grad is None for p in params]
    assert torch.equal(*moved)


@pytest.mark.parametrize("is_kept", [False, True])
def test_scales_need_the_memory_of_the_copies_and_two_blocks(is_kept, monkeypatch):
    monkeypatch.setattr("hf_gr.optim.ascents._is_kept", lambda _: is_kept)
    params = [nn.Parameter(torch.ones(2**15)) for _ in range(80)]  # 20 blocks
    for p in params:
        p.grad = torch.ones_like(p)

    def perturb() -> None:
        perturbation = Perturbation(params, "adaptive")
        perturbation.apply(0.5, gradient_norm(params))
        perturbation.restore()

    assert devices.extra_memory("cpu", perturb) <= 1.11 * sum(p.nbytes for p in params)


def test_parameters_without_gradient_stay():
    used, unused = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    used.grad = torch.ones(3)
    perturbation = Perturbation([used, unused])
    perturbation.apply(1.0, gradient_norm([used, unused]))
    assert torch.equal(unused, torch.ones(3)) and not torch.equal(used, torch.ones(3))


def test_sam_drops_the_first_gradient_and_leaves_none_missing():
    # The second pass reaches `used` only; `unused` had a gradient in the first pass and must not be skipped.
    used, unused = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    used.grad, unused.grad = torch.ones(3), torch.ones(3)
    perturbation = Perturbation([used, unused])
    perturbation.apply(0.1, gradient_norm([used, unused]), grad_scale=0)
    assert used.grad is None and unused.grad is None
    (2 * used).sum().backward()
    perturbation.restore()
    assert torch.equal(used.grad, torch.full((3,), 2.0)) and torch.equal(unused.grad, torch.zeros(3))


@pytest.mark.parametrize("ratio", [0.25, 9.0, 999.0])
def test_second_norm_in_float32(ratio):
    # The stated bound: 1e-3 for ratios up to 1e3, at the size of weights and steps that training has.
    torch.manual_seed(0)
    p = (0.05 * torch.randn(1_000_000)).requires_grad_()
    g1, g2 = torch.randn(1_000_000), torch.randn(1_000_000)
    p.grad = g1.clone()
    perturbation = Perturbation([p])
    perturbation.apply(0.1, gradient_norm([p]))
    p.grad = ratio * g1 + g2
    assert perturbation.second_gradient_norm(ratio) == pytest.approx(g2.norm().item(), rel=1e-3)


def test_scaling():
    p = torch.ones(2, requires_grad=True)
    none = torch.ones(2, requires_grad=True)
    p.grad = torch.tensor([float("inf"), 1.0])
    scale_gradients_([p, none], 0)
    assert torch.equal(p.grad, torch.zeros(2)) and none.grad is None
    assert gradient_norm([none]) == 0.0
