"""How many training images an attacker draws from a fine-tuned model whose base is public: FineXtract (Wu et al., ICML
2025), beside as many plain draws from the model and from its base.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from ietagc_diffusers import __version__
from ietagc_diffusers.files import write_json, write_text

from .base_guidance import BaseGuidance
from .clusters import Cluster, clusters_of
from .extract_sheet import Shown, sheet
from .features import Embedded, Extractor, embed
from .fine_tune import FineTune
from .generate import Settings, generate, model_hash, trained_resolution
from .image_sets import ImageSet, load_images, unusable
from .metrics.intervals import bootstrap_interval, wilson_interval
from .plots import png
from .prompts import Prompt
from .record import TrainingSet
from .tools import Tools
from .views import Whole

RESULT, TABLE, SHEET, CLUSTERS = "extract.json", "extract.md", "sheet.png", "clusters.csv"
GUIDED, PLAIN, BASE = "guided", "plain", "base"
DRAWS = {
    GUIDED: "the model, guided away from its base",
    PLAIN: "the model, as anyone draws from it",
    BASE: "the base, which has not seen the images",
}
PLAIN_GUIDANCE = 3.0  # the authors'
SHARED = ("seed", "num_inference_steps", "resolution", "scheduler", "dtype")  # settings of all three ways
SHEET_ROWS, NONE_ROWS = 16, 4  # training images on the sheet, at most, and if none was extracted
IMAGES_AT_ONCE = 4096


@dataclass(frozen=True)
class Drawn:
    """One way to draw, and what it gave away.

    Args:
        images: with their features; clusters: of them.
        similarity: of each training image to each drawn one, (N, M).
    """

    images: Embedded
    clusters: list[Cluster]
    similarity: torch.Tensor

    @property
    def representatives(self) -> list[int]:
        return [cluster.representative for cluster in self.clusters]

    @property
    def best(self) -> np.ndarray:
        """The highest similarity of a representative to each training image, float64 (N,)."""
        return self.similarity[:, self.representatives].amax(dim=1).double().numpy()

    @property
    def best_of_all(self) -> np.ndarray:
        """The same of any drawn image."""
        return self.similarity.amax(dim=1).double().numpy()

    def nearest(self, training_image: int) -> int:
        """The representative that is most similar to a training image: its place among the drawn images."""
        own = self.representatives
        return own[int(self.similarity[training_image, own].argmax())]


def extract(
    tune: FineTune,
    training: TrainingSet,
    prompts: Sequence[Prompt],
    output: str | Path,
    settings: Settings,
    tools: Tools | None,
    guidance: BaseGuidance,
    plain_guidance: float = PLAIN_GUIDANCE,
    num_clusters: int | None = None,
    cache: str | Path | None = None,
    device: str = "cpu",
    state: PartialState | None = None,
) -> dict[str, Any] | None:
    """Draw an image for each prompt in the three ways of ``DRAWS``, make clusters of each, compare their
    representatives with the training images, and write extract.json, extract.md, sheet.png, clusters.csv and the images
    into the folder ``output``. Images that are already there are kept.

    Args:
        settings: how images are drawn in all three ways, but for the guidance.
        tools: for comparing; None on processes that only draw.
        guidance: of ``FineTune.guidance``.
        plain_guidance: guidance scale of the other two ways.
        num_clusters: None: as many as there are different training images, as in the authors' code.
        cache: folder of cached features.
        state: of the processes, if several draw.

    Returns:
        The content of extract.json; None on processes that only drew.

    Raises:
        UsageError: see ``generate``; or no training image can be read.
    """
    output = Path(output)
    settings = replace(settings, resolution=settings.resolution or trained_resolution(tune.model, tune.lora))
    if settings.scheduler is None and not tune.flow:
        settings = replace(settings, scheduler="ddim")
    plain = replace(settings, guidance_scale=plain_guidance, lora=tune.lora)
    ways = {
        GUIDED: (tune.model, replace(plain, guidance_scale=1.0, base_guidance=guidance)),
        PLAIN: (tune.model, plain),
        BASE: (tune.base, replace(plain, lora=())),
    }
    for name, (model, of_way) in ways.items():
        generate(model, prompts, output / name, of_way, device, state, desc=f"Drawing: {name}")
    if tools is None:
        return None
    described, found = _compare(training.images, output, tools, num_clusters, cache)
    shown = described.distinct()
    threshold = tools.protocol.copy_threshold(tools.descriptor)
    result: dict[str, Any] = {
        "version": __version__,
        "model": tune.model,
        "model_hash": model_hash(tune.model, lora=tune.lora),
        "lora": list(tune.lora),
        "base": tune.base,
        "train": training.images.source,
        "num_train": len(shown.kept),
        "num_images": len(prompts),
        "num_prompts": len({prompt.text for prompt in prompts}),
        "guidance": guidance.scale,
        "correction": guidance.correction,
        "plain_guidance": plain_guidance,
        "settings": {name: getattr(settings, name) for name in SHARED},
        "descriptor": tools.descriptor.identity,
        "protocol": tools.protocol_name,
        "views": tools.views and tools.views.record,
        "copy_similarity": threshold,
        "draws": {name: _measured(one, threshold) for name, one in found.items()},
        "added_by_guidance": _added(found[GUIDED], found[PLAIN], threshold),
    }
    result["notes"] = _notes(result, training, described)
    _write_clusters(output / CLUSTERS, found, shown, threshold)
    png(sheet(*_rows(found, shown, threshold)), output / SHEET)
    write_text(output / TABLE, table(result))
    write_json(output / RESULT, result)
    return result


def _compare(
    images: ImageSet, output: Path, tools: Tools, num_clusters: int | None, cache: str | Path | None
) -> tuple[Embedded, dict[str, Drawn]]:
    """The training images, and what each way of drawing gave away of the different ones."""
    whole: dict[str, Extractor] = {"views": Whole(tools.descriptor)}
    of_training = whole if tools.views is None else tools.views.of_training(tools.descriptor)
    described = embed(images.files(), of_training, cache, desc="Describing training images")
    training = described.distinct()
    found = {}
    for name in DRAWS:
        drawn = embed(load_images(output / name, "output"), tools.queries, cache, desc=f"Describing images: {name}")
        number = min(num_clusters or len(training.kept), len(drawn.kept))
        found[name] = Drawn(
            drawn, clusters_of(drawn.several["views"].last(), number), similarity_between(training, drawn)
        )
    return described, found


def similarity_between(training: Embedded, drawn: Embedded) -> torch.Tensor:
    """The similarity of each of N training images to each of M drawn ones, float32 (N, M): the highest of a view of the
    one and of the other, either way round.
    """
    shown = training.several["views"]
    best = torch.full((len(training.kept), len(drawn.kept)), -torch.inf)
    for way in drawn.both_ways():
        for rows in torch.arange(len(shown.owners)).split(IMAGES_AT_ONCE):
            similar = shown.vectors[rows] @ way.vectors.T
            of_drawn = torch.full((len(rows), len(drawn.kept)), -torch.inf)
            of_drawn.scatter_reduce_(1, way.owners.expand(len(rows), -1), similar, "amax")
            best.scatter_reduce_(0, shown.owners[rows, None].expand_as(of_drawn), of_drawn, "amax")
    return best


def _measured(one: Drawn, threshold: float) -> dict[str, Any]:
    """Numbers of a way of drawing, with 95% intervals over the training images."""
    hits = one.best > threshold
    copies = (one.similarity[:, one.representatives].amax(dim=0) > threshold).sum()
    return {
        "extracted": int(hits.sum()),
        "extracted_share": float(hits.mean()),
        "extracted_interval": wilson_interval(hits),
        "average_similarity": float(one.best.mean()),
        "average_similarity_interval": bootstrap_interval(one.best, np.mean),
        "num_clusters": len(one.clusters),
        "representatives_that_are_copies": int(copies),
        "in_any_image": int((one.best_of_all > threshold).sum()),
    }


def _added(guided: Drawn, plain: Drawn, threshold: float) -> dict[str, Any]:
    """What guided draws have more than plain ones, with 95% intervals over the training images."""
    similarity = guided.best - plain.best
    hits = (guided.best > threshold).astype(float) - (plain.best > threshold)
    return {
        "extracted": int(hits.sum()),
        "extracted_share_interval": bootstrap_interval(hits, np.mean),
        "average_similarity": float(similarity.mean()),
        "average_similarity_interval": bootstrap_interval(similarity, np.mean),
    }


def _notes(result: dict[str, Any], training: TrainingSet, described: Embedded) -> list[str]:
    """What to keep in mind when reading the numbers, in sentences."""
    notes = [*training.warnings, *(f"{note[0].upper()}{note[1:]}." for note in training.notes)]
    if repeated := len(described.kept) - result["num_train"]:
        notes.append(f"{repeated} training images are exact duplicates of others, and each image counts once.")
    if bad := unusable(described.skipped):
        notes.append(f"{len(bad)} training images were left out: {bad[0][0]} {bad[0][1]}.")
    if result["draws"][GUIDED]["num_clusters"] == result["num_images"]:
        notes.append(
            "There are no more drawn images than clusters, so that each image represents itself: the attacker is not "
            "told which images are likely copies. Draw more with `num_images`."
        )
    if result["descriptor"]["descriptor"] == "pixel":
        notes.append("The descriptor pixel detects only near-exact copies.")
    return notes


def table(result: dict[str, Any]) -> str:
    """The numbers in Markdown."""
    correction = f", correction {result['correction']:g}" if result["correction"] else ""
    lines = [
        f"{result['num_train']} training images; {result['num_images']} images of {result['num_prompts']} prompts "
        f"drawn in each way. A training image is extracted if the representative of a cluster has a similarity over "
        f"{result['copy_similarity']:g} to it ({result['descriptor']['descriptor']}).",
        "",
        "| drawn from | guidance | extracted (95%) | average similarity (95%) | clusters, copies | in any image |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in result["draws"].items():
        guidance = f"{result['plain_guidance']:g}" if name != GUIDED else f"{result['guidance']:g}{correction}"
        lines.append(
            f"| {DRAWS[name]} | {guidance} | {one['extracted']} ({_shares(one['extracted_interval'])}) | "
            f"{one['average_similarity']:.3f} ({_numbers(one['average_similarity_interval'])}) | "
            f"{one['num_clusters']}, {one['representatives_that_are_copies']} | {one['in_any_image']} |"
        )
    added = result["added_by_guidance"]
    lines += [
        "",
        f"Against plain draws from the model, the guidance changes the number of extracted images by "
        f"{added['extracted']:+d} and the average similarity by {added['average_similarity']:+.3f} "
        f"({_numbers(added['average_similarity_interval'])}).",
    ]
    lines += ["", *(f"- {note}" for note in result["notes"])]
    return "\n".join(lines).rstrip() + "\n"


def _shares(interval: list[float]) -> str:
    return " – ".join(f"{share:.1%}" for share in interval)


def _numbers(interval: list[float]) -> str:
    return " – ".join(f"{number:.3f}" for number in interval)


def _write_clusters(path: Path, found: dict[str, Drawn], training: Embedded, threshold: float) -> None:
    """A row for each cluster: its representative, and the training image that this is most similar to."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["draws", "cluster", "size", "least_similarity", "representative", "text", "nearest", "similarity", "copy",
             "members"]
        )  # fmt: skip
        for name, one in found.items():
            images = one.images.images
            for number, cluster in enumerate(one.clusters, 1):
                similarity, nearest = one.similarity[:, cluster.representative].max(dim=0)
                about = [name, number, len(cluster.members), f"{cluster.similarity:.4f}"]
                about += [images.names[cluster.representative], images.texts[cluster.representative]]
                about += [training.images.names[nearest], f"{similarity:.4f}", int(similarity > threshold)]
                writer.writerow([*about, " ".join(images.names[member] for member in cluster.members)])


def _rows(found: dict[str, Drawn], training: Embedded, threshold: float) -> tuple[str, list[Shown]]:
    """The training images that draws from the model come nearest to, each with the nearest representatives."""
    of_model = np.maximum(found[GUIDED].best, found[PLAIN].best)
    order = np.argsort(-of_model, kind="stable")
    rows = []
    for place in order[: min(int((of_model > threshold).sum()) or NONE_ROWS, SHEET_ROWS)]:
        shown: Shown = [("training", training.images.image(int(place)), None, False)]
        for name, one in found.items():
            similarity = float(one.best[place])
            picture = one.images.images.image(one.nearest(int(place)))
            shown.append((name, picture, similarity, similarity > threshold))
        rows.append(shown)
    counts = ", ".join(f"{name} {int((one.best > threshold).sum())}" for name, one in found.items())
    return f"Extracted of {len(order)} training images: {counts}", rows
