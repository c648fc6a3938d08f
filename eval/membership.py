"""Attacks that tell training images of a model from others by asking the model about each image: what they ask, and the
score that they make of the answers. A higher score says: trained on.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DDPMScheduler

from ietagc_diffusers.errors import UsageError, one_line
from ietagc_diffusers.families import Family, family_of
from ietagc_diffusers.run_folder import RunFolder
from ietagc_diffusers.training.fixed_losses import FixedLosses

from .adapters import base_of_run
from .pipelines import check_pipeline, pipeline_folder

# Noise levels of SimA and PIA, as shares of all of them: of SimA the middle of those that its authors' code tries, 0 to
# 190 of 1,000; of PIA the one up to which its authors find it to become better on DDPM.
SIMA_LEVEL, PIA_LEVEL = 0.1, 0.2
NORM = 4  # the power in the distance of both, in their authors' code
SCHEDULE = {
    "prediction_type": "epsilon",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": None,
    "beta_end": None,
    "rescale_betas_zero_snr": False,
    "shift": None,
}  # what a loss depends on of a scheduler's configuration, with Diffusers' defaults

Answers = dict[str, np.ndarray]  # of a model on each of N images, by the name of the question: float64 (N,)


class Opened(NamedTuple):
    """A model in memory: what surrounds its denoiser, and the denoiser."""

    family: Family
    denoiser: torch.nn.Module


@dataclass(frozen=True)
class Target:
    """A pipeline that can be asked.

    Args:
        place: its folder or Hub id; setting: that named it, for messages.
        adapter: a folder with an adapter for it, or None.
        prediction_type: what it was trained to predict, if not what its scheduler says.
    """

    place: str
    setting: str = "model"
    adapter: Path | None = None
    prediction_type: str | None = None

    @classmethod
    def of_model(cls, model: str | Path) -> "Target":
        """The target that a folder, a LoRA run's too, a checkpoint in a single file or a Hub id means."""
        check_pipeline(model)
        folder = str(pipeline_folder(model))
        if base_of_run(model) is None:
            return cls(folder)
        return cls(folder, adapter=Path(model), prediction_type=RunFolder(model).config().get("prediction_type"))

    @property
    def kind(self) -> type[Family]:
        return family_of(self.place, setting=self.setting)

    @property
    def schedule(self) -> dict[str, Any]:
        """What its losses depend on besides the weights; {} if that cannot be read."""
        try:
            config = DDPMScheduler.load_config(self.place, subfolder="scheduler")
        except (OSError, ValueError):
            return {}  # told when the scheduler is loaded
        found = {name: config.get(name, default) for name, default in SCHEDULE.items()}
        return found | ({"prediction_type": self.prediction_type} if self.prediction_type else {})

    @contextmanager
    def opened(self, device: str = "cpu") -> Iterator[Opened]:
        """Within it the model is in memory, in float32. Raises ``UsageError`` if it does not load."""
        family = self.kind.load_frozen(self.place, self.prediction_type, device, setting=self.setting)
        try:
            denoiser = (
                family.load_denoiser(self.place, family.denoiser_name)
                if self.adapter is None
                else family.load_adapted(self.place, self.adapter)
            )
        except Exception as error:
            raise UsageError(f"`{self.setting}` {self.place}: its weights do not load: {one_line(error)}") from error
        with family.text_adapted(self.adapter) if self.adapter else nullcontext():
            yield Opened(family, denoiser.to(device).eval())


def check_base(model: Target, base: Target) -> None:
    """Raise ``UsageError`` if predictions of these two on the same noise cannot be compared, or are the same."""
    advice = "give the pipeline that the model was trained from"
    if model.adapter is None and Path(model.place).resolve() == Path(base.place).resolve():
        raise UsageError(f"`base` {base.place}: is the model itself; {advice}")
    if model.kind is not base.kind:
        raise UsageError(f"`base` {base.place}: is {base.kind.name}, and the model is {model.kind.name}; {advice}")
    ours, theirs = model.schedule, base.schedule
    for name in ours.keys() & theirs.keys():
        if ours[name] != theirs[name]:
            raise UsageError(
                f"`base` {base.place}: has {name} {theirs[name]}, and the model {ours[name]}, so that their "
                f"predictions cannot be compared; {advice}"
            )


def middles(draws: int, num_levels: int) -> list[int]:
    """The middle of each of ``draws`` equal parts of the noise levels: as each draw has the same level for all images,
    their losses differ by the images, not by the levels.
    """
    return [int((draw + 0.5) / draws * num_levels) for draw in range(draws)]


def _loss(model: Opened, fixed: FixedLosses, name: str) -> torch.Tensor:
    return fixed.of_draws(partial(fixed.objective.losses, model.denoiser), desc=name).mean(dim=0)


def _untold_loss(model: Opened, fixed: FixedLosses, name: str) -> torch.Tensor:
    """The loss where the model is told the empty caption."""
    nothing = model.family.unconditional()
    return fixed.of_draws(lambda drawn: fixed.objective.losses(model.denoiser, drawn.told(nothing)), desc=name).mean(
        dim=0
    )


def _seen(model: Opened, fixed: FixedLosses, drawn: Any, level: float, noise: torch.Tensor | None = None):
    """The noise that the model sees at a level in [0, 1)."""
    objective = fixed.objective
    levels = torch.full((len(drawn),), int(level * objective.num_levels))
    return objective.noise_in(model.denoiser, objective.at_levels(drawn, levels), noise)


def _sima(model: Opened, fixed: FixedLosses, name: str) -> torch.Tensor:
    def size(drawn):
        return _seen(model, fixed, drawn, SIMA_LEVEL).abs().pow(NORM).flatten(1).sum(dim=1)

    return fixed.of_draws(size, 1, name)[0]


def _pia(model: Opened, fixed: FixedLosses, name: str) -> torch.Tensor:
    def distance(drawn):
        start = _seen(model, fixed, drawn, 0)
        return (start - _seen(model, fixed, drawn, PIA_LEVEL, start)).abs().pow(NORM).flatten(1).sum(dim=1)

    return fixed.of_draws(distance, 1, name)[0]


QUESTIONS: dict[str, Callable[[Opened, FixedLosses, str], torch.Tensor]] = {
    "loss": _loss,
    "loss_without_caption": _untold_loss,
    "sima": _sima,
    "pia": _pia,
}


def ask(model: Opened, fixed: FixedLosses, questions: Iterable[str], who: str = "Model") -> Answers:
    """The answers of a model to some of ``QUESTIONS`` about the images of ``fixed``. ``who``: in progress bars."""
    return {name: QUESTIONS[name](model, fixed, f"{who}: {name}").double().numpy() for name in questions}


@dataclass(frozen=True)
class Attack:
    """A membership attack.

    Args:
        rule: what it does, in words; source: whose it is.
        asks: of the model, names of ``QUESTIONS``.
        score: (N,) of the model's answers and the base's.
        calls: of the denoiser for an image, for a number of noise draws.
        base, captions, noise: whether it needs the base, a model with captions, or one that predicts noise.
    """

    rule: str
    source: str
    asks: tuple[str, ...]
    score: Callable[[Answers, Answers], np.ndarray]
    calls: Callable[[int], int]
    base: bool = False
    captions: bool = False
    noise: bool = False

    def missing(self, family: Family) -> str | None:
        """Why it is not defined for a model, or None."""
        if self.captions and not family.text_encoders:
            return f"needs a model that is told captions, and {family.name} is not"
        if self.noise and not family.objective.predicts_noise:
            return f"asks for the noise that a model sees in an image, which this one ({family.name}) does not predict"
        return None


ATTACKS = {
    "loss": Attack(
        "the loss is low",
        "Matsumoto et al. 2023",
        ("loss",),
        lambda model, base: -model["loss"],
        lambda draws: draws,
    ),
    "calibrated": Attack(
        "the loss is lower than the base model's on the same noise",
        "Watson et al. 2022, with the base as the reference",
        ("loss",),
        lambda model, base: base["loss"] - model["loss"],
        lambda draws: 2 * draws,
        base=True,
    ),
    "ratio": Attack(
        "the base model's loss on the same noise is many times the model's",
        "as calibrated, by the ratio of the losses",
        ("loss",),
        lambda model, base: base["loss"] / model["loss"],
        lambda draws: 2 * draws,
        base=True,
    ),
    "sima": Attack(
        f"the model sees little noise in the image itself, at {SIMA_LEVEL:.0%} of the noise levels",
        "Rao et al. 2025",
        ("sima",),
        lambda model, base: -model["sima"],
        lambda draws: 1,
        noise=True,
    ),
    "pia": Attack(
        "the noise that the model sees in the image itself is also what it sees once that noise is added, at "
        f"{PIA_LEVEL:.0%} of the noise levels",
        "Kong et al. 2024",
        ("pia",),
        lambda model, base: -model["pia"],
        lambda draws: 2,
        noise=True,
    ),
    "clid": Attack(
        "the caption lowers the loss much",
        "Zhai et al. 2024, eq. 13",
        ("loss", "loss_without_caption"),
        lambda model, base: model["loss_without_caption"] - model["loss"],
        lambda draws: 2 * draws,
        captions=True,
    ),
}
