"""All numbers of a folder of generated images against the training set, each with its protocol; one that cannot be
computed is null, with the reason.
"""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from ietagc_diffusers.config import UsageError
from sscd import load_descriptor
from sscd.descriptor import protocol_of

from .clip_score import ClipScorer, clip_scores
from .features import Embedded, Pixels, embed
from .fid import SMALL, Inception, PooledPixels, frechet_distance, kernel_distance, load_inception
from .memorized_quantity import NUM_NEIGHBOURS, memorization_ratio, memorized_quantity, ratio_of
from .neighbours import GIB, most_similar, nearest_l2, uses_faiss
from .patches import PatchDescriptor, most_similar_crops
from .records import read_json, write_json
from .similarity import bootstrap_interval, copy_rate, share_interval, sim_score

SCORES, NEAREST, BACKGROUND = "scores.json", "nearest.parquet", "background.parquet"
BACKGROUND_SAMPLES = 10_000
MQ_PIXELS = 64
ALWAYS_A_COPY = 0.999


@dataclass(frozen=True)
class Protocol:
    """What is measured, and with what.

    Args:
        name: ``dcr`` or ``sscd``, or a preprocessing of ``sscd.PREPROCESS``; None is the descriptor's own or ``dcr``.
        descriptor: see ``sscd.load_descriptor``.
        copy_similarity: over it an image is a copy; None is the descriptor's own.
        l2: ``iet-agc`` or ``paper``, for MQ. The Gu ratio comes with it.
        pixels: side of the images whose l2 distances are measured; None is the generated images', at most 64.
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
        chosen = {"descriptor": self.descriptor, "pixels": pixels, "features": self.features, "patches": self.patches}
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
    pixels = Pixels(tools.protocol.pixels or min(MQ_PIXELS, _smallest_edge(generated)))
    options = {"cache": cache, "batch_size": tools.protocol.batch_size}
    extractors = tools.extractors(pixels)
    known = embed(training, extractors, desc="Describing training images", **options)
    first = first_of_each(known.features)
    clip = {"clip": tools.clip.images} if tools.clip is not None else {}
    made = embed(generated, extractors | clip, desc="Describing generated images", **options)
    reasons, notes = {}, []
    num_duplicates = len(known.kept) - len(first)
    distinct = {name: vectors[first] for name, vectors in known.features.items()}
    if tools.protocol.distinct:
        known = Embedded(distinct, [known.kept[i] for i in first], known.skipped)
    elif num_duplicates:
        notes.append(
            f"{num_duplicates} training images duplicate another exactly: their copies have two neighbours alike, "
            "which Gu's ratio cannot see; --distinct counts each image once"
        )
    drawn, trained = generated.select(made.kept), training.select(known.kept)
    table, background = {}, {}

    flat = made.features["pixels"]
    num_flat = int((flat.amax(dim=1) == flat.amin(dim=1)).sum())
    if num_flat:
        notes.append(f"{num_flat} generated images are of one colour: similar to nothing, as a broken model draws them")
    scores = _similarity(made, known, drawn, trained, tools, table, background, reasons, notes)
    scores |= _l2(made, known, tools, table, reasons, notes)
    scores |= _patches(made, known, distinct.get("patches"), trained, tools, table, reasons)
    scores |= _clip(made, drawn, tools, table, reasons, notes)
    wanted = known
    if reference is not None and tools.features is not None:
        wanted = embed(reference, {"features": tools.features}, desc="Describing reference images", **options)
    scores |= _frechet(made, wanted, tools, reasons, notes)
    scores |= {
        "num_generated": len(drawn),
        "num_of_one_colour": num_flat,
        "num_train": len(trained),
        "num_train_duplicates": num_duplicates,
        "protocol": _record(tools, pixels, known.features["descriptor"], reference),
        "generated": str(Path(generated.source).resolve()) if Path(generated.source).exists() else generated.source,
        "train": str(Path(training.source).resolve()) if Path(training.source).exists() else training.source,
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


def first_of_each(features):
    """Rows of the first of each set of training images whose features are all the same."""
    seen = {}
    for index, vectors in enumerate(zip(*features.values(), strict=True)):
        key = hashlib.blake2b(b"".join(vector.numpy().tobytes() for vector in vectors), digest_size=16).digest()
        seen.setdefault(key, index)
    return list(seen.values())


def load_scores(folder):
    """(scores, nearest, background) that ``score`` left in a folder; the tables as dicts of lists."""
    folder = Path(folder)
    scores = read_json(folder / SCORES)
    try:
        tables = [pq.read_table(folder / name).to_pydict() for name in (NEAREST, BACKGROUND)]
    except (OSError, pa.ArrowInvalid) as error:
        raise UsageError(f"{folder}: {error}; `python -m eval score` writes what is needed") from error
    return scores, *tables


def _smallest_edge(images):
    """The smallest side of any image, as the files' headers say."""
    edges = []
    for index in range(len(images)):
        try:
            edges.append(min(Image.open(io.BytesIO(images.encoded(index))).size))
        except (ValueError, OSError):  # those are named when they are read
            continue
    return min(edges, default=MQ_PIXELS)


def _metadata_columns(images):
    """File name, prompt and seed of each image; of what others wrote, only what is of the right kind."""

    def column(key, kind):
        values = [row.get(key) for row in images.rows]
        return [value if isinstance(value, kind) and not isinstance(value, bool) else None for value in values]

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
    scores = dict.fromkeys(("memorized_quantity", "memorized_quantity_ci95", "memorization_ratio"))
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
    }


def _because(reasons, scores, why):
    reasons |= dict.fromkeys(scores, why)
    return {}


def _patches(made, known, distinct, trained, tools, table, reasons):
    scores = dict.fromkeys(("patch_sim_score", "patch_copy_rate", "train_train_patch_sim_score"))
    if tools.patches is None:
        return scores | _because(reasons, scores, "not asked for: give --patches")
    ours, theirs = made.features["patches"], known.features["patches"]
    similarity, nearest, box, their_box = most_similar_crops(ours, theirs, tools.patches, **tools.search())
    table["patch_similarity"] = similarity.tolist()
    table["patch_nearest"] = [trained.names[i] for i in nearest]
    table["patch"], table["patch_of_nearest"] = box.tolist(), their_box.tolist()
    scores["patch_sim_score"] = sim_score(similarity)
    threshold = tools.copy_similarity
    if len(distinct) < 2:
        reasons["train_train_patch_sim_score"] = "needs two different training images"
    else:
        among = most_similar_crops(distinct, distinct, tools.patches, same=True, **tools.search())[0]
        scores["train_train_patch_sim_score"] = sim_score(among)
        # Crops of unrelated images are more alike than the images: a copy must also exceed the training set's own 95%,
        # exact duplicates aside. An exact copy is always one, whatever rounding makes of its similarity.
        threshold = min(max(threshold, sim_score(among)), ALWAYS_A_COPY)
    scores["patch_copy_similarity"] = threshold
    scores["patch_copy_rate"] = copy_rate(similarity, threshold)
    scores["patch_copy_rate_ci95"] = share_interval(similarity > threshold)
    return scores


def _clip(made, drawn, tools, table, reasons, notes):
    if tools.clip is None:
        reasons["clip_score"] = "not asked for: give --clip ViT-B-16:openai, which downloads 600 MB, or ViT-B-16:FILE"
        return {"clip_score": None, "clip_score_ci95": None}
    if not all(drawn.texts):
        missing = next(name for name, text in zip(drawn.names, drawn.texts, strict=True) if not text)
        number = sum(not text for text in drawn.texts)
        reasons["clip_score"] = f"{number} images have no prompt in a metadata.jsonl: {missing} first"
        return {"clip_score": None, "clip_score_ci95": None}
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


def _record(tools, pixels, vectors, reference):
    protocol = tools.protocol
    return {
        "name": tools.protocol_name,
        **tools.descriptor.identity,
        "copy_similarity": tools.copy_similarity,
        "neighbours": "faiss" if uses_faiss(protocol.index, vectors, protocol.max_memory) else "exact",
        "l2": protocol.l2,
        "l2_neighbours": min(NUM_NEIGHBOURS, len(vectors)),
        "l2_pixels": pixels.size,
        "clip": None if tools.clip is None else tools.clip.record,
        "frechet": None if tools.features is None else {"features": tools.features.name, **tools.features.identity},
        "frechet_reference": "train" if reference is None else reference.source,
        "patches": None if tools.patches is None else [tools.patches.grid, tools.patches.share],
        "distinct": protocol.distinct,
    }
