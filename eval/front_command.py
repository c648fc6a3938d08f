"""``python -m eval front``: measure, draw and read the front of any runs."""

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import yaml

from ietagc_diffusers.data import image_transform
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.files import read_json, write_text

from .front import compare, crossing, measure, replicates, saved_models, weights_hash, write_csv
from .generate import Settings, generate, model_hash, trained_resolution
from .image_sets import BadImage, content_hash, load_images, to_tensor
from .plots import plot_front, plot_sampled, png
from .prompts import caption_prompts, choose
from .score import SCORES, score

SAMPLED = {"sim_score": "Sim Score", "copy_rate": "copy rate", "memorized_quantity_0.4": "MQ 0.4"}


def captioned(images, resolution, max_images, seed=0, flag="--train"):
    """Images that have a caption, as the training transform with a centre crop shows them: uint8 (N, 3, R, R), and
    their captions. What does not decode is left out.
    """
    transform = image_transform(resolution, True, False, "bilinear").transforms[:2]  # resize, crop
    captions = images.captions()
    pixels, texts = [], []
    for index, text in choose(captions, min(max_images, len(captions)), seed) if captions else []:
        try:
            image = images.image(index)
            for step in transform:
                image = step(image)
            pixels.append(to_tensor(image))
            texts.append(text)
        except BadImage:
            continue
    if len(pixels) < 2:
        raise UsageError(
            f"{flag} {images.source}: the front needs at least two images with captions (a metadata.jsonl with text)"
        )
    return torch.stack(pixels), texts


def run_config(run_dir):
    """What the run was trained with, as it recorded it."""
    path = Path(run_dir) / "ietagc" / "config.yaml"
    if not path.is_file():
        raise UsageError(
            f"--run {run_dir}: has no ietagc/config.yaml: not a finished run of train_text_to_image_ietagc.py"
        )
    return yaml.safe_load(path.read_text())


def run(args, device, make_tools, cache, named):
    runs = {name or Path(folders).name: folders.split(",") for name, folders in named}
    for folders in runs.values():
        for folder in folders:
            if not saved_models(folder):
                raise UsageError(f"--run {folder}: holds no checkpoints and no rounds; train with --save_rounds")
    control = args.control or next(iter(runs))
    if control not in runs:
        raise UsageError(f"--control {control}: is none of the runs {', '.join(runs)}")
    first = next(iter(runs.values()))[0]
    config = run_config(first)
    base = args.base or config["pretrained_model_name_or_path"]
    source = args.train or config.get("train_data_dir") or config.get("dataset_name")
    if source is None:
        raise UsageError("--train: the run does not say what it was trained on; give the training images")
    training = load_images(source, "train", *_columns(args, {} if args.train else config))
    heldout = load_images(args.heldout, "heldout", *_columns(args, {}))
    reference = load_images(args.reference, "reference") if args.reference else None
    resolution = args.resolution or config.get("resolution", 512)
    settings = _settings(args, first, device) if args.sample else None
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    measured = measure(
        base,
        runs,
        captioned(training, resolution, args.max_images),
        captioned(heldout, resolution, args.max_images, flag="--heldout"),
        memory=output / "losses.jsonl",
        points=args.points,
        draws=args.draws,
        seed=args.seed,
        device=device,
        batch_size=args.batch_size,
        prediction_type=config.get("prediction_type"),
    )
    points = [point for point, _ in measured]
    if args.sample:
        prompts = choose(caption_prompts(training, "train"), args.sample, args.seed)
        points = _sampled(measured, settings, prompts, base, training, reference, output, make_tools(), cache, device)
    write_csv(points, output / "front.csv")
    _picture(points, control, output / "front.png")
    text = reading(points, control)
    write_text(output / "front.md", text)
    print(f"{text}\n{output}/front.png, front.csv, front.md")


def _settings(args, run_dir, device):
    return Settings(
        seed=args.seed,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        scheduler=args.scheduler,
        batch_size=args.batch_size,
        resolution=args.resolution or trained_resolution(run_dir),
        dtype="float16" if str(device).startswith("cuda") else "float32",
    )


def _columns(args, config):
    """Columns of the images and of their captions: those that were asked for, else those that a run recorded."""
    return (
        args.image_column or config.get("image_column", "image"),
        args.caption_column or config.get("caption_column", "text"),
    )


def _hash(value):
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=4).hexdigest()


def _contents(images):
    """A name and a hash of the file of each image that can be read."""
    contents = []
    for index, name in enumerate(images.names):
        with suppress(BadImage):
            contents.append([name, content_hash(images.encoded(index)).hex()])
    return contents


def _sampled(measured, settings, prompts, base, training, reference, output, tools, cache, device):
    """The points, each with scores of images that its model drew; finished ones are kept."""
    conditions = [asdict(settings), asdict(tools.protocol), tools.descriptor.identity, model_hash(base)]
    conditions += [[asdict(prompt) for prompt in prompts], _contents(training), reference and _contents(reference)]
    points = []
    for point, unet in measured:
        name = "base" if unet is None else f"{point.run}-{point.replicate}-{point.step}".replace("/", "_")
        # What was drawn or scored under other conditions, or by a run since trained anew, lies elsewhere.
        key = _hash([*conditions, "" if unet is None else weights_hash(unet)])
        folder = output / "samples" / f"{name}-{key}"
        if not (folder / SCORES).exists():
            generate(base, prompts, folder / "images", settings, device, denoiser=unet, desc=f"Drawing with {name}")
            score(load_images(folder / "images", "output"), training, folder, tools, cache, reference)
        scores = read_json(folder / SCORES)
        inception = scores["fid"] is not None
        sampled = {
            "sim_score": scores["sim_score"],
            "copy_rate": scores["copy_rate"],
            "memorized_quantity_0.4": (scores["memorized_quantity"] or {}).get("0.4"),
            "frechet": scores["fid"] if inception else scores["frechet_distance"],
            "kernel": ((scores["kid"] if inception else scores["kernel_distance"]) or [None])[0],
        }
        points.append(replace(point, sampled=sampled))
    return points


def _picture(points, control, path):
    panels = list(SAMPLED.items()) if points[0].sampled else []
    figure, axes = plt.subplots(1, 1 + len(panels), figsize=(7.5 + 4.5 * len(panels), 4.6), squeeze=False)
    plot_front(axes[0, 0], points, control)
    for panel, (key, label) in zip(axes[0, 1:], panels, strict=True):
        plot_sampled(panel, points, key, label, control)
    figure.tight_layout()
    png(figure, path)


def reading(points, control):
    """What the front says of each run against the control, in Markdown."""
    lines = [f"Differences to `{control}`; below zero is better.", ""]
    lines += ["| run | held-out loss at equal gap | gap at equal held-out loss |", "|---|---|---|"]
    for comparison in compare(points, control):
        cells = [_range(comparison.at_gap, "gap"), _range(comparison.at_loss, "loss")]
        lines.append(f"| {comparison.run} | {cells[0]} | {cells[1]} |")
    if points[0].sampled:
        titles = " | ".join(f"{label} at equal Fréchet distance" for label in SAMPLED.values())
        lines += ["", f"| run | {titles} |", "|---|" + "---|" * len(SAMPLED)]
        names = dict.fromkeys(p.run for p in points if p.run != control)
        lines += [f"| {name} | {' | '.join(_sampled_range(points, name, control))} |" for name in names]
    return "\n".join(lines) + "\n"


def _range(differences, what):
    """Mean and range of {where: difference}."""
    if not differences:
        return f"they share no {what}"
    values = list(differences.values())
    below = sum(value < 0 for value in values)
    return (
        f"{sum(values) / len(values):+.4f} ({min(values):+.4f} to {max(values):+.4f}), "
        f"below at {below} of {len(values)} from {min(differences):.4f} to {max(differences):.4f}"
    )


def _sampled_range(points, name, control):
    """The last model of each seed against the control's course where that is first at the same Frechet distance."""
    cells = []
    for key in SAMPLED:
        ours = [seed[-1] for seed in replicates([p for p in points if p.run == name])]
        theirs = replicates([p for p in points if p.run == control])
        differences = [
            last.sampled[key] - value
            for last in ours
            for seed in theirs
            if (
                value := crossing(
                    seed, lambda p: p.sampled["frechet"], lambda p, key=key: p.sampled[key], last.sampled["frechet"]
                )
            )
            is not None
        ]
        cells.append(f"{sum(differences) / len(differences):+.4f}" if differences else "never equal")
    return cells
