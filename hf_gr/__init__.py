"""Gradient regularization with GR warmup, IRE and TVLARS for the Hugging Face Trainer.

Names are imported when they are first asked for: the optimizers alone load neither transformers nor accelerate.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import GRArguments, GRConfig
    from .optim import IRE, LAMB, LARS, TVLARS, Muon
    from .optimizer_factory import create_optimizer, list_optimizers
    from .trainer import GRMixin, GRTrainer, SharpnessCallback

__version__ = "0.2.0"

__all__ = [
    "IRE",
    "LAMB",
    "LARS",
    "TVLARS",
    "GRArguments",
    "GRConfig",
    "GRMixin",
    "GRTrainer",
    "Muon",
    "SharpnessCallback",
    "create_optimizer",
    "list_optimizers",
]

_MODULES = {
    "config": ("GRArguments", "GRConfig"),
    "optim": ("IRE", "LAMB", "LARS", "TVLARS", "Muon"),
    "optimizer_factory": ("create_optimizer", "list_optimizers"),
    "trainer": ("GRMixin", "GRTrainer", "SharpnessCallback"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
