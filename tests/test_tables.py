"""Tables of a benchmark: means, spreads and ranks, and how they are written."""

import csv
import io

import pytest

from ietagc_diffusers.eval.tables import COLUMNS, build_table, comma_separated, latex, markdown


def result(training, seed, sim, clip, inference="none"):
    return {
        "training": training,
        "inference": inference,
        "seed": seed,
        "scores": {"sim_score": sim, "clip_score": clip},
    }


RESULTS = [
    result("a", 0, 0.60, 30.0), result("a", 1, 0.64, 31.0),
    result("b", 0, 0.30, 29.0), result("b", 1, 0.30, 29.0),
    result("c", 0, 0.40, 32.0), {"training": "c", "inference": "none", "seed": 1, "failed": "exit 1: no"},
]  # fmt: skip
ROWS = [{"label": "A & co_1", "training": "a"}, {"label": "B", "training": "b"}, {"label": "C|c", "training": "c"}]
TABLE = build_table("X", {"title": "10% é {x}", "rows": ROWS}, ["sim_score", "clip_score", "fid"], RESULTS)


def test_means_spreads_and_ranks_follow_the_direction_of_each_column():
    assert [column.title for column in TABLE.columns] == ["Sim Score", "CLIP score"]  # fid has no value anywhere
    text = markdown(TABLE)
    assert "| A & co_1 | <u>0.620 ± 0.028</u> | **30.50 ± 0.71** |" in text
    assert "| B | **0.300 ± 0.000** | <u>29.00 ± 0.00</u> |" in text
    assert "| C\\|c (1 of 2 seeds) | 0.400 | 32.00 |" in text  # a row that is not complete is not ranked
    assert "C|c (1 of 2 seeds) failed: seed 1: exit 1: no" in text


def test_latex_is_escaped_and_complete():
    text = latex(TABLE)
    assert r"A \& co\_1 & \underline{0.620 $\pm$ 0.028} & \textbf{30.50 $\pm$ 0.71} \\" in text
    assert r"\caption{10\% é \{x\}}" in text and text.count(r"\begin") == text.count(r"\end") == 2
    assert r"\textbf{0.300 $\pm$ 0.000}" in text


def test_the_csv_has_every_seed():
    rows = list(csv.DictReader(io.StringIO(comma_separated([TABLE]))))
    assert len(rows) == 6
    assert rows[0]["values"] == "0.6 0.64" and float(rows[0]["mean"]) == pytest.approx(0.62)
    assert rows[4]["deviation"] == "" and rows[2]["rank"] == "best"


def test_equal_means_rank_alike_and_a_single_row_has_no_best():
    rows = [{"training": "a"}, {"training": "b"}]
    same = [result("a", 0, 0.50001, 1), result("b", 0, 0.50002, 2)]
    table = build_table("X", {"rows": rows}, ["sim_score"], same)
    assert [row.entries[0].rank for row in table.rows] == ["", ""]
    assert COLUMNS["clip_score"].lower is False
