"""Which prompts give training images back: the text-conditional noise of Wen et al. (2024) at the first steps, a number
a prompt that needs neither the training set nor a finished image.
"""

import csv
import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tqdm.auto import tqdm

from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.files import read_json, read_json_lines, write_json, write_text
from ietagc_diffusers.mitigations import text_conditional_noise

from .generate import Settings, load_pipeline, model_hash, trained_resolution
from .plots import COLOURS, png

FALSE_POSITIVES = 0.01
RESULT, SCORES, SETTINGS, KEPT = "detect.json", "detect.csv", ".settings.json", ".magnitudes.jsonl"


@dataclass(frozen=True)
class Detection:
    """How prompts are scored.

    Args:
        steps: of denoising whose magnitudes are averaged; 1 costs one UNet call a generation.
        generations: of each prompt, with other noise, that are averaged; the authors take 4.
        resolution: of the images; None is what the model was trained at, as it records, else its own.
    """

    steps: int = 1
    generations: int = 4
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    seed: int = 0
    resolution: int | None = None


def roc_auc(scores, labels):
    """Probability that a memorized prompt (label True) scores higher than another; ties count half. (N,) each."""
    scores, labels = np.asarray(scores, dtype=float), np.asarray(labels, dtype=bool)
    positive, negative = scores[labels], scores[~labels]
    # Mann and Whitney: places of the positives among all, the mean place where several tie.
    ordered = np.sort(scores)
    places = (np.searchsorted(ordered, positive, "left") + np.searchsorted(ordered, positive, "right") + 1) / 2
    return float((places.sum() - len(positive) * (len(positive) + 1) / 2) / (len(positive) * len(negative)))


def threshold_at(scores, labels, false_positives=FALSE_POSITIVES):
    """The lowest threshold which at most this share of the other prompts exceed, and the share of memorized ones that
    exceed it: (threshold, TPR@FPR).
    """
    scores, labels = np.asarray(scores, dtype=float), np.asarray(labels, dtype=bool)
    negative = np.sort(scores[~labels])[::-1]
    threshold = negative[int(false_positives * len(negative))]  # so many lie over it, or fewer
    return float(threshold), float((scores[labels] > threshold).mean())


def detect(model, prompts, output, settings, labels=None, device="cpu", dtype="float32", batch_size=16):
    """Score prompts. Writes detect.csv (a row a prompt), detect.json and detect.png into ``output``; finished batches
    are kept, except those of a pipeline, which says nothing that would tell it from another.

    Args:
        model: folder or Hub id, or a pipeline; prompts: N str; labels: N bool, whether each is memorized, or None.

    Returns:
        What detect.json holds: with labels ``auc``, ``tpr_at_1_percent_fpr``, ``threshold``.
    """
    if labels is not None and len(set(labels)) < 2:
        raise UsageError("labels: detection is judged on memorized prompts and on others: give both, or no labels")
    by_name = isinstance(model, (str, Path))
    if by_name:
        settings = replace(settings, resolution=settings.resolution or trained_resolution(model))
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    if not by_name:
        for name in (SETTINGS, KEPT):
            (output / name).unlink(missing_ok=True)
    magnitudes = _magnitudes(model, prompts, output, settings, device, dtype, batch_size)
    scores = magnitudes.mean(axis=1)
    result = {
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
    png(_histogram(scores, labels, result), output / "detect.png")
    return result


def _magnitudes(model, prompts, output, settings, device, dtype, batch_size):
    """(N, generations), from what is kept of an earlier run as far as it goes."""
    drawing = Settings(dtype=dtype, resolution=settings.resolution)
    _check_settings(model, prompts, output, settings, dtype, batch_size)
    kept = output / KEPT
    rows = read_json_lines(kept)
    rows = rows[: len(rows) // batch_size * batch_size] if len(rows) < len(prompts) else rows  # whole batches
    write_text(kept, "".join(json.dumps(row) + "\n" for row in rows))
    if len(rows) < len(prompts):
        pipeline = load_pipeline(model, drawing, device) if isinstance(model, (str, Path)) else model
        with tqdm(total=len(prompts), initial=len(rows), desc="Scoring prompts") as bar:
            for start in range(len(rows), len(prompts), batch_size):
                made = _of_batch(pipeline, prompts[start : start + batch_size], start, settings, batch_size)
                with kept.open("a") as file:
                    file.write("".join(json.dumps(row) + "\n" for row in made))
                rows += made
                bar.update(len(made))
    return np.array(rows)


def _of_batch(pipeline, prompts, start, settings, batch_size):
    """Magnitudes of a batch of prompts, a list of generations each. Prompt i, generation g has the noise of seed
    ``seed + i * generations + g``.
    """
    repeated = [prompt for prompt in prompts for _ in range(settings.generations)]
    first = settings.seed + start * settings.generations
    made = text_conditional_noise(
        pipeline,
        repeated,
        list(range(first, first + len(repeated))),
        settings.num_inference_steps,
        settings.steps,
        settings.guidance_scale,
        batch_size,
        settings.resolution,
    )
    return made.magnitude.view(len(prompts), settings.generations).tolist()


def _check_settings(model, prompts, output, settings, dtype, batch_size):
    wanted = asdict(settings) | {"dtype": dtype, "batch_size": batch_size, "num_prompts": len(prompts)}
    wanted["prompts"] = hashlib.blake2b(json.dumps(prompts).encode(), digest_size=8).hexdigest()
    if isinstance(model, (str, Path)):
        wanted["model_hash"] = model_hash(model)
    path = output / SETTINGS
    if not path.exists():
        write_json(path, wanted)
        return
    found = read_json(path)
    for key, value in wanted.items():
        if found.get(key) != value:
            raise UsageError(f"{output}: begun with {key} {found.get(key)!r}, not {value!r}; give another --output")


def _histogram(scores, labels, result):
    figure, axes = plt.subplots(figsize=(6.4, 4))
    bins = np.linspace(scores.min(), scores.max() + 1e-6, 40)
    style = {"bins": bins, "histtype": "step", "linewidth": 1.8}
    if labels is None:
        axes.hist(scores, color=COLOURS[1], **style)
    else:
        labels = np.asarray(labels, dtype=bool)
        axes.hist(scores[labels], color=COLOURS[0], label=f"memorized ({labels.sum()})", **style)
        axes.hist(scores[~labels], color=COLOURS[1], label=f"others ({(~labels).sum()})", **style)
        axes.axvline(result["threshold"], color="#888888", linestyle="--", label="1% of the others lie above")
        axes.set_title(f"AUC {result['auc']:.3f}, TPR at 1% FPR {result['tpr_at_1_percent_fpr']:.3f}", fontsize=10)
        axes.legend()
    axes.set_xlabel("text-conditional noise")
    axes.set_ylabel("prompts")
    return figure
