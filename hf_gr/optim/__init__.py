"""The methods on plain tensors and parameters, for any training loop: torch and numpy alone."""

from .ire import IRE
from .lamb import LAMB
from .lars import LARS
from .tvlars import TVLARS

__all__ = ["IRE", "LAMB", "LARS", "TVLARS"]
