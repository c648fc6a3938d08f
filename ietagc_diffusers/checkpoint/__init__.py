"""Checkpoints: named states and tensors in a folder that is whole or not there, in safetensors and JSON.

Layout of ``checkpoint-<global_step>/``: a folder for each set of weights (``unet/``, ``unet_ema/``: theta_hat, as
diffusers loads it), and ``ietagc/``: ``checkpoint.json`` (format, version, fingerprint of the run), each named state as
``<name>.json`` and, if it has tensors, ``<name>.safetensors``, large sets of tensors as files of their own, and
``manifest.json`` (sizes and CRCs of all files). It is written under a temporary name, brought to the disk, and renamed.

A set of tensors that has not changed since the last checkpoint, or that waits in a file already, is linked, not written
again. What the states are is the business of those who give them.
"""

from .ownership import begins, continues, fingerprints
from .reading import Checkpoint, CheckpointError, check_fingerprint, damage, find, read_state
from .states import flatten, unflatten
from .writing import Held, NoRoom, Writer, gigabytes, room

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Held",
    "NoRoom",
    "Writer",
    "begins",
    "check_fingerprint",
    "continues",
    "damage",
    "find",
    "fingerprints",
    "flatten",
    "gigabytes",
    "read_state",
    "room",
    "unflatten",
]

_load_state = read_state  # its name in 0.1: scripts that look into checkpoints use it
