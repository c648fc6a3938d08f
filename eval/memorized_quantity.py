"""MQ: how many generations lie much nearer to one training image than to its neighbourhood (eq. 12, 13)."""

import torch

from .neighbours import nearest_l2

THRESHOLDS = (0.4, 0.5, 0.6)
NUM_NEIGHBOURS = 50
GU_RATIO = 1 / 3
TINY = 1e-12


def l2_ratio(generated, training, protocol="iet-agc", num_neighbours=NUM_NEIGHBOURS, **options):
    """The l2 ratio of each generation; 0 is an exact copy.

    Args:
        generated: (N, D) pixels, float32 in [0, 1] or uint8; training: (M, D).
        protocol: ``iet-agc``, as the released code: squared l2 to the nearest training image over the mean squared l2
            to the 50 nearest (the nearest included), in [0, 1];
            ``paper``, as eq. 12 is printed: l2 to the nearest, x_bar, over the mean l2 from x_bar to the 50 training
            images that are nearest to the generation;
            ``gu`` (Gu et al.): l2 to the nearest over l2 to the second nearest, in [0, 1].
        options: of ``nearest_l2``.

    Returns:
        float32 (N,).
    """
    return ratio_of(
        *nearest_l2(generated, training, max(2, num_neighbours), **options), training, protocol, num_neighbours
    )


def ratio_of(distances, indices, training, protocol, num_neighbours=NUM_NEIGHBOURS):
    """The ratios of ``l2_ratio``, of neighbours already found: distances and indices (N, at least 2)."""
    if protocol == "gu":
        return distances[:, 0] / distances[:, 1].clamp(min=TINY)
    distances, indices = distances[:, :num_neighbours], indices[:, :num_neighbours]
    if protocol == "iet-agc":
        squared = distances.double().pow(2)
        return (squared[:, 0] / squared.mean(dim=1).clamp(min=TINY)).float()
    if protocol == "paper":
        around = torch.stack([_spread(training, row) for row in indices])
        return distances[:, 0] / around.clamp(min=TINY)
    raise ValueError(f"protocol {protocol}: must be iet-agc, paper or gu")


def _spread(training, neighbours):
    """Mean l2 from the first of ``neighbours`` to all of them, itself included."""
    near = training[neighbours]
    near = near.float() / 255 if near.dtype == torch.uint8 else near
    return (near - near[0]).norm(dim=1).mean()


def memorized_quantity(ratios):
    """Share of the generations at or under each threshold: {"0.4": ..., "0.5": ..., "0.6": ...}."""
    return {str(threshold): (ratios <= threshold).float().mean().item() for threshold in THRESHOLDS}


def memorization_ratio(ratios):
    """Gu et al.'s share of generations whose ratio (protocol ``gu``) is under 1/3."""
    return (ratios < GU_RATIO).float().mean().item()
