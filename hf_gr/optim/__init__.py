"""The methods on plain tensors and parameters, for any training loop: torch and numpy alone."""

from typing import Any

from .ire import IRE
from .lamb import LAMB
from .lars import LARS
from .muon import Muon
from .tvlars import TVLARS

__all__ = ["IRE", "LAMB", "LARS", "OPTIMIZERS", "TVLARS", "Muon"]

#: The optimizers that transformers does not know, by their names for the flag `optim`. A class describes itself by its
#: attributes `help`, `latex`, `citation` and `symbols`, which the command line, the model card and the docs read.
OPTIMIZERS: dict[str, Any] = {"lamb": LAMB, "lars": LARS, "muon": Muon, "tvlars": TVLARS}
