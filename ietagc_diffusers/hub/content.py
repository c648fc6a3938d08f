"""What of a run's folder is uploaded: an allow-list. Whatever else lies in the folder stays, however it is called."""

import json
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from ..errors import UsageError
from ..files import read_json, without_places
from ..run_folder import ADAPTER_FILE, RunFolder

Content = Path | bytes
CARD = "README.md"
PART = re.compile(r"[A-Za-z]\w*")  # the name of a pipeline's part, which is also its folder's
# The files of a part, as diffusers and transformers name them.
CONFIGURATIONS = ("config.json", "*_config.json")
OF_A_PART = (
    *CONFIGURATIONS,
    "diffusion_pytorch_model*.safetensors",
    "model*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
)
OF_THIS_MACHINE = ("output_dir", "cache_dir", "logging_dir")  # settings that say nothing to others


def contents(run: RunFolder) -> dict[str, Content]:
    """What is uploaded of a finished run, but for its card: {path in the repository: file, or bytes}.

    That is the pipeline or the adapter, the settings, the record of the training set without its rows, and the rounds.
    Configurations and settings go without the places of this machine. Links are never followed.

    Raises ``UsageError`` if the folder holds no trained model, or records that cannot be read.
    """
    config = run.config()
    if not run.is_finished:
        raise UsageError(f"{run.path}: has neither a model_index.json nor a {ADAPTER_FILE}: no trained model is there")
    found: dict[str, Content] = {}
    for path in _candidates(run):
        if _is_own(run.path, path):
            found[path.relative_to(run.path).as_posix()] = _shown(path)
    settings = {key: value for key, value in config.items() if key not in OF_THIS_MACHINE}
    text = yaml.safe_dump(without_places(settings), sort_keys=False, allow_unicode=True)
    return found | {run.config_file.relative_to(run.path).as_posix(): text.encode()}


def _candidates(run: RunFolder) -> Iterator[Path]:
    index = run.path / "model_index.json"
    if index.is_file():
        yield index
        for part in run.parts():
            if PART.fullmatch(part.relative_to(run.path).as_posix()) and part != run.records:
                yield from (path for path in sorted(part.iterdir()) if _is_named(path, OF_A_PART))
    yield from (run.path / ADAPTER_FILE, run.card_grid_file, run.training_set_file, run.rounds_file)


def _is_named(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in patterns)


def _is_own(folder: Path, path: Path) -> bool:
    """Whether a file is of this folder: neither it nor a folder on the way is a link."""
    way = [path, *path.parents[: len(path.relative_to(folder).parts) - 1]]
    return path.is_file() and not any(place.is_symlink() for place in way)


def _shown(path: Path) -> Content:
    """The file, or its content without places of this machine where it is a configuration that has one."""
    if not _is_named(path, ("model_index.json", *CONFIGURATIONS)):
        return path
    value: Any = read_json(path)
    shown = without_places(value)
    return path if shown == value else (json.dumps(shown, indent=2) + "\n").encode()
