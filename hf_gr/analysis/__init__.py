"""What can be measured on a trained model: torch and numpy alone."""

from .curvature import average_sharpness, hessian_trace, sam_sharpness, top_hessian_eigenvalue
from .estimates import Estimate

__all__ = ["Estimate", "average_sharpness", "hessian_trace", "sam_sharpness", "top_hessian_eigenvalue"]
