"""Threshold-aware augmentation: how strongly (eq. 6, 7), and with what (RandAugment)."""

from collections.abc import Sequence

import torch
from torchvision.transforms import InterpolationMode, RandAugment
from torchvision.transforms import functional as F


def augmentation_strength(ratio: torch.Tensor, skip_threshold: float | torch.Tensor, decay: float) -> torch.Tensor:
    """rho = exp(-A d) (eq. 7) with d = |r - lambda| / lambda (eq. 6).

    Args:
        ratio: loss ratios (B,); +inf gives strength 0.
        skip_threshold: lambda > 0, or one for each, (B,).
        decay: A >= 0.

    Returns:
        (B,) in [0, 1], 1 at the threshold.
    """
    return torch.exp(-decay * (ratio - skip_threshold).abs() / skip_threshold)


class GradedRandAugment(RandAugment):
    """RandAugment whose effect grows with the magnitude and leaves no marks of its own.

    Left out are operations that ignore the magnitude (AutoContrast, Equalize) or shift whole ranges of colours at
    once (Posterize, Solarize). Geometric ones are bilinear and reflect the image at its borders instead of filling
    with black, which a generative model would learn.
    """

    UNGRADED = ("AutoContrast", "Equalize", "Posterize", "Solarize")

    def __init__(self, num_ops, magnitude):
        super().__init__(num_ops, magnitude, interpolation=InterpolationMode.BILINEAR)

    def _augmentation_space(self, num_bins, image_size):
        height, width = image_size
        space = super()._augmentation_space(num_bins, (height - 2 * (height // 4), width - 2 * (width // 4)))
        return {name: operation for name, operation in space.items() if name not in self.UNGRADED}

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[-2:]
        padded = F.pad(image, [width // 2, height // 2], padding_mode="reflect")
        return F.center_crop(super().forward(padded), [height, width])


OPERATIONS = {"all": RandAugment, "graded": GradedRandAugment}


class StrengthRandAugment:
    """RandAugment whose magnitude is ``round(strength * magnitude)`` on torchvision's 31-bin scale; 0 leaves a sample
    as it is. ``operations``: ``all`` of torchvision's, or the ``graded`` ones.
    """

    def __init__(self, magnitude: int = 5, num_ops: int = 2, operations: str = "all"):
        self.magnitude = magnitude
        kind = OPERATIONS[operations]
        self.by_magnitude = [kind(num_ops=num_ops, magnitude=m) for m in range(magnitude + 1)]

    def magnitudes(self, strength: torch.Tensor) -> torch.Tensor:
        """(B,) strengths in [0, 1] -> (B,) int64 magnitudes in [0, M]."""
        return (strength * self.magnitude).round().long()

    def __call__(self, images: torch.Tensor, magnitudes: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
        """Augment images (N, 3, H, W) in [-1, 1].

        ``magnitudes`` and ``seeds`` are N integers on the host. Each image's draw comes from its own seed, so that it
        depends neither on the batch nor on the number of processes. Returns images of the same shape, range and
        dtype.
        """
        pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        augmented = []
        with torch.random.fork_rng(devices=[]):
            for image, magnitude, seed in zip(pixels, magnitudes, seeds, strict=True):
                torch.default_generator.manual_seed(seed)  # not torch's, which seeds the device too
                augmented.append(self.by_magnitude[magnitude](image))
        return torch.stack(augmented).to(images.dtype) / 127.5 - 1
