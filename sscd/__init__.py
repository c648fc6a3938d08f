"""Image descriptors for copy detection."""

from .descriptor import Descriptor, DescriptorError, descriptors_here, load_descriptor, pixel_descriptor
from .preprocess import PREPROCESS

__all__ = ["PREPROCESS", "Descriptor", "DescriptorError", "descriptors_here", "load_descriptor", "pixel_descriptor"]
