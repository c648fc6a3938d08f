"""Image descriptors for copy detection."""

from .descriptor import pixel_descriptor

__all__ = ["pixel_descriptor"]
