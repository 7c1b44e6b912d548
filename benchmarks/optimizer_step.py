"""What a step of LARS, TVLARS and LAMB costs: against timm, pytorch_optimizer, and the way TVLARS was released.

    pip install -c constraints.txt -e ".[bench]" && pip install --no-deps --target outputs/timm timm
    python benchmarks/optimizer_step.py --timm outputs/timm --threads 1 2

(Of timm two files are used. Installed beside everything else, but without torchvision, it would break `accelerate
launch`.) All kinds run in one process, interleaved in a
new order each round; what is reported are medians of the ratios within a round, with the range of their middle half.
"""

import argparse
import copy
import importlib
import platform
import random
import statistics
import sys
import types
from datetime import date
from importlib.metadata import version
from pathlib import Path

import pytorch_optimizer
import torch
from gr_step import LiveBytes, interleave, llama, ratio
from torch import nn

from hf_gr import LAMB, LARS, TVLARS, __version__
from hf_gr.models.presets import create_vit


def timm_optimizers(folder: Path) -> tuple[type, type]:
    """timm's LARS and LAMB, without running timm's own __init__."""
    for name, path in (("timm", folder / "timm"), ("timm.optim", folder / "timm" / "optim")):
        package = types.ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package
    return importlib.import_module("timm.optim.lars").Lars, importlib.import_module("timm.optim.lamb").Lamb


DECAY = {"weight_decay": 5e-4}


class ReleasedTVLARS:
    """The released way of computing TVLARS: one tensor after the other, norms from squares that are written out, phi on
    the device for each tensor, and three numbers of each read out for a log."""

    def __init__(self, params, lr: float, weight_decay: float, momentum: float = 0.9, tv_lambda: float = 1e-3):
        self.params, self.lr, self.momentum = list(params), lr, momentum
        self.weight_decay, self.tv_lambda, self.steps = weight_decay, tv_lambda, 0
        self.buffers = {p: torch.zeros_like(p) for p in self.params}
        self.log: list[list[float]] = []

    @torch.no_grad()
    def step(self) -> None:
        self.log.clear()
        for p in self.params:
            d = p.grad
            if p.ndim != 1:
                d = d.add(p, alpha=self.weight_decay)
                w_norm, d_norm = (t.pow(2).sum().sqrt().clamp(0, 10) for t in (p, d))
                psi = self.tv_lambda * torch.tensor(float(self.steps + 1))
                ratio = 1e-3 * torch.pow(0.1 + torch.exp(psi), -1) * w_norm / d_norm
                one = torch.ones_like(w_norm)
                d = d.mul(torch.where(w_norm > 0, torch.where(d_norm > 0, ratio, one), one))
                self.log.append([ratio.item(), w_norm.item(), d_norm.item()])
            self.buffers[p].mul_(self.momentum).add_(d)
            p.add_(self.buffers[p], alpha=-self.lr)
        self.steps += 1


def measure(model: nn.Module, rounds: int, timm: tuple[type, type]) -> list[str]:
    timm_lars, timm_lamb = timm
    lars, lamb = pytorch_optimizer.LARS, pytorch_optimizer.Lamb
    made = {
        "LARS": lambda ps: LARS(ps, 0.1, **DECAY),
        "LARS timm": lambda ps: timm_lars(ps, 0.1, momentum=0.9, **DECAY),
        "LARS timm foreach": lambda ps: timm_lars(ps, 0.1, momentum=0.9, foreach=True, **DECAY),
        "LARS pytorch_optimizer": lambda ps: lars(ps, 0.1, foreach=False, **DECAY),
        "LARS pytorch_optimizer foreach": lambda ps: lars(ps, 0.1, foreach=True, **DECAY),
        "TVLARS": lambda ps: TVLARS(ps, 0.1, tv_lambda=1e-3, delay_steps=10_000, **DECAY),
        "TVLARS released": lambda ps: ReleasedTVLARS(ps, 0.1, **DECAY),
        "LAMB": lambda ps: LAMB(ps, 1e-3, **DECAY),
        "LAMB timm": lambda ps: timm_lamb(ps, 1e-3, **DECAY),
        "LAMB timm foreach": lambda ps: timm_lamb(ps, 1e-3, foreach=True, **DECAY),
        "LAMB pytorch_optimizer": lambda ps: lamb(ps, 1e-3, foreach=False, **DECAY),
        "LAMB pytorch_optimizer foreach": lambda ps: lamb(ps, 1e-3, foreach=True, **DECAY),
    }
    accepted = {name: make for name, make in made.items() if _is_accepted(make)}
    kinds, live = {}, {}
    for name, make in accepted.items():
        params = list(copy.deepcopy(model).parameters())
        generator = torch.Generator().manual_seed(0)
        for p in params:
            p.grad = 0.01 * torch.randn(p.shape, generator=generator)
        optimizer = make(params)
        kinds[name], live[name] = optimizer.step, (optimizer, params)
    seconds = interleave(kinds, rounds)
    cells = []
    for name in ("LARS", "TVLARS", "LAMB"):
        optimizer, params = live[name]
        rivals = [other for other in kinds if other.startswith(f"{name} ")]
        best = min(rivals, key=lambda other: statistics.median(seconds[other]))
        peak = LiveBytes()
        peak.watch_existing(
            [*params, *(p.grad for p in params), *(t for s in optimizer.state.values() for t in s.values())]
        )
        with peak:
            optimizer.step()
        n = sum(p.numel() * p.element_size() for p in params)
        cells += [
            f"{1e3 * statistics.median(seconds[name]):.1f} ms",
            f"{ratio(seconds, name, best)} of {best.removeprefix(name).strip()}, "
            f"{1e3 * statistics.median(seconds[best]):.1f} ms",
            f"{peak.peak / n:.2f} N",
        ]
    return cells


def _is_accepted(make) -> bool:
    """Whether this version of a peer has the argument `foreach`."""
    try:
        make([nn.Parameter(torch.zeros(2, 2))])
    except TypeError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--timm", type=Path, required=True, help="folder that timm was installed into")
    options = parser.parse_args()
    timm = timm_optimizers(options.timm)
    torch.manual_seed(0)
    random.seed(0)
    models = {
        "ViT-Ti": create_vit("vit-ti", [str(i) for i in range(10)], dropout=0.0),
        "Llama 58 M": llama(),
    }
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for name, model in models.items():
            where = f"{name}, {threads} thread{'s' * (threads > 1)}"
            rows.append(f"| {where} | {' | '.join(measure(model, options.rounds, timm))} |")
            print(rows[-1], flush=True)
    release = next(options.timm.glob("timm-*.dist-info")).name.removesuffix(".dist-info").replace("-", " ")
    peers = f"{release}, pytorch_optimizer {version('pytorch_optimizer')}"
    print(
        f"\n{date.today()}, hf_gr {__version__}, torch {torch.__version__}, {peers}, {platform.processor() or 'CPU'};"
    )
    print(f"medians of {options.rounds} paired ratios, the middle half in brackets.\n")
    heads = [f"{name} | to the fastest other | temporary memory" for name in ("LARS", "TVLARS", "LAMB")]
    print(f"| | {' | '.join(heads)} |\n|{'---|' * 10}")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
