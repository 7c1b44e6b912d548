"""Shared code of the training scripts, and the `hf-gr` command."""
