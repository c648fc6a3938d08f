"""Adapters (LoRA) for a pipeline: found, hashed, and put on as diffusers does."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ietagc_diffusers.errors import UsageError, one_line
from ietagc_diffusers.run_folder import ADAPTER_FILE, RunFolder

ENDING = ".safetensors"


class Adapter(NamedTuple):
    """A file of adapters, and how strongly they act: 1 is as trained. ``given``: as the user wrote it."""

    given: str
    file: Path
    scale: float


def find_adapter(given: str) -> Adapter:
    """The adapter that ``PLACE`` or ``PLACE:SCALE`` means. A place is a file, a folder or a Hub id. Of a folder it is
    ``pytorch_lora_weights.safetensors``, or the only safetensors file. Raises ``UsageError``.
    """
    place, scale = _split(given)
    if not math.isfinite(scale):
        raise UsageError(f"`lora` {given}: the scale must be a finite number")
    path = Path(place)
    if path.is_file():
        if path.suffix != ENDING:
            raise UsageError(f"`lora` {given}: must be a {ENDING} file; others can run code when they are loaded")
        return Adapter(given, path, scale)
    if path.is_dir():
        name = _choose([file.name for file in path.glob(f"*{ENDING}")])
        if name is None:
            raise UsageError(f"`lora` {given}: the folder holds no {ADAPTER_FILE}, and not just one {ENDING} file")
        return Adapter(given, path / name, scale)
    return Adapter(given, _download(given, place), scale)


def _split(given):
    place, colon, scale = given.rpartition(":")
    if not colon or Path(given).exists():
        return given, 1.0
    try:
        return place, float(scale)
    except ValueError:
        if Path(place).exists():
            raise UsageError(f"`lora` {given}: the scale {scale} is not a number") from None
        return given, 1.0


def _choose(names):
    return ADAPTER_FILE if ADAPTER_FILE in names else names[0] if len(names) == 1 else None


def _download(given, place):
    from huggingface_hub import hf_hub_download, list_repo_files

    try:
        try:
            return Path(hf_hub_download(place, ADAPTER_FILE))
        except Exception:  # it may have another name, if the Hub can be asked for it
            name = _choose([name for name in list_repo_files(place) if name.endswith(ENDING)])
            if name is None:
                raise UsageError(
                    f"`lora` {given}: has no {ADAPTER_FILE}, and not just one {ENDING} file; download one and give that"
                ) from None
            return Path(hf_hub_download(place, name))
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"`lora` {given}: neither a file or folder nor a Hub id: {' '.join(str(error).split())[:300]}"
        ) from error


def base_of_run(folder: str | Path) -> str | None:
    """The base model of a run that left only an adapter; None for any other folder."""
    run = RunFolder(folder)
    return str(run.config()["pretrained_model_name_or_path"]) if run.is_adapter and run.config_file.is_file() else None


def put_on(pipeline: Any, adapters: Sequence[Adapter]) -> None:
    """Load adapters into a pipeline; kohya's files too, which diffusers converts. Raises ``UsageError``."""
    if not adapters:
        return
    if not hasattr(pipeline, "load_lora_weights"):
        raise UsageError(f"`lora` {adapters[0].given}: a {type(pipeline).__name__} takes no adapters")
    names = [f"adapter_{number}" for number in range(len(adapters))]
    quiet = logging.getLogger("diffusers.loaders")
    for name, adapter in zip(names, adapters, strict=True):
        level = quiet.level
        # It warns of each part of the pipeline that an adapter has nothing for, and prints errors that it raises.
        quiet.setLevel(logging.CRITICAL)
        try:
            pipeline.load_lora_weights(adapter.file.parent, weight_name=adapter.file.name, adapter_name=name)
        except Exception as error:
            reason = one_line(error)
            if "mismatch" in reason:  # pages of layers
                reason = "its layers have other sizes than the model's: made for another kind of model"
            raise UsageError(f"`lora` {adapter.given}: does not fit the model: {reason}") from error
        finally:
            quiet.setLevel(level)
        if not any(name in loaded for loaded in pipeline.get_list_adapters().values()):
            raise UsageError(f"`lora` {adapter.given}: fits no layer of the model: made for another kind of model")
    pipeline.set_adapters(names, [adapter.scale for adapter in adapters])
