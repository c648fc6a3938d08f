"""The memory bank: an exponential moving average of the loss at each timestep (eq. 3) and the ratio to it (eq. 4)."""

import torch


class LossMemoryBank:
    """Moving average of the loss per timestep bucket, kept on the losses' device and never synchronised with the host.

    Args:
        num_timesteps: T; timesteps are integers in [0, T).
        decay: eta in [0, 1).
        bias_correction: divide an entry by 1 - eta^n after n visits, so that its zero start does not bias it low.
        num_buckets: neighbouring timesteps share an entry; None gives each timestep its own.
    """

    def __init__(
        self, num_timesteps: int, decay: float = 0.8, bias_correction: bool = True, num_buckets: int | None = None
    ):
        num_buckets = num_timesteps if num_buckets is None else num_buckets
        if not 1 <= num_buckets <= num_timesteps:
            raise ValueError(f"num_buckets {num_buckets}: must be in 1 to num_timesteps ({num_timesteps})")
        if not 0 <= decay < 1:
            raise ValueError(f"decay {decay}: must be in [0, 1)")
        self.num_timesteps = num_timesteps
        self.num_buckets = num_buckets
        self.decay = decay
        self.bias_correction = bias_correction
        self.averages = torch.zeros(num_buckets)
        self.visits = torch.zeros(num_buckets)

    def to(self, device: torch.device | str) -> "LossMemoryBank":
        self.averages, self.visits = self.averages.to(device), self.visits.to(device)
        return self

    def _buckets(self, timesteps):
        return timesteps * self.num_buckets // self.num_timesteps

    def loss_ratio(self, losses: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """r = loss / l_t (eq. 4). losses (B,), timesteps (B,) -> (B,); +inf where the entry was never visited."""
        buckets = self._buckets(timesteps)
        average, visits = self.averages[buckets], self.visits[buckets]
        if self.bias_correction:
            average = average / (1 - self.decay**visits)
        return torch.where(average > 0, losses.detach().float() / average, torch.inf)

    def update(self, losses: torch.Tensor, timesteps: torch.Tensor) -> None:
        """l_t <- eta l_t + (1 - eta) loss (eq. 3), for losses (B,) in batch order.

        A bucket that occurs m times decays by eta^m, and its j-th of m losses weighs (1 - eta) eta^(m - j): the
        sequential update in closed form. Losses that are not finite are left out.
        """
        losses, buckets = losses.detach().float(), self._buckets(timesteps)
        finite = losses.isfinite()
        same = (buckets[:, None] == buckets[None, :]) & finite
        later_visits = same.triu(diagonal=1).sum(dim=1)
        weighted = torch.where(finite, (1 - self.decay) * self.decay**later_visits * losses, 0.0)
        occurrences = same.sum(dim=1)
        # Rows of one bucket write the same value, so the repeated index is harmless.
        self.averages[buckets] = self.decay**occurrences * self.averages[buckets] + (same * weighted).sum(dim=1)
        self.visits[buckets] = self.visits[buckets] + occurrences

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"averages": self.averages, "visits": self.visits}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        if state["averages"].shape != self.averages.shape:
            raise ValueError(f"the saved memory bank has {len(state['averages'])} buckets, this one {self.num_buckets}")
        self.averages.copy_(state["averages"])
        self.visits.copy_(state["visits"])
