"""The fast paths on the CPU compute what the plain versions beside them compute."""

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from hf_gr import IRE, LAMB, LARS, TVLARS
from hf_gr.optim import _cpu
from hf_gr.optim.order_statistics import SAMPLE, Scan, kth_smallest

SHAPES = [(600, 1000), (7,), (5, 3, 2), (), (0, 4), (70, 90)]  # the first is longer than a block


def draw(seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]


@pytest.fixture(params=["fast", "plain"])
def scan_of(request, monkeypatch):
    monkeypatch.setattr(_cpu, "suits_numpy", _cpu.suits_numpy if request.param == "fast" else lambda _: False)
    return Scan


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_scan(dtype, scan_of):
    block = torch.tensor([[0.5, -2.0, 0.0, 1.0], [-1.0, 3.0, -0.25, 2.0]], dtype=dtype)
    scan, mask = scan_of([block]), torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.uint8)
    count, between = scan.split(block, 0.5, 2.0)
    assert int(count) == 3 and between.tolist() == [1.0, 1.0]
    flags = scan.at_most(block, 1.0)
    assert flags.tolist() == [True, False, True, True, True, False, True, False]
    assert int(scan.replace(mask, flags)) == 2
    assert mask.tolist() == [[1, 0, 1, 1], [1, 0, 1, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kth_smallest_bitwise(dtype, scan_of):
    tensors = [*draw(0, dtype), *torch.randn(5 * SAMPLE, generator=torch.Generator().manual_seed(1)).split(SAMPLE)]
    ordered = torch.cat([t.reshape(-1).abs().double() for t in tensors]).sort().values
    assert [kth_smallest(tensors, k) for k in (1, 99_999, len(ordered))] == ordered[[0, 99_998, -1]].tolist()


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("amplify_weight_decay", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ire_around_adamw_bitwise(dtype, amplify_weight_decay, maximize, monkeypatch):
    def trained() -> list[torch.Tensor]:
        params = [nn.Parameter(w) for w in draw(0, dtype)]
        groups = [{"params": params[:3], "lr": 0.1, "weight_decay": 0.1}, {"params": params[3:], "betas": (0.8, 0.9)}]
        optimizer = AdamW(groups, fused=True, maximize=maximize)
        ire = IRE(optimizer, gamma=0.6, exclude=params[1:2], amplify_weight_decay=amplify_weight_decay)
        for step in range(5):
            for p, g in zip(params, draw(step + 1, dtype), strict=True):
                p.grad = g
            params[2].grad = None if step == 3 else params[2].grad
            ire.update_mask()
            ire.step()
        state = [t for p in params for t in ire.state[p].values()]
        return [*params, *state]

    fast = trained()
    monkeypatch.setattr(_cpu, "suits_blockwise_adamw", lambda _: False)
    assert all(torch.equal(a, b) for a, b in zip(fast, trained(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "make",
    [
        lambda ps: LARS(ps, 0.7, weight_decay=0.1),
        lambda ps: LARS(ps, 0.7, weight_decay=0.1, nesterov=True),
        lambda ps: LARS(ps, 0.7, momentum=0.0, bias_lr_scale=0.1),
        lambda ps: TVLARS(ps, 0.7, weight_decay=0.1, tv_lambda=2.0, delay_steps=2),
        lambda ps: LAMB(ps, 0.03, weight_decay=0.1, norm_clamp=(0, 10)),
        lambda ps: LAMB(ps, 0.03, bias_correction=False, exclude_1d=False),
    ],
)
def test_layer_by_layer_equals_all_together(make, dtype, monkeypatch):
    """To rounding: the norms are summed in another order."""

    def trained() -> list[torch.Tensor]:
        params = [nn.Parameter(w) for w in draw(0, dtype)]
        optimizer = make(params)
        for step in range(5):
            for p, g in zip(params, draw(step + 1, dtype), strict=True):
                p.grad = g
            optimizer.step()
        return [p.detach() for p in params]

    fast = trained()
    monkeypatch.setattr(_cpu, "suits_fused_kernels", lambda *_: False)
    tolerance = 64 * torch.finfo(dtype).eps
    for a, b in zip(fast, trained(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_private_kernel_of_sgd_is_the_public_one_bitwise(momentum, monkeypatch):
    def trained() -> list[torch.Tensor]:
        params = [nn.Parameter(w) for w in draw(0, torch.float32)]
        optimizer = LARS(params, 0.7, weight_decay=0.1, momentum=momentum)
        for step in range(3):
            for p, g in zip(params, draw(step + 1, torch.float32), strict=True):
                p.grad = g
            optimizer.step()
        return params

    fast = trained()
    monkeypatch.setattr(_cpu, "_has_kernels", False)
    assert all(torch.equal(a, b) for a, b in zip(fast, trained(), strict=True))


def test_the_private_kernel_of_adamw_is_the_public_one_bitwise(monkeypatch):
    """IRE's blocks, small enough that the large parameters are cut."""
    monkeypatch.setattr(_cpu, "STEP_BLOCK", 64)

    def trained() -> list[torch.Tensor]:
        params = [nn.Parameter(w) for w in draw(0, torch.float32)]
        base = AdamW(params, 0.1, weight_decay=0.1, fused=True)
        ire = IRE(base, kappa=2.0)
        for step in range(3):
            for p, g in zip(params, draw(step + 1, torch.float32), strict=True):
                p.grad = g
            ire.update_mask()
            ire.step()
        return [*params, *(t for state in base.state.values() for t in state.values())]

    fast = trained()
    monkeypatch.setattr(_cpu, "_has_kernels", False)
    assert all(torch.equal(a, b) for a, b in zip(fast, trained(), strict=True))
