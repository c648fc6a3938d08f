"""What is done to an image before SSCD sees it: by name, because numbers under different ones do not compare."""

from dataclasses import dataclass

import torch
from torchvision.transforms.v2 import functional as TF

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CENTRED = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Preprocess:
    """Resize (an int is the small edge, a pair is the whole image), crop the centre, normalise.

    ``__call__``: uint8 (N, 3, H, W) -> float32 (N, 3, h, w). Resizing is bilinear with antialiasing, as PIL's.
    """

    resize: int | tuple[int, int]
    crop: int | None
    normalise: tuple[tuple[float, ...], tuple[float, ...]]

    def __call__(self, images):
        size = [self.resize] if isinstance(self.resize, int) else list(self.resize)
        images = TF.resize(images, size, antialias=True)
        if self.crop is not None:
            images = TF.center_crop(images, [self.crop])
        mean, std = (torch.tensor(x, device=images.device)[:, None, None] for x in self.normalise)
        return (images.float() / 255 - mean) / std


PREPROCESS = {
    # Somepalli et al.'s DCR, Wen et al., IET-AGC: the tables of these papers.
    "dcr": Preprocess(256, 224, CENTRED),
    # SSCD's README: the small edge to 288, or the whole image squashed to 320 x 320.
    "sscd-288": Preprocess(288, None, IMAGENET),
    "sscd-320": Preprocess((320, 320), None, IMAGENET),
}
