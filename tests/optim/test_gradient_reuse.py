"""v of LookSAM, over all parameters as one vector."""

import pytest
import torch

from hf_gr.optim.gradient_reuse import GradientReuse


def parameters(count=3):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((3, 2), (4,), (1,))[:count]]


def set_gradients(params, vector):
    torch.nn.utils.vector_to_parameters(vector.clone(), grads := [torch.empty_like(p) for p in params])
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def remember(reuse, params, g1, combined):
    set_gradients(params, g1)
    reuse.keep_first()
    set_gradients(params, combined)
    reuse.keep_second()


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5])
def test_v_is_the_part_of_g2_that_is_orthogonal_to_g1(ratio):
    """Whatever multiple of g1 has been added to g2: autograd adds r/lambda - 1 times."""
    params = parameters()
    g1, g2, g = torch.randn(3, 11, dtype=torch.float64)
    reuse = GradientReuse(params)
    assert not reuse.is_ready
    remember(reuse, params, g1, g2 + ratio * g1)
    v = g2 - (g1 @ g2) / (g1 @ g1) * g1
    set_gradients(params, g)
    reuse.add_(0.7, g.norm().item())
    torch.testing.assert_close(flat(p.grad for p in params), g + 0.7 * g.norm() * v / v.norm(), rtol=1e-10, atol=1e-12)


def test_gradients_that_are_parallel_leave_nothing_to_reuse():
    params = parameters()
    g1 = torch.ones(11, dtype=torch.float64)
    reuse = GradientReuse(params)
    remember(reuse, params, g1, 2 * g1)
    assert not reuse.is_ready


def test_a_parameter_without_gradient_is_left_out():
    params = parameters(2)
    reuse = GradientReuse(params)
    params[0].grad = torch.ones(3, 2, dtype=torch.float64)
    reuse.keep_first()
    params[0].grad = torch.arange(6, dtype=torch.float64).reshape(3, 2)
    reuse.keep_second()
    params[1].grad = torch.ones(4, dtype=torch.float64)
    reuse.add_(0.7, 1.0)
    assert torch.equal(params[1].grad, torch.ones(4, dtype=torch.float64))
    assert reuse.state_dict()["directions"].keys() == {0}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_reused(bad):
    params = parameters()
    reuse = GradientReuse(params)
    remember(reuse, params, torch.ones(11, dtype=torch.float64), torch.full((11,), bad, dtype=torch.float64))
    assert not reuse.is_ready and reuse.state_dict() == {"directions": {}}


def test_the_state_is_restored_in_every_bit(tmp_path):
    params = parameters()
    reuse, restored = GradientReuse(params), GradientReuse(params)
    remember(reuse, params, *torch.randn(2, 11, dtype=torch.float64))
    torch.save(reuse.state_dict(), tmp_path / "state")
    restored.load_state_dict(torch.load(tmp_path / "state"))
    assert restored.is_ready
    set_gradients(params, g := torch.randn(11, dtype=torch.float64))
    reuse.add_(0.7, 2.0)
    expected = flat(p.grad for p in params)
    set_gradients(params, g)
    restored.add_(0.7, 2.0)
    assert torch.equal(flat(p.grad for p in params), expected)


def test_the_state_of_another_model_is_refused():
    params = parameters()
    reuse = GradientReuse(params)
    remember(reuse, params, *torch.randn(2, 11, dtype=torch.float64))
    other = GradientReuse(parameters(1))
    with pytest.raises(ValueError, match=r"direction of shape \(4,\) for parameter 1, which does not fit"):
        other.load_state_dict(reuse.state_dict())
    assert not other.is_ready
