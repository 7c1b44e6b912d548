"""What a step of an optimizer costs, on random gradients."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from comparison import Bench, Comparison, Fact, Group, Row
from peers import ReleasedTVLARS, peer
from timing import peak_bytes
from torch import Tensor, nn
from workloads import Workload, random_gradients, size_of

from hf_gr import LAMB, LARS, TVLARS, Muon
from hf_gr.optim.muon import hidden_matrices

DECAY = {"weight_decay": 5e-4}
RELEASED, TORCH_MUON = "TVLARS, the released way", "Muon and AdamW of torch"
LIBRARIES = "timm, pytorch_optimizer"
LARS_PEERS, LAMB_PEERS = (
    tuple(f"{name} of {library}{foreach}" for library in ("timm", "pytorch_optimizer") for foreach in ("", ", foreach"))
    for name in ("LARS", "LAMB")
)

Make = Callable[[list[nn.Parameter]], Any]


def layerwise() -> dict[str, Make]:
    """Ours, and all others that are installed."""
    made: dict[str, Make] = {
        "LARS": lambda ps: LARS(ps, 0.1, **DECAY),
        "TVLARS": lambda ps: TVLARS(ps, 0.1, tv_lambda=1e-3, delay_steps=10_000, **DECAY),
        RELEASED: lambda ps: ReleasedTVLARS(ps, 0.1, **DECAY),
        "LAMB": lambda ps: LAMB(ps, 1e-3, **DECAY),
    }
    for library in ("timm", "pytorch_optimizer"):
        try:
            module = peer(library)
        except ImportError:
            continue
        is_timm = library == "timm"
        lars = partial(module.lars.Lars, momentum=0.9) if is_timm else module.LARS
        lamb = module.lamb.Lamb if is_timm else module.Lamb
        for name, cls, lr in (("LARS", lars, 0.1), ("LAMB", lamb, 1e-3)):
            for ending, foreach in (("", False), (", foreach", True)):
                make = partial(cls, lr=lr, foreach=foreach, **DECAY)
                if _is_accepted(make):
                    made[f"{name} of {library}{ending}"] = make
    return made


def _is_accepted(make: Make) -> bool:
    """Whether this version of a peer has the argument `foreach`."""
    try:
        make([nn.Parameter(torch.zeros(2, 2))])
    except TypeError:
        return False
    return True


def bench(model: nn.Module, made: dict[str, Make], measured: tuple[str, ...], device: str) -> Bench:
    kinds, facts = {}, []
    for name, make in made.items():
        params = list(copy.deepcopy(model).parameters())
        for p, gradient in zip(params, random_gradients(params), strict=True):
            p.grad = gradient
        optimizer = make(params)
        kinds[name] = optimizer.step
        if name in measured:
            memory = partial(temporary_memory, optimizer, params, device)
            facts.append(Fact(f"temporary memory: {name}", memory, None, "N"))
    return Bench(kinds, facts=facts)


def temporary_memory(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], device: str) -> float:
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    return peak_bytes(optimizer.step, [*params, *(p.grad for p in params), *state], device) / size_of(params)


def layerwise_steps(workload: Workload, device: str) -> Bench:
    return bench(workload.model(device), layerwise(), ("LARS", "TVLARS", "LAMB"), device)


def muon_steps(workload: Workload, device: str) -> Bench:
    model = workload.model(device)
    indices = [i for i, p in enumerate(model.parameters()) if any(p is matrix for matrix in hidden_matrices(model))]

    class MuonAndAdamW:
        def __init__(self, params: list[nn.Parameter]):
            matrices = [params[i] for i in indices]
            others = [p for i, p in enumerate(params) if i not in set(indices)]
            self.muon = torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
            self.adamw = torch.optim.AdamW(others, lr=1e-3, weight_decay=0.1)

        def step(self) -> None:
            self.muon.step()
            self.adamw.step()

    made: dict[str, Make] = {
        "Muon": lambda ps: Muon(ps, lr=1e-3, weight_decay=0.1, hidden=[ps[i] for i in indices]),
        TORCH_MUON: MuonAndAdamW,
    }
    return bench(model, made, ("Muon",), device)


LAYERWISE_ROWS = (
    Row("LARS", LARS_PEERS, 1.05, 1.00, against=LIBRARIES),
    Row("LAMB", LAMB_PEERS, 1.05, 1.00, against=LIBRARIES),
    Row("TVLARS", (RELEASED,), 0.45),
)
MUON_ROWS = (Row("Muon", (TORCH_MUON,)),)


def comparisons(tiny: bool) -> list[Comparison]:
    vit, resnet = Workload("vit-ti", 1).tiny(tiny), Workload("resnet-18", 1).tiny(tiny)
    llama = Workload("llama-60m", 1, 1).tiny(tiny)
    return [
        *(
            Comparison(w.model_name, LAYERWISE_ROWS, partial(layerwise_steps, w), rounds)
            for w, rounds in ((vit, 31), (resnet, 15), (llama, 11))
        ),
        Comparison(vit.model_name, MUON_ROWS, partial(muon_steps, vit), 11),
    ]


GROUP = Group(
    "A step of an optimizer",
    "Without passes, on random gradients, in float32. timm and pytorch_optimizer each run with and without `foreach`, "
    "and the fastest of all is the peer; torch has neither LARS nor LAMB. The formulas differ in details, so times "
    "are compared, not results. The released way of TVLARS takes one tensor after the other and reads three numbers "
    "of each.",
    comparisons,
)
