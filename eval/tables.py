"""Tables of a benchmark: mean and spread over seeds, the best bold and the second underlined, as Markdown, CSV and
LaTeX.
"""

import csv
import io
import math
from dataclasses import dataclass

import numpy as np

from ietagc_diffusers.files import write_text

from .report import lookup


@dataclass(frozen=True)
class Column:
    """title; key: of the scores, dotted; lower: whether less is better; factor: what the value is shown times."""

    title: str
    key: str
    lower: bool = True
    digits: int = 3
    factor: float = 1


COLUMNS = {
    "sim_score": Column("Sim Score", "sim_score"),
    "copy_rate": Column("copies %", "copy_rate", digits=1, factor=100),
    "mq_0.4": Column("MQ 0.4 %", "memorized_quantity.0.4", digits=1, factor=100),
    "mq_0.5": Column("MQ 0.5 %", "memorized_quantity.0.5", digits=1, factor=100),
    "mq_0.6": Column("MQ 0.6 %", "memorized_quantity.0.6", digits=1, factor=100),
    "memorization_ratio": Column("Gu ratio %", "memorization_ratio", digits=1, factor=100),
    "patch_sim_score": Column("patch Sim Score", "patch_sim_score"),
    "clip_score": Column("CLIP score", "clip_score", lower=False, digits=2),
    "fid": Column("FID", "fid", digits=2),
    "frechet_distance": Column("Fréchet distance", "frechet_distance", digits=3),
}
PLAIN, BEST, SECOND = "", "best", "second"


@dataclass(frozen=True)
class Entry:
    """values: of the seeds; rank: best, second or neither."""

    values: tuple
    rank: str = PLAIN

    def text(self, column):
        """Mean and, of several seeds, their standard deviation."""
        if not self.values:
            return "–"
        shown = [value * column.factor for value in self.values]
        mean = f"{np.mean(shown):.{column.digits}f}"
        return mean if len(shown) < 2 else f"{mean} ± {np.std(shown, ddof=1):.{column.digits}f}"


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    rows: list  # (phase or None, label, [Entry], failures)
    columns: list

    @property
    def has_phase(self):
        return any(row[0] for row in self.rows)

    @property
    def header(self):
        arrows = [f"{column.title} {'↓' if column.lower else '↑'}" for column in self.columns]
        return [*(["phase"] if self.has_phase else []), "method", *arrows]


def build_table(name, spec, columns, results):
    """One table of the benchmark's results; columns that no row has a value in are left out. A row some of whose seeds
    failed says so in its label and is not ranked.
    """
    by_cell = {}
    for result in results:
        by_cell.setdefault((result["training"], result["inference"]), []).append(result)
    rows = []
    for row in spec["rows"]:
        found = by_cell.get((row["training"], row.get("inference", "none")), [])
        done = [result["scores"] for result in found if "scores" in result]
        values = [tuple(filter(_finite, (lookup(s, COLUMNS[c].key) for s in done))) for c in columns]
        failures = [f"seed {result['seed']}: {result['failed']}" for result in found if "failed" in result]
        label = row.get("label", row["training"]) + (f" ({len(done)} of {len(found)} seeds)" if failures else "")
        rows.append([row.get("phase"), label, values, failures])
    kept = [i for i, _ in enumerate(columns) if any(row[2][i] for row in rows)]
    shown = [COLUMNS[columns[i]] for i in kept]
    complete = [[() if row[3] else row[2][i] for row in rows] for i in kept]
    ranks = [_ranks(values, COLUMNS[columns[i]]) for i, values in zip(kept, complete, strict=True)]
    for number, row in enumerate(rows):
        row[2] = [Entry(row[2][i], rank[number]) for i, rank in zip(kept, ranks, strict=True)]
    return Table(name, spec.get("title", ""), [tuple(row) for row in rows], shown)


def _finite(value):
    return value is not None and math.isfinite(value)


def _ranks(values, column):
    """Best and second by mean, as shown: what rounds alike ranks alike."""
    means = [round(float(np.mean(v)) * column.factor, column.digits) if v else None for v in values]
    order = sorted({mean for mean in means if mean is not None}, reverse=not column.lower)
    names = dict(zip(order, (BEST, SECOND), strict=False)) if len(order) > 1 else {}
    return [names.get(mean, PLAIN) for mean in means]


def markdown(table):
    marks = {PLAIN: "{}", BEST: "**{}**", SECOND: "<u>{}</u>"}
    lines = [f"### Table {table.name}: {table.title}", "", _markdown_row(table.header)]
    lines.append("|" + "---|" * len(table.header))
    for phase, label, entries, _ in table.rows:
        cells = [marks[e.rank].format(e.text(c)) for e, c in zip(entries, table.columns, strict=True)]
        lines.append(_markdown_row([*([phase or ""] if table.has_phase else []), label, *cells]))
    lines += [f"\n{label} failed: {why}" for _, label, _, failures in table.rows for why in failures]
    return "\n".join(lines) + "\n"


def _markdown_row(cells):
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


ESCAPES = {
    **{letter: f"\\{letter}" for letter in "&%_#${}"},
    "\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "–": "--", "±": r"$\pm$",
}  # fmt: skip
ARROWS = {"↓": r"$\downarrow$", "↑": r"$\uparrow$"}


def _latex_text(text):
    return "".join({**ESCAPES, **ARROWS}.get(letter, letter) for letter in text)


def latex(table):
    marks = {PLAIN: "{}", BEST: r"\textbf{{{}}}", SECOND: r"\underline{{{}}}"}
    alignment = "l" * (len(table.header) - len(table.columns)) + "c" * len(table.columns)
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_latex_text(table.title)}}}"]
    lines += [rf"\begin{{tabular}}{{{alignment}}}", r"\hline"]
    lines += [" & ".join(map(_latex_text, table.header)) + r" \\", r"\hline"]
    for phase, label, entries, _ in table.rows:
        cells = [marks[e.rank].format(_latex_text(e.text(c))) for e, c in zip(entries, table.columns, strict=True)]
        first = [_latex_text(phase or "")] if table.has_phase else []
        lines.append(" & ".join([*first, _latex_text(label), *cells]) + r" \\")
    return "\n".join([*lines, r"\hline", r"\end{tabular}", r"\end{table}"]) + "\n"


def comma_separated(tables):
    """All tables, a line a row and column: mean, standard deviation and the seeds' values."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["table", "phase", "method", "column", "mean", "deviation", "rank", "seeds", "values"])
    for table in tables:
        for phase, label, entries, _ in table.rows:
            for entry, column in zip(entries, table.columns, strict=True):
                values = [value * column.factor for value in entry.values]
                mean = np.mean(values) if values else ""
                deviation = np.std(values, ddof=1) if len(values) > 1 else ""
                shown = " ".join(f"{value:.6g}" for value in values)
                writer.writerow(
                    [table.name, phase or "", label, column.title, mean, deviation, entry.rank, len(values), shown]
                )
    return buffer.getvalue()


def write_tables(benchmark, results):
    """tables.md, tables.csv and tables.tex in the benchmark's output folder."""
    tables = [build_table(name, spec, benchmark.columns, results) for name, spec in benchmark.tables.items()]
    done = [result["scores"] for result in results if "scores" in result]
    notes = _notes(benchmark, done)
    write_text(benchmark.output / "tables.md", "\n".join([*(markdown(table) for table in tables), notes]))
    write_text(benchmark.output / "tables.csv", comma_separated(tables))
    write_text(benchmark.output / "tables.tex", "\n".join(latex(table) for table in tables))


def _notes(benchmark, done):
    if not done:
        return "No cell is finished.\n"
    protocol = done[0]["protocol"]
    name = f", protocol {protocol['name']}" if protocol["name"] else ""
    frechet = (protocol["frechet"] or {}).get("features", "none")
    return (
        f"{done[0]['num_generated']} images a cell, {len(benchmark.seeds)} seeds (± is their standard deviation), "
        f"against {done[0]['num_train']} training images. Descriptor: {protocol['descriptor']}{name}, "
        f"copy over {protocol['copy_similarity']:.3g}; Fréchet features: {frechet}. "
        "Bold is best, underlined second, by the mean.\n"
    )
