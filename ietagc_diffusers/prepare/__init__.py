"""Sets of images and captions as people have them, made into one that training loads as it is."""

from .formats import FORMATS, Options
from .prepare import Settings, prepare
from .report import summary

__all__ = ["FORMATS", "Options", "Settings", "prepare", "summary"]
