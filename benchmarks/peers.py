"""What hf_gr is compared with: other libraries where they are installed, and other ways, written from their formulas.

timm is read without running its `__init__`, which imports torchvision. That has no build for the CPU build of torch
and breaks `from transformers import Trainer` where it is installed all the same. So a folder of peers is on the path
only while one of them is imported.
"""

import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch
from timing import Run
from torch import Tensor

#: Installed with `pip install --target FOLDER`; see `--peers`.
folders: list[str] = []
NAMES = ("timm", "pytorch_optimizer", "kornia", "torchvision")


@contextlib.contextmanager
def on_path() -> Iterator[None]:
    before = sys.path.copy()
    sys.path += folders
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before


@functools.cache
def peer(name: str) -> ModuleType:
    """The module. Raises `ImportError` if it is not installed."""
    with on_path():
        return _timm_optim() if name == "timm" else importlib.import_module(name)


def _timm_optim() -> ModuleType:
    """`timm.optim` as an empty package, to import its files from."""
    spec = importlib.util.find_spec("timm")
    if spec is None:
        raise ImportError("timm is not installed")
    package = ModuleType("timm_optim")
    package.__spec__ = ModuleSpec("timm_optim", None, is_package=True)
    package.__path__ = [f"{folder}/optim" for folder in spec.submodule_search_locations or ()]
    sys.modules["timm_optim"] = package
    for name in ("lars", "lamb"):
        importlib.import_module(f"timm_optim.{name}")
    return package


def versions() -> list[str]:
    """Names and versions of the peers that are installed."""
    found = []
    with on_path():
        for name in NAMES:
            with contextlib.suppress(PackageNotFoundError):
                found.append(f"{name} {version(name)}")
    return found


# ---- SAM: move to theta + r g / ||g||, and back ----


class Davda54SAM:
    """In the manner of the widely used davda54/sam: copy, move along scale * grad, point back at the copy."""

    def __init__(self, params: list[Tensor], rho: float):
        self.params, self.rho, self.state = params, rho, {}

    @torch.no_grad()
    def first_step(self) -> None:
        norm = torch.norm(torch.stack([(1.0 * p.grad).norm(p=2) for p in self.params if p.grad is not None]), p=2)
        scale = self.rho / (norm + 1e-12)
        for p in self.params:
            if p.grad is not None:
                self.state[p] = p.data.clone()
                p.add_(1.0 * p.grad * scale.to(p))

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.params:
            if p.grad is not None:
                p.data = self.state[p]


class ComposerSAM:
    """In the manner of MosaicML Composer: keep e = rho g / ||g||, add it, and subtract it, which rounds theta."""

    def __init__(self, params: list[Tensor], rho: float):
        self.params, self.rho, self.state = params, rho, {}

    @torch.no_grad()
    def first_step(self) -> None:
        scale = self.rho / (torch.stack([p.grad.norm() for p in self.params if p.grad is not None]).norm() + 1e-12)
        for p in self.params:
            if p.grad is not None:
                self.state[p] = p.grad * scale.to(p)
                p.add_(self.state[p])

    @torch.no_grad()
    def second_step(self) -> None:
        for p, step in self.state.items():
            p.sub_(step)


def library_sam(params: list[Tensor], rho: float) -> Any:
    """pytorch_optimizer's SAM with a base step that does nothing."""

    class Nothing(torch.optim.SGD):
        def step(self, closure=None):
            pass

    return peer("pytorch_optimizer").SAM(params, Nothing, rho=rho, lr=0.0)


def there_and_back(sam: Any) -> Run:
    def run() -> None:
        sam.first_step()
        sam.second_step()

    return run


# ---- TVLARS ----


class ReleasedTVLARS:
    """The released way of computing TVLARS: one tensor after the other, norms from squares that are written out, phi on
    the device for each tensor, and three numbers of each read out for a log."""

    def __init__(
        self, params: list[Tensor], lr: float, weight_decay: float, momentum: float = 0.9, tv_lambda: float = 1e-3
    ):
        self.params, self.lr, self.momentum = params, lr, momentum
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
                psi = self.tv_lambda * torch.tensor(float(self.steps + 1), device=p.device)
                ratio = 1e-3 * torch.pow(0.1 + torch.exp(psi), -1) * w_norm / d_norm
                one = torch.ones_like(w_norm)
                d = d.mul(torch.where(w_norm > 0, torch.where(d_norm > 0, ratio, one), one))
                self.log.append([ratio.item(), w_norm.item(), d_norm.item()])
            self.buffers[p].mul_(self.momentum).add_(d)
            p.add_(self.buffers[p], alpha=-self.lr)
        self.steps += 1


# ---- IRE ----


class AuthorsIREStep:
    """The step of the authors' ire.py: copy everything, step, and write new tensors with a float mask."""

    def __init__(self, base: torch.optim.Optimizer, masks: list[Tensor], kappa: float):
        self.base, self.params, self.kappa = base, base.param_groups[0]["params"], kappa
        self.masks = [mask.float() for mask in masks]

    @torch.no_grad()
    def __call__(self) -> None:
        old = [p.data.clone() for p in self.params]
        self.base.step()
        for p, before, mask in zip(self.params, old, self.masks, strict=True):
            difference = p.data - before
            p.data = p.data + difference * mask * self.kappa


@torch.no_grad()
def authors_mask(params: list[Tensor], gamma: float) -> list[Tensor]:
    """The choice of the authors' ire_new.py: absolute values in place, one long copy, and its k-th value."""
    magnitudes = [p.grad.abs_() for p in params]
    everything = torch.cat([m.view(-1) for m in magnitudes])
    threshold = torch.kthvalue(everything, int(len(everything) * gamma)).values
    del everything
    return [m <= threshold for m in magnitudes]
