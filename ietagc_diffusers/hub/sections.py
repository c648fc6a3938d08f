"""Cards that people and programs write together: metadata, and sections between two comments."""

import re
from collections.abc import Iterable
from typing import Any

import yaml

from ..errors import UsageError, one_line
from ..run_folder import RunFolder

START, END = "<!-- ietagc: this section is written by ietagc -->", "<!-- end of the section by ietagc -->"
# What programs write: the run's section, and that of `audit --card`.
SECTIONS = ((START, END), ("<!-- memorization audit -->", "<!-- end of memorization audit -->"))
SOURCE = "IET-AGC+ for Diffusers"  # of the results in ``model-index``
_METADATA = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)


def read_card(run: RunFolder) -> str | None:
    """The card in a run's folder; None if there is none. Raises ``UsageError`` for one that cannot be read."""
    if not run.card_file.is_file():
        return None
    try:
        return run.card_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{run.card_file}: cannot be read: {one_line(error)}") from error


def split(card: str) -> tuple[dict[str, Any] | None, str, str]:
    """A card's metadata, their block as it is written, and the text after it; {} without metadata, and None for
    metadata that cannot be read.
    """
    found = _METADATA.match(card)
    if found is None:
        return {}, "", card
    try:
        metadata = yaml.safe_load(found[1])
    except yaml.YAMLError:
        metadata = False
    metadata = {} if metadata is None else metadata
    return metadata if isinstance(metadata, dict) else None, found[0], card[found.end() :]


def join(metadata: dict[str, Any], text: str) -> str:
    """A card. The metadata keep their order."""
    block = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=10_000)
    return f"---\n{block}---\n{text}"


def merge(card: str, new: str, name: str) -> str:
    """``card`` with the sections and the metadata of ``new``; all else stays as it was written.

    A section takes the place of its earlier version, or comes last. Of metadata a tag is added, a result of this
    software takes the place of its earlier version, and what is not set is set; a choice that was made stays.

    Raises ``UsageError``, naming the card, where the end of a section is missing: what follows it may be someone's.
    """
    metadata, block, text = split(card)
    ours, _, source = split(new)
    for start, end in SECTIONS:
        section = _section(source, start, end, name)
        if section is not None:
            before, there, after = _around(text, start, end, name)
            text = f"{before}{section}{after}" if there else f"{text.rstrip()}\n\n{section}\n".lstrip("\n")
    merged = None if metadata is None else _merged(metadata, ours or {})
    return f"{block}{text}" if merged is None or merged == metadata else join(merged, text)


def _around(text: str, start: str, end: str, name: str) -> tuple[str, str, str]:
    """What is before a section, the section with its comments ("" if there is none), and what is after it."""
    before, opened, rest = text.partition(start)
    if not opened:
        return text, "", ""
    inside, closed, after = rest.partition(end)
    if not closed:
        raise UsageError(f"{name}: has the line {start} without {end}; put the end where it belongs")
    return before, f"{opened}{inside}{closed}", after


def _section(text: str, start: str, end: str, name: str) -> str | None:
    return _around(text, start, end, name)[1] or None


def _merged(metadata: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    merged = dict(metadata)
    for key, value in ours.items():
        if key == "tags":
            merged[key] = _union(_listed(metadata.get(key)), value)
        elif key != "model-index" and merged.get(key) is None:
            merged[key] = value
    index = _merged_results(metadata.get("model-index"), ours.get("model-index"))
    if index:
        merged["model-index"] = index
    else:
        merged.pop("model-index", None)
    return merged


def _merged_results(there: Any, ours: Any) -> list[Any]:
    """The models with their results, where ours take the place of our earlier ones."""
    models = [dict(model) if isinstance(model, dict) else model for model in _listed(there)]
    for model in models:
        if isinstance(model, dict) and isinstance(model.get("results"), list):
            model["results"] = [result for result in model["results"] if not _is_ours(result)]
    if ours:
        first = next((m for m in models if isinstance(m, dict) and isinstance(m.get("results"), list)), None)
        if first is None:
            return [*models, *ours]
        first["results"] += ours[0]["results"]
    return [model for model in models if not isinstance(model, dict) or model.get("results") != []]


def _is_ours(result: Any) -> bool:
    source = result.get("source") if isinstance(result, dict) else None
    return isinstance(source, dict) and source.get("name") == SOURCE


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [] if value is None else [value]


def _union(first: Iterable[Any], second: Iterable[Any]) -> list[Any]:
    return [*first, *(each for each in second if each not in first)]
