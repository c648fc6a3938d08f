"""Sets of images and captions as people have them, made into one that training loads as it is."""

from .formats import FORMATS, Options
from .report import summary
from .run import Settings, prepare

__all__ = ["FORMATS", "Options", "Settings", "prepare", "summary"]
