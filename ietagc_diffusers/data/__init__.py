"""The training set: which sample comes when, and what it is."""

from .samples import decode, load_training_rows

__all__ = ["decode", "load_training_rows"]
