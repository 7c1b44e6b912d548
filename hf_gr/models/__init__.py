"""Models that are trained from scratch, by name."""
