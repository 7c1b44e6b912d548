"""Models that are trained from scratch, by name; Barlow Twins around any of them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .barlow_twins import BarlowTwinsConfig, BarlowTwinsForPretraining, barlow_twins_loss

__all__ = ["BarlowTwinsConfig", "BarlowTwinsForPretraining", "barlow_twins_loss"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".barlow_twins", __name__), name)
