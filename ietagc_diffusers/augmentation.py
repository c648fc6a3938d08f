"""Threshold-aware augmentation: how strongly (eq. 6, 7), and with what (RandAugment)."""

import torch
from torchvision.transforms import RandAugment


def augmentation_strength(ratio, skip_threshold, decay):
    """rho = exp(-A d) (eq. 7) with d = |r - lambda| / lambda (eq. 6).

    Args:
        ratio: loss ratios (B,); +inf gives strength 0.
        skip_threshold: lambda > 0.
        decay: A >= 0.

    Returns:
        (B,) in [0, 1], 1 at the threshold.
    """
    return torch.exp(-decay * (ratio - skip_threshold).abs() / skip_threshold)


class StrengthRandAugment:
    """RandAugment whose magnitude is ``round(strength * magnitude)`` on torchvision's 31-bin scale; 0 leaves a sample
    as it is.
    """

    def __init__(self, magnitude=5, num_ops=2):
        self.magnitude = magnitude
        self.by_magnitude = [RandAugment(num_ops=num_ops, magnitude=m) for m in range(magnitude + 1)]

    def magnitudes(self, strength):
        """(B,) strengths in [0, 1] -> (B,) int64 magnitudes in [0, M]."""
        return (strength * self.magnitude).round().long()

    def __call__(self, images, magnitudes, seeds):
        """Augment images (N, 3, H, W) in [-1, 1].

        ``magnitudes`` and ``seeds`` are N integers on the host. Each image's draw comes from its own seed, so that it
        depends neither on the batch nor on the number of processes. Returns images of the same shape, range and
        dtype.
        """
        pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        augmented = []
        with torch.random.fork_rng(devices=[]):
            for image, magnitude, seed in zip(pixels, magnitudes, seeds, strict=True):
                torch.manual_seed(seed)
                augmented.append(self.by_magnitude[magnitude](image))
        return torch.stack(augmented).to(images.dtype) / 127.5 - 1
