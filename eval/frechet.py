"""Frechet distance between two sets of features, taken as normal distributions."""

import torch


def frechet_distance(first, second):
    """||m1 - m2||^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of features (N, D) and (M, D), computed in float64."""
    first, second = first.double(), second.double()
    mean1, mean2 = first.mean(dim=0), second.mean(dim=0)
    cov1, cov2 = torch.cov(first.T), torch.cov(second.T)
    # tr (C1 C2)^(1/2) is the sum of the roots of the eigenvalues, which are real and not negative.
    eigenvalues = torch.linalg.eigvals(cov1 @ cov2).real.clamp(min=0)
    distance = (mean1 - mean2).pow(2).sum() + cov1.trace() + cov2.trace() - 2 * eigenvalues.sqrt().sum()
    return distance.clamp(min=0).item()


def pooled_pixels(images, size=8):
    """Coarse pixels as features, named ``pixel-8``: uint8 (N, 3, H, W) -> float32 (N, 3 * size * size) in [0, 1]."""
    pooled = torch.nn.functional.interpolate(images.float() / 255, size=(size, size), mode="bilinear", antialias=True)
    return pooled.flatten(1)
