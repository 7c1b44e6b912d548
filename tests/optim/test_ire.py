"""IRE on plain tensors: closed forms, a slow reference, and what a good optimizer has to be able to do."""

import copy
import io
import math
import pickle
import sys

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop

from helpers import pages
from helpers.host_reads import HostReads, take_the_way_of_a_gpu
from hf_gr import IRE, LAMB
from hf_gr.optim.order_statistics import SAMPLE, _kth_by_digits, kth_smallest

BASES = {
    "adamw": lambda params: AdamW(params, lr=1e-2, weight_decay=0.1),
    "fused adamw": lambda params: AdamW(params, lr=1e-2, weight_decay=0.1, fused=True),
    "fused adamw maximize": lambda params: AdamW(params, lr=1e-2, fused=True, maximize=True),
    "adam": lambda params: Adam(params, lr=1e-2),
    "sgd": lambda params: SGD(params, lr=1e-2, momentum=0.9, weight_decay=1e-3),
    "rmsprop": lambda params: RMSprop(params, lr=1e-2),
}
SHAPES = [(600, 1000), (7,), (5, 3, 2), (), (70, 90)]  # the first is longer than a block
BLOCK = 2**17


@pytest.fixture(autouse=True)
def blocks_of_one_thread(monkeypatch):
    monkeypatch.setattr("hf_gr.optim._cpu.step_block", lambda: BLOCK)


def parameters(dtype=torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def gradients(step: int, params) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) * (i + 1) for i, p in enumerate(params)]


def set_gradients(params, step: int) -> None:
    for p, g in zip(params, gradients(step, params), strict=True):
        p.grad = g


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def masks_of(ire: IRE) -> list[torch.Tensor]:
    saved = ire.state_dict()["ire"]["masks"]
    return [saved[i].bool() for i in sorted(saved)]


# ---- The paper's example ----


@pytest.mark.parametrize(
    ("kappa", "path", "limit"),
    [
        (0, [(0.9999, -0.01), (0.9998, 0.009998)], 0.99289),
        (90, [(0.9909, -0.01)], 0.92849),
        (900, [(0.9099, -0.01)], 0.74259),
        (9000, [(0.0999, -0.01), (0.00998, 0.0001)], 0.00998),
    ],
)
def test_toy_of_the_paper(kappa, path, limit):
    """L(u, v) = (1 + u^2) v^2 / 2 from (1, 0.01) with a step size of 1: IRE moves along the flat valley v = 0."""
    u, v = (nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in (1.0, 0.01))
    ire = IRE(SGD([u, v], lr=1.0), kappa=kappa, gamma=0.5)
    points = []
    for step in range(5000):
        ire.zero_grad()
        ((1 + u**2) * v**2 / 2).backward()
        if step == 0:
            ire.update_mask()
            assert [m.item() for m in masks_of(ire)] == [True, False]
        ire.step()
        points.append((u.item(), v.item()))
    for point, expected in zip(points, path, strict=False):
        assert point == pytest.approx(expected, abs=1e-5)
    assert abs(u.item()) == pytest.approx(limit, abs=1e-5)


def test_toy_of_the_paper_diverges_with_a_longer_step_everywhere():
    u, v = 1.0, 0.01
    for _ in range(100):
        u, v = u - 2 * u * v**2, v - 2 * (1 + u**2) * v
        if abs(v) > 1:
            return
    raise AssertionError("plain gradient descent with a step size of 2 did not diverge")


# ---- The step ----


@pytest.mark.parametrize("name", BASES)
def test_kappa_0_is_the_base_optimizer_bitwise(name):
    plain, wrapped = parameters(), parameters()
    base, ire = BASES[name](plain), IRE(BASES[name](wrapped), kappa=0.0)
    for step in range(6):
        set_gradients(plain, step)
        set_gradients(wrapped, step)
        if step == 2:
            ire.update_mask()
        base.step()
        ire.step()
        assert equal(plain, wrapped)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_equals_a_plain_reference_bitwise(name, dtype, caplog):
    """The reference: p += kappa * mask * (p - p_old), after the base optimizer, with a mask sorted out in full."""
    kappa, gamma = 2.0, 0.6
    plain, wrapped = parameters(dtype), parameters(dtype)
    base, ire = BASES[name](plain), IRE(BASES[name](wrapped), kappa=kappa, gamma=gamma)
    for step in range(8):
        if step in (1, 5):
            estimate = gradients(100 + step, plain)
            flat = torch.cat([g.reshape(-1) for g in estimate]).square()
            threshold = flat.sort().values[math.floor(gamma * flat.numel()) - 1]
            masks = [g.square() <= threshold for g in estimate]
            set_gradients(wrapped, 100 + step)
            assert ire.update_mask()
            assert equal(masks_of(ire), masks)
            assert equal([p.grad for p in wrapped], estimate)
        set_gradients(plain, step)
        set_gradients(wrapped, step)
        old = [p.detach().clone() for p in plain]
        base.step()
        if step == 0:
            ire.step()
            assert "IRE has no mask yet and steps as its base optimizer" in caplog.text
        else:
            with torch.no_grad():
                for p, before, mask in zip(plain, old, masks, strict=True):
                    p += kappa * mask * (p - before)
            ire.step()
        assert equal(plain, wrapped)
        assert [s["step"] for s in base.state.values() if "step" in s] == [
            s["step"] for s in ire.state.values() if "step" in s
        ]


@pytest.mark.parametrize("name", BASES)
def test_uniform_mask_is_the_whole_step_made_longer(name):
    plain, wrapped = parameters(torch.float64), parameters(torch.float64)
    base, ire = BASES[name](plain), IRE(BASES[name](wrapped), kappa=3.0, mask="uniform")
    ire.update_mask()
    assert ire.flat_fraction == 1
    for step in range(4):
        set_gradients(plain, step)
        set_gradients(wrapped, step)
        old = [p.detach().clone() for p in plain]
        base.step()
        with torch.no_grad():
            for p, before in zip(plain, old, strict=True):
                p.copy_(before + 4.0 * (p - before))
        ire.step()
        for p, q in zip(plain, wrapped, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-13)  # rounded in another order


def test_weight_decay_can_be_left_as_it_is():
    """AdamW: theta - lr (1 + kappa) u - lr wd theta instead of theta - lr (1 + kappa) (u + wd theta)."""
    for fused in (False, True):
        decayed, plain = parameters(torch.float64), parameters(torch.float64)
        ire = IRE(
            AdamW(decayed, lr=0.1, weight_decay=0.3, fused=fused), kappa=3.0, gamma=1.0, amplify_weight_decay=False
        )
        base = AdamW(plain, lr=0.1, weight_decay=0.0)
        set_gradients(decayed, 50)
        ire.update_mask()
        for step in range(3):
            old = [p.detach().clone() for p in decayed]
            set_gradients(decayed, step)
            set_gradients(plain, step)
            with torch.no_grad():
                for p, q in zip(plain, old, strict=True):
                    p.copy_(q)
            ire.step()
            base.step()
            for p, q, before in zip(decayed, plain, old, strict=True):
                torch.testing.assert_close(p - before, 4 * (q - before) - 0.1 * 0.3 * before, rtol=0, atol=1e-13)
    with pytest.raises(
        ValueError, match=r"amplify_weight_decay=False: the weight decay of SGD is part of its gradient"
    ):
        IRE(SGD(parameters(), lr=0.1, weight_decay=0.1), amplify_weight_decay=False)
    IRE(SGD(parameters(), lr=0.1), amplify_weight_decay=False)


def test_kappa_in_proportion_to_the_learning_rate():
    p = nn.Parameter(torch.zeros(4))
    ire = IRE(SGD([p], lr=1.0), kappa=3.0, gamma=1.0, kappa_schedule="lr")
    scheduler = torch.optim.lr_scheduler.LambdaLR(ire, lambda step: 1 - 0.25 * step)
    p.grad = torch.ones(4)
    ire.update_mask()
    for factor in (1.0, 0.75, 0.5):
        before = p.detach().clone()
        assert ire.kappa_in_force == pytest.approx(3.0 * factor)
        ire.step()
        torch.testing.assert_close(before - p, torch.full((4,), factor * (1 + 3.0 * factor)))
        scheduler.step()


def test_inactive_is_the_base_optimizer_without_a_word(caplog):
    plain, wrapped = parameters(), parameters()
    base, ire = BASES["sgd"](plain), IRE(BASES["sgd"](wrapped))
    ire.active = False
    set_gradients(plain, 0)
    set_gradients(wrapped, 0)
    ire.step()
    assert not caplog.text
    base.step()
    assert equal(plain, wrapped)
    assert ire.kappa_in_force == 0


@pytest.mark.parametrize("name", ["adamw", "fused adamw"])
def test_closure_and_parameters_without_gradient(name):
    params = parameters()
    ire = IRE(BASES[name](params), gamma=1.0)
    set_gradients(params, 0)
    ire.update_mask()
    before = [p.detach().clone() for p in params]

    def closure():
        set_gradients(params, 1)
        params[1].grad = None
        return 7.0

    for p in params:
        p.grad = None
    assert ire.step(closure) == 7.0
    assert [torch.equal(p, q) for p, q in zip(params, before, strict=True)] == [False, True, False, False, False]
    closure()
    ire.step()
    assert torch.equal(params[1], before[1])


def test_hooks_of_the_base_optimizer_are_called():
    params = parameters()
    base = BASES["fused adamw"](params)
    ire = IRE(base, gamma=1.0)
    calls = []
    base.register_step_post_hook(lambda *_: calls.append("base"))
    ire.register_step_post_hook(lambda *_: calls.append("ire"))
    for step in range(3):
        set_gradients(params, step)
        ire.update_mask()
        ire.step()
    assert calls == ["base", "ire"] * 3


# ---- The mask ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "mostly zero", "equal", "few values", "two scales"])
def test_threshold_is_exact(kind, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6 * SAMPLE + 11, generator=generator)
    x = {
        "normal": x,
        "heavy tails": x / torch.rand(x.shape, generator=generator) ** 3,
        "mostly zero": x * (torch.rand(x.shape, generator=generator) < 0.3),
        "equal": torch.full_like(x, -2.0),
        "few values": (x * 2).round(),
        "two scales": torch.where(x > 0, x * 1e-20, x * 1e10),
    }[kind].to(dtype)
    tensors = [*x[: 5 * SAMPLE].view(5, -1).unbind(), x[5 * SAMPLE : -11].view(2, -1).T, *x[-11:]]
    ordered = x.abs().sort().values
    for k in (1, 2, 1000, x.numel() // 2, math.floor(0.6 * x.numel()), math.floor(0.99 * x.numel()), x.numel()):
        assert kth_smallest(tensors, k) == ordered[k - 1].item()
    assert kth_smallest(tensors, 0) == -math.inf
    assert _kth_by_digits([tensors], [k := x.numel() // 3]).item() == ordered[k - 1].item()
    rows, ks = [tensors[:1], tensors[1:2], tensors[5:]], [0, SAMPLE // 2, 1]
    assert _kth_by_digits(rows, ks).tolist() == [kth_smallest(row, k) for row, k in zip(rows, ks, strict=True)]


@pytest.mark.parametrize("kind", ["normal", "mostly zero", "equal"])
def test_threshold_needs_little_memory(kind, monkeypatch):
    x = torch.randn(20 * SAMPLE, generator=torch.Generator().manual_seed(0))
    x = {"normal": x, "mostly zero": torch.where(x > 1, x, 0.0), "equal": torch.ones_like(x)}[kind]
    sizes = []
    original = sys.modules["hf_gr.optim.order_statistics"]._kth
    monkeypatch.setattr(
        "hf_gr.optim.order_statistics._kth", lambda values, k: sizes.append(values.numel()) or original(values, k)
    )
    assert kth_smallest([x], 12 * SAMPLE) == x.abs().sort().values[12 * SAMPLE - 1].item()
    assert max(sizes) <= 1.1 * SAMPLE  # the sample itself, and what is between the bounds


def test_threshold_when_the_sample_misleads(monkeypatch):
    x = [torch.arange(5.0 * SAMPLE)]
    for bounds in ((1.0, 2.0), (1e6, 2e6), (3.0, 4.0)):
        monkeypatch.setattr("hf_gr.optim.order_statistics._bounds", lambda *_, bounds=bounds: bounds)
        assert kth_smallest(x, 5) == 4.0
        assert kth_smallest(x, 100_000) == 99_999.0


def test_empty_tensors_are_nothing():
    x = torch.arange(5.0 * SAMPLE)
    assert kth_smallest([x, torch.zeros(0), torch.zeros(0, dtype=torch.float64)], 100_000) == 99_999.0


def test_no_weight_decay_is_no_weight_decay():
    p = nn.Parameter(torch.zeros(3))
    ire = IRE(torch.optim.Rprop([p], lr=0.1), kappa=1.0, gamma=1.0, amplify_weight_decay=False)
    p.grad = torch.ones(3)
    ire.update_mask()
    ire.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), -0.2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scope", ["global", "per_tensor"])
def test_the_way_of_a_gpu_gives_the_same(scope, dtype, monkeypatch):
    def chosen() -> tuple:
        params = parameters(dtype)
        ire = IRE(BASES["sgd"](params), gamma=0.7, scope=scope)
        for step in (0, 1, 2):
            set_gradients(params, step)
            params[4].grad[:60] = 0.0
            ire.update_mask()
        return masks_of(ire), list(ire.flat_counts.values()), ire.mask_overlap

    expected = chosen()
    take_the_way_of_a_gpu(monkeypatch)
    masks, *numbers = chosen()
    assert equal(masks, expected[0])
    assert numbers == list(expected[1:])


@pytest.mark.parametrize("settings", [{}, {"scope": "per_tensor", "beta": 0.5}, {"mask": "random"}], ids=str)
def test_counts_are_read_when_they_are_asked_for(settings, monkeypatch):
    """On a CPU one number is, whether the gradient is finite, which waits for nothing."""
    take_the_way_of_a_gpu(monkeypatch)
    params = parameters()
    ire = IRE(SGD(params, lr=1.0, foreach=True), **settings)
    set_gradients(params, 0)
    with HostReads() as reads:
        ire.update_mask()
        ire.update_mask()
    assert reads.total == 2, reads.by_caller
    with HostReads() as reads:
        ire.step()
    assert reads.by_caller == {}
    with HostReads() as reads:
        assert ire.flat_fraction > 0 and ire.mask_overlap is not None
    assert reads.total == 2


@pytest.mark.parametrize("make", [lambda ps: AdamW(ps, foreach=True), lambda ps: LAMB(ps, 0.1)], ids=["AdamW", "LAMB"])
@pytest.mark.parametrize("settings", [{}, {"scope": "per_tensor", "beta": 0.5}, {"mask": "inverted"}], ids=str)
def test_no_number_is_read_from_another_device(make, settings):
    """Tensors of the device "meta" have none to be read."""
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES]
    ire = IRE(make(params), **settings)
    for p in params:
        p.grad = torch.empty_like(p)
    for _ in range(2):
        with HostReads() as reads:
            ire.update_mask()
        assert reads.total == 0
        ire.step()


def test_ties_are_flat_and_excluded_parameters_do_not_count():
    a, b, c = (nn.Parameter(torch.zeros(n)) for n in (4, 4, 2))
    ire = IRE(SGD([a, b, c], lr=1.0), gamma=0.5, exclude=[c])
    a.grad, b.grad, c.grad = torch.tensor([0.0, 1, 2, 3]), torch.tensor([-2.0, 5, 6, -7]), torch.zeros(2)
    ire.update_mask()  # the 4th smallest of 8 is 2, which is there twice
    assert [m.tolist() for m in masks_of(ire)] == [[True, True, True, False], [True, False, False, False]]
    assert ire.flat_fraction == 0.5
    assert ire.flat_counts == {a: 3, b: 1}
    ire.step()
    torch.testing.assert_close(c.detach(), torch.zeros(2))


def test_scope_per_tensor():
    params = parameters()
    ire = IRE(SGD(params, lr=1.0), gamma=0.7, scope="per_tensor")
    set_gradients(params, 0)
    ire.update_mask()
    assert [int(m.sum()) for m in masks_of(ire)] == [math.floor(0.7 * p.numel()) for p in params]


def test_inverted_is_what_flat_is_not_and_random_has_the_same_share():
    params = parameters()
    set_gradients(params, 0)
    flat, inverted, chance = (IRE(SGD(params, lr=1.0), gamma=0.7, mask=kind) for kind in ("flat", "inverted", "random"))
    for ire in (flat, inverted, chance):
        ire.update_mask()
    assert equal(masks_of(inverted), [~m for m in masks_of(flat)])
    assert chance.flat_fraction == pytest.approx(0.7, abs=0.005)  # five standard deviations of 306,345 draws: 0.004
    first = masks_of(chance)
    chance.update_mask()
    assert chance.mask_overlap == pytest.approx(0.49 / 0.91, abs=0.01)
    again = IRE(SGD(params, lr=1.0), gamma=0.7, mask="random")
    again.update_mask()
    assert equal(masks_of(again), first)


def test_overlap_is_the_jaccard_index():
    p = nn.Parameter(torch.zeros(10))
    ire = IRE(SGD([p], lr=1.0), gamma=0.5)
    p.grad = torch.arange(10.0)
    ire.update_mask()
    assert ire.mask_overlap is None
    p.grad = (torch.arange(10.0) - 2).abs()  # flat: 0 1 2 3 4
    ire.update_mask()
    assert ire.mask_overlap == 1.0
    p.grad = (torch.arange(10.0) - 5).abs()  # flat: 3 4 5 6 7
    ire.update_mask()
    assert ire.mask_overlap == pytest.approx(2 / 8)


def test_moving_average_is_bias_corrected():
    p = nn.Parameter(torch.zeros(50, dtype=torch.float64))
    ire = IRE(SGD([p], lr=1.0), beta=0.9)
    h = torch.zeros(50, dtype=torch.float64)
    for n in range(1, 6):
        p.grad = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        ire.update_mask()
        h = 0.9 * h + 0.1 * p.grad**2
        saved = ire.state_dict()["ire"]
        torch.testing.assert_close(saved["averages"][0], h / (1 - 0.9**n))
        assert torch.equal(saved["masks"][0].bool(), h <= h.sort().values[29])


def test_gradient_that_is_not_finite_changes_nothing():
    params = parameters()
    ire = IRE(SGD(params, lr=1.0), beta=0.5)
    set_gradients(params, 0)
    assert ire.update_mask()
    before = copy.deepcopy(ire.state_dict()["ire"])
    for value in (math.nan, math.inf):
        set_gradients(params, 1)
        params[0].grad[3, 5] = value
        assert not ire.update_mask()
        after = ire.state_dict()["ire"]
        assert equal(after["masks"].values(), before["masks"].values())
        assert equal(after["averages"].values(), before["averages"].values())
        assert after["updates"] == before["updates"]


def test_parameters_without_gradient_are_flat_and_frozen_ones_are_left_out():
    a, b, frozen = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    frozen.requires_grad = False
    ire = IRE(SGD([a, b, frozen], lr=1.0), gamma=0.5)
    a.grad = torch.ones(4)
    ire.update_mask()
    assert ire.flat_counts == {a: 0, b: 4}


def test_other_memory_layouts():
    p = nn.Parameter(torch.randn(8, 3, 5, 5).to(memory_format=torch.channels_last))
    q = nn.Parameter(p.detach().contiguous())
    for optimizer in (AdamW, SGD):
        ires = [IRE(optimizer([x], lr=0.1, fused=True), gamma=0.6) for x in (p, q)]
        for step in range(3):
            grad = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(step))
            p.grad, q.grad = grad.to(memory_format=torch.channels_last), grad
            for ire in ires:
                ire.update_mask()
                ire.step()
        assert torch.equal(p, q)
        assert p.is_contiguous(memory_format=torch.channels_last)


# ---- An honest optimizer ----


def trained(steps: int, ire: IRE, params, first: int = 0) -> None:
    for step in range(first, first + steps):
        if step % 3 == 0:
            set_gradients(params, 1000 + step)
            ire.update_mask()
        set_gradients(params, step)
        ire.step()


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("kind", ["flat", "random"])
def test_saving_and_loading_between_two_masks_is_bitwise(name, kind):
    straight, resumed = parameters(), parameters()
    options = {"mask": kind, "beta": 0.5 if kind == "flat" else 0.0}
    ire = IRE(BASES[name](straight), **options)
    trained(5, ire, straight)
    file = io.BytesIO()
    torch.save(ire.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        for p, q in zip(resumed, straight, strict=True):
            p.copy_(q)
    again = IRE(BASES[name](resumed), **options)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert list(again.flat_counts.values()) == list(ire.flat_counts.values())
    assert again.mask_overlap == ire.mask_overlap
    trained(7, ire, straight, first=5)
    trained(7, again, resumed, first=5)
    assert equal(straight, resumed)
    assert again.state_dict()["ire"]["step"] == 12


def test_param_groups_and_state_are_those_of_the_base_optimizer():
    params = parameters()
    base = BASES["adamw"](params)
    ire = IRE(base)
    trained(1, ire, params)
    for loader in (ire, base):
        loader.load_state_dict(copy.deepcopy(loader.state_dict()))
        assert ire.param_groups is base.param_groups
        assert ire.state is base.state
        assert ire.defaults is base.defaults
    extra = nn.Parameter(torch.zeros(3))
    ire.add_param_group({"params": [extra], "lr": 5.0})
    assert base.param_groups[-1]["params"] == [extra]
    assert base.param_groups[-1]["weight_decay"] == 0.1
    ire.zero_grad()
    assert all(p.grad is None for p in params)


def test_state_dict_of_a_run_without_ire_can_be_loaded():
    params = parameters()
    base = BASES["adamw"](params)
    set_gradients(params, 0)
    base.step()
    state = copy.deepcopy(base.state_dict())
    ire = IRE(BASES["adamw"](params))
    trained(1, ire, params)
    ire.load_state_dict(state)
    assert not ire.has_mask
    assert ire.flat_fraction == 0


def test_state_dict_of_another_model_is_refused_and_nothing_is_lost():
    params = parameters()
    ire = IRE(BASES["adamw"](params))
    trained(1, ire, params)
    before = copy.deepcopy(ire.state_dict())
    other = [nn.Parameter(torch.zeros(2)) for _ in params]
    foreign = IRE(BASES["adamw"](other))
    trained(1, foreign, other)
    with pytest.raises(ValueError, match=r"IRE state for parameter 0, of shape \(2,\), does not fit"):
        ire.load_state_dict(foreign.state_dict())
    assert equal(ire.state_dict()["ire"]["masks"].values(), before["ire"]["masks"].values())


def test_storage_is_never_replaced():
    for name in BASES:
        params = parameters()
        addresses = [p.data_ptr() for p in params]
        trained(4, IRE(BASES[name](params)), params)
        assert [p.data_ptr() for p in params] == addresses


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copying_and_pickling(duplicate):
    params = parameters()
    ire = IRE(BASES["adamw"](params))
    trained(2, ire, params)
    other_params, other = duplicate((params, ire))
    trained(4, ire, params, first=2)
    trained(4, other, other_params, first=2)
    assert equal(params, other_params)
    assert other.param_groups is other.base_optimizer.param_groups


def test_accelerator_and_learning_rate_scheduler():
    model, plain = nn.Linear(4, 3), nn.Linear(4, 3)
    plain.load_state_dict(model.state_dict())
    accelerator = Accelerator(cpu=True)
    ire = IRE(AdamW(model.parameters(), lr=1e-2), kappa=2.0, gamma=1.0)
    model, optimizer = accelerator.prepare(model, ire)
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=4))
    assert ire.base_optimizer.param_groups[0]["lr"] == 1e-2
    for _ in range(4):
        optimizer.zero_grad()
        accelerator.backward(model(torch.ones(2, 4)).square().sum())
        ire.update_mask()
        optimizer.step()
        scheduler.step()
    assert ire.base_optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    assert ire.state_dict()["ire"]["step"] == 4


# ---- Arguments ----


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kappa": -1.0}, "kappa=-1.0: must be >= 0"),
        ({"kappa": math.nan}, "kappa=nan"),
        ({"gamma": 0.0}, r"gamma=0.0: the fraction of flat coordinates must be in \(0, 1\]"),
        ({"gamma": 1.1}, "gamma=1.1"),
        ({"beta": 1.0}, r"beta=1.0: must be in \[0, 1\)"),
        ({"scope": "layer"}, "scope='layer': choose one of global, per_tensor"),
        ({"mask": "sharp"}, "mask='sharp': choose one of flat, inverted, random, uniform"),
        ({"kappa_schedule": "cosine"}, "kappa_schedule='cosine': choose one of constant, lr"),
    ],
)
def test_arguments_out_of_range_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        IRE(SGD(parameters(), lr=1.0), **kwargs)


def test_ire_around_ire_is_refused():
    with pytest.raises(ValueError, match="amplifies twice"):
        IRE(IRE(SGD(parameters(), lr=1.0)))


class AveragedSGD(SGD):
    """What is schedule-free has these, to exchange the weights."""

    def train(self):
        pass

    def eval(self):
        pass


class Wrapper:
    def __init__(self, optimizer):
        self.param_groups, self.state = optimizer.param_groups, optimizer.state


class Lookahead(torch.optim.Optimizer):
    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda ps: torch.optim.LBFGS(ps), "IRE around LBFGS: it chooses its step by the loss along it"),
        (lambda ps: torch.optim.ASGD(ps), "IRE around ASGD: it keeps an average of the weights"),
        (lambda ps: AveragedSGD(ps, lr=1.0), "IRE around AveragedSGD: it keeps an average of the weights"),
        (lambda ps: Wrapper(SGD(ps, lr=1.0)), "IRE around Wrapper, which is no torch.optim.Optimizer"),
        (lambda ps: Lookahead(SGD(ps, lr=1.0)), "IRE around Lookahead, which wraps SGD: put IRE around SGD, and"),
        (
            lambda ps: Accelerator(cpu=True).prepare_optimizer(SGD(ps, lr=1.0)),
            "IRE around AcceleratedOptimizer, which wraps SGD: put IRE around SGD, and AcceleratedOptimizer around IRE",
        ),
        (lambda ps: SGD(ps, lr=math.nan), "lr=nan: the base optimizer of IRE needs a number"),
    ],
    ids=["lbfgs", "asgd", "schedule-free", "no optimizer", "lookahead", "accelerated", "nan"],
)
def test_what_ire_would_be_wrong_around_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        IRE(make(parameters()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype):
    """With steps of a quarter of what bf16 resolves, IRE moved less than half of what it should have."""
    half, single = nn.Parameter(torch.ones(4, dtype=dtype)), nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match=f"IRE around {dtype} parameters"):
        IRE(SGD([single, half], lr=1.0))
    IRE(SGD([single, half], lr=1.0), exclude=[half])
    IRE(SGD([single, nn.Parameter(half.detach(), requires_grad=False)], lr=1.0))
    ire = IRE(SGD([single], lr=1.0))
    with pytest.raises(ValueError, match=f"IRE around {dtype} parameters"):
        ire.add_param_group({"params": [half]})
    assert len(ire.param_groups) == len(ire.base_optimizer.param_groups) == 1


def test_hooks_around_the_state():
    """Those of IRE see all of it, those of the base optimizer its part; each may replace what it is given."""
    params, calls = parameters(), []
    base = BASES["adamw"](params)
    ire = IRE(base)
    trained(2, ire, params)

    def say(word, change=None):
        def hook(optimizer, *given):
            calls.append((word, type(optimizer), *("ire" in part for part in given)))
            return None if change is None else {**given[0], change: 1}

        return hook

    base.register_state_dict_pre_hook(say("save"))
    base.register_state_dict_post_hook(say("saved", "base"))
    ire.register_state_dict_pre_hook(say("save"))
    ire.register_state_dict_post_hook(say("saved", "note"))
    state = ire.state_dict()
    assert calls == [("save", IRE), ("save", AdamW), ("saved", AdamW, False), ("saved", IRE, True)]
    assert state["base"] == state["note"] == 1
    calls.clear()
    fresh = IRE(BASES["adamw"](parameters()))
    fresh.register_load_state_dict_pre_hook(say("load", "again"))
    fresh.register_load_state_dict_post_hook(say("loaded"))
    fresh.base_optimizer.register_load_state_dict_pre_hook(say("load"))
    fresh.base_optimizer.register_load_state_dict_post_hook(say("loaded"))
    fresh.load_state_dict(state)
    assert calls == [("load", IRE, True), ("load", AdamW, False), ("loaded", AdamW), ("loaded", IRE)]
    assert "again" not in state and fresh.has_mask


def test_state_dict_of_another_optimizer_is_refused_and_nothing_is_lost():
    params = parameters()
    ire, other = IRE(BASES["adamw"](params)), IRE(BASES["sgd"](params))
    trained(2, ire, params)
    before = copy.deepcopy(ire.state_dict())
    with pytest.raises(ValueError, match=r"not of AdamW: it has no betas, eps"):
        ire.load_state_dict(other.state_dict())
    assert ire.param_groups[0]["betas"] == (0.9, 0.999)
    trained(2, ire, params, first=2)
    assert before["state"].keys() == ire.state_dict()["state"].keys()


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="IRE cannot read sparse gradients"):
        IRE(SGD(embedding.parameters(), lr=1.0)).update_mask()


def test_less_than_half_flat_is_said(caplog):
    IRE(SGD(parameters(), lr=1.0), gamma=0.3)
    assert "gamma=0.3: the paper calls more than half" in caplog.text


def test_the_blockwise_path_is_taken():
    """Otherwise the comparisons above would not have tested it."""
    params = parameters()
    assert params[0].numel() > BLOCK
    ire = IRE(BASES["fused adamw"](params))
    trained(2, ire, params)
    called = []
    ire.base_optimizer.step = lambda *_: called.append(1)
    trained(1, ire, params, first=2)
    assert not called


def test_the_loop_of_the_docs():
    (loop,) = [b.code for b in pages.blocks(pages.DOCS / "methods" / "ire.md", "python") if "update_mask" in b.code]
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    names = {
        "torch": torch,
        "F": torch.nn.functional,
        "model": model,
        "data": [(torch.randn(8, 3), torch.randint(0, 4, (8,))) for _ in range(12)],
    }
    before = model.weight.detach().clone()
    exec(loop, names)
    assert names["optimizer"].updates == 2
    assert names["optimizer"].flat_fraction == pytest.approx(0.6, abs=0.05)
    assert not torch.equal(model.weight, before)
