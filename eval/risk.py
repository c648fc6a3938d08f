"""Which training images a model memorizes, and why: joined from what its run, an attack and an audit left behind."""

import csv
import html
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ietagc_diffusers.data.near_duplicates import nearest_others
from ietagc_diffusers.data.sources import SAMPLE_ID
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.files import read_json, write_text
from ietagc_diffusers.run_folder import RunFolder
from ietagc_diffusers.sscd import Descriptor

from .attack import IMAGES, RESULT
from .dedup import Duplicates, near_duplicates
from .generate import model_hash
from .image_sets import ImageSet
from .record import TrainingSet
from .report import as_html, picture_of
from .roc import FALSE_POSITIVES, threshold_at
from .score import load_scores

TABLE, PAGE = "risk.csv", "risk.html"
TEMPLATE = Path(__file__).with_suffix(".html")
OFTEN = 2  # times the median share of skips, from which an image counts as skipped often


@dataclass
class Risk:
    """What is known of one training image. None: not known.

    Attributes:
        name, text, sample_id: of the image, the text being its caption.
        visits, skips: of the training.
        model_loss, base_loss: on the same noise; given_away: whether their ratio is over that of all but 1% of the
            held-out images.
        copies: drawn images that are copies of it; most_similar: the highest similarity of a drawn image to it.
        group: the number of its cluster of near duplicates; size: of the cluster; twin: the similarity to the nearest
            other image; like_others: whether that is a near duplicate.
        reasons: why it is memorized, or may be, in words.
    """

    name: str
    text: str | None
    sample_id: int
    visits: int | None = None
    skips: int | None = None
    model_loss: float | None = None
    base_loss: float | None = None
    given_away: bool | None = None
    copies: int | None = None
    most_similar: float | None = None
    group: int | None = None
    size: int | None = None
    twin: float | None = None
    like_others: bool = False
    reasons: list[str] = field(default_factory=list)

    @property
    def skip_share(self) -> float | None:
        return self.skips / self.visits if self.visits and self.skips is not None else None

    @property
    def ratio(self) -> float | None:
        """How many times the model's loss the base's is."""
        return self.base_loss / self.model_loss if self.model_loss and self.base_loss is not None else None

    @property
    def memorized(self) -> bool:
        """Whether the model itself shows it: by a copy, or by its loss."""
        return bool(self.copies or self.given_away)

    @property
    def order(self) -> tuple:
        """The most memorized first: copies, then losses that give an image away, then the number of reasons."""
        return -(self.copies or 0), not self.given_away, -len(self.reasons), -(self.ratio or 0), -(self.skip_share or 0)


def risk(
    run: str | Path,
    training: TrainingSet,
    output: str | Path,
    descriptor: Descriptor,
    duplicate_similarity: float | None = None,
    attack: str | Path | None = None,
    audit: str | Path | None = None,
    cache: str | Path | None = None,
    max_shown: int = 200,
) -> list[Risk]:
    """Join what is known of each training image, and write risk.csv and risk.html into the folder ``output``.

    Args:
        run: the run's folder; training: its images.
        descriptor: by which near duplicates are looked for; duplicate_similarity: two images over it are near
            duplicates, None: measured on the images. See ``dedup.near_duplicates``.
        attack, audit: folders that these commands wrote about this model, or None.
        max_shown: images on the page.

    Returns:
        The images, the most memorized first.

    Raises:
        UsageError: results of another model, an audit that names other training images, or files that are missing or
            broken.
    """
    folder, images = RunFolder(run), training.images
    risks = [
        Risk(name, text, row[SAMPLE_ID])
        for name, text, row in zip(images.names, images.texts, images.rows, strict=True)
    ]
    notes = [*training.warnings]
    _add_skips(risks, folder, notes)
    _add_losses(risks, run, attack, notes)
    _add_copies(risks, run, images, audit, notes)
    _add_duplicates(risks, near_duplicates(images, descriptor, duplicate_similarity, cache), notes)
    median = _median_share(risks)
    for one in risks:
        one.reasons = _reasons(one, median)
    places = sorted(range(len(risks)), key=lambda place: risks[place].order)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    ordered = [risks[place] for place in places]
    _write_table(output / TABLE, ordered)
    shown = [place for place in places if risks[place].reasons][:max_shown]
    write_text(output / PAGE, _page(folder.path, risks, shown, images, notes))
    return ordered


def _add_skips(risks: list[Risk], folder: RunFolder, notes: list[str]) -> None:
    if not folder.skip_counts_file.is_file():
        notes.append("How often each image was skipped is not recorded.")
        return
    try:
        rows = pq.read_table(folder.skip_counts_file).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise UsageError(f"{folder.skip_counts_file}: cannot be read: {error}") from error
    known = {row[SAMPLE_ID]: row for row in rows}
    for one in risks:
        if (row := known.get(one.sample_id)) is not None:
            one.visits, one.skips = row["visits"], row["skips"]
    if not any(one.skips for one in risks):
        notes.append("The run skipped no image: its skip counts say nothing.")


def _add_losses(risks: list[Risk], run: str | Path, attack: str | Path | None, notes: list[str]) -> None:
    if attack is None:
        notes.append("Losses are not compared: run the command `attack` with held-out images, and give its folder.")
        return
    _check_model(read_json(Path(attack) / RESULT), run, "attack", attack)
    try:
        with (Path(attack) / IMAGES).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UsageError(f"`attack` {attack}: cannot be read: {error}") from error
    if not rows or not {"model_loss", "base_loss"} <= rows[0].keys():
        raise UsageError(f"`attack` {attack}: has no losses of the base; attack with `base`, and by ratio")
    ratios = [float(row["base_loss"]) / float(row["model_loss"]) for row in rows]
    threshold, _ = threshold_at(ratios, [row["set"] == "train" for row in rows], FALSE_POSITIVES)
    known = {(row["file_name"], row[SAMPLE_ID]): row for row in rows if row["set"] == "train"}
    for one in risks:
        if (row := known.get((one.name, str(one.sample_id)))) is not None:
            one.model_loss, one.base_loss = float(row["model_loss"]), float(row["base_loss"])
            one.given_away = one.base_loss / one.model_loss > threshold
    missing = sum(one.given_away is None for one in risks)
    if missing:
        notes.append(f"The attack was not made on {missing} of these images: their losses are not known.")


def _add_copies(
    risks: list[Risk], run: str | Path, training: ImageSet, audit: str | Path | None, notes: list[str]
) -> None:
    if audit is None:
        notes.append("Drawn images are not looked at: run the command `audit`, and give its folder.")
        return
    scores, nearest, _ = load_scores(audit)
    _check_model(scores, run, "audit", audit)
    by_name: dict[str, list[Risk]] = {}
    for one in risks:
        one.copies = 0
        by_name.setdefault(one.name, []).append(one)
    # What was found of an image under another name would count for none, and the image would not look memorized.
    unknown = [name for name in nearest["nearest"] if name not in by_name]
    if unknown:
        raise UsageError(
            f"`audit` {audit}: names {len(set(unknown))} training images that are not among these, such as "
            f"{unknown[0]}: it compared with {scores.get('train')}, and these, of {training.source}, are other images "
            f"or the same in another form (here the first is {risks[0].name}); give the same `train` to both commands, "
            "or to neither"
        )
    for name, similarity, copy in zip(nearest["nearest"], nearest["similarity"], nearest["copy"], strict=True):
        for one in by_name[name]:
            one.copies = (one.copies or 0) + bool(copy)
            one.most_similar = max(similarity, one.most_similar if one.most_similar is not None else -1.0)


def _check_model(found: dict[str, Any], run: str | Path, setting: str, folder: str | Path) -> None:
    recorded = found.get("model_hash")
    if recorded is not None and recorded != model_hash(run):
        raise UsageError(f"`{setting}` {folder}: is about another model ({found.get('model')}), not about {run}")


def _add_duplicates(risks: list[Risk], found: Duplicates, notes: list[str]) -> None:
    clusters, twins = found.clusters, nearest_others(found.vectors).tolist()
    for place, group, size, twin in zip(
        found.images.kept, clusters.kept.tolist(), clusters.sizes.tolist(), twins, strict=True
    ):
        one = risks[place]
        one.group, one.size, one.twin = group, size, twin if np.isfinite(twin) else None
        one.like_others = twin > found.similarity
    notes.extend(found.notes)


def _median_share(risks: list[Risk]) -> float:
    shares = [one.skip_share for one in risks if one.skip_share is not None]
    return float(np.median(shares)) if shares else 0.0


def _reasons(one: Risk, median: float) -> list[str]:
    reasons = []
    if one.copies:
        times = "an image that is a copy" if one.copies == 1 else f"{one.copies} images that are copies"
        reasons.append(f"The model drew {times} of it (similarity up to {one.most_similar:.2f}).")
    if one.given_away and one.ratio is not None:
        reasons.append(
            f"The base's loss on it is {one.ratio:.1f} times the model's; of the held-out images at most 1% reach that."
        )
    if one.like_others:
        size = one.size or 1
        others = f"{size - 1} others" if size > 2 else "another image"
        reasons.append(f"The set has {others} like it (similarity {one.twin:.2f}): the model sees it more often.")
    if one.skips and one.skip_share is not None and one.skip_share >= OFTEN * median:
        reasons.append(
            f"It was skipped in {one.skip_share:.0%} of its visits, as its loss was too low (median: {median:.0%})."
        )
    return reasons


COLUMNS = (
    *("visits", "skips", "skip_share", "model_loss", "base_loss", "ratio", "given_away"),
    *("copies", "most_similar", "group", "size", "twin"),
)  # of the table, besides names and words


def _write_table(path: Path, risks: list[Risk]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["rank", "file_name", SAMPLE_ID, "memorized", *COLUMNS, "text", "reasons"])
        for rank, one in enumerate(risks, 1):
            values = [getattr(one, name) for name in COLUMNS]
            told = ["" if value is None else int(value) if isinstance(value, bool) else value for value in values]
            words = [one.text or "", " ".join(one.reasons)]
            writer.writerow([rank, one.name, one.sample_id, int(one.memorized), *told, *words])


def summary(risks: list[Risk]) -> str:
    """The result in a sentence or two."""
    memorized = sum(one.memorized for one in risks)
    others = sum(bool(one.reasons) and not one.memorized for one in risks)
    if all(one.copies is None and one.given_away is None for one in risks):
        return f"{others} of {len(risks)} training images may be memorized."
    return (
        f"{memorized} of {len(risks)} training images are memorized: the model copied them, or its loss gives them "
        f"away. For {others} others there is a reason why they may be."
    )


def _page(run: Path, risks: list[Risk], shown: list[int], images: ImageSet, notes: list[str]) -> str:
    values = {
        "title": html.escape(f"Images at risk: {run.name}"),
        "lead": html.escape(summary(risks)),
        "notes": "".join(f"<li>{as_html(note)}</li>" for note in notes),
        "count": html.escape(f"{len(shown)} images, the most memorized first. {TABLE} has all {len(risks)}."),
        "cards": "".join(_card(risks[place], images, place) for place in shown),
    }
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(values)


def _card(one: Risk, images: ImageSet, place: int) -> str:
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in one.reasons)
    return (
        f'<figure class="{"memorized" if one.memorized else "maybe"}">{picture_of(images, place)}'
        f"<figcaption><b>{html.escape(one.name)}</b> {html.escape(one.text or '')}<ul>{reasons}</ul></figcaption>"
        "</figure>"
    )
