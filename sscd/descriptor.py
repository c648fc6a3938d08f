"""Descriptors: callables from images to unit vectors whose dot product is the similarity."""

import torch.nn.functional as F


def pixel_descriptor(images, size=16):
    """The built-in descriptor ``pixel``: downsampled, mean-centred, normalised pixels. Needs no weights; never to be
    called SSCD.

    Args:
        images: uint8 (N, 3, H, W).
        size: side of the downsampled image.

    Returns:
        float32 (N, 3 * size * size) of unit length; zero for an image of one colour.
    """
    small = F.interpolate(images.float() / 255, size=(size, size), mode="bilinear", antialias=True).flatten(1)
    return F.normalize(small - small.mean(dim=1, keepdim=True), dim=1)
