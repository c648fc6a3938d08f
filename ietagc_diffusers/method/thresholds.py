"""Skip thresholds that follow the loss ratios: running quantiles at each range of noise levels."""

import torch

NUM_BUCKETS = 10  # ratios are alike over wide ranges of noise levels: the memory bank has taken out their size
WINDOW = 50  # latest ratios of a bucket


class RunningQuantile:
    """A quantile of the latest loss ratios at each range of noise levels, kept on the ratios' device and never
    synchronised with the host.

    Args:
        rate: which quantile, in (0, 1): of ratios like the latest ones about this share lies below it.
        num_levels: T; noise levels are integers in [0, T).
    """

    def __init__(self, rate: float, num_levels: int):
        if not 0 < rate < 1:
            raise ValueError(f"rate {rate}: must be over 0 and under 1")
        self.rate, self.num_levels = rate, num_levels
        self.num_buckets = min(NUM_BUCKETS, num_levels)
        # The latest ratios of each bucket, each in the place of the oldest, and one place more, for what is left out.
        self.ratios = torch.full((self.num_buckets * WINDOW + 1,), torch.inf)
        self.visits = torch.zeros(self.num_buckets, dtype=torch.int64)
        self.needed = min(WINDOW, 1 / rate)  # with fewer ratios even the smallest is no such quantile

    def to(self, device: torch.device | str) -> "RunningQuantile":
        self.ratios, self.visits = self.ratios.to(device), self.visits.to(device)
        return self

    def _buckets(self, levels):
        return levels * self.num_buckets // self.num_levels

    def __call__(self, levels: torch.Tensor) -> torch.Tensor:
        """The quantile at noise levels (B,): (B,) float32, linear between ratios; 0 where too few have been seen."""
        ordered = self.ratios[:-1].view(self.num_buckets, WINDOW).sort(dim=1).values
        place = self.rate * (self.visits.clamp(max=WINDOW) - 1).clamp(min=0)
        below = place.long()[:, None]
        low, high = ordered.gather(1, below), ordered.gather(1, (below + 1).clamp(max=WINDOW - 1))
        share = place[:, None] - below
        quantiles = torch.where(share > 0, low + share * (high - low), low).squeeze(1)
        return torch.where(self.visits >= self.needed, quantiles, 0.0)[self._buckets(levels)]

    def update(self, ratios: torch.Tensor, levels: torch.Tensor) -> None:
        """Take in loss ratios (B,) at noise levels (B,), in batch order. Those that are not finite are left out."""
        finite, buckets = ratios.isfinite(), self._buckets(levels)
        same = (buckets[:, None] == buckets[None, :]) & finite
        before, after = same.tril(diagonal=-1).sum(dim=1), same.triu(diagonal=1).sum(dim=1)
        places = buckets * WINDOW + (self.visits[buckets] + before) % WINDOW
        stays = finite & (after < WINDOW)  # what later ones of the batch would replace would be written in any order
        self.ratios[torch.where(stays, places, len(self.ratios) - 1)] = ratios
        # Rows of one bucket write the same value, so the repeated index is harmless.
        self.visits[buckets] = self.visits[buckets] + same.sum(dim=1)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"ratios": self.ratios[:-1], "ratio_visits": self.visits}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.ratios[:-1].copy_(state["ratios"])
        self.visits.copy_(state["ratio_visits"])
