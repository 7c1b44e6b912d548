"""The methods inside `transformers.Trainer`."""

from .sharpness import SharpnessCallback
from .trainer import GRMixin, GRTrainer

__all__ = ["GRMixin", "GRTrainer", "SharpnessCallback"]
