"""Where a pipeline is: a folder, a checkpoint in a single file, or a Hub id with the records of its training; and what
else people give for one.
"""

import functools
import logging
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from ietagc_diffusers.errors import UsageError, one_line
from ietagc_diffusers.families import Unconditional
from ietagc_diffusers.files import read_json
from ietagc_diffusers.run_folder import ADAPTER_FILE, RunFolder
from ietagc_diffusers.single_file import IS_PICKLE, PICKLES, folder_of, is_checkpoint

from .adapters import base_of_run

logger = logging.getLogger(__name__)
INDEX = "model_index.json"  # in every pipeline's folder
ADAPTERS = (ADAPTER_FILE, "pytorch_lora_weights.bin", "adapter_config.json")
ADVICE = "set `model` to its base model, and `lora` to this"


def pipeline_folder(model: str | Path, setting: str = "model") -> Path:
    """The folder of a pipeline: the given one, the base's if a run left only an adapter, the one that a checkpoint in a
    single file is converted into, or the one that a Hub id was downloaded to, with what the repository records of the
    training. ``setting`` names it in messages.

    Raises:
        UsageError: a file that is no checkpoint, or neither a folder nor a Hub id.
    """
    path, base = Path(model), base_of_run(model)
    if base is not None:
        try:
            return pipeline_folder(base)
        except UsageError as error:
            raise UsageError(
                f"`model` {model}: holds an adapter for {base}, which is not found; set `model` to that base, and "
                "`lora` to this folder"
            ) from error
    if path.is_dir():
        return path
    if path.is_file():
        check_pipeline(path)
        return Path(folder_of(path))
    try:
        folder = Path(DiffusionPipeline.download(str(model)))
    except Exception as error:
        raise UsageError(f"`{setting}` {model}: neither a folder nor a Hub id: {one_line(error)}") from error
    _fetch_records(str(model), folder)
    return folder


def converted(model: str | Path, config: str) -> str:
    """The folder that a checkpoint in a single file is converted into, with the configuration of ``config``, a folder
    or a Hub id of a pipeline of the same kind. Raises ``UsageError``.
    """
    path = Path(model)
    if path.is_file() and (path.name in ADAPTERS or _has_adapters(path)):
        raise UsageError(f"`model` {model}: {_of_file(path)}")
    return folder_of(path, config)


def check_pipeline(model: str | Path) -> None:
    """Raise ``UsageError``, saying what is there and what would do, for a folder or file that is not a pipeline."""
    path = Path(model)
    if path.is_file() and not is_checkpoint(path):
        raise UsageError(f"`model` {model}: {_of_file(path)}")
    if path.is_dir() and not (path / INDEX).is_file() and base_of_run(path) is None:
        raise UsageError(f"`model` {model}: {_of_folder(path)}")


def is_unprompted(model: str | Path) -> bool:
    """Whether a pipeline draws without prompts."""
    index = pipeline_folder(model) / INDEX
    kind = read_json(index).get("_class_name") if index.is_file() else None
    return kind in {pipeline.__name__ for pipeline in Unconditional.pipelines}


def num_classes(model: str | Path) -> int | None:
    """How many classes the UNet of an unconditional pipeline is told of; None if of none."""
    config = pipeline_folder(model) / Unconditional.denoiser_name / "config.json"
    return read_json(config).get("num_class_embeds") if config.is_file() else None


@functools.cache  # a download that cannot be made is said once
def _fetch_records(repository: str, folder: Path) -> None:
    """Download what a repository records of the training, of the revision that ``folder`` is a snapshot of. What it
    does not have is left out.
    """
    run = RunFolder(folder)
    for path in (run.config_file, run.training_set_file):
        name, revision, cache = path.relative_to(folder).as_posix(), folder.name, folder.parents[2]
        known = try_to_load_from_cache(repository, name, cache, revision)
        if known is _CACHED_NO_EXIST or isinstance(known, str):
            continue
        try:
            hf_hub_download(repository, name, revision=revision, cache_dir=cache)
        except LocalEntryNotFoundError:  # no connection
            logger.warning(
                f"{repository}: whether it has a {name}, which would say how the model was trained, cannot be looked "
                "up now: the training images and their resolution are taken for unknown"
            )
            return
        except EntryNotFoundError:
            continue
        except Exception as error:
            logger.warning(f"{repository}: {name} cannot be downloaded: {one_line(error)}")


def _of_file(path: Path) -> str:
    """What a file that was given for a pipeline is, and what would do."""
    if path.name in ADAPTERS or _has_adapters(path):
        return f"is a LoRA, not a pipeline; {ADVICE}"
    if path.name == INDEX:
        return f"is a file of a pipeline; give its folder, {path.parent}"
    if path.suffix in PICKLES:
        return IS_PICKLE
    return (
        "is a file, but no whole checkpoint of a kind that Diffusers knows; give such a .safetensors file, or a "
        "pipeline's folder. A file with only a UNet's weights goes into the unet folder of a copy of the base model"
    )


def _has_adapters(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return any("lora" in name.lower() for name in file.keys())  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError):
        return False


def _of_folder(path: Path) -> str:
    """What a folder without an index of a pipeline is, and what would do."""
    if any((path / name).is_file() for name in ADAPTERS):
        return f"holds a LoRA, not a pipeline; {ADVICE}"
    if (path / "ietagc" / "checkpoint.json").is_file() or path.name.startswith("checkpoint-"):
        return (
            "is a checkpoint of a training, not a pipeline; put its unet folder into a copy of the base model and give "
            "that, or train with `save_rounds`, which writes each round as a pipeline"
        )
    config = path / "config.json"
    kind = read_json(config).get("_class_name") if config.is_file() else None
    if kind:
        return (
            f"holds only a {kind}, not a pipeline; put it into a copy of the base model, in the folder of that part, "
            "and give the copy"
        )
    run = RunFolder(path)
    if run.records.is_dir():
        advice = "; it is a run that is not finished: continue it with `resume_from_checkpoint` latest"
        return f"has no {INDEX}{advice if run.checkpoints() else ''}"
    files = sorted(path.glob("*.safetensors"))
    if files:
        if is_checkpoint(files[0]):
            return f"has no {INDEX}, but a checkpoint in a single file; give that file, {files[0]}"
        return f"has no {INDEX}, only files such as {files[0].name}: the first {_of_file(files[0])}"
    return f"has no {INDEX}: not the folder of a pipeline"
