"""The methods inside `transformers.Trainer`."""

from .trainer import GRMixin, GRTrainer

__all__ = ["GRMixin", "GRTrainer"]
