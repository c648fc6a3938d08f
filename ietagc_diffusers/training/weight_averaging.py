"""Averaging over time: the mean of models that one run left along its way (stochastic weight averaging, Izmailov et
al. 2018). Of adapters it is the mean of their updates, not of their factors.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from .. import tensor_files
from ..errors import UsageError
from ..families import WEIGHTS_FILE, family_of
from ..files import write_json
from ..method.factors import Factors, total, truncate
from ..run_folder import ADAPTER_FILE, RunFolder
from ..tensor_files import TensorFile

SIDES = {".lora_A.": ".lora_B.", ".lora.down.": ".lora.up."}  # names of an adapter's factors: down, up


def window(last: str, number: int) -> int:
    """How many of the first ``number`` models are averaged: the last so many, or ("50%") the last share of them.

    Raises ``UsageError`` for what is neither.
    """
    try:
        share = last.endswith("%")
        amount = float(last[:-1]) / 100 if share else int(last)
        if amount > 0 and (amount <= 1 or not share):
            return max(1, math.ceil(number * amount)) if share else min(int(amount), number)
    except ValueError:
        pass
    raise UsageError(f"`last` {last}: must be a number of models, such as 5, or a share of them, such as 50%")


def average_weights(folders: Sequence[Path], output: Path) -> None:
    """Write the mean of denoisers, folders that diffusers loads, as another: summed in float64, tensor by tensor.

    Raises ``UsageError`` where they have different tensors.
    """
    files = [_weights(folder) for folder in folders]

    def means() -> Iterator[tuple[str, torch.Tensor]]:
        for name, like in files[-1].items():
            yield name, (sum(file[name].double() for file in files) / len(files)).to(like.dtype)

    output.mkdir(parents=True, exist_ok=True)
    shutil.copy2(folders[-1] / "config.json", output / "config.json")
    tensor_files.write(output / WEIGHTS_FILE, files[-1], means(), metadata={"format": "pt"})


def _weights(folder):
    if not (folder / WEIGHTS_FILE).is_file():
        raise UsageError(f"`run` {folder}: has no {WEIGHTS_FILE}")
    return TensorFile(folder / WEIGHTS_FILE)


def average_adapters(folders: Sequence[Path], output: Path) -> float:
    """Write the adapter of the same rank that is nearest to the mean of adapters' updates. Returns the share of the
    mean's energy that the rank leaves out.

    Raises ``UsageError`` for adapters whose mean is no adapter (DoRA).
    """
    files = [TensorFile(folder / ADAPTER_FILE) for folder in folders]
    pairs = _pairs(files[-1], folders[-1])
    made: dict[str, torch.Tensor] = {}
    energy = lost = 0.0
    for down, up in pairs.items():
        parts = [Factors(file[up].flatten(1) / len(files), file[down].flatten(1)) for file in files]
        rank = files[-1][down].shape[0]
        nearest = truncate(total(parts), rank)
        energy, lost = energy + nearest.energy, lost + nearest.discarded
        for name, factor in zip((up, down), nearest.factors, strict=True):
            like = files[-1][name]
            made[name] = factor.to(like.dtype).reshape(like.shape).contiguous()
    output.mkdir(parents=True, exist_ok=True)
    with safe_open(folders[-1] / ADAPTER_FILE, framework="pt") as file:
        about = file.metadata()
    tensor_files.write(output / ADAPTER_FILE, made, metadata=about)
    return lost / energy if energy else 0.0


def _pairs(file: Mapping[str, torch.Tensor], folder: Path) -> dict[str, str]:
    """{name of ``down``: name of ``up``} of an adapter."""
    pairs = {name: name.replace(down, up) for down, up in SIDES.items() for name in file if down in name}
    others = set(file) - pairs.keys() - set(pairs.values())
    if others:
        raise UsageError(
            f"`run` {folder}: {min(others)} is no factor of a LoRA: the mean of other adapters (DoRA) is none"
        )
    return pairs


def average_run(run: Path, output: Path, last: str) -> list[int]:
    """Write the mean of the last models that a run left behind, as the pipeline or adapter that its own result is, with
    the records by which it is audited.

    Args:
        run: the folder of a finished run that has ``rounds`` (``save_rounds``) or several checkpoints.
        last: see ``window``.

    Returns:
        The steps of the averaged models.

    Raises:
        UsageError: nothing to average, or an output that is not empty.
    """
    folder, averaged = RunFolder(run), RunFolder(output)
    if not folder.is_finished:
        raise UsageError(f"`run` {run}: holds no trained model; give the folder of a finished run")
    if output.exists() and any(output.iterdir()):
        raise UsageError(f"`output` {output}: is not empty; give another folder")
    if folder.is_adapter:
        kind = family_of(str(folder.config()["pretrained_model_name_or_path"]), setting="run")
    else:
        kind = family_of(str(run), setting="run")
    found = folder.saved_models(kind.denoiser_name)
    if len(found) < 2:
        raise UsageError(f"`run` {run}: left fewer than two models along its way; train with `save_rounds`")
    chosen = found[len(found) - window(last, len(found)) :]
    models = [model for _, model in chosen]
    if folder.is_adapter:
        average_adapters(models, output)
    else:
        parts = json.loads((run / "model_index.json").read_text(encoding="utf-8"))
        output.mkdir(parents=True, exist_ok=True)
        for part in parts:
            if (run / part).is_dir() and part != kind.denoiser_name:
                shutil.copytree(run / part, output / part)
        average_weights(models, output / kind.denoiser_name)
        shutil.copy2(run / "model_index.json", output / "model_index.json")
    averaged.records.mkdir(parents=True, exist_ok=True)
    for file in (folder.config_file, folder.training_set_file, folder.training_rows_file):
        if file.is_file():
            shutil.copy2(file, averaged.records / file.name)
    steps = [step for step, _ in chosen]
    write_json(averaged.records / "averaged.json", {"steps": steps})
    return steps
