"""Presets of the method's numbers."""

import math
from typing import Any

_OFF = {"num_shards": 1, "skip_threshold": 0.0, "augment_range": 1.0, "redistribute_fraction": 0.0}
_AGC, _IET, _TAA, _MSR = (
    {"skip_threshold": 0.8},
    {"num_shards": 4},
    {"augment_range": math.inf},
    {"redistribute_fraction": 0.25},
)

# Beyond the paper: calibrated ratios are narrower than the paper's, so that the thresholds lie nearer to 1.
_CALIBRATED = {"calibrate": "base", "skip_threshold": 0.97}
_CALIBRATED_TAA = {"augment_range": 1.06, "augment_decay": 25.0}

# Rows of the paper's Tables III and IV, with its LAION-10k numbers; and the same with calibrated control.
PRESETS: dict[str, dict[str, Any]] = {
    "none": _OFF,
    "agc": _OFF | _AGC,
    "iet": _OFF | _IET,
    "iet-agc": _OFF | _IET | _AGC,
    "iet-agc-taa": _OFF | _IET | _AGC | _TAA,
    "iet-agc+": _OFF | _IET | _AGC | _TAA | _MSR,
    "agc-c": _OFF | _CALIBRATED,
    "iet-agc-c": _OFF | _IET | _CALIBRATED,
    "iet-agc+c": _OFF | _IET | _CALIBRATED | _CALIBRATED_TAA | _MSR,
}
DEFAULT_PRESET = "iet-agc+"
