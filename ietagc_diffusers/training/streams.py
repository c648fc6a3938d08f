"""The process's random streams, as one value that can be kept and put back."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class RandomStreams:
    """Python's, NumPy's and torch's global generators, and the device's."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)

    def get(self) -> dict[str, Any]:
        """A dict of JSON values and uint8 tensors."""
        version, internal, gauss = random.getstate()
        numpy_state = np.random.get_state(legacy=False)
        state = {
            "python": [version, list(internal), gauss],
            "numpy": numpy_state
            | {"state": {"key": numpy_state["state"]["key"].tolist(), "pos": numpy_state["state"]["pos"]}},
            "torch": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def set(self, state: dict[str, Any]) -> None:
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        key = np.array(state["numpy"]["state"]["key"], dtype=np.uint32)
        np.random.set_state(state["numpy"] | {"state": {"key": key, "pos": state["numpy"]["state"]["pos"]}})
        torch.set_rng_state(state["torch"])
        if "cuda" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)

    def seed(self, seed: Sequence[int]) -> None:
        """Start all streams from a sequence of integers."""
        numbers = np.random.SeedSequence(seed).generate_state(3).tolist()
        random.seed(numbers[0])
        np.random.seed(numbers[1])
        torch.manual_seed(numbers[2])

    @contextmanager
    def seeded(self, seed: Sequence[int]) -> Iterator[None]:
        """Within it all streams start from ``seed``; afterwards they are where they were."""
        now = self.get()
        self.seed(seed)
        try:
            yield
        finally:
            self.set(now)

    def fresh(self, seed: Sequence[int]) -> dict[str, Any]:
        """The state that ``seed`` starts from; the streams stay as they are."""
        with self.seeded(seed):
            return self.get()
