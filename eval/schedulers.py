"""Schedulers for drawing, by name and with options, in place of a pipeline's own."""

import inspect
from typing import Any

import diffusers
import yaml

from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.method.recipes import check_keys

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "pndm": "PNDMScheduler",
}


def parse_scheduler(text: str) -> tuple[Any, dict[str, Any]]:
    """The class and the options that a text such as ``ddim`` or ``ddim:steps_offset=1,set_alpha_to_one=false`` names.

    Raises:
        UsageError: an unknown name, or an option that is not the class's.
    """
    where = f"`scheduler` {text}"
    name, _, listed = text.partition(":")
    if name not in SCHEDULERS:
        raise UsageError(f"{where}: must be one of {', '.join(SCHEDULERS)}, perhaps with options: {name}:option=value")
    kind, options = getattr(diffusers, SCHEDULERS[name]), {}
    for pair in filter(None, listed.split(",")):
        option, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not value:
            raise UsageError(f"{where}: '{option}' has no value: write {option}=value")
        options[option] = yaml.safe_load(value)
    check_keys(options, [*inspect.signature(kind).parameters], where)
    return kind, options


def describe(text: str) -> str:
    """A scheduler for people: its class, and its options in brackets."""
    name, _, options = text.partition(":")
    return SCHEDULERS[name] + (f" ({options.replace(',', ', ')})" if options else "")
