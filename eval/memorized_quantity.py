"""MQ: how many generations lie much nearer to one training image than to its neighbourhood (eq. 12, 13)."""

from .neighbours import nearest_l2

THRESHOLDS = (0.4, 0.5, 0.6)


def l2_ratio(generated, training, num_neighbours=50):
    """Protocol ``iet-agc``: squared l2 to the nearest training image over the mean squared l2 to the 50 nearest.

    Args:
        generated: float32 (N, D) pixels in [0, 1]; training: float32 (M, D).

    Returns:
        (N,) in [0, 1]; 0 is an exact copy.
    """
    distances, _ = nearest_l2(generated, training, min(num_neighbours, len(training)))
    squared = distances.pow(2)
    return squared[:, 0] / squared.mean(dim=1).clamp(min=1e-12)


def memorized_quantity(ratios):
    """Share of the generations at or under each threshold: {"0.4": ..., "0.5": ..., "0.6": ...}."""
    return {str(threshold): (ratios <= threshold).float().mean().item() for threshold in THRESHOLDS}
