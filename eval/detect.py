"""Find memorized prompts by the text-conditional noise of Wen et al. (2024) at the first denoising steps.

This needs neither the training set nor a finished image.
"""

import csv
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from ietagc_diffusers import __version__
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.files import read_json, read_json_lines, write_json, write_text
from ietagc_diffusers.mitigations import text_conditional_noise

from .generate import Settings, load_pipeline, model_hash, trained_resolution
from .plots import COLOURS, png
from .roc import by_label, roc_auc, threshold_at

RESULT, SCORES, PICTURE = "detect.json", "detect.csv", "detect.png"
SETTINGS, MAGNITUDES = ".settings.json", ".magnitudes.jsonl"  # of an interrupted run, to continue it


@dataclass(frozen=True)
class Detection:
    """How prompts are scored.

    Args:
        steps: denoising steps to average over; each costs one call of the denoiser for each generation.
        generations: of each prompt, each with other noise, to average over; the authors take 4.
        num_inference_steps: of a whole generation, which sets the timesteps.
        seed: prompt i, generation g has the noise of seed ``seed + i * generations + g``.
        resolution: height and width of the images in pixels; None is what the model was trained at, see
            ``trained_resolution``, or else the pipeline's own.
        lora: adapters for the model, see ``adapters.find_adapter``.
    """

    steps: int = 1
    generations: int = 4
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    seed: int = 0
    resolution: int | None = None
    lora: tuple[str, ...] = ()


def detect(
    model: Any,
    prompts: Sequence[str],
    output: str | Path,
    settings: Detection,
    labels: Sequence[bool] | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    batch_size: int = 16,
) -> dict[str, Any]:
    """Score prompts. Writes detect.csv (a row for each prompt), detect.json and detect.png into ``output``.

    An interrupted run continues after its last finished batch if the model is named by a folder or a Hub id. A pipeline
    is measured from the beginning: nothing in it tells it from another one.

    Args:
        model: folder or Hub id, or a pipeline.
        prompts: N prompts.
        labels: whether each is memorized, N bool; None if that is not known.

    Returns:
        The content of detect.json; with labels ``auc``, ``tpr_at_1_percent_fpr`` and ``threshold`` are not None.

    Raises:
        UsageError: labels of one kind only; ``output`` holds results of other settings.
    """
    if labels is not None and len(set(labels)) < 2:
        raise UsageError(
            "`labels`: detection is judged on memorized prompts and on others: give prompts of both kinds, or no labels"
        )
    by_name = isinstance(model, (str, Path))
    if by_name:
        settings = replace(settings, resolution=settings.resolution or trained_resolution(model, settings.lora))
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    if not by_name:
        for name in (SETTINGS, MAGNITUDES):
            (output / name).unlink(missing_ok=True)
    magnitudes = _magnitudes(model, prompts, output, settings, device, dtype, batch_size)
    scores = magnitudes.mean(axis=1)
    result = {
        "version": __version__,
        "num_prompts": len(prompts),
        **asdict(settings),
        "mean": float(scores.mean()),
        "auc": None,
        "tpr_at_1_percent_fpr": None,
        "threshold": None,
    }
    if labels is not None:
        threshold, rate = threshold_at(scores, labels)
        result |= {"auc": roc_auc(scores, labels), "tpr_at_1_percent_fpr": rate, "threshold": threshold}
    with (output / SCORES).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "magnitude", "memorized"])
        for row, prompt in enumerate(prompts):
            writer.writerow([prompt, f"{scores[row]:.6g}", "" if labels is None else int(labels[row])])
    write_json(output / RESULT, result)
    png(_histogram(scores, labels, result), output / PICTURE)
    return result


def _magnitudes(
    model: Any,
    prompts: Sequence[str],
    output: Path,
    settings: Detection,
    device: str,
    dtype: str,
    batch_size: int,
) -> np.ndarray:
    """(N, generations); those that an interrupted run left are not computed again."""
    drawing = Settings(dtype=dtype, resolution=settings.resolution, lora=settings.lora)
    _check_settings(model, prompts, output, settings, dtype, batch_size)
    kept = output / MAGNITUDES
    rows = read_json_lines(kept)
    if len(rows) < len(prompts):
        rows = rows[: len(rows) // batch_size * batch_size]  # whole batches, so that the arithmetic is the same
    write_text(kept, "".join(json.dumps(row) + "\n" for row in rows))
    if len(rows) < len(prompts):
        pipeline = load_pipeline(model, drawing, device) if isinstance(model, (str, Path)) else model
        with tqdm(total=len(prompts), initial=len(rows), desc="Scoring prompts") as bar:
            for start in range(len(rows), len(prompts), batch_size):
                batch = _of_batch(pipeline, prompts[start : start + batch_size], start, settings, batch_size)
                with kept.open("a") as file:
                    file.write("".join(json.dumps(row) + "\n" for row in batch))
                rows += batch
                bar.update(len(batch))
    return np.array(rows)


def _of_batch(
    pipeline: Any, prompts: Sequence[str], start: int, settings: Detection, batch_size: int
) -> list[list[float]]:
    """Magnitudes of a batch of prompts, of which the first is prompt ``start``: for each a list of generations."""
    repeated = [prompt for prompt in prompts for _ in range(settings.generations)]
    first = settings.seed + start * settings.generations
    noise = text_conditional_noise(
        pipeline,
        repeated,
        list(range(first, first + len(repeated))),
        settings.num_inference_steps,
        settings.steps,
        settings.guidance_scale,
        batch_size,
        settings.resolution,
    )
    return noise.magnitude.view(len(prompts), settings.generations).tolist()


def _check_settings(
    model: Any, prompts: Sequence[str], output: Path, settings: Detection, dtype: str, batch_size: int
) -> None:
    """Record in ``output`` how prompts are scored, or compare with the record that is there."""
    wanted = asdict(settings) | {"dtype": dtype, "batch_size": batch_size, "num_prompts": len(prompts)}
    del wanted["lora"]  # a place; the model's hash says what is there
    wanted["prompts"] = hashlib.blake2b(json.dumps(prompts).encode(), digest_size=8).hexdigest()
    if isinstance(model, (str, Path)):
        wanted["model_hash"] = model_hash(model, lora=settings.lora)
    path = output / SETTINGS
    if not path.exists():
        write_json(path, wanted | {"version": __version__})
        return
    found = read_json(path)
    for key, value in wanted.items():
        if found.get(key) != value:
            raise UsageError(f"{output}: begun with `{key}` {found.get(key)!r}, not {value!r}; give another `output`")


def _histogram(scores: np.ndarray, labels: Sequence[bool] | None, result: dict[str, Any]) -> Figure:
    figure, axes = plt.subplots(figsize=(6.4, 4))
    bins = np.linspace(scores.min(), scores.max() + 1e-6, 40)
    style: dict[str, Any] = {"bins": bins, "histtype": "step", "linewidth": 1.8}
    if labels is None:
        axes.hist(scores, color=COLOURS[1], **style)
    else:
        memorized, others = by_label(scores, labels)
        axes.hist(memorized, color=COLOURS[0], label=f"memorized ({len(memorized)})", **style)
        axes.hist(others, color=COLOURS[1], label=f"others ({len(others)})", **style)
        axes.axvline(result["threshold"], color="#888888", linestyle="--", label="1% of the others lie above")
        axes.set_title(f"AUC {result['auc']:.3f}, TPR at 1% FPR {result['tpr_at_1_percent_fpr']:.3f}", fontsize=10)
        axes.legend()
    axes.set_xlabel("text-conditional noise")
    axes.set_ylabel("prompts")
    return figure
