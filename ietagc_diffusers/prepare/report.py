"""What a preparation kept and left out, as JSON and as a page to read."""

from pathlib import Path
from typing import Any

from ..data.listing import printable
from ..files import place_name, write_json, write_text
from .state import Progress

REPORT, PAGE = "report.json", "report.md"


def write_report(output: Path, source: str | Path, settings: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Write ``report.md`` and, last, ``report.json``, which says that the set is complete. Returns the latter."""
    report = {
        "source": place_name(str(source)),
        "settings": settings,
        "rows": progress.rows,
        "bytes": progress.bytes,
        "files": progress.shards,
        "captions": progress.captions,
        "left_out": dict(sorted(progress.left_out.items(), key=lambda entry: (-entry[1]["count"], entry[0]))),
    }
    write_text(output / PAGE, as_markdown(report))
    write_json(output / REPORT, report)
    return report


def summary(report: dict[str, Any]) -> str:
    """The report in a few lines, for the console."""
    rows, left_out = report["rows"], report["left_out"]
    number = sum(rows.values())
    lines = [
        f"{number} images with {report['captions']} captions, {sum(report['bytes'].values()) / 1e6:.1f} MB: "
        + ", ".join(f"{rows[split]} {split}" for split in sorted(rows, reverse=True))
    ]
    if report["settings"]["test_share"] and len(rows) < 2:
        lines.append("All images fell into one split: there are too few for this share, or another seed would do.")
    if left_out:
        lines.append(f"Left out: {sum(about['count'] for about in left_out.values())}")
    for why, about in left_out.items():
        lines.append(f"  {about['count']:>7}  {why} (such as {printable(about['first'][0])[:120]})")
    return "\n".join(lines)


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    settings, left_out = report["settings"], report["left_out"]
    told = ", ".join(f"{name} {value}" for name, value in settings.items() if name != "mark" and value is not None)
    lines = [f"# {_cell(report['source'])}, prepared", "", f"Settings: {told}.", ""]
    lines += ["| split | images | files | MB |", "|---|---|---|---|"]
    for split in sorted(report["rows"], reverse=True):
        size = f"{report['bytes'][split] / 1e6:.1f}"
        lines.append(f"| {split} | {report['rows'][split]} | {report['files'].get(split, 0)} | {size} |")
    lines += ["", f"Captions: {report['captions']}.", "", "## Left out", ""]
    lines += ["| number | reason | the first of them |", "|---|---|---|"] if left_out else ["Nothing."]
    for why, about in left_out.items():
        names = "<br>".join(_cell(name) for name in about["first"])
        more = "<br>..." if about["count"] > len(about["first"]) else ""
        lines.append(f"| {about['count']} | {why} | {names}{more} |")
    return "\n".join([*lines, ""])


def _cell(name: str) -> str:
    """A name that cannot be taken for a part of the page."""
    return printable(name)[:200].replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
