"""A mitigation at inference: its options, and where in a pipeline's call it acts."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..errors import UsageError

if TYPE_CHECKING:
    from .call import Call, Step


def option(default: Any, help: str, parse: Callable[[Any], Any]) -> Any:
    """A dataclass field. ``parse`` converts a given value, or raises ``ValueError`` that says what it must be."""
    return field(default=default, metadata={"help": help, "parse": parse})


def real(value: Any) -> float:
    """A finite float."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("must be a number")
    return number


def non_negative(value: Any) -> float:
    """A finite float, at least 0."""
    if not real(value) >= 0:
        raise ValueError("must be at least 0")
    return real(value)


def whole(value: Any) -> int:
    """An int, at least 0."""
    if not (real(value) >= 0 and real(value).is_integer()):
        raise ValueError("must be a whole number, at least 0")
    return int(real(value))


def switch(value: Any) -> bool:
    """A bool, also from "true" and "false"."""
    if str(value).lower() not in ("true", "false"):
        raise ValueError("must be true or false")
    return str(value).lower() == "true"


@dataclass
class Mitigation:
    """One mitigation and its options (the fields). Subclasses override the methods in which they act.

    Each call of a pipeline uses its own copy, with ``call`` and ``salt`` set, which may keep state. Raises
    ``UsageError`` naming an option that is out of range.
    """

    name: ClassVar[str]
    compares: ClassVar[bool] = False  # whether it needs an unconditional branch even where guidance is off
    rescales: ClassVar[bool] = False  # whether it acts on cross-attention, which not every denoiser has
    call: ClassVar["Call"]
    salt: ClassVar[str] = ""  # makes the mitigation's random draws differ from those of others in the chain

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            try:
                setattr(self, entry.name, entry.metadata["parse"](value))
            except ValueError as error:
                raise UsageError(f"mitigation {self.name}: `{entry.name}` {value}: {error}") from error

    @property
    def acts(self) -> bool:
        """False if the options leave every image as it is; the mitigation is then not called."""
        return True

    def attach(self, denoiser: torch.nn.Module) -> Iterable[Any]:
        """Put hooks on parts of the denoiser for the duration of a call. Returns their handles."""
        return ()

    def before_step(self, step: "Step") -> None:
        """Called before ``step`` is computed; may change its embeddings in place."""

    def after_step(self, step: "Step", prediction: torch.Tensor) -> None:
        """Called with the denoiser's output: 2B rows under guidance (the unconditional B first), otherwise B rows."""

    def guidance_scale(self, scale: Any) -> Any:
        """The guidance scale of the current step: a float, or a tensor (B, 1, 1, 1)."""
        return scale


class PromptMitigation(Mitigation):
    """A mitigation that rewrites prompts; negative prompts stay as they are."""

    def rewrite(self, prompt: str, tokenizer: Any, rng: Random) -> str:
        """The prompt of one image, rewritten with random draws from ``rng``."""
        raise NotImplementedError
