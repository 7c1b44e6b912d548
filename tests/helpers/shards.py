"""LARS, LAMB, TVLARS and IRE on sharded parameters beside ordinary ones, in every process of a group."""

import itertools
from collections import Counter
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from hf_gr import IRE, LAMB, LARS, TVLARS

#: Of 7 and 5 rows processes hold different numbers, of 1 row most hold none.
SHAPES = [(7, 6), (5,), (1, 9), (5, 3, 2, 2), (130, 70)]
STEPS = 4
OPTIMIZERS = {
    "lars": lambda ps: LARS(ps, 20.0, weight_decay=0.1),
    "lars, nesterov": lambda ps: LARS(ps, 20.0, weight_decay=0.1, nesterov=True, exclude_1d=False),
    "tvlars": lambda ps: TVLARS(ps, 20.0, weight_decay=0.1, tv_lambda=1.0, delay_steps=3, gamma_min=0.1),
    "tvlars, without momentum": lambda ps: TVLARS(ps, 20.0, momentum=0.0, tv_lambda=1.0, delay_steps=3),
    "lamb": lambda ps: LAMB(ps, 0.03, weight_decay=0.1, norm_clamp=(0, 10)),
}
MASKS = {
    f"{scope}, {mask}, beta {beta}": {"scope": scope, "mask": mask, "beta": beta}
    for scope, mask, beta in itertools.product(("global", "per_tensor"), ("flat", "inverted"), (0.0, 0.5))
} | {mask: {"mask": mask} for mask in ("random", "uniform")}


def layouts() -> dict[str, tuple]:
    """How the parameters may be distributed: a mesh of processes and the placements on it."""
    size = dist.get_world_size()
    line = init_device_mesh("cpu", (size,))
    found = {"rows": (line, [Shard(0)]), "last dimension": (line, [Shard(-1)]), "copies": (line, [Replicate()])}
    if size == 4:
        square = init_device_mesh("cpu", (2, 2))
        found |= {"copies of rows": (square, [Replicate(), Shard(0)]), "blocks": (square, [Shard(0), Shard(-1)])}
    return found


def drawn(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * (i + 1) for i, shape in enumerate(SHAPES)]


def pairs(layout: tuple) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The same parameters, ordinary and sharded; of the latter the last is ordinary as well."""
    whole = drawn(0)
    parts = [distribute_tensor(t.clone(), *layout) for t in whole[:-1]] + [whole[-1].clone()]
    return [nn.Parameter(t) for t in whole], [nn.Parameter(t) for t in parts]


def set_gradients(whole: list[nn.Parameter], parts: list[nn.Parameter], layout: tuple, seed: int) -> None:
    for p, part, grad in zip(whole, parts, drawn(seed), strict=True):
        p.grad = grad
        part.grad = grad.clone() if p is whole[-1] else distribute_tensor(grad.clone(), *layout)


def full(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def relative_error(parts, whole) -> float:
    """The largest of a parameter. The rates are such that the parameters move by some hundredths of their size."""
    return max(((full(a) - b).norm() / b.norm()).item() for a, b in zip(parts, whole, strict=True))


def compare_optimizer(make, layout: tuple) -> dict:
    whole, parts = pairs(layout)
    of_whole, of_parts = make(whole), make(parts)
    calls: Counter[str] = Counter()
    reduce = dist.all_reduce

    def counted(values, *args, **kwargs):
        calls["all_reduce"] += 1
        return reduce(values, *args, **kwargs)

    for step in range(STEPS):
        set_gradients(whole, parts, layout, step + 1)
        of_parts.rates, of_whole.rates = {}, {}
        of_whole.step()
        with patch.object(dist, "all_reduce", counted):
            of_parts.step()
    state = [(s[key], of_whole.state[p][key]) for (p, q) in zip(whole, parts, strict=True)
             for s in [of_parts.state[q]] for key in s if isinstance(s[key], torch.Tensor)]  # fmt: skip
    rates = [
        (float(of_parts.rates[q]), float(of_whole.rates[p]))
        for p, q in zip(whole, parts, strict=True)
        if p in of_whole.rates
    ]
    return {
        "weights": relative_error([p.detach() for p in parts], [p.detach() for p in whole]),
        "state": relative_error(*zip(*state, strict=True)) if state else 0.0,
        "rates": max(abs(a / b - 1) for a, b in rates),
        "placements": all(s.placements == q.placements for q in parts[:-1]
                          for s in of_parts.state[q].values() if isinstance(s, torch.Tensor)),
        "all_reduces": calls["all_reduce"] / STEPS,
    }  # fmt: skip


def compare_masks(settings: dict, layout: tuple) -> dict[str, bool]:
    """Whether masks, counts and weights are the same bits, after each of some choices."""
    whole, parts = pairs(layout)
    ires = [IRE(torch.optim.AdamW(ps, lr=0.1), gamma=0.6, exclude=ps[1:2], seed=3, **settings) for ps in (whole, parts)]
    same: dict[str, bool] = {}
    for step in range(2):
        set_gradients(whole, parts, layout, step + 1)
        for ire in ires:
            assert ire.update_mask()
            ire.step()
        a, b = ires
        now = {
            "masks": all(torch.equal(full(b._masks[q]), a._masks[p]) for p, q in zip(whole, parts, strict=True)
                         if p in a._masks),
            "which": len(a._masks) == len(b._masks) == len(SHAPES) - 1,
            "counts": list(a.flat_counts.values()) == list(b.flat_counts.values()),
            "overlap": a.mask_overlap == b.mask_overlap,
            "weights": all(torch.equal(full(q.detach()), p) for p, q in zip(whole, parts, strict=True)),
        }  # fmt: skip
        same = {key: value and same.get(key, True) for key, value in now.items()}
    parts[0].grad.to_local().mul_(float("inf") if dist.get_rank() == 0 else 1.0)
    before = [full(mask).clone() for mask in ires[1]._masks.values()]
    same["overflow"] = bool(ires[1].update_mask()) == (not ires[1].needs_estimate)
    if ires[1].needs_estimate:
        same["kept"] = all(map(torch.equal, before, (full(mask) for mask in ires[1]._masks.values())))
    return same


def shards(folder: str) -> dict:
    """Each comparison, by case and layout. Four processes at once are slow, and take what two cannot."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    found = layouts()
    if dist.get_world_size() == 4:
        found = {where: found[where] for where in ("copies of rows", "blocks")}
    of_masks = {where: layout for where, layout in found.items() if where not in ("last dimension", "copies")}
    return {
        "optimizers": {(name, where): compare_optimizer(make, layout)
                       for name, make in OPTIMIZERS.items() for where, layout in found.items()},
        "masks": {(name, where): compare_masks(settings, layout)
                  for name, settings in MASKS.items() for where, layout in of_masks.items()},
    }  # fmt: skip
