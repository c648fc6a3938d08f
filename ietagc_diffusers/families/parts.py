"""The parts of a pipeline: text encoders with their tokenizers, how parts are loaded, and what stands for them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn

from ..errors import UsageError, one_line
from .base import TOKEN_IDS, Tensors

FLOW = "FlowMatch"  # begins the names of the schedulers of flow matching


class Reader(NamedTuple):
    """A text encoder of a pipeline and its tokenizer: the names of their folders end with ``suffix``.

    ``length``: of the token sequences; None is the tokenizer's. ``optional``: whether a pipeline may lack it.
    """

    suffix: str
    tokenizer: type
    encoder: type
    optional: bool = False

    @property
    def ids(self) -> str:
        """The name of its token ids among a batch's inputs."""
        return f"{TOKEN_IDS}{self.suffix}"

    @property
    def encoder_name(self) -> str:
        return f"text_encoder{self.suffix}"

    @property
    def tokenizer_name(self) -> str:
        return f"tokenizer{self.suffix}"


@dataclass(frozen=True)
class Tokenize:
    """Texts to token ids (B, L) by name, each padded or cut to its length L.

    ``tokenizers``: (tokenizer, L) by the name of the ids.
    """

    tokenizers: Mapping[str, tuple[Any, int]]

    def __call__(self, texts: list[str]) -> Tensors:
        return {
            name: tokenizer(
                texts, max_length=length, padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids
            for name, (tokenizer, length) in self.tokenizers.items()
        }


def part_of(
    kind: Any, base: str, subfolder: str | None, setting: str = "pretrained_model_name_or_path", **options: Any
) -> Any:
    """A part of a pipeline, from its subfolder. Raises ``UsageError`` naming ``setting`` if it is not there, cannot be
    read, or lacks weights, which would stay random.
    """
    where = {} if subfolder is None else {"subfolder": subfolder}
    name = f"`{setting}` {base}"
    place = "" if subfolder is None else f" in its subfolder '{subfolder}'"
    if Path(base).is_dir() and not any(Path(base, subfolder or ".").glob("*")):  # transformers makes up a tokenizer
        raise UsageError(f"{name}: no {kind.__name__}{place}: the folder is empty or not there")
    try:
        if not issubclass(kind, nn.Module):
            return kind.from_pretrained(base, **where, **options)
        part, found = kind.from_pretrained(base, **where, **options, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = one_line(error)
        hint = ""
        if options.get("variant") is None and any(Path(base, subfolder or ".").glob("*.fp16.*")):
            hint = "; it has weights of the variant fp16 only: set `variant` to fp16"
        raise UsageError(f"{name}: no {kind.__name__}{place}{hint}: {reason}") from error
    if found["missing_keys"]:
        first, *others = sorted(found["missing_keys"])
        more = f" and {len(others)} more" if others else ""
        raise UsageError(f"{name}: no {kind.__name__}{place}: its weights lack {first}{more}; is it of another model?")
    return part


def scheduler_of(kind: Any, base: str, setting: str = "pretrained_model_name_or_path", **options: Any) -> Any:
    """A pipeline's scheduler as another class. Raises ``UsageError`` as ``part_of``, and where one of the two classes
    is of flow matching and the other not: diffusers would fill the settings up with defaults.
    """
    scheduler = part_of(kind, base, "scheduler", setting=setting, **options)
    named = kind.load_config(base, subfolder="scheduler", **options).get("_class_name", kind.__name__)
    if (FLOW in named) != (FLOW in kind.__name__):
        wanted = "is trained by flow matching" if FLOW in kind.__name__ else "is not trained by flow matching"
        raise UsageError(f"`{setting}` {base}: its scheduler is a {named}, and a model of its kind {wanted} here")
    return scheduler


def cast(module: Any, dtype: torch.dtype) -> None:
    """Cast a frozen module, except that in float16 layers stay in float32 that would overflow: those that transformers
    loads so, such as the last of each of T5's blocks.
    """
    if module.dtype != dtype:  # diffusers warns of a cast even where there is none
        module.to(dtype=dtype)
    overflowing = (getattr(module, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else ()
    for name, layer in module.named_modules():
        if name.rpartition(".")[2] in overflowing:
            layer.float()


def mark_of(module: Any) -> str:
    """A hash of a module's configuration and weights, wherever they came from."""
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    about = {k: v for k, v in config.items() if not k.startswith("_") and k != "transformers_version"}
    digest = hashlib.blake2b(json.dumps(about, sort_keys=True, default=str).encode(), digest_size=8)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def mark_of_tokenizer(tokenizer: Any) -> str:
    """A hash of a tokenizer's files."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path.read_bytes() for path in Path(folder).iterdir())
    return hashlib.blake2b(b"".join(files), digest_size=8).hexdigest()
