"""The training set: which sample comes when, and what it is."""

from .batch import Batch
from .conditions import Captions, ClassLabels, Condition
from .rows import decode, load_training_rows
from .samples import TrainingSamples, View, fixed_transforms, image_transform
from .settings import DataSettings, ImageSettings
from .sources import read_source, selected

__all__ = [
    "Batch",
    "Captions",
    "ClassLabels",
    "Condition",
    "DataSettings",
    "ImageSettings",
    "TrainingSamples",
    "View",
    "decode",
    "fixed_transforms",
    "image_transform",
    "load_training_rows",
    "read_source",
    "selected",
]
