"""What can be measured on a trained model, and what theory says of it: torch and numpy, scipy for eigenvalues."""

from .adaptive_lr import adaptive_lr_variance, adaptive_lr_variation, effective_samples, fit_norm_decay
from .curvature import average_sharpness, hessian_trace, sam_sharpness, top_hessian_eigenvalue
from .estimates import Estimate

__all__ = [
    "Estimate",
    "adaptive_lr_variance",
    "adaptive_lr_variation",
    "average_sharpness",
    "effective_samples",
    "fit_norm_decay",
    "hessian_trace",
    "sam_sharpness",
    "top_hessian_eigenvalue",
]
