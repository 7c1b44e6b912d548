"""Gradient regularization with GR warmup, IRE and TVLARS for the Hugging Face Trainer."""

from .config import GRArguments, GRConfig
from .ire import IRE
from .optimizer_factory import create_optimizer, list_optimizers
from .optimizers import LAMB, LARS, TVLARS
from .trainer import GRMixin, GRTrainer

__version__ = "0.1.0"

__all__ = [
    "IRE",
    "LAMB",
    "LARS",
    "TVLARS",
    "GRArguments",
    "GRConfig",
    "GRMixin",
    "GRTrainer",
    "create_optimizer",
    "list_optimizers",
]
