"""What an estimate from random samples returns."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A value estimated from random samples, and its standard error."""

    value: float
    standard_error: float
