"""Sim Score and copy rate (eq. 14)."""

import torch

SIM_PERCENTILE = 0.95
COPY_SIMILARITY = 0.5


def sim_score(similarities):
    """The 95th percentile of similarities (N,) to the nearest training image."""
    return torch.quantile(similarities, SIM_PERCENTILE).item()


def copy_rate(similarities, threshold=COPY_SIMILARITY):
    """Share of similarities (N,) over the threshold."""
    return (similarities > threshold).float().mean().item()
