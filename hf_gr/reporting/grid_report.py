"""Moved to `comparison.py` and `comparison_plots.py`."""
