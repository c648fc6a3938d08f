"""The front of any runs: the losses of every model along them and, if wanted, scores of images that the models draw;
written as a table, a picture and Markdown.
"""

import csv
import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.families import Unconditional, family_of
from ietagc_diffusers.files import read_json, write_text
from ietagc_diffusers.run_folder import RunFolder
from ietagc_diffusers.single_file import folder_of

from .curves import FrontPoint, by_run, table
from .generate import Settings, generate, model_hash, trained_resolution
from .heldout import check_held_out_files
from .image_sets import BadImage, ImageSet, load_images
from .levels import shared_gap, write_levels
from .losses import Losses, Measured, SavedModel, measure, saved_models, shown, untrained, weights_hash
from .metrics import METRICS, measured_distances
from .pipelines import num_classes
from .plots import as_label, plot_front, plot_growth, plot_levels, plot_sampled, png
from .prompts import Prompt, caption_prompts, choose, without_prompts
from .score import SCORES, Tools, score
from .told import told_by

# Columns of front.csv: scores that runs are compared by, and the two distances.
COMPARED = {
    "sim_score": METRICS["sim_score"],
    "copy_rate": METRICS["copy_rate"],
    "memorized_quantity_0.4": METRICS["mq_0.4"],
    "training_preference": METRICS["training_preference"],
}
SAMPLED = (*COMPARED, "frechet", "kernel")
TITLES = {column: metric.title for column, metric in COMPARED.items()}


@dataclass(frozen=True)
class Front:
    """The points of all runs, the name of the run that the others are compared with, and what noise levels are."""

    points: list[FrontPoint]
    control: str
    level_name: str = "timestep"

    @property
    def markdown(self) -> str:
        """Each run against the control."""
        return table(self.points, self.control, TITLES)

    def write(self, output: Path) -> None:
        """Write front.csv, front.png and front.md into a folder, and front_levels.csv and front_levels.png if there is
        something by noise level; otherwise those of an earlier front are removed.
        """
        write_csv(self.points, output / "front.csv")
        png(self._picture(), output / "front.png")
        write_text(output / "front.md", self.markdown)
        table, picture = output / "front_levels.csv", output / "front_levels.png"
        if self.points[0].levels:
            write_levels(self.points, table)
            png(self._picture_of_levels(), picture)
        else:
            table.unlink(missing_ok=True)
            picture.unlink(missing_ok=True)

    def _picture(self) -> Figure:
        if not self.points[0].sampled:
            figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
            plot_front(axes, self.points, self.control)
            return figure
        figure = plt.figure(figsize=(16.5, 8.5), layout="constrained")
        halves: Any = figure.subfigures(1, 2, width_ratios=(7.5, 9))
        plot_front(halves[0].subplots(), self.points, self.control)
        for panel, (key, title) in zip(halves[1].subplots(2, 2).flat, TITLES.items(), strict=True):
            plot_sampled(panel, self.points, key, title, self.control)
        return figure

    def _picture_of_levels(self) -> Figure:
        """The gap by noise level, and below it as a share of the held-out loss: of the last models, of models with the
        same mean gap, and along the control.
        """
        shared = shared_gap(self.points)
        gaps = {"last models": None} | ({f"at an equal mean gap ({shared:.3g})": shared} if shared > 0 else {})
        size = (1.4 + 4.6 * (1 + len(gaps)), 8.2)
        figure, axes = plt.subplots(2, 1 + len(gaps), figsize=size, squeeze=False, layout="constrained")
        fields = {"gap": "gap (held-out minus training loss)", "relative_gap": "gap / held-out loss"}
        control = by_run(self.points)[self.control]
        for row, (field, label) in zip(axes, fields.items(), strict=True):
            for panel, (title, gap) in zip(row, gaps.items(), strict=False):
                plot_levels(panel, self.points, field, gap, self.control)
                panel.set_title(title, fontsize=10)
                panel.set_xlabel(self.level_name)
                panel.set_ylabel(label)
            figure.colorbar(plot_growth(row[-1], control, field), ax=row[-1], label=label)
            row[-1].set_title(f"along {as_label(self.control)}", fontsize=10)
            row[-1].set_ylabel(self.level_name)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=9)
        return figure


@dataclass(frozen=True)
class Sampling:
    """Images that each model on the front draws, and how they are scored.

    num_images: captions of training images that are drawn, or images without prompts; settings: a resolution of None
    is what the first run was trained at; reference: images for the Fréchet distance, None is the training images;
    cache: folder of features.
    """

    num_images: int
    settings: Settings
    tools: Tools
    reference: ImageSet | None = None
    cache: Path | None = None


def front(
    runs: dict[str, list[Path]],
    training: ImageSet,
    heldout: ImageSet,
    output: Path,
    *,
    base: str | None = None,
    control: str | None = None,
    resolution: int | None = None,
    max_images: int = 1000,
    points: int | None = None,
    draws: int = 3,
    seed: int = 0,
    batch_size: int = 8,
    levels: int = 10,
    device: str = "cpu",
    sampling: Sampling | None = None,
) -> Front:
    """Measure the front of runs and write it into the folder ``output``. What was measured or drawn is kept there, so
    that an interrupted call can be repeated.

    Args:
        runs: {name: run folders, one a seed}.
        training, heldout: images with captions, or with the classes that the runs' models are told of; held-out ones
            come from the same distribution.
        base: the pipeline that all runs started from; None is what the first run recorded. Runs from scratch have none,
            and each starts from the untrained model of its seed.
        control: the name of the plain run; None is the first.
        resolution: of the images; None is the first run's.
        max_images: of each set; draws: of noise an image; batch_size: images at once, which changes no draw.
        points: models of a run, evenly spread, the last among them; None is all.
        levels: equal parts of the range of noise levels in which losses and gap are also measured; 1 is the mean only.

    Raises:
        UsageError: a run without models, an unknown control, held-out files that are also training files, fewer than
            two images with captions, images without the class that models are told of, more levels than the models
            have, or a base that does not load.
    """
    control = next(iter(runs)) if control is None else control
    if control not in runs:
        raise UsageError(f"`control` {control}: is none of the runs {', '.join(runs)}")
    check_held_out_files(heldout, training)
    heldout = heldout.decoded_like(training)
    first = next(iter(runs.values()))[0]
    config = RunFolder(first).config()
    base = base or config.get("pretrained_model_name_or_path")
    edge = resolution or config.get("resolution", 512)
    output.mkdir(parents=True, exist_ok=True)
    starts = None
    if base is None:
        models = saved_models(runs, Unconditional.denoiser_name, points)
        starts = untrained(runs, models, output / "untrained")
        base = str(next(iter(starts.values())))
    else:
        base = folder_of(base, setting="base")
        models = saved_models(runs, family_of(base, setting="base").denoiser_name, points)
    unprompted = family_of(base, setting="base") is Unconditional
    if sampling is not None and not unprompted:
        settings = sampling.settings
        settings = replace(settings, resolution=settings.resolution or resolution or trained_resolution(first))
        sampling = replace(sampling, settings=settings)
    measured: Measured = []
    level_name = ""
    for alike in _told_alike(runs, models):
        run, number = alike[0].run, alike[0].replicate
        start = base if starts is None else starts[run, number]
        told = told_by(RunFolder(runs[run][number]).config(), start)
        losses = Losses(
            base,
            shown(training, edge, max_images, told=told),
            shown(heldout, edge, max_images, setting="heldout", told=told),
            memory=output / "losses.jsonl",
            prediction_type=config.get("prediction_type"),
            device=device,
            draws=draws,
            seed=seed,
            batch_size=batch_size,
            levels=levels,
        )
        found = measure(losses, alike, starts)
        level_name = losses.family.objective.level_name
        if sampling is not None:
            if unprompted:
                prompts = without_prompts(sampling.num_images, num_classes(start), seed)
            else:
                prompts = choose(caption_prompts(training, "train"), sampling.num_images, seed)
            found = _sampled(found, base, prompts, training, heldout, sampling, output, device)
        measured += found
    result = Front([point for point, _ in measured], control, level_name)
    result.write(output)
    return result


def _told_alike(runs: dict[str, list[Path]], models: list[SavedModel]) -> list[list[SavedModel]]:
    """The models in groups of runs that were told the same of each image: random labels are drawn by a run's seed."""
    groups: dict[Any, list[SavedModel]] = {}
    for model in models:
        config = RunFolder(runs[model.run][model.replicate]).config()
        kind = config.get("class_labels")
        key = kind, config.get("label_column"), config.get("seed") if kind == "random" else None
        groups.setdefault(key, []).append(model)
    return list(groups.values())


def _sampled(
    measured: Measured,
    base: str,
    prompts: list[Prompt],
    training: ImageSet,
    heldout: ImageSet,
    sampling: Sampling,
    output: Path,
    device: str,
) -> Measured:
    """``measured``, each point with scores of images that its model drew; finished ones are kept."""
    tools, reference = sampling.tools, sampling.reference
    conditions: list[Any] = [
        asdict(sampling.settings),
        asdict(tools.protocol),
        tools.descriptor.identity,
        model_hash(base),
        [asdict(prompt) for prompt in prompts],
        _contents(training),
        _contents(heldout),
        reference and _contents(reference),
    ]
    found = []
    for point, denoiser in measured:
        name = "base" if denoiser is None else f"{point.run}-{point.replicate}-{point.step}".replace("/", "_")
        # Images drawn or scored under other conditions, or by an earlier training of the run, are in other folders.
        values = [*conditions, "" if denoiser is None else weights_hash(denoiser)]
        key = hashlib.blake2b(json.dumps(values).encode(), digest_size=4).hexdigest()
        folder = output / "samples" / f"{name}-{key}"
        if not (folder / SCORES).exists():
            desc = f"Drawing with {name}"
            generate(base, prompts, folder / "images", sampling.settings, device, denoiser=denoiser, desc=desc)
            drawn = load_images(folder / "images", "output")
            score(drawn, training, folder, tools, sampling.cache, reference, heldout=heldout)
        found.append((replace(point, sampled=_of_scores(read_json(folder / SCORES))), denoiser))
    return found


def _of_scores(scores: dict) -> dict:
    """Those in ``SAMPLED``."""
    distances = zip(("frechet", "kernel"), measured_distances(scores), strict=True)
    return {column: metric.value(scores) for column, metric in COMPARED.items()} | dict(distances)


def _contents(images: ImageSet) -> list:
    """A name and a hash of each image that can be read, which stands for its pixels."""
    contents = []
    for index, name in enumerate(images.names):
        with suppress(BadImage):
            contents.append([name, images.key(images.encoded(index)).hex()])
    return contents


def write_csv(points: list[FrontPoint], path: Path) -> None:
    """One row a point: losses and gap, then what was sampled, if anything was."""
    with Path(path).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "replicate", "step", "train_loss", "heldout_loss", "gap", *SAMPLED])
        for p in points:
            sampled = [p.sampled.get(key, "") for key in SAMPLED]
            writer.writerow([p.run, p.replicate, p.step, p.train_loss, p.heldout_loss, p.gap, *sampled])
