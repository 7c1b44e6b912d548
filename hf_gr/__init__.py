"""Gradient regularization with GR warmup for the Hugging Face Trainer."""

from .config import GRArguments, GRConfig
from .trainer import GRMixin, GRTrainer

__version__ = "0.1.0"

__all__ = ["GRArguments", "GRConfig", "GRMixin", "GRTrainer"]
