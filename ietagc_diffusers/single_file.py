"""Checkpoints in a single file, as people download them: each is converted once into the folder of a pipeline."""

import functools
import hashlib
import inspect
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES, SingleFileComponentError, fetch_diffusers_config
from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError, safe_open

from .errors import UsageError, one_line
from .files import cache_folder, write_json

SUFFIX = ".safetensors"
PICKLES = {".ckpt", ".pt", ".pth", ".bin"}
ORIGIN_FILE = "single_file.json"  # in the folder: the file that it was converted from
IS_PICKLE = f"is a pickle, which can run code when it is loaded; give the checkpoint as a {SUFFIX} file"
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
# Diffusers takes a file that it does not know for Stable Diffusion 1, of which this is the first layer.
FIRST_LAYER = CHECKPOINT_KEY_NAMES["inpainting"]
FALLBACK = fetch_diffusers_config({})["pretrained_model_name_or_path"]


def folder_of(
    model: str | Path, config: str | None = None, cache_dir: str | Path | None = None, setting: str = "model"
) -> str:
    """The folder of the pipeline that a file is converted into; a model that is no file as it is.

    The folder lies in a cache, under the hash of what the file holds, and is there whole or not at all; of several
    processes one converts, and the others wait. Weights keep their precision.

    Args:
        model: a .safetensors file with a whole checkpoint; or a folder or a Hub id.
        config: a folder or a Hub id of a pipeline of the same kind, for the configuration, the tokenizers, and parts
            that the file lacks as a whole. None: the Hub id that Diffusers has for the kind, for the first two.
        cache_dir: None: ``cache_folder()``.
        setting: names the model in messages.

    Raises:
        UsageError: a file that is no such checkpoint, or a configuration that cannot be read or does not fit.
    """
    file, named = Path(model), f"`{setting}` {model}"
    if not file.is_file():
        if config is not None:
            raise UsageError(f"`model_config` {config}: is for a model in a single file, not for {model}; leave it out")
        return str(model)
    if file.suffix in PICKLES:
        raise UsageError(f"{named}: {IS_PICKLE}")
    repository = config or _repository(file)
    if repository is None or not _is_readable(file):
        raise UsageError(
            f"{named}: holds no whole checkpoint of a kind that Diffusers knows; give a pipeline's folder, or a file "
            "with all its parts"
        )
    key = hashlib.sha256((_content(file) + _identity(repository)).encode()).hexdigest()[:16]
    folder = Path(cache_dir or cache_folder()) / "single_files" / f"{file.stem}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder.with_name(folder.name + ".lock")):
        if not folder.is_dir():
            _convert(file, named, repository, folder, lends=config is not None)
    return str(folder)


def is_checkpoint(file: Path) -> bool:
    """Whether a file holds a whole checkpoint of a kind that Diffusers knows."""
    return file.suffix == SUFFIX and _repository(file) is not None


def _repository(file: Path) -> str | None:
    """The Hub id of the pipeline whose configuration Diffusers has for the kind of a file; None if it is of none."""
    try:
        shapes = _header(file)
        found = fetch_diffusers_config(shapes)["pretrained_model_name_or_path"]
    except (OSError, SafetensorError, ValueError, KeyError, NotImplementedError, UnboundLocalError):
        return None  # Diffusers' list of kinds fails in several ways for tensors that it does not expect
    return None if found == FALLBACK and FIRST_LAYER not in shapes else found


def _header(file: Path) -> Mapping[str, torch.Tensor]:
    """The tensors of a file without their values."""
    with safe_open(file, "pt") as tensors:
        names = tensors.keys()
        return {name: torch.empty(tensors.get_slice(name).get_shape(), device="meta") for name in names}


def _is_readable(file: Path) -> bool:
    try:
        return bool(_header(file))
    except (OSError, SafetensorError):
        return False


def _dtype(file: Path) -> torch.dtype:
    """The precision of a file's weights; float32 if they have several."""
    with safe_open(file, "pt") as tensors:
        weights = [name for name in tensors.keys() if name.endswith((".weight", ".bias"))]  # noqa: SIM118 (no dict)
        found = {tensors.get_slice(name).get_dtype() for name in weights}
    return DTYPES.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32


def _content(file: Path) -> str:
    about = file.stat()
    return _hash(file, about.st_size, about.st_mtime_ns)


@functools.lru_cache
def _hash(file: Path, size: int, changed: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _identity(repository: str) -> str:
    """What stands for a configuration: a Hub id as it is; the names and contents of a folder's files."""
    folder = Path(repository)
    if not folder.is_dir():
        return repository
    files = sorted([*folder.glob("*.json"), *(path for path in folder.glob("*/*") if path.is_file())])
    return "".join(f"{path.relative_to(folder)} {_content(path)}\n" for path in files)


def _convert(file: Path, named: str, repository: str, folder: Path, lends: bool) -> None:
    """``lends``: whether parts that the file lacks are taken from ``repository``."""
    kind = _pipeline_class(named, repository)
    takes = inspect.signature(kind.__init__).parameters
    # Checkers black images out, which would hide copies; and they are not in such files.
    checker = {"safety_checker": None, "requires_safety_checker": False}
    options = {name: value for name, value in checker.items() if name in takes}
    pipeline = _read(kind, file, named, repository, lends, options)
    for name, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module) and any(tensor.is_meta for tensor in module.state_dict().values()):
            raise UsageError(f"{named}: {_partial(f'its {name}', repository)}")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)  # of a conversion that was killed
    pipeline.save_pretrained(part)
    write_json(part / ORIGIN_FILE, {"file": str(file.resolve()), "sha256": _content(file), "config": repository})
    part.rename(folder)


def _read(kind: Any, file: Path, named: str, repository: str, lends: bool, parts: Mapping[str, Any]) -> Any:
    """The pipeline; ``parts`` are given instead of read."""
    dtype = _dtype(file)
    try:
        return kind.from_single_file(str(file), config=repository, torch_dtype=dtype, **parts)
    except SingleFileComponentError as error:
        found = re.search(r"(\w+) = \w+\.from_pretrained", str(error.message))
        part = found[1] if found else "other parts"
    except NotImplementedError as error:  # of torch: weights that were not in the file have no values to convert
        raise UsageError(f"{named}: {_partial('a part', repository)}") from error
    except Exception as error:
        raise UsageError(
            f"{named}: does not convert with the configuration of {repository}: {one_line(error)}"
        ) from error
    if not lends:
        raise UsageError(
            f"{named}: lacks its {part}; give `model_config`, a whole pipeline of the same kind, from which parts that "
            "the file lacks are taken"
        )
    lent = _lent(kind, part, named, repository, dtype)
    return _read(kind, file, named, repository, part not in parts, {**parts, part: lent})


def _lent(kind: Any, part: str, named: str, repository: str, dtype: torch.dtype) -> Any:
    """A part of another pipeline."""
    index = kind.load_config(repository)
    others = {name: None for name, value in index.items() if isinstance(value, (list, tuple)) and name != part}
    try:
        return getattr(kind.from_pretrained(repository, torch_dtype=dtype, **others), part)
    except Exception as error:
        raise UsageError(
            f"{named}: lacks its {part}, and {repository} has no weights for it: {one_line(error)}"
        ) from error


def _pipeline_class(named: str, repository: str) -> Any:
    """The class of the pipeline that a configuration is of."""
    try:
        name = DiffusionPipeline.load_config(repository)["_class_name"]
    except Exception as error:
        if Path(repository).is_dir():
            raise UsageError(f"`model_config` {repository}: is no pipeline's folder: {one_line(error)}") from error
        raise UsageError(
            f"{named}: needs the configuration of {repository}, which cannot be downloaded now ({one_line(error)}); "
            "try again with a connection, or give `model_config`, the folder of a pipeline of the same kind"
        ) from error
    kind = getattr(diffusers, name, None)
    if not hasattr(kind, "from_single_file"):
        raise UsageError(f"{named}: is of a {name}, which Diffusers does not read from a single file; give a folder")
    return kind


def _partial(part: str, repository: str) -> str:
    return f"lacks some weights of {part}: it is not whole, or not of the kind of {repository}; give another file"
