"""DP-SGD (Abadi et al. 2016): each sample's gradient is clipped by itself, and noise is added to their sum."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from ..errors import UsageError
from .groups import PrivacySettings

NAMES = ("epsilon", "epsilon_poisson")  # in a round's record
MEANINGFUL = 10  # an epsilon above it says little


def check_launch(settings: Any, num_processes: int) -> None:
    """Raise ``UsageError`` where DP-SGD is asked for and cannot work as the run was launched.

    settings: ``RunSettings``, with the precision of the run.
    """
    if settings.dp_noise_multiplier is None:
        return
    if find_spec("opacus") is None:
        raise UsageError("`dp_noise_multiplier`: needs the package opacus; `pip install opacus`")
    if settings.mixed_precision not in (None, "no"):
        raise UsageError(f"`mixed_precision` {settings.mixed_precision}: DP-SGD clips in float32; give no")
    if num_processes > settings.method.num_shards:
        raise UsageError(
            f"`num_processes` {num_processes}: with DP-SGD at most as many as `num_shards`, "
            f"{settings.method.num_shards}, because one process adds a step's noise"
        )


class PrivateGradients:
    """Makes the gradient of a step from those of its samples: each is scaled down to the norm C at most, their sum gets
    noise N(0, (sigma C)^2), and the result is divided by the samples that a full step has.

    Each image counts once a step: where an epoch ends in the middle of a step and the next one brings an image again,
    the second gradient is left out. So one image changes the sum by C at most. A gradient that is not finite is left
    out too.

    The loss must be the sum of the samples' own losses, and every layer with trained parameters work on each sample by
    itself. The gradients of the samples are opacus's; it takes convolutions' inputs to lie in memory with the channels
    first, whatever they do, so that here they are made so before each of them.

    Args:
        model: in training mode, in float32, on the device. It gets hooks, which also heed calls of the module itself.
        noise_multiplier: sigma.
        max_norm: C.
        step_samples: of a full step, over all of its micro-batches.

    Raises:
        UsageError: a layer is not fit for opacus.
    """

    def __init__(self, model: torch.nn.Module, noise_multiplier: float, max_norm: float, step_samples: int):
        from opacus import GradSampleModule

        self.noise_multiplier, self.max_norm, self.step_samples = noise_multiplier, max_norm, step_samples
        warnings.filterwarnings("ignore", message="Full backward hook is firing")  # of the first layer, as it should
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_pre_hook(_contiguous)
        try:
            GradSampleModule(model, loss_reduction="sum")
        except (NotImplementedError, ValueError) as error:
            raise UsageError(f"`dp_noise_multiplier`: {' '.join(str(error).split())[:300]}") from error
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.sums = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.used: list[torch.Tensor] = []  # samples of this step

    @classmethod
    def of(cls, settings: Any, model: torch.nn.Module, step_samples: int) -> "PrivateGradients | None":
        """What the settings of a training say; None where DP-SGD is off."""
        if settings.dp_noise_multiplier is None:
            return None
        return cls(model, settings.dp_noise_multiplier, settings.dp_max_grad_norm, step_samples)

    @torch.no_grad()
    def collect(self, samples: torch.Tensor) -> None:
        """After the backward pass of a micro-batch: add its clipped gradients. ``samples`` (B,): its rows' numbers."""
        gradients: list[Any] = [parameter.grad_sample for parameter in self.parameters]  # type: ignore[attr-defined]
        if any(p.grad is not None and g is None for p, g in zip(self.parameters, gradients, strict=True)):
            raise RuntimeError("a layer gives no gradients of single samples")
        present = [gradient for gradient in gradients if gradient is not None]
        norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in present]).norm(dim=0)
        again = (samples[:, None] == samples).tril(-1).any(dim=1)
        if self.used:
            again |= torch.isin(samples, torch.cat(self.used))
        factors = torch.where(norms.isfinite() & ~again, (self.max_norm / norms).clamp(max=1), 0.0)
        for total, gradient in zip(self.sums, gradients, strict=True):
            if gradient is not None:
                total += torch.einsum("n,n...->...", factors, gradient.nan_to_num_(0.0, 0.0, 0.0))
        for parameter in self.parameters:
            parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]
        self.used.append(samples)

    @torch.no_grad()
    def release(self) -> None:
        """Put the step's noisy gradient into the parameters' ``grad``."""
        deviation = self.noise_multiplier * self.max_norm
        for parameter, total in zip(self.parameters, self.sums, strict=True):
            noisy = total + deviation * torch.randn_like(total) if deviation else total.clone()
            parameter.grad = noisy / self.step_samples
            total.zero_()
        self.used = []


def _contiguous(module, inputs):
    return tuple(tensor.contiguous() for tensor in inputs)


def epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """The epsilon of (epsilon, delta)-differential privacy by Renyi accounting (opacus), of steps in which each sample
    takes part with probability ``sample_rate`` by itself. Infinite without noise.
    """
    if steps == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, min(sample_rate, 1.0), steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the best order is the first or last: the bound holds all the same
        return accountant.get_epsilon(delta=delta)


@dataclass(frozen=True)
class PrivacyAccount:
    """What the training tells of one image: how far the models with it and without it may differ, where "without it"
    means that its gradients are left out and all else stays as it is.

    With several shards an image is in one of them for the whole training, and all that the others learn of it comes
    from the noisy gradients of that shard's proxy: so the steps of one proxy count, and the smallest shard is worst.

    Attributes:
        noise_multiplier, delta: as in ``epsilon``.
        step_samples: samples that a step of a proxy has.
        shard_samples: of the smallest shard.
    """

    noise_multiplier: float
    delta: float
    step_samples: int
    shard_samples: int

    @classmethod
    def of(cls, settings: PrivacySettings, step_samples: int, shards: Sequence[Any]) -> "PrivacyAccount | None":
        """None where DP-SGD is off."""
        if settings.dp_noise_multiplier is None:
            return None
        return cls(settings.dp_noise_multiplier, settings.dp_delta or 0.0, step_samples, min(map(len, shards)))

    def spent(self, steps: int) -> dict[str, float | None]:
        """After so many steps of each proxy: ``epsilon_poisson``, if batches were drawn by Poisson sampling, and
        ``epsilon``, which holds for the shuffled batches that there are: each image takes part once an epoch, and
        nothing is gained from not knowing when. None: infinite.
        """
        rate = self.step_samples / self.shard_samples
        visits = math.ceil(steps * rate) if rate < 1 else steps
        found = {
            "epsilon": epsilon(self.noise_multiplier, 1.0, visits, self.delta),
            "epsilon_poisson": epsilon(self.noise_multiplier, rate, steps, self.delta),
        }
        return {name: value if math.isfinite(value) else None for name, value in found.items()}


def in_words(spent: dict[str, Any], delta: float | None) -> str:
    """What ``PrivacyAccount.spent`` gives, for people."""
    shuffled, poisson = ("infinite" if spent[name] is None else f"{spent[name]:.4g}" for name in NAMES)
    words = (
        f"epsilon {shuffled} at delta {delta:g} for any one image, with batches shuffled as they are here, or "
        f"{poisson} by the usual accounting, as if they were drawn by Poisson sampling"
    )
    if min(math.inf if spent[name] is None else spent[name] for name in NAMES) > MEANINGFUL:
        words += f". Over about {MEANINGFUL} this is clipping of gradients, not privacy"
    return words
