"""Tables of a benchmark as Markdown, CSV and LaTeX: mean and standard deviation over seeds, the best value bold and the
second underlined.
"""

import csv
import io
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ietagc_diffusers.files import write_text

from .metrics import METRICS, Metric
from .score import different_versions

if TYPE_CHECKING:
    from .matrix import Benchmark


COLUMNS = {name: metric for name, metric in METRICS.items() if metric.lower is not None}
PLAIN, BEST, SECOND = "", "best", "second"


@dataclass(frozen=True)
class Entry:
    """The values of a metric for each seed, and their rank: best, second or neither."""

    values: tuple[float, ...]
    rank: str = PLAIN

    def text(self, metric: Metric) -> str:
        """The mean and, of several seeds, their standard deviation."""
        if not self.values:
            return "–"
        shown = [value * metric.scale for value in self.values]
        mean = f"{np.mean(shown):.{metric.digits}f}"
        return mean if len(shown) < 2 else f"{mean} ± {np.std(shown, ddof=1):.{metric.digits}f}"


@dataclass(frozen=True)
class Row:
    """The results of one method: an entry for each column, and why seeds failed."""

    phase: str | None
    label: str
    entries: list[Entry]
    failures: list[str]


@dataclass(frozen=True)
class Table:
    """Methods by metrics."""

    name: str
    title: str
    rows: list[Row]
    columns: list[Metric]

    @property
    def has_phase(self) -> bool:
        return any(row.phase for row in self.rows)

    @property
    def header(self) -> list[str]:
        titles = [f"{_title(metric)}{metric.arrow}" for metric in self.columns]
        return [*(["phase"] if self.has_phase else []), "method", *titles]


def _title(metric: Metric) -> str:
    return f"{metric.title} %" if metric.percent else metric.title


def build_table(name: str, spec: dict[str, Any], columns: list[str], results: list[dict[str, Any]]) -> Table:
    """One table of the benchmark's results.

    Args:
        spec: {title, rows: [{label, training, inference, phase}]}.
        columns: keys of ``COLUMNS``; those without any value are left out.
        results: [{training, inference, seed, scores or failed}].

    A row with failed seeds says so in its label and is not ranked.
    """
    by_cell: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        by_cell.setdefault((result["training"], result["inference"]), []).append(result)
    metrics = [COLUMNS[column] for column in columns]
    rows = [
        _row(row, by_cell.get((row["training"], row.get("inference", "none")), []), metrics) for row in spec["rows"]
    ]
    shown = [i for i, _ in enumerate(metrics) if any(row.entries[i].values for row in rows)]
    ranks = {i: _ranks([() if row.failures else row.entries[i].values for row in rows], metrics[i]) for i in shown}
    ranked = [
        replace(row, entries=[replace(row.entries[i], rank=ranks[i][number]) for i in shown])
        for number, row in enumerate(rows)
    ]
    return Table(name, spec.get("title", ""), ranked, [metrics[i] for i in shown])


def _row(row: dict[str, str], results: list[dict[str, Any]], metrics: list[Metric]) -> Row:
    """A row of the table's description with the results of its seeds, not yet ranked."""
    done = [result["scores"] for result in results if "scores" in result]
    failures = [f"seed {result['seed']}: {result['failed']}" for result in results if "failed" in result]
    label = row.get("label", row["training"]) + (f" ({len(done)} of {len(results)} seeds)" if failures else "")
    entries = [
        Entry(tuple(value for scores in done if (value := metric.number(scores)) is not None and math.isfinite(value)))
        for metric in metrics
    ]
    return Row(row.get("phase"), label, entries, failures)


def _ranks(values: list[tuple[float, ...]], metric: Metric) -> list[str]:
    """Best and second by the mean as it is shown: means that round to the same number have the same rank."""
    means = [round(float(np.mean(v)) * metric.scale, metric.digits) if v else None for v in values]
    order = sorted({mean for mean in means if mean is not None}, reverse=not metric.lower)
    names = dict(zip(order, (BEST, SECOND), strict=False)) if len(order) > 1 else {}
    return [PLAIN if mean is None else names.get(mean, PLAIN) for mean in means]


def markdown(table: Table) -> str:
    """The table in Markdown, with the reasons of failed seeds below it."""
    marks = {PLAIN: "{}", BEST: "**{}**", SECOND: "<u>{}</u>"}
    lines = [f"### Table {table.name}: {table.title}", "", _markdown_row(table.header)]
    lines.append("|" + "---|" * len(table.header))
    for row in table.rows:
        cells = [marks[e.rank].format(e.text(metric)) for e, metric in zip(row.entries, table.columns, strict=True)]
        lines.append(_markdown_row([*([row.phase or ""] if table.has_phase else []), row.label, *cells]))
    lines += [f"\n{row.label} failed: {why}" for row in table.rows for why in row.failures]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


ESCAPES = {
    **{letter: f"\\{letter}" for letter in "&%_#${}"},
    "\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "–": "--", "±": r"$\pm$",
}  # fmt: skip
ARROWS = {"↓": r"$\downarrow$", "↑": r"$\uparrow$"}


def _latex_text(text: str) -> str:
    return "".join({**ESCAPES, **ARROWS}.get(letter, letter) for letter in text)


def latex(table: Table) -> str:
    """The table in LaTeX."""
    marks = {PLAIN: "{}", BEST: r"\textbf{{{}}}", SECOND: r"\underline{{{}}}"}
    alignment = "l" * (len(table.header) - len(table.columns)) + "c" * len(table.columns)
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_latex_text(table.title)}}}"]
    lines += [rf"\begin{{tabular}}{{{alignment}}}", r"\hline"]
    lines += [" & ".join(map(_latex_text, table.header)) + r" \\", r"\hline"]
    for row in table.rows:
        texts = [_latex_text(e.text(metric)) for e, metric in zip(row.entries, table.columns, strict=True)]
        cells = [marks[e.rank].format(text) for e, text in zip(row.entries, texts, strict=True)]
        first = [_latex_text(row.phase or "")] if table.has_phase else []
        lines.append(" & ".join([*first, _latex_text(row.label), *cells]) + r" \\")
    return "\n".join([*lines, r"\hline", r"\end{tabular}", r"\end{table}"]) + "\n"


def comma_separated(tables: list[Table]) -> str:
    """All tables as CSV, a line for each row and column: mean, standard deviation and the values of the seeds."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["table", "phase", "method", "column", "mean", "deviation", "rank", "seeds", "values"])
    for table in tables:
        for row in table.rows:
            for entry, metric in zip(row.entries, table.columns, strict=True):
                values = [value * metric.scale for value in entry.values]
                mean = np.mean(values) if values else ""
                deviation = np.std(values, ddof=1) if len(values) > 1 else ""
                shown = " ".join(f"{value:.6g}" for value in values)
                cells = [_title(metric), mean, deviation, entry.rank, len(values), shown]
                writer.writerow([table.name, row.phase or "", row.label, *cells])
    return buffer.getvalue()


def write_tables(benchmark: "Benchmark", results: list[dict[str, Any]]) -> None:
    """Write tables.md, tables.csv and tables.tex into the benchmark's output folder."""
    tables = [build_table(name, spec, benchmark.columns, results) for name, spec in benchmark.tables.items()]
    done = [result["scores"] for result in results if "scores" in result]
    notes = _notes(benchmark, done)
    write_text(benchmark.output / "tables.md", "\n".join([*(markdown(table) for table in tables), notes]))
    write_text(benchmark.output / "tables.csv", comma_separated(tables))
    write_text(benchmark.output / "tables.tex", "\n".join(latex(table) for table in tables))


def _notes(benchmark: "Benchmark", done: list[dict[str, Any]]) -> str:
    if not done:
        return "No cell is finished.\n"
    protocol = done[0]["protocol"]
    name = f", protocol {protocol['name']}" if protocol["name"] else ""
    frechet = (protocol["frechet"] or {}).get("features", "none")
    versions = different_versions(done)
    number = len(benchmark.seeds)
    seeds = "one seed" if number == 1 else f"{number} seeds (± is their standard deviation)"
    return (
        f"{done[0]['num_generated']} images a cell, {seeds}, "
        f"compared with {done[0]['num_train']} training images. Descriptor: {protocol['descriptor']}{name}; "
        f"similarity of a copy: over {protocol['copy_similarity']:.3g}; Fréchet features: {frechet}. "
        "The best mean is bold, the second underlined.\n" + (f"Cells were scored by {versions}.\n" if versions else "")
    )
