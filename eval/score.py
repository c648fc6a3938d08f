"""All numbers of a folder of generated images against the training set, each with its protocol; one that cannot be
computed is null, with the reason.
"""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from ietagc_diffusers.sscd import load_descriptor
from ietagc_diffusers.sscd.descriptor import protocol_of

from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.files import read_json, write_json

from .clip_score import ClipScorer, clip_scores
from .features import Pixels, SmallEdge, embed, first_of_each
from .fid import SMALL, Inception, PooledPixels, frechet_distance, kernel_distance, load_inception
from .image_sets import MIN_EDGE, load_images, unusable
from .memorized_quantity import GU_RATIO, NUM_NEIGHBOURS, memorization_ratio, memorized_quantity, ratio_of
from .neighbours import GIB, most_similar, nearest_l2, uses_faiss
from .patches import PatchDescriptor, patch_scores
from .similarity import bootstrap_interval, copy_rate, share_interval, sim_score

SCORES, NEAREST, BACKGROUND = "scores.json", "nearest.parquet", "background.parquet"
BACKGROUND_SAMPLES = 10_000
MQ_PIXELS = 64
INT64 = range(-(2**63), 2**63)


@dataclass(frozen=True)
class Protocol:
    """What is measured, and with what.

    Args:
        name: ``dcr`` or ``sscd``, or a preprocessing of ``sscd.PREPROCESS``; None is the descriptor's own or ``dcr``.
        descriptor: see ``sscd.load_descriptor``.
        copy_similarity: over it an image is a copy; None is the descriptor's own.
        l2: ``iet-agc`` or ``paper``, for MQ. The Gu ratio comes with it.
        pixels: side of the images whose l2 distances are measured; None is the small edge of most generated images, at
            most 64.
        clip: open_clip's ``MODEL:TAG`` or ``MODEL:FILE``; None leaves the CLIP score out.
        clip_preprocess: ``own`` or ``dcr``; None follows ``name``.
        fid: ``inception``, ``inception:FILE``, ``pixel-8``, or ``none``.
        patches: whether crops are compared too.
        distinct: whether exact duplicates in the training set count once, so that a copy of a duplicated image has a
            second neighbour to be compared with.
        index: of ``eval.neighbours``.
    """

    name: str | None = None
    descriptor: str = "auto"
    copy_similarity: float | None = None
    l2: str = "iet-agc"
    pixels: int | None = None
    clip: str | None = None
    clip_preprocess: str | None = None
    fid: str = "pixel-8"
    fid_antialias: bool = False
    patches: bool = False
    distinct: bool = False
    index: str = "auto"
    device: str = "cpu"
    batch_size: int = 32
    max_memory: int = 2 * GIB


@dataclass
class Tools:
    """A protocol with its models loaded."""

    protocol: Protocol
    descriptor: object = None
    features: object = None
    clip: object = None
    patches: object = None

    def __post_init__(self):
        p = self.protocol
        if p.pixels is not None and p.pixels < MIN_EDGE:
            raise UsageError(f"--pixels {p.pixels}: must be at least {MIN_EDGE}: a single pixel shows nothing")
        self.descriptor = load_descriptor(p.descriptor, p.name, p.device)
        kind, _, path = p.fid.partition(":")
        if kind == "inception":
            self.features = load_inception(path or None, p.fid_antialias, p.device)
        elif kind == "pixel-8":
            self.features = PooledPixels(8)
        elif kind != "none":
            raise UsageError(f"--fid {p.fid}: must be inception, inception:FILE, pixel-8 or none")
        if p.clip is not None:
            model, _, weights = p.clip.partition(":")
            preprocess = p.clip_preprocess or ("dcr" if (p.name or protocol_of(p.descriptor)) == "dcr" else "own")
            self.clip = ClipScorer(model, weights or "openai", preprocess, p.device)
        if p.patches:
            self.patches = PatchDescriptor(self.descriptor)

    @property
    def protocol_name(self):
        """None of a descriptor that has no protocols."""
        return None if self.descriptor.name == "pixel" else self.protocol.name or protocol_of(self.protocol.descriptor)

    @property
    def copy_similarity(self):
        given = self.protocol.copy_similarity
        return self.descriptor.copy_similarity if given is None else given

    def extractors(self, pixels):
        """What is computed of every image of both sets."""
        chosen = {"descriptor": self.descriptor, "pixels": pixels, "edge": SmallEdge()}
        chosen |= {"features": self.features, "patches": self.patches}
        return {name: extractor for name, extractor in chosen.items() if extractor is not None}

    def search(self):
        return {"device": self.protocol.device, "index": self.protocol.index, "max_memory": self.protocol.max_memory}


def score(generated, training, output, tools, cache=None, reference=None, about=None):
    """Compare images with the training set. Writes ``scores.json``, ``nearest.parquet`` (a row a generated image) and
    ``background.parquet`` (a row a training image: its nearest other one) into the folder ``output``.

    Args:
        generated, training: ``ImageSet``s.
        tools: ``Tools(Protocol(...))``.
        cache: folder where features are kept.
        reference: ``ImageSet`` that the Frechet distance is measured to; None is the training set.
        about: what else to record: JSON values.

    Returns:
        The scores.
    """
    options = {"cache": cache, "batch_size": tools.protocol.batch_size}
    reasons, notes = {}, []
    num_rows = len(generated) + len(training)
    generated, training = generated.files(), training.files()
    if num_again := num_rows - len(generated) - len(training):
        notes.append(f"{num_again} rows name an image file that another row names: it counts once")
    pixels = Pixels(tools.protocol.pixels or _common_edge(generated, options))
    extractors = tools.extractors(pixels)
    known = embed(training, extractors, desc="Describing training images", **options)
    first = first_of_each(known.features)
    clip = {"clip": tools.clip.images} if tools.clip is not None else {}
    made = embed(generated, extractors | clip, desc="Describing generated images", **options)
    num_files = {side: len(x.kept) + len(unusable(x.skipped)) for side, x in (("generated", made), ("train", known))}
    train_hash = known.content()
    small, of_training = (int((x.features["edge"] < pixels.size).sum()) for x in (made, known))
    if small or of_training:
        notes.append(
            f"{small} generated and {of_training} training images are smaller than the {pixels.size} pixels at which "
            "l2 is measured: they are enlarged"
        )
    num_duplicates = len(known.kept) - len(first)
    distinct = known.select(first)
    if tools.protocol.distinct:
        known = distinct
    elif num_duplicates:
        notes.append(
            f"{num_duplicates} training images duplicate another exactly: their copies have two neighbours alike, "
            "which Gu's ratio cannot see, and among themselves they are as similar as can be, which the training "
            "images' own Sim Score shows; --distinct counts each image once"
        )
    drawn, trained = generated.select(made.kept), training.select(known.kept)
    table, background = {}, {}

    flat = made.features["pixels"]
    num_flat = int((flat.amax(dim=1) == flat.amin(dim=1)).sum())
    if num_flat:
        notes.append(f"{num_flat} generated images are of one colour: similar to nothing, as a broken model draws them")
    scores = _similarity(made, known, drawn, trained, tools, table, background, reasons, notes)
    scores |= _l2(made, known, tools, table, reasons, notes)
    scores |= patch_scores(made, known, distinct, trained, tools, table, reasons, notes)
    scores |= _clip(made, drawn, tools, table, reasons, notes)
    wanted = known
    if reference is not None and tools.features is not None:
        wanted = embed(reference.files(), {"features": tools.features}, desc="Describing reference images", **options)
    scores |= _frechet(made, wanted, tools, reasons, notes)
    scores |= {
        "num_generated": len(drawn),
        "num_of_one_colour": num_flat,
        "num_train": len(trained),
        "num_train_duplicates": num_duplicates,
        "num_files": num_files,
        "train_hash": train_hash,
        "protocol": _record(tools, pixels, known.features, reference),
        "generated": str(Path(generated.source).resolve()) if Path(generated.source).exists() else generated.source,
        "train": str(Path(training.source).resolve()) if Path(training.source).exists() else training.source,
        "columns": {"generated": generated.columns, "train": training.columns},
        "skipped": {"generated": made.skipped, "train": known.skipped},
        "reasons": reasons,
        "notes": notes,
    } | (about or {})
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(_metadata_columns(drawn) | table), output / NEAREST)
    pq.write_table(pa.table(background), output / BACKGROUND)
    write_json(output / SCORES, scores)
    return scores


def load_scores(folder):
    """(scores, nearest, background) that ``score`` left in a folder; the tables as dicts of lists."""
    folder = Path(folder)
    scores = read_json(folder / SCORES)
    try:
        tables = [pq.read_table(folder / name).to_pydict() for name in (NEAREST, BACKGROUND)]
    except (OSError, pa.ArrowInvalid) as error:
        raise UsageError(f"{folder}: {error}; `python -m eval score` writes what is needed") from error
    return scores, *tables


def images_of(scores, side):
    """The images of a side, ``generated`` or ``train``, loaded again."""
    columns = scores.get("columns", {}).get(side, {})
    return load_images(scores[side], "scores", columns.get("image_column", "image"), columns.get("text_column", "text"))


def _common_edge(images, options):
    """The small edge that most images have, at most 64; of two equally frequent ones the smaller."""
    edges = embed(images, {"edge": SmallEdge()}, desc="Measuring generated images", **options).features["edge"]
    sizes, counts = edges.clamp(max=MQ_PIXELS).int().unique(return_counts=True)
    return int(sizes[counts.argmax()])


def _metadata_columns(images):
    """File name, prompt and seed of each image; of what others wrote, only what is of the right kind."""

    def column(key, kind):
        values = [row.get(key) for row in images.rows]
        return [value if type(value) is kind and (kind is str or value in INT64) else None for value in values]

    return {
        "file_name": images.names,
        "text": pa.array(images.texts, pa.string()),
        "seed": pa.array(column("seed", int), pa.int64()),
        "mitigation": pa.array(column("mitigation", str), pa.string()),
        "sample_id": pa.array(column("sample_id", int), pa.int64()),
    }


def _similarity(made, known, drawn, trained, tools, table, background, reasons, notes):
    ours, theirs = made.features["descriptor"], known.features["descriptor"]
    similarity, nearest = (x[:, 0] for x in most_similar(ours, theirs, **tools.search()))
    table["similarity"] = similarity.tolist()
    table["nearest"] = [trained.names[i] for i in nearest]
    threshold = tools.copy_similarity
    table["copy"] = (similarity > threshold).tolist()
    scores = {
        "sim_score": sim_score(similarity),
        "sim_score_ci95": bootstrap_interval(similarity, sim_score),
        "sim_mean": similarity.mean().item(),
        "sim_mean_ci95": bootstrap_interval(similarity, lambda x: x.mean()),
        "copy_rate": copy_rate(similarity, threshold),
        "copy_rate_ci95": share_interval(similarity > threshold),
        "num_copied_train": len(set(nearest[similarity > threshold].tolist())),
        "train_train_sim_score": None,
    }
    if len(theirs) < 2:
        reasons["train_train_sim_score"] = "needs two training images"
        background |= {"file_name": trained.names, "similarity": [None], "nearest": [None]}
        return scores
    rows = torch.arange(len(theirs))
    if len(rows) > BACKGROUND_SAMPLES:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randperm(len(rows), generator=generator)[:BACKGROUND_SAMPLES].sort().values
        notes.append(f"the training images' own similarity is that of {BACKGROUND_SAMPLES:,} of them, drawn at random")
    groups = (rows, torch.arange(len(theirs)))
    among, which = (x[:, 0] for x in most_similar(theirs[rows], theirs, groups=groups, **tools.search()))
    background["file_name"] = [trained.names[i] for i in rows]
    background["similarity"] = among.tolist()
    background["nearest"] = [trained.names[i] for i in which]
    return scores | {"train_train_sim_score": sim_score(among)}


def _l2(made, known, tools, table, reasons, notes):
    ours, theirs = made.features["pixels"], known.features["pixels"]
    names = ("memorized_quantity", "memorization_ratio")
    scores = dict.fromkeys((*names, *(f"{name}_ci95" for name in names)))
    if len(theirs) < 2:
        return scores | _because(reasons, scores, "needs two training images")
    if len(theirs) < NUM_NEIGHBOURS:
        notes.append(
            f"MQ's neighbourhood is all {len(theirs)} training images, fewer than {NUM_NEIGHBOURS}: ratios are higher"
        )
    found = nearest_l2(ours, theirs, NUM_NEIGHBOURS, progress=True, **tools.search())
    ratios, gu = ratio_of(*found, theirs, tools.protocol.l2), ratio_of(*found, theirs, "gu")
    table["l2_ratio"], table["gu_ratio"] = ratios.tolist(), gu.tolist()
    quantity = memorized_quantity(ratios)
    intervals = {key: share_interval(ratios <= float(key)) for key in quantity}
    return {
        "memorized_quantity": quantity,
        "memorized_quantity_ci95": intervals,
        "memorization_ratio": memorization_ratio(gu),
        "memorization_ratio_ci95": share_interval(gu < GU_RATIO),
    }


def _because(reasons, scores, why):
    reasons |= dict.fromkeys(scores, why)
    return {}


def _clip(made, drawn, tools, table, reasons, notes):
    if tools.clip is None:
        reasons["clip_score"] = (
            "not asked for: give --clip ViT-B-16:openai, which downloads 600 MB, or ViT-B-16-quickgelu:FILE with "
            "OpenAI's weights"
        )
        return {"clip_score": None, "clip_score_ci95": None}
    if not all(drawn.texts):
        missing = next(name for name, text in zip(drawn.names, drawn.texts, strict=True) if not text)
        number = sum(not text for text in drawn.texts)
        reasons["clip_score"] = f"{number} images have no prompt in a metadata.jsonl: {missing} first"
        return {"clip_score": None, "clip_score_ci95": None}
    if tools.clip.note:
        notes.append(tools.clip.note)
    vectors, num_longer = tools.clip.texts(drawn.texts)
    if num_longer:
        notes.append(f"{num_longer} prompts have more tokens than CLIP reads: the rest of them does not count")
    values = clip_scores(made.features["clip"], vectors)
    table["clip_score"] = values.tolist()
    return {
        "clip_score": values.mean().item(),
        "clip_score_ci95": bootstrap_interval(values, lambda x: x.mean()),
        "num_prompts_truncated": num_longer,
    }


def _frechet(made, wanted, tools, reasons, notes):
    scores = dict.fromkeys(("fid", "kid", "frechet_distance", "kernel_distance"))
    if tools.features is None:
        return scores | _because(reasons, scores, "not asked for: --fid none")
    ours, theirs = made.features["features"], wanted.features["features"]
    if min(len(ours), len(theirs)) < 2:
        return scores | _because(reasons, scores, "needs two images on both sides")
    distance, kernel = frechet_distance(ours, theirs), kernel_distance(ours, theirs)
    if min(len(ours), len(theirs)) < SMALL:
        notes.append(
            f"Fréchet distance of {len(ours)} to {len(theirs)} images: under {SMALL} it is biased upwards; "
            "compare it at equal numbers only, or the kernel distance, which is not"
        )
    if isinstance(tools.features, Inception):
        why = "Inception's: see fid and kid"
        _because(reasons, ("frechet_distance", "kernel_distance"), why)
        return scores | {"fid": distance, "kid": kernel}
    why = f"measured on {tools.features.name} features instead: see frechet_distance; give --fid inception"
    _because(reasons, ("fid", "kid"), why)
    return scores | {"frechet_distance": distance, "kernel_distance": kernel}


def _record(tools, pixels, features, reference):
    protocol = tools.protocol
    searched = {"descriptor": features["descriptor"], "l2": features["pixels"]}
    if tools.patches is not None:
        searched["patches"] = tools.patches.crops(features["patches"])
    searches = {
        name: "faiss" if uses_faiss(protocol.index, vectors, protocol.max_memory) else "exact"
        for name, vectors in searched.items()
    }
    return {
        "name": tools.protocol_name,
        **tools.descriptor.identity,
        "copy_similarity": tools.copy_similarity,
        "neighbours": searches["descriptor"],
        "searches": searches,
        "l2": protocol.l2,
        "l2_neighbours": min(NUM_NEIGHBOURS, len(features["pixels"])),
        "l2_pixels": pixels.size,
        "clip": None if tools.clip is None else tools.clip.record,
        "frechet": None if tools.features is None else {"features": tools.features.name, **tools.features.identity},
        "frechet_reference": "train" if reference is None else reference.source,
        "patches": None if tools.patches is None else [tools.patches.grid, tools.patches.share],
        "distinct": protocol.distinct,
    }
