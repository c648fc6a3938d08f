"""A mitigation at inference: its options, and where in a pipeline's call it acts."""

import math
from dataclasses import dataclass, field, fields
from typing import ClassVar

from ..errors import UsageError


def option(default, help, parse):
    """A dataclass field; ``parse`` makes its value from what was given, or raises ``ValueError`` saying what would
    do.
    """
    return field(default=default, metadata={"help": help, "parse": parse})


def real(value):
    """A finite float."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("must be a number")
    return number


def non_negative(value):
    if not real(value) >= 0:
        raise ValueError("must be at least 0")
    return real(value)


def whole(value):
    if not (real(value) >= 0 and real(value).is_integer()):
        raise ValueError("must be a whole number, at least 0")
    return int(real(value))


def switch(value):
    if str(value).lower() not in ("true", "false"):
        raise ValueError("must be true or false")
    return str(value).lower() == "true"


@dataclass
class Mitigation:
    """One mitigation and its options (the fields). Subclasses override the places where they act.

    A pipeline's call works on a copy of its own, ``call`` and ``salt`` set, which may keep state. Raises
    ``UsageError`` naming an option that is out of range.
    """

    name: ClassVar[str]
    compares: ClassVar[bool] = False  # whether it needs an unconditional branch where guidance is off, too
    call: ClassVar = None
    salt: ClassVar[str] = ""  # tells the mitigation's randomness from that of others in the chain

    def __post_init__(self):
        for entry in fields(self):
            value = getattr(self, entry.name)
            try:
                setattr(self, entry.name, entry.metadata["parse"](value))
            except ValueError as error:
                raise UsageError(f"mitigation {self.name}: {entry.name} {value}: {error}") from error

    @property
    def acts(self):
        """False where the options leave every image as it is; the mitigation is then not asked at all."""
        return True

    def attach(self, unet):
        """Put hooks of its own on the UNet's parts for the length of a call. Returns their handles."""
        return ()

    def before_unet(self, step):
        """``step``: the ``Step`` that is about to be computed; its embeddings may be changed in place."""

    def after_unet(self, step, prediction):
        """``prediction``: the UNet's output, of 2B rows under guidance (the unconditional B first), else of B."""

    def guidance_scale(self, scale):
        """The guidance scale of the current step: a float, or a tensor (B, 1, 1, 1)."""
        return scale


class PromptMitigation(Mitigation):
    """A mitigation that rewrites prompts; negative prompts stay as they are."""

    def rewrite(self, prompt, tokenizer, rng):
        """The prompt (str) of one image, rewritten with draws from ``rng`` (``random.Random``)."""
        raise NotImplementedError
