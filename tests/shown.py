"""By hand: what training may show of a picture."""

import numpy as np
import torch
from PIL import Image, ImageOps

from ietagc_diffusers.eval.image_sets import to_tensor


def crops(picture: Image.Image, apart: float | None) -> list[Image.Image]:
    """Squares along the long side, from end to end, at most so many pixels apart; None: the one at the centre."""
    side, room = min(picture.size), max(picture.size) - min(picture.size)
    starts = [round(room / 2)]
    if apart is not None:
        few = next(n for n in range(1, 1000) if (n == 1 and not room) or (n > 1 and room / (n - 1) <= apart))
        starts = [round(start) for start in np.linspace(0, room, few)]
    wide = picture.width > picture.height
    return [picture.crop((s, 0, s + side, side) if wide else (0, s, side, s + side)) for s in starts]


def similarity(drawn: list[Image.Image], picture: Image.Image, descriptor, apart: float) -> float:
    """The highest similarity of some images to the picture or to one of its crops."""

    def vectors(images):
        return torch.stack([descriptor(to_tensor(image)[None])[0].double() for image in images])

    return float((vectors(drawn) @ vectors([picture, *crops(picture, apart)]).T).max())


def both_ways(drawn: Image.Image) -> list[Image.Image]:
    """An image and its mirror image, each as a whole and only its centre."""
    return [shown for image in (drawn, ImageOps.mirror(drawn)) for shown in (image, *crops(image, None))]
