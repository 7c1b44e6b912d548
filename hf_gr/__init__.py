"""Gradient regularization with GR warmup, and IRE, for the Hugging Face Trainer."""

from .config import GRArguments, GRConfig
from .ire import IRE
from .trainer import GRMixin, GRTrainer

__version__ = "0.1.0"

__all__ = ["IRE", "GRArguments", "GRConfig", "GRMixin", "GRTrainer"]
