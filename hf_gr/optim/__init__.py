"""The methods on plain tensors and parameters, for any training loop: torch and numpy alone."""

from ._layerwise import LayerwiseOptimizer
from .ire import IRE
from .lamb import LAMB
from .lars import LARS
from .tvlars import TVLARS

__all__ = ["IRE", "LAMB", "LARS", "OPTIMIZERS", "TVLARS"]

#: The optimizers that transformers does not know, by their names for the flag `optim`. A class describes itself by its
#: attributes `help`, `latex`, `citation` and `symbols`, which the command line, the model card and the docs read.
OPTIMIZERS: dict[str, type[LayerwiseOptimizer]] = {"lamb": LAMB, "lars": LARS, "tvlars": TVLARS}
