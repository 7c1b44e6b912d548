"""Curvature against explicit Hessians, sharpness in closed form; what a measurement may not change."""

import math
import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from hf_gr.analysis import average_sharpness, curvature, hessian_trace, sam_sharpness, top_hessian_eigenvalue


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loss_of(model, batch):
    return model(**batch).loss


class MLP(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 3))

    def forward(self, x, labels):
        logits = super().forward(x)
        return type("Output", (), {"loss": F.cross_entropy(logits, labels)})


def mlp():
    return MLP(), [{"x": normal(12, 6, seed=k), "labels": torch.arange(12) % 3} for k in range(2)]


def vit():
    config = ViTConfig(hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=4,
                       patch_size=2, num_channels=1, num_labels=3, hidden_dropout_prob=0.3)  # fmt: skip
    batches = [{"pixel_values": normal(6, 1, 4, 4, seed=k), "labels": torch.arange(6) % 3} for k in range(2)]
    return ViTForImageClassification(config), batches


def llama():
    config = LlamaConfig(vocab_size=16, hidden_size=12, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
                         attention_dropout=0.3)  # fmt: skip
    tokens = torch.randint(0, 16, (2, 4, 8), generator=torch.Generator().manual_seed(0))
    return LlamaForCausalLM(config), [{"input_ids": ids, "labels": ids} for ids in tokens]


def lora():
    torch.manual_seed(0)
    model = get_peft_model(llama()[0], LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return model, llama()[1]


MODELS = {"mlp": mlp, "vit": vit, "llama": llama, "lora": lora}


def case(name, dtype=torch.float32):
    torch.manual_seed(0)
    model, batches = MODELS[name]()
    floats = [{k: x.to(dtype) if x.is_floating_point() else x for k, x in batch.items()} for batch in batches]
    return model.to(dtype), floats


def hessian(name):
    """H in float64, by torch.func, of the trainable parameters in their order."""
    model, batches = case(name, torch.float64)
    model.eval()
    if name != "mlp":
        model.set_attn_implementation("eager")
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}

    def loss(flat):
        parts = flat.split([p.numel() for p in trained.values()])
        values = {key: part.view_as(p) for (key, p), part in zip(trained.items(), parts, strict=True)}
        return sum(torch.func.functional_call(model, values, (), batch).loss for batch in batches) / len(batches)

    flat = torch.cat([p.detach().reshape(-1) for p in trained.values()])
    assert 10 < len(flat) < 5000
    # Reverse over reverse, column by column: some kernels know no forward derivatives.
    return torch.func.jacrev(torch.func.grad(loss), chunk_size=64)(flat)


@pytest.fixture(scope="module", params=MODELS)
def known(request):
    return request.param, hessian(request.param)


# ---- The Hessian ----


@pytest.mark.parametrize("method", curvature.METHODS)
def test_top_eigenvalue(known, method):
    name, h = known
    model, batches = case(name)
    found = top_hessian_eigenvalue(model, loss_of, batches, method=method)
    expected = torch.linalg.eigvalsh(h)[-1].item()
    assert found.value == pytest.approx(expected, rel=1e-3)
    assert found.standard_error <= 2e-3 * expected


def test_products_of_the_hessian(known):
    """`exact` is, to the float32 that transformers' norms and softmax compute in even for float64 weights; the central
    difference in float32 is good to 1e-3 for signs and for eigenvectors."""
    name, h = known
    vectors = [torch.linalg.eigh(h)[1][:, -1], normal(len(h)).sign().double()]
    exact = 1e-12 if name == "mlp" else 1e-6
    for dtype, method, error in ((torch.float64, "exact", exact), (torch.float32, "difference", 1e-3)):
        model, batches = case(name, dtype)
        with curvature._measured(model, loss_of, batches, curvature.alone) as loss:
            for v in vectors:
                product = loss.product(curvature._unflatten(v, loss.params), method)
                assert (curvature._flatten(product) - h @ v).norm() <= error * (h @ v).norm()


@pytest.mark.parametrize("method", curvature.METHODS)
def test_trace(known, method):
    name, h = known
    found = hessian_trace(*(case(name)[0], loss_of, case(name)[1]), num_samples=60, method=method)
    assert abs(found.value - h.trace().item()) < 3 * found.standard_error
    spread = math.sqrt(2 * (h.square().sum() - h.diagonal().square().sum()).item() / 60)
    assert found.standard_error == pytest.approx(spread, rel=0.5)


class Quadratic(nn.Module):
    """theta . A theta / 2 + b . theta."""

    def __init__(self, a, b=None, theta=None):
        super().__init__()
        self.a, self.b = a, torch.zeros(len(a)) if b is None else b
        self.theta = nn.Parameter(torch.zeros(len(a)) if theta is None else theta)


def quadratic(model, weight):
    return weight * (model.theta @ model.a @ model.theta / 2 + model.b @ model.theta)


def test_a_diagonal_hessian_needs_one_draw():
    """z . H z is the trace for every vector of signs; the batches count the same."""
    model = Quadratic(torch.diag(torch.tensor([3.0, 1.0, -2.0])))
    found = hessian_trace(model, quadratic, [1.0, 3.0], num_samples=2)
    assert found.value == pytest.approx(4.0) and found.standard_error == 0
    assert math.isnan(hessian_trace(model, quadratic, [1.0], num_samples=1).standard_error)
    assert top_hessian_eigenvalue(model, quadratic, [1.0, 3.0]).value == pytest.approx(6.0)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_small_and_indefinite(size):
    model = Quadratic(torch.diag(torch.linspace(-5, 1, size)) if size > 1 else torch.tensor([[-5.0]]))
    expected = 1 if size > 1 else -5
    assert top_hessian_eigenvalue(model, quadratic, [1.0]).value == pytest.approx(expected, rel=1e-3)


def test_preconditioned():
    h, scales = hessian("mlp"), normal(10_000).exp()
    model, batches = case("mlp")
    diagonal = scales[: len(h)].double()
    preconditioner = curvature._unflatten(scales[: len(h)], list(model.parameters()))
    found = top_hessian_eigenvalue(model, loss_of, batches, preconditioner=preconditioner)
    expected = torch.linalg.eigvals(h / diagonal[:, None]).real.max().item()
    assert found.value == pytest.approx(expected, rel=1e-3)
    assert expected != pytest.approx(torch.linalg.eigvalsh(h)[-1].item(), rel=0.1)


def test_no_convergence():
    model = Quadratic(torch.diag(torch.linspace(0.99, 1, 2000)))
    with pytest.warns(UserWarning, match="no convergence within 20 products"):
        found = top_hessian_eigenvalue(model, quadratic, [1.0], tolerance=1e-7, max_products=20)
    assert math.isnan(found.value) and math.isnan(found.standard_error)


def test_generators():
    model, batches = case("mlp")

    def trace(seed=None):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return hessian_trace(model, loss_of, batches, 3, generator)

    assert trace() == trace() == trace(0) != trace(1)


# ---- Sharpness ----


def test_sam_sharpness_of_a_quadratic():
    a = torch.diag(torch.tensor([4.0, 1.0]))
    model = Quadratic(a, theta=torch.tensor([1.0, 2.0]))
    g = torch.tensor([4.0, 2.0])
    found = sam_sharpness(model, quadratic, [1.0, 1.0], r=0.1)
    expected = 0.1 * g.norm() + 0.1**2 / 2 * (g @ a @ g) / g.square().sum()
    assert found.value == pytest.approx(expected.item(), rel=1e-5) and found.standard_error == 0
    t = model.theta.detach().abs() + 0.01
    d = t**2 * g / (t * g).norm()
    found = sam_sharpness(model, quadratic, [1.0], r=0.5, adaptive=True)
    assert found.value == pytest.approx((0.5 * g @ d + 0.5**2 / 2 * d @ a @ d).item(), rel=1e-5)


@pytest.mark.parametrize("adaptive", [True, False])
def test_average_sharpness_of_a_quadratic(adaptive):
    """sigma^2/2 times the trace, of |theta| A |theta| if adaptive; the slope, a hundred times as large, cancels."""
    theta = torch.tensor([1.0, -2.0, 0.0])
    a = torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, 0.0], [0.0, 0.0, 5.0]])
    model = Quadratic(a, b=torch.full((3,), 100.0), theta=theta).double()
    model.a, model.b = a.double(), model.b.double()
    found = average_sharpness(model, quadratic, [1.0], sigma=0.1, num_samples=1000, adaptive=adaptive)
    trace = (a.diagonal() * theta**2).sum() if adaptive else a.trace()
    expected = 0.1**2 / 2 * trace.item()
    assert abs(found.value - expected) < 4 * found.standard_error < 0.2 * expected


def test_a_factor_moved_between_layers_changes_only_what_is_not_adaptive():
    model = nn.Sequential(nn.Linear(5, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
    batches = [(normal(20, 5), torch.arange(20) % 3)]

    def measured(**kwargs):
        return average_sharpness(model, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), batches, 0.1,
                                 **kwargs)  # fmt: skip

    torch.manual_seed(0)
    before = measured(), measured(adaptive=False)
    with torch.no_grad():
        model[0].weight.mul_(8)
        model[2].weight.div_(8)
    after = measured(), measured(adaptive=False)
    assert after[0].value == pytest.approx(before[0].value, rel=1e-4)
    assert after[1].value > 2 * before[1].value


# ---- What a measurement may not change ----

MEASURES = {
    "trace": lambda *args: hessian_trace(*args, num_samples=2),
    "difference": lambda *args: hessian_trace(*args, num_samples=2, method="difference"),
    "top": top_hessian_eigenvalue,
    "sam": sam_sharpness,
    "average": lambda *args: average_sharpness(*args, num_samples=2),
}


def state_of(model):
    bits = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    grads = [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()]
    flags = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    return bits, grads, flags, torch.get_rng_state(), random.getstate(), np.random.get_state()[1]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, np.ndarray):
        return (a == b).all()
    return all(map(same, a, b)) and len(a) == len(b) if isinstance(a, list | tuple) else a == b


def drawing(model, batch):
    """A loss that draws random numbers, and that counts in a buffer."""
    model.seen += 1
    noise = torch.rand(()) + random.random() + np.random.rand()
    return (1 + 0 * noise) * loss_of(model, batch)


@pytest.mark.parametrize("measure", MEASURES)
def test_everything_is_restored_bitwise_also_after_an_error(measure):
    model, batches = case("vit")
    model.register_buffer("seen", torch.zeros(()))
    model.train()
    model.vit.layernorm.eval()
    model.vit.embeddings.requires_grad_(False)
    loss_of(model, batches[0]).backward()
    with torch.no_grad():
        model.classifier.bias[0] = -0.0
    before = state_of(model)
    with torch.no_grad():  # whatever the caller does
        found = MEASURES[measure](model, drawing, batches)
    assert math.isfinite(found.value) and same(state_of(model), before)

    passes = 0

    def interrupted(model, batch):
        nonlocal passes
        passes += 1
        if passes > 3:
            raise KeyboardInterrupt
        return drawing(model, batch)

    with pytest.raises(KeyboardInterrupt):
        MEASURES[measure](model, interrupted, batches)
    assert same(state_of(model), before)


@pytest.mark.parametrize("measure", MEASURES)
def test_dropout_and_batch_statistics_are_off(measure):
    """In training mode a model gives what it gives in evaluation mode."""
    model, batches = case("mlp")
    in_training = MEASURES[measure](model, loss_of, batches)
    model.eval()
    assert in_training == MEASURES[measure](model, loss_of, batches)


def test_a_frozen_part_has_no_curvature():
    model, batches = case("mlp")
    whole = hessian_trace(model, loss_of, batches)
    model[0].requires_grad_(False)
    part = hessian_trace(model, loss_of, batches)
    assert part.value != whole.value and model[0].weight.grad is None


@pytest.mark.parametrize("measure", MEASURES)
def test_a_loss_that_is_not_finite(measure):
    model, batches = case("mlp")
    assert math.isnan(MEASURES[measure](model, lambda model, batch: loss_of(model, batch) * math.inf, batches).value)


def test_processes_are_averaged():
    """Two halves of the batches, one after the other, with the other half's share added by `reduce`."""
    model, batches = case("mlp")
    expected = sam_sharpness(model, loss_of, batches, r=0.1)
    seen = []

    def reduce(tensor):
        seen.append(tensor.shape)
        return tensor

    assert sam_sharpness(model, loss_of, batches, r=0.1, reduce=reduce) == expected
    assert seen.count(()) == 2 and len(seen) == 2 + len(list(model.parameters()))
    doubled = hessian_trace(model, loss_of, batches, 2, reduce=lambda x: 2 * x)
    assert doubled.value == pytest.approx(2 * hessian_trace(model, loss_of, batches, 2).value)


# ---- Mistakes ----


def test_attention_without_second_derivatives_is_explained(monkeypatch):
    def fused(model, batch):
        raise RuntimeError("derivative for aten::_fused_backward is not implemented")

    model, batches = case("vit")
    with pytest.raises(ValueError, match=r"^method='exact': .*_fused_backward.*method='difference'"):
        hessian_trace(model, fused, batches)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": []}, "batches: there are none"),
        ({"batches": iter([1.0])}, "batches: they are passed over several times. Give a list"),
        ({"num_samples": 0}, "num_samples=0: give at least 1"),
        ({"method": "forward"}, "method='forward' is unknown. Use one of exact, difference"),
        ({"loss_fn": lambda model, _: model.theta * 2}, r"loss_fn: a loss of shape \(3,\)"),
        ({"loss_fn": lambda model, _: torch.ones(())}, "loss_fn: the loss does not depend on a trainable"),
    ],
)
def test_mistakes(change, message):
    arguments = {"model": Quadratic(torch.eye(3)), "loss_fn": quadratic, "batches": [1.0], **change}
    with pytest.raises(ValueError, match=message):
        hessian_trace(**arguments)


def test_mistakes_of_models_radii_and_preconditioners():
    model = Quadratic(torch.eye(3))
    with pytest.raises(ValueError, match="r=0: give a number above 0"):
        sam_sharpness(model, quadratic, [1.0], r=0)
    with pytest.raises(ValueError, match="sigma=nan: give a number above 0"):
        average_sharpness(model, quadratic, [1.0], sigma=math.nan)
    for preconditioner, problem in ([torch.ones(2)], "shapes"), ([torch.tensor([1.0, 0.0, 1.0])], "not positive"):
        with pytest.raises(ValueError, match=f"preconditioner: .*{problem}"):
            top_hessian_eigenvalue(model, quadratic, [1.0], preconditioner=preconditioner)
    with pytest.raises(ValueError, match="model: trainable parameters in bfloat16"):
        hessian_trace(model.bfloat16(), quadratic, [1.0])
    with pytest.raises(ValueError, match="model: it has no trainable parameter"):
        hessian_trace(model.requires_grad_(False), quadratic, [1.0])
