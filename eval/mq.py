"""MQ and Gu et al.'s ratio of any two sets of images under all definitions in print, side by side."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ietagc_diffusers import __version__
from ietagc_diffusers.errors import UsageError

from .features import Pixels, embed
from .image_sets import ImageSet
from .metrics.base import prompt_numbers
from .metrics.intervals import wilson_interval
from .metrics.l2 import GU_RATIO, NUM_NEIGHBOURS, PAPER_SAMPLES, THRESHOLDS, l2_ratio
from .neighbours import GIB, nearest_l2
from .score import common_edge

# The l2 ratio of each protocol, see ``l2_ratio``.
PROTOCOLS = {
    "iet-agc": "squared l2 to the nearest / mean squared l2 to the 50 nearest",
    "paper": "l2 to the nearest, x / mean l2 from x to the 50 nearest",
    "gu": "l2 to the nearest / l2 to the second nearest",
}
COMPARISONS = {"<": torch.lt, "<=": torch.le}
SOURCES = {
    ("iet-agc", "<"): "released code of IET-AGC",
    ("paper", "<="): "eq. 12 and 13 as printed",
    ("gu", "<"): "Gu et al.",
}


def memorized_quantities(
    generated: ImageSet,
    training: ImageSet,
    protocols: Sequence[str] = tuple(PROTOCOLS),
    thresholds: Sequence[float] = THRESHOLDS,
    pixels: int | None = None,
    distinct: bool = False,
    cache: str | Path | None = None,
    device: str = "cpu",
    max_memory: int = 2 * GIB,
) -> dict[str, Any]:
    """Count the generated images whose l2 ratio to the training images is under, and at or under, each threshold.

    Images are compared as a whole and unmirrored, as in print. Memory holds 3 * pixels^2 bytes of each image, some
    hundred bytes of each generated one for its neighbours, and ``max_memory``; nothing of each pair.

    Args:
        protocols: keys of ``PROTOCOLS``.
        thresholds: of ``iet-agc`` and ``paper``; Gu's is 1/3.
        pixels: side of the compared images; None: the small edge that most generated images have, at most 64.
        distinct: whether exact duplicates among the training images count once.
        cache: folder of cached pixels.
        max_memory: bytes of working memory of the search.

    Returns:
        JSON values. Under ``protocols``, by protocol, threshold and comparison (``<`` or ``<=``): count, share, ci95
        and per_65536.

    Raises:
        UsageError: a set without a usable image, or fewer than two training images.
    """
    describe = partial(embed, cache=cache)
    generated, training = generated.files(), training.files()
    extractor = Pixels(pixels or common_edge(generated, describe))
    trained = describe(training, {"pixels": extractor}, desc="Reading training images")
    drawn = describe(generated, {"pixels": extractor}, desc="Reading generated images")
    different = trained.distinct()
    num_duplicates = len(trained.kept) - len(different.kept)
    trained = different if distinct else trained
    if len(trained.kept) < 2:
        raise UsageError(f"`train` {training.source}: l2 ratios need two training images, and there is one")
    references, groups = trained.features["pixels"], prompt_numbers(drawn.images.texts)
    found = nearest_l2(
        drawn.features["pixels"], references, NUM_NEIGHBOURS, max_memory=max_memory, device=device, progress=True
    )
    counts: dict[str, Any] = {}
    for protocol in protocols:
        ratios = l2_ratio(*found, references, protocol)
        limits = {"1/3": GU_RATIO} if protocol == "gu" else {f"{limit:g}": limit for limit in thresholds}
        counts[protocol] = {name: _counted(ratios, limit, groups) for name, limit in limits.items()}
    return {
        "version": __version__,
        "generated": generated.source,
        "train": training.source,
        "num_generated": len(drawn.kept),
        "num_train": len(trained.kept),
        "pixels": extractor.size,
        "neighbours": min(NUM_NEIGHBOURS, len(trained.kept)),
        "distinct": distinct,
        "protocols": counts,
        "skipped": {"generated": drawn.skipped, "train": trained.skipped},
        "notes": _notes(len(trained.kept), 0 if distinct else num_duplicates),
    }


def _counted(ratios: torch.Tensor, limit: float, groups: Any) -> dict[str, Any]:
    """The number of ratios (N,) under a limit, and at or under it, by comparison."""
    counted = {}
    for sign, compare in COMPARISONS.items():
        hits = compare(ratios, limit)
        share = hits.double().mean().item()
        counted[sign] = {
            "count": int(hits.sum()),
            "share": share,
            "ci95": wilson_interval(hits, groups=groups),
            "per_65536": share * PAPER_SAMPLES,
        }
    return counted


def _notes(num_training: int, num_duplicates: int) -> list[str]:
    notes = []
    if num_training < NUM_NEIGHBOURS:
        notes.append(f"only {num_training} training images, and MQ compares with {NUM_NEIGHBOURS}: ratios are higher")
    if num_duplicates:
        notes.append(
            f"exact duplicates among the training images: {num_duplicates}. A copy of such an image has two equally "
            "near neighbours, and Gu's ratio misses it; with `distinct` each image counts once"
        )
    return notes


def table(found: dict[str, Any]) -> str:
    """What ``memorized_quantities`` found, in Markdown."""
    lines = [
        f"{found['num_generated']:,} generated images, {found['num_train']:,} training images, "
        f"{found['pixels']} x {found['pixels']} pixels.",
        "",
        f"| protocol | l2 ratio | images | share | 95% interval | of {PAPER_SAMPLES:,} | as in |",
        "|---|---|---|---|---|---|---|",
    ]
    for protocol, limits in found["protocols"].items():
        for limit, by_sign in limits.items():
            for sign, counted in by_sign.items():
                low, high = counted["ci95"]
                cells = [
                    protocol,
                    f"{sign.replace('<=', '≤')} {limit}",
                    f"{counted['count']:,}",
                    f"{counted['share']:.2%}",
                    f"{low:.2%} to {high:.2%}",
                    f"{counted['per_65536']:,.0f}",
                    SOURCES.get((protocol, sign), ""),
                ]
                lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- {protocol}: {PROTOCOLS[protocol]}" for protocol in found["protocols"])]
    for side, skipped in found["skipped"].items():
        if skipped:
            lines.append(f"- {len(skipped)} {side} files were left out, such as {skipped[0][0]}: {skipped[0][1]}")
    lines += [f"- {note}" for note in found["notes"]]
    return "\n".join(lines) + "\n"
