"""Upload of a prepared set to the Hub: its Parquet files and a card, and nothing else of the folder."""

from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..hub.repository import Repository
from .run import read_report

AT_ONCE = 50  # files of a commit: one that fails costs no more than these
CARD = "README.md"


def publish(folder: str | Path, repository: Repository) -> str:
    """Upload a prepared set, in commits of up to 50 files. Files that the Hub has already are not sent again.

    A card that is there already stays. Returns the address of the last commit.

    Raises:
        UploadError: the Hub or the network refuses; the same call continues, and sends no file twice.
        UsageError: no set was prepared in the folder.
    """
    folder = Path(folder)
    report = read_report(folder)
    files = [path for split in sorted(report["rows"]) for path in sorted((folder / split).glob("*.parquet"))]
    if len(files) != sum(report["files"].values()):
        raise UsageError(f"{folder}: has {len(files)} of {sum(report['files'].values())} files; prepare it again")
    repository = repository.create()
    address = ""
    for start in range(0, len(files), AT_ONCE):
        some = {path.relative_to(folder).as_posix(): path for path in files[start : start + AT_ONCE]}
        address = repository.commit(some, f"Images, from file {start + 1} of {len(files)}")
    if repository.card() is None:
        address = repository.commit({CARD: card(report).encode()}, "Card")
    return address


def card(report: dict[str, Any]) -> str:
    """The card of a prepared set: where its splits are, and what is in it. It names no file of the source."""
    splits = sorted(report["rows"], reverse=True)
    files = "".join(f"  - split: {split}\n    path: {split}/*.parquet\n" for split in splits)
    rows = "".join(f"| {split} | {report['rows'][split]} |\n" for split in splits)
    left_out = "".join(f"| {why} | {about['count']} |\n" for why, about in report["left_out"].items())
    return f"""---
configs:
- config_name: default
  data_files:
{files}tags:
- text-to-image
---

# {report["source"]}

Images as they were stored, with {report["captions"]} captions, prepared by `ietagc prepare`.
`text` is one caption of an image and `captions` are all of them. `sample_id`
does not depend on how the source was split into files.

| split | images |
|---|---|
{rows}
Left out:

| reason | number |
|---|---|
{left_out or "| nothing | 0 |"}
"""
