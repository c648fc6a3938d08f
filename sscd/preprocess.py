"""The preprocessing of images for SSCD, by name: numbers under different ones are not comparable."""

from dataclasses import dataclass

import torch
from torchvision.transforms.v2 import functional as TF

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CENTRED = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Preprocess:
    """Resize, crop the centre, normalise: uint8 (N, 3, H, W) -> float32 (N, 3, h, w), uint8 if nothing is normalised.

    Args:
        resize: pixels of the small edge, or (height, width). Bilinear with antialiasing, as Pillow resizes.
        crop: pixels of both edges; None crops nothing.
        normalise: mean and deviation of each channel, for values in [0, 1]; None: the network does it itself.
    """

    resize: int | tuple[int, int]
    crop: int | None
    normalise: tuple[tuple[float, ...], tuple[float, ...]] | None

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of every image that it makes; None if they keep their shape."""
        if self.crop is not None:
            return self.crop, self.crop
        return None if isinstance(self.resize, int) else self.resize

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        size = [self.resize] if isinstance(self.resize, int) else list(self.resize)
        images = TF.resize(images, size, antialias=True)
        if self.crop is not None:
            images = TF.center_crop(images, [self.crop])
        if self.normalise is None:
            return images
        mean, std = (torch.tensor(x, device=images.device)[:, None, None] for x in self.normalise)
        return (images.float() / 255 - mean) / std


PREPROCESS = {
    # Somepalli et al.'s DCR, Wen et al., IET-AGC: the tables of these papers.
    "dcr": Preprocess(256, 224, CENTRED),
    # SSCD's README: the small edge to 288, or the whole image squashed to 320 x 320.
    "sscd-288": Preprocess(288, None, IMAGENET),
    "sscd-320": Preprocess((320, 320), None, IMAGENET),
}
# For networks that normalise by themselves.
RESIZE = {"resize-288": Preprocess(288, None, None), "resize-320": Preprocess((320, 320), None, None)}
