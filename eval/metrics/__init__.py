"""Metrics: each is one object that says how its number is computed, kept and shown.

``METRICS[name]`` has ``title``, ``lower``, ``format(value)``, ``value(scores)`` and ``interval(scores)``; ``KINDS``
computes them.
"""

from .base import ImageSets, Kind, Measured, Metric
from .clip_score import ClipScore
from .frechet import Frechet, measured_distances
from .l2 import L2
from .patches import Patches
from .plausibility import Plausibility
from .similarity import Similarity

KINDS: tuple[type[Kind], ...] = (Similarity, L2, Patches, ClipScore, Frechet, Plausibility)
METRICS: dict[str, Metric] = {metric.name: metric for kind in KINDS for metric in kind.metrics}

__all__ = ["KINDS", "METRICS", "ImageSets", "Kind", "Measured", "Metric", "measured_distances"]
