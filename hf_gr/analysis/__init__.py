"""What can be measured on a trained model, and what theory says of it: torch and numpy alone."""

from .adaptive_lr import adaptive_lr_variance, adaptive_lr_variation, effective_samples, fit_norm_decay
from .estimates import Estimate

__all__ = ["Estimate", "adaptive_lr_variance", "adaptive_lr_variation", "effective_samples", "fit_norm_decay"]
