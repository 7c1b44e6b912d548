"""LARS, TVLARS and LAMB on plain tensors, against references written from the formulas."""

import copy
import itertools
import logging
import math

import pytest
import torch

from helpers.host_reads import HostReads
from helpers.reference import lamb_steps, lars_steps, phi
from hf_gr import IRE, LAMB, LARS, TVLARS
from hf_gr.optim.tvlars import time_varying_factor

STEPS = 10
SHAPES = [(4, 3), (5,), (2, 3, 2, 2), (1, 6), (), (3, 3)]


def problem(seed: int = 0) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """Weights, among them a layer of zeros, and gradients for some steps, among them a layer's that are zero."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    weights = [draw(shape) for shape in SHAPES]
    weights[3].zero_()
    gradients = [[draw(shape) * 5 for shape in SHAPES] for _ in range(STEPS)]
    for grads in gradients[:2]:
        grads[5].zero_()
    return weights, gradients


def run(make, weights, gradients, before=None) -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = make(params)
    for t, grads in enumerate(gradients):
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        if before is not None:
            before(t, optimizer)
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True)), "a gradient was changed"
    return [p.detach() for p in params], optimizer


def assert_close(actual, expected, tolerance=1e-12):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


PATHS = [pytest.param(True, id="together"), pytest.param(False, id="each")]

LARS_SETTINGS = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "nesterov": True},
    {"weight_decay": 0.1, "momentum": 0.0},
    {"bias_lr_scale": 0.024},
    {"weight_decay": 0.1, "norm_clamp": (0, 2)},
]


def as_reference(settings: dict) -> dict:
    names = {"norm_clamp": "clamp", "trust_coefficient": "eta"}
    return {names.get(key, key): value for key, value in settings.items()}


@pytest.mark.parametrize("foreach", PATHS)
@pytest.mark.parametrize("settings", LARS_SETTINGS, ids=str)
def test_lars_is_its_formula(settings, foreach):
    weights, gradients = problem()
    actual, _ = run(lambda ps: LARS(ps, 0.7, **settings, foreach=foreach), weights, gradients)
    assert_close(actual, lars_steps(weights, gradients, 0.7, **as_reference(settings)))


@pytest.mark.parametrize("foreach", PATHS)
@pytest.mark.parametrize("settings", LARS_SETTINGS, ids=str)
def test_tvlars_is_its_formula(settings, foreach):
    weights, gradients = problem()
    curve = {"tv_lambda": 0.9, "delay_steps": 4, "alpha": 1.0, "gamma_min": 0.01}
    actual, _ = run(lambda ps: TVLARS(ps, 0.7, **settings, **curve, foreach=foreach), weights, gradients)
    phis = [phi(t, *curve.values()) for t in range(1, STEPS + 1)]
    assert_close(actual, lars_steps(weights, gradients, 0.7, phis=phis, **as_reference(settings)))


@pytest.mark.parametrize("foreach", PATHS)
def test_tvlars_has_the_released_code_as_a_setting(foreach):
    """q = eta / (0.1 + exp(lambda (s + 1))) ||p|| / ||d|| with s from 0 and both norms in [0, 10]; no phi on biases."""
    weights, gradients = problem()
    weights[0] *= 20  # beyond the clamp
    actual, _ = run(
        lambda ps: TVLARS(
            ps,
            0.7,
            weight_decay=5e-4,
            tv_lambda=0.3,
            delay_steps=0,
            alpha=0.1,
            gamma_min=0.0,
            norm_clamp=(0, 10),
            phi_everywhere=False,
            foreach=foreach,
        ),
        weights,
        gradients,
    )
    phis = [1 / (0.1 + math.exp(0.3 * (s + 1))) for s in range(STEPS)]
    expected = lars_steps(weights, gradients, 0.7, weight_decay=5e-4, clamp=(0, 10), phis=phis, phi_everywhere=False)
    assert_close(actual, expected)


@pytest.mark.parametrize("foreach", PATHS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-3},
        {"weight_decay": 0.1, "bias_correction": False, "exclude_1d": False, "norm_clamp": (0, 2)},
    ],
    ids=str,
)
def test_lamb_is_its_formula(settings, foreach):
    weights, gradients = problem()
    actual, _ = run(lambda ps: LAMB(ps, 0.03, **settings, foreach=foreach), weights, gradients)
    assert_close(actual, lamb_steps(weights, gradients, 0.03, **as_reference(settings)))


# ---- What is a layer ----


@pytest.mark.parametrize("foreach", PATHS)
def test_the_trust_ratio_acts_without_weight_decay(foreach):
    """With the weight decay of 0 that is transformers' default, a step of LARS and LAMB is as long as ||w|| says."""
    weights, gradients = problem()
    (after, *_), _ = run(lambda ps: LARS(ps, 0.5, momentum=0.0, foreach=foreach), weights, gradients[:1])
    assert (after - weights[0]).norm().item() == pytest.approx(0.5 * 1e-3 * weights[0].norm().item(), rel=1e-12)
    (after, *_), _ = run(lambda ps: LAMB(ps, 0.5, foreach=foreach), weights, gradients[:1])
    assert (after - weights[0]).norm().item() == pytest.approx(0.5 * weights[0].norm().item(), rel=1e-12)


@pytest.mark.parametrize("cls", [LARS, LAMB])
def test_norms_and_biases_are_told_by_their_dimensions(cls):
    """Whatever the weight decay of their group: not decayed, not adapted; treated as layers if that is asked for."""
    bias = [torch.full((4,), 2.0, dtype=torch.float64)]
    gradients = [[torch.full((4,), 0.5, dtype=torch.float64)]]
    plain = {LARS: 2.0 - 0.1 * 0.5, LAMB: 2.0 - 0.1 * 0.5 / (0.5 + 1e-6)}[cls]
    (after,), _ = run(lambda ps: cls(ps, 0.1, weight_decay=0.3), bias, gradients)
    assert_close([after], [torch.full((4,), plain, dtype=torch.float64)])
    (after,), _ = run(lambda ps: cls(ps, 0.1, weight_decay=0.3, exclude_1d=False), bias, gradients)
    length = {LARS: 0.1 * 1e-3 * 4.0, LAMB: 0.1 * 4.0}[cls]
    assert (after - bias[0]).norm().item() == pytest.approx(length, rel=1e-12)


# ---- Layouts, sizes, types ----


def float32(seed: int, *shapes) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


MAKERS = {
    "LARS": lambda ps, **kw: LARS(ps, 0.7, weight_decay=0.1, **kw),
    "LARS Nesterov": lambda ps, **kw: LARS(ps, 0.7, weight_decay=0.1, nesterov=True, **kw),
    "TVLARS": lambda ps, **kw: TVLARS(ps, 0.7, weight_decay=0.1, tv_lambda=0.5, delay_steps=4, **kw),
    "LAMB": lambda ps, **kw: LAMB(ps, 0.03, weight_decay=0.1, **kw),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_quick_way_on_a_cpu_is_taken(make, monkeypatch):
    """And not for what the fused kernels cannot read, nor where the other one is asked for."""
    taken = []

    def taken_by(weight, **settings):
        taken.clear()
        p = torch.nn.Parameter(weight)
        p.grad = torch.ones_like(p)
        optimizer = make([p], **settings)
        monkeypatch.setattr(type(optimizer), "_step_each", lambda self, layers, others, group: taken.extend(layers))
        optimizer.step()
        return len(taken)

    (weight,) = float32(0, (4, 3, 2, 2))
    assert (taken_by(weight), taken_by(weight, foreach=True)) == (1, 0)
    assert taken_by(weight.to(memory_format=torch.channels_last)) == 0
    assert taken_by(weight.bfloat16()) == 0


@pytest.mark.parametrize("phi_now", [1.0, 1e-3, 1e-6])
def test_single_precision_is_as_good_as_it_can_be(phi_now):
    """The share of the gradient in the buffer, 0.001 phi ||w|| / ||g||, is exact however small."""
    (w,), (g,) = float32(0, (30, 20)), float32(1, (30, 20))
    curve = {"tv_lambda": 1e-9, "delay_steps": 10**9, "alpha": 1 / phi_now - math.exp(-1)}
    optimizer = TVLARS([p := torch.nn.Parameter(w.clone())], 1.0, **curve)
    p.grad = g
    optimizer.step()
    expected = phi_now * 1e-3 * w.double().norm() / g.double().norm() * g.double()
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"].double(), expected, rtol=1e-6, atol=0)


def test_a_gradient_that_cancels_the_decay():
    """||g + weight_decay w|| where g is nearly -weight_decay w, to what single precision allows."""
    (w,) = float32(0, (50, 40))
    (noise,) = float32(1, (50, 40))
    g = -0.1 * w + 1e-4 * noise
    (after,), _ = run(lambda ps: LARS(ps, 1.0, momentum=0.0, weight_decay=0.1), [w], [[g]])
    d = g.double() + 0.1 * w.double()
    expected = 1e-3 * w.double().norm() / d.norm() * d
    torch.testing.assert_close((w - after).double(), expected, rtol=1e-3, atol=1e-6)
    assert (w - after).norm().item() == pytest.approx(1e-3 * w.norm().item(), rel=1e-4)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_channels_last(make):
    weights, gradients = float32(0, (6, 5, 3, 3)), [float32(t, (6, 5, 3, 3)) for t in range(1, 4)]
    expected, _ = run(make, weights, gradients)
    actual, optimizer = run(make, [w.to(memory_format=torch.channels_last) for w in weights], gradients)
    assert actual[0].is_contiguous(memory_format=torch.channels_last)
    (state,) = optimizer.state.values()
    assert all(t.stride() == actual[0].stride() for t in state.values() if isinstance(t, torch.Tensor))
    assert_close(actual, expected, tolerance=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_half_precision_is_single_but_for_what_is_stored(make, foreach, dtype):
    """With gradients of 1e-4, whose squares fp16 does not have: a step is float32's, rounded, the state as well."""
    weights = [w.to(dtype) for w in float32(0, (16, 8), (4,))]
    gradients = [[1e-4 * g for g in float32(t, (16, 8), (4,))] for t in range(1, 6)]
    gradients = [[g.to(dtype) for g in gs] for gs in gradients]
    halves = [torch.nn.Parameter(w.clone()) for w in weights]
    single = [torch.nn.Parameter(w.float()) for w in weights]
    optimizers = make(halves, foreach=foreach), make(single, foreach=True)
    for grads in gradients:
        for p, q, g in zip(halves, single, grads, strict=True):
            p.grad, q.grad = g.clone(), g.float()
            q.data.copy_(p.data)
        for optimizer in optimizers:
            optimizer.step()
        assert all(torch.equal(p, q.to(dtype)) for p, q in zip(halves, single, strict=True))
        for p, q in zip(halves, single, strict=True):
            state, expected = optimizers[0].state[p], optimizers[1].state[q]
            assert all(torch.equal(torch.as_tensor(state[key]), torch.as_tensor(expected[key])) for key in expected)
    second = make(halves)
    second.load_state_dict(copy.deepcopy(optimizers[0].state_dict()))  # torch would round it to the parameters' type
    for p in halves:
        pairs = zip(second.state[p].values(), optimizers[0].state[p].values(), strict=True)
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)


@pytest.mark.parametrize("foreach", [True, False])
def test_bias_correction_of_lamb_counts_the_steps_of_each_parameter(foreach):
    """A gradient that comes late finds the moments at zero: its first step is that of a new optimizer."""
    early, late = float32(0, (4, 3), (5, 2)), float32(1, (4, 3), (5, 2))
    params = [torch.nn.Parameter(w.clone()) for w in early]
    optimizer = LAMB(params, 0.1, foreach=foreach)
    for _ in range(7):
        params[0].grad = late[0].clone()
        optimizer.step()
    alone = torch.nn.Parameter(early[1].clone())
    new = LAMB([alone], 0.1, foreach=foreach)
    for step in range(1, 4):
        params[1].grad, alone.grad = late[1].clone(), late[1].clone()
        optimizer.step()
        new.step()
        assert torch.equal(params[1], alone)
        assert [optimizer.state[p]["step"] for p in params] == [7 + step, step]


def test_lamb_goes_on_from_a_state_that_counted_by_group():
    weights, gradients = problem()
    expected, _ = run(MAKERS["LAMB"], weights, gradients)
    halfway, first = run(MAKERS["LAMB"], weights, gradients[:4])
    older = copy.deepcopy(first.state_dict())
    older["param_groups"][0]["step"] = 4
    for state in older["state"].values():
        del state["step"]

    def second(params):
        optimizer = MAKERS["LAMB"](params)
        optimizer.load_state_dict(older)
        return optimizer

    assert all(torch.equal(a, e) for a, e in zip(run(second, halfway, gradients[4:])[0], expected, strict=True))


@pytest.mark.parametrize("foreach", PATHS)
@pytest.mark.parametrize("settings", [{}, {"momentum": 0.0}, {"nesterov": True}], ids=str)
def test_a_layer_whose_norms_overflow_stays(settings, foreach):
    """LARS and TVLARS, where the raw gradient would move the weights by 1e25; the momentum there is goes on."""
    curve = {"tv_lambda": 0.1, "delay_steps": 50}
    for make in (lambda p: LARS([p], 1.0, **settings, foreach=foreach),
                 lambda p: TVLARS([p], 1.0, **curve, **settings, foreach=foreach)):  # fmt: skip
        (w,) = float32(0, (4, 3))
        for first in (w, 1e25 * w):
            p = torch.nn.Parameter(first.clone())
            optimizer = make(p)
            p.grad = 1e25 * w
            optimizer.step()
            assert torch.equal(p, first)
    p = torch.nn.Parameter(w.clone())
    optimizer = LARS([p], 1.0, foreach=foreach)
    for scale in (1.0, 1e25):
        before, p.grad = p.detach().clone(), scale * w
        optimizer.step()
        if scale == 1:
            moved = p.detach() - before
    torch.testing.assert_close(p.detach() - before, 0.9 * moved, rtol=1e-3, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("norm", [1e9, 1e13, 1e17])
def test_a_large_gradient_is_normalized(norm, momentum):
    """1 - (1 - q) would be wrong from q = 1e-10 on, and 0 from 1e-16 on."""
    (w,), (g,) = float32(0, (30, 20)), float32(1, (30, 20))
    (after,), _ = run(lambda ps: LARS(ps, 1.0, momentum=momentum), [w], [[g * norm]])
    expected = 1e-3 * w.double().norm() / g.double().norm() * g.double()
    torch.testing.assert_close((w - after).double(), expected, rtol=1e-3, atol=1e-6)
    (after,), optimizer = run(lambda ps: LARS(ps, 1.0), [w], [[g * norm]])
    (state,) = optimizer.state.values()
    torch.testing.assert_close(state["momentum_buffer"].double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_empty_and_unused_parameters(make, foreach):
    params = [torch.nn.Parameter(t) for t in float32(0, (0, 3), (0,), (2, 2), (3, 3))]
    for p in params[:3]:
        p.grad = torch.ones_like(p)
    before = params[3].detach().clone()
    make(params, foreach=foreach).step()
    assert torch.equal(params[3], before)
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_way_of_a_gpu_reads_nothing(make):
    """Whatever the number of layers; a copy to the CPU, which is not seen here, fails in the next test."""
    weights, gradients = problem()
    params = [torch.nn.Parameter(w) for w in weights]
    optimizer = make(params, foreach=True)
    for p, g in zip(params, gradients[0], strict=True):
        p.grad = g
    with HostReads() as reads:
        optimizer.step()
        optimizer.step()
    assert reads.by_caller == {}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_no_number_is_read_from_another_device(make):
    """Tensors of the device "meta" have none: whoever asks for one, as for a norm on a GPU, gets an error."""
    params = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in ((4, 3), (5,), (2, 3, 2, 2))]
    optimizer = make(params)
    for p in params:
        p.grad = torch.empty_like(p)
    for _ in range(2):
        optimizer.step()
    with pytest.raises(RuntimeError):
        params[0].norm().item()


# ---- phi ----


def test_phi_at_its_marks():
    """Near 1/alpha at the start, 1/(alpha + 1) at the delay, the floor at the end; no overflow anywhere."""
    assert time_varying_factor(0, 0.1, 200) == pytest.approx(1.0, abs=1e-8)
    assert time_varying_factor(200, 0.1, 200) == 0.5
    assert time_varying_factor(200, 0.1, 200, alpha=3.0, gamma_min=0.25) == 0.5
    assert time_varying_factor(10**9, 0.1, 200, gamma_min=0.003) == 0.003
    assert time_varying_factor(10**9, 10.0, 0) == pytest.approx(0.0, abs=1e-300)
    assert time_varying_factor(0, 10.0, 10**9, alpha=0.0) > 1e300
    values = [time_varying_factor(t, 0.05, 100, gamma_min=0.01) for t in range(300)]
    assert all(a > b > 0.01 for a, b in itertools.pairwise(values))


def one_parameter(grad: float = 1.0) -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.ones(2, 2))
    p.grad = torch.full_like(p, grad)
    return p


def test_a_phi_that_never_starts_high_is_named_once(caplog):
    optimizer = TVLARS([one_parameter()], 1.0, tv_lambda=0.01, delay_steps=50, gamma_min=0.1)
    with caplog.at_level(logging.WARNING):
        optimizer.step()
        optimizer.step()
    (message,) = [r.getMessage() for r in caplog.records]
    assert "tv_lambda * delay_steps is 0.5, below 1: phi starts at 0.72" in message


def test_a_phi_that_dies_is_named_once(caplog):
    optimizer = TVLARS([one_parameter()], 1.0, tv_lambda=2.0, delay_steps=2)
    with caplog.at_level(logging.WARNING):
        for _ in range(20):
            optimizer.step()
    (message,) = [r.getMessage() for r in caplog.records]
    assert "phi is 4.5e-05 at step 7 and has no floor" in message
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        floored = TVLARS([one_parameter()], 1.0, tv_lambda=2.0, delay_steps=2, gamma_min=1e-3)
        for _ in range(20):
            floored.step()
    assert not caplog.records


# ---- State, closures, copies ----


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_state_survives_saving_and_loading_bit_for_bit(make, tmp_path):
    weights, gradients = problem()
    expected, _ = run(make, weights, gradients)
    halfway, first = run(make, weights, gradients[:4])
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")

    params = [torch.nn.Parameter(w.clone()) for w in halfway]
    second = make(params)
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for grads in gradients[4:]:
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        second.step()
    assert all(torch.equal(p, e) for p, e in zip(params, expected, strict=True))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_copy_goes_on_alike(make):
    weights, gradients = problem()
    _, optimizer = run(make, weights, gradients[:3])
    twin = copy.deepcopy(optimizer)
    for each in (optimizer, twin):
        for p, g in zip(each.param_groups[0]["params"], gradients[3], strict=True):
            p.grad = g.clone()
        each.step()
    pairs = zip(optimizer.param_groups[0]["params"], twin.param_groups[0]["params"], strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_closure(make):
    p = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = make([p])

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert (p < 1).all()


def test_hooks_run_once_in_a_step():
    """torch wraps `step` for each class of which there has been an optimizer."""
    for make in MAKERS.values():
        make([one_parameter()])
    for make in MAKERS.values():
        optimizer, calls = make([one_parameter()]), []
        optimizer.register_step_pre_hook(lambda *_, calls=calls: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append("after"))
        optimizer.step()
        assert calls == ["before", "after"]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_groups_have_settings_of_their_own(make):
    weights, gradients = problem()
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = make([{"params": params[:2], "lr": 0.0}])
    optimizer.add_param_group({"params": params[2:]})
    for p, g in zip(params, gradients[0], strict=True):
        p.grad = g.clone()
    optimizer.step()
    assert [torch.equal(p, w) for p, w in zip(params, weights, strict=True)][:2] == [True, True]
    assert not torch.equal(params[2], weights[2])


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_ire_amplifies_their_step(make):
    """With kappa = 1 on all coordinates the displacement is twice as long."""
    weights, gradients = problem()

    def wrapped(params):
        ire = IRE(make(params), kappa=1.0, mask="uniform")
        ire.update_mask()
        return ire

    plain, _ = run(make, weights, gradients[:1])
    amplified, _ = run(wrapped, weights, gradients[:1])
    for w, p, a in zip(weights, plain, amplified, strict=True):
        torch.testing.assert_close(a - w, 2 * (p - w), rtol=1e-12, atol=1e-14)


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: LARS([p], -1.0), "lr=-1.0: must be >= 0"),
        (lambda p: LARS([p], 1.0, momentum=1.0), "momentum=1.0: must be in [0, 1)"),
        (lambda p: LARS([p], 1.0, momentum=0.0, nesterov=True), "nesterov=True has no effect with momentum=0"),
        (lambda p: LARS([p], 1.0, weight_decay=-0.1), "weight_decay=-0.1: must be >= 0"),
        (lambda p: LARS([p], 1.0, trust_coefficient=0.0), "trust_coefficient=0.0: must be > 0"),
        (lambda p: LARS([p], 1.0, norm_clamp=(10, 0)), "norm_clamp=(10, 0): give None, or (low, high)"),
        (lambda p: LARS([p], 1.0, exclude_1d=False, bias_lr_scale=0.1), "bias_lr_scale=0.1 has no effect with"),
        (lambda p: LARS([{"params": [p], "momentum": 2.0}], 1.0), "momentum=2.0: must be in [0, 1)"),
        (lambda p: TVLARS([p], 1.0, tv_lambda=0.0, delay_steps=1), "tv_lambda=0.0: must be > 0"),
        (lambda p: TVLARS([p], 1.0, tv_lambda=1.0, delay_steps=-1), "delay_steps=-1: must be >= 0"),
        (lambda p: TVLARS([p], 1.0, tv_lambda=1.0, delay_steps=1, alpha=-1.0), "alpha=-1.0: must be >= 0"),
        (lambda p: TVLARS([p], 1.0, tv_lambda=1.0, delay_steps=1, gamma_min=-1.0), "gamma_min=-1.0: the floor"),
        (lambda p: LAMB([p], 1.0, betas=(0.9, 1.0)), "betas=(0.9, 1.0): give two numbers in [0, 1)"),
        (lambda p: LAMB([p], 1.0, eps=0.0), "eps=0.0: must be > 0"),
        (lambda p: LARS([p], math.nan), "lr=nan: must be >= 0, and finite"),
        (lambda p: LAMB([{"params": [p], "weight_decay": math.nan}], 1.0), "weight_decay=nan: must be >= 0, and"),
        (lambda p: LARS([p], 1.0, bias_lr_scale=math.nan), "bias_lr_scale=nan: must be >= 0"),
        (lambda p: LARS([p], torch.ones(2)), "a tensor must have one element"),
        (lambda p: LARS([{"params": [p], "tv_lambda": 1.0}], 1.0), "these are the settings of TVLARS"),
        (lambda p: LAMB([torch.nn.Parameter(p.to(torch.complex64))], 1.0), "LAMB takes real parameters"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError) as error:
        make(one_parameter())
    assert message in str(error.value)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_sparse_gradients_are_refused(make):
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="cannot read sparse gradients"):
        make(embedding.parameters()).step()


def test_a_group_that_is_refused_is_not_kept():
    optimizer = LARS([one_parameter()], 1.0)
    with pytest.raises(ValueError, match="momentum=2"):
        optimizer.add_param_group({"params": [one_parameter()], "momentum": 2.0})
    assert len(optimizer.param_groups) == 1
