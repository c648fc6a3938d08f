"""Images at risk: what a run, an attack and an audit left behind, joined and explained."""

import csv
import json
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import write_folder

from ietagc_diffusers.cli import main
from ietagc_diffusers.eval.generate import model_hash

MEMORIZED, SEEN = 5, 7  # images that a drawn image copies, and that the loss gives away


@pytest.fixture
def run(base, tmp_path):
    """A finished run on ten pictures, of which the first is there twice, and what was measured of its model."""
    pictures = write_folder(tmp_path / "pictures", 10, copies=(0,))
    lines = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    lines[MEMORIZED]["text"] = "<script>alert(1)</script>"
    (pictures / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = shutil.copytree(base, tmp_path / "run")
    (folder / "ietagc").mkdir()
    config = {"pretrained_model_name_or_path": str(base), "train_data_dir": str(pictures), "resolution": 16}
    (folder / "ietagc" / "config.yaml").write_text(yaml.safe_dump(config))
    skips = {"sample_id": [*range(11)], "visits": [20] * 11, "skips": [1] * 9 + [8, 1], "shard": [0] * 11}
    pq.write_table(pa.table(skips), folder / "ietagc" / "skip_counts.parquet")
    names = [line["file_name"] for line in lines]
    write_attack(tmp_path / "attack", names, model_hash(folder))
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "scores.json").write_text(json.dumps({"model_hash": model_hash(folder), "model": "m"}))
    nearest = {"nearest": [names[MEMORIZED]] * 3 + [names[1]], "similarity": [0.99, 0.97, 0.5, 0.2]}
    pq.write_table(pa.table(nearest | {"copy": [True, True, False, False]}), tmp_path / "audit" / "nearest.parquet")
    pq.write_table(pa.table({"similarity": [0.1]}), tmp_path / "audit" / "background.parquet")
    return folder


def write_attack(folder, names, hash_of_model, columns=("model_loss", "base_loss")):
    folder.mkdir()
    (folder / "attack.json").write_text(json.dumps({"model_hash": hash_of_model, "model": "other"}))
    with (folder / "images.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["set", "file_name", "sample_id", *columns])
        for row, name in enumerate(names):
            writer.writerow(["train", name, row, 0.2 if row in (MEMORIZED, SEEN) else 0.5, 1.0])
        writer.writerows(["heldout", f"{row}.png", row, 0.4, 1.0] for row in range(20))  # a ratio of 2.5


def judged(run, *flags):
    """The rows of risk.csv by file name, and the page."""
    output = run.parent / "risk"
    words = ["risk", "--run", run, "--descriptor", "pixel", "--feature_cache", "none", "--output", output, *flags]
    assert main([*map(str, words), "--device", "cpu"]) == 0
    rows = list(csv.DictReader((output / "risk.csv").open()))
    assert [row["rank"] for row in rows] == [str(rank) for rank in range(1, 12)]
    return {row["file_name"]: row for row in rows}, (output / "risk.html").read_text()


def test_the_most_memorized_comes_first_with_reasons_in_words(run, capsys):
    rows, page = judged(run, "--attack", run.parent / "attack", "--audit", run.parent / "audit")
    assert "2 of 11 training images are memorized" in capsys.readouterr().out
    first, second, *others = rows.values()
    assert first["copies"] == "2" and first["most_similar"] == "0.99" and first["memorized"] == "1"
    assert "drew 2 images that are copies of it (similarity up to 0.99)" in first["reasons"]
    assert all("loss on it is 5.0 times the model's" in row["reasons"] for row in (first, second))
    assert second["sample_id"] == str(SEEN) and second["copies"] == "0" and second["memorized"] == "1"
    twins = [row for row in others if row["size"] == "2"]
    assert {row["file_name"] for row in twins} == {"000_0.png", "000_1.png"} and twins[0]["group"] == twins[1]["group"]
    assert all("another image like it (similarity 1.00)" in row["reasons"] for row in twins)
    skipped = [row for row in others if "skipped in 40% of its visits" in row["reasons"]]
    assert [row["sample_id"] for row in skipped] == ["9"] and "(median: 5%)" in skipped[0]["reasons"]
    assert all(row["reasons"] == "" and row["memorized"] == "0" for row in others[3:])
    assert page.count("<figure") == 5 == page.count("data:image/") and page.count('class="memorized"') == 2
    assert "<script" not in page and "&lt;script&gt;" in page and not re.search(r'(src|href)="(?!data:)', page)


def test_what_is_not_known_is_left_empty_and_named(run):
    rows, page = judged(run)
    assert all(row["copies"] == row["ratio"] == row["given_away"] == "" for row in rows.values())
    assert (
        "command <code>attack</code>" in page
        and "command <code>audit</code>" in page
        and "3 of 11 training images may be" in page
    )
    (run / "ietagc" / "skip_counts.parquet").unlink()
    rows, page = judged(run, "--duplicate_similarity", "-1", "--max_shown", 4)
    assert "is not recorded" in page and page.count("<figure") == 4
    assert {row["size"] for row in rows.values()} == {"11"}


def test_an_audit_that_names_the_images_otherwise_is_not_read_as_no_copies(run, tmp_path, capsys):
    nearest = {"nearest": ["row 5", "000_0.png"], "similarity": [0.99, 0.2], "copy": [True, False]}
    pq.write_table(pa.table(nearest), tmp_path / "audit" / "nearest.parquet")
    scores = tmp_path / "audit" / "scores.json"
    scores.write_text(json.dumps(json.loads(scores.read_text()) | {"train": "parquet/of/them"}))
    assert main(["risk", "--run", str(run), "--audit", str(tmp_path / "audit"), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"--audit {tmp_path / 'audit'}: names 1 training images" in error and "such as row 5: it compared" in error
    assert "with parquet/of/them" in error and "the same --train to both" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run", "{pictures}"], "{pictures}: has no ietagc/config.yaml: not the folder of a training run"),
        (["--attack", "{other}"], "--attack {other}: is about another model (other), not about {run}"),
        (["--attack", "{bare}"], "--attack {bare}: has no losses of the base"),
        (["--attack", "{pictures}"], "attack.json: cannot be read"),
        (["--audit", "{pictures}"], "scores.json: cannot be read"),
        (["--duplicate_similarity", "2"], "--duplicate_similarity 2.0: must be from -1 to 1"),
        (["--output", "{pictures}/here"], "--output {pictures}/here: what is written there would get into"),
        (["--output", "{run}"], "--output {run}: is the model's folder"),
        (["--max_shown", "0"], "--max_shown 0"),
    ],
)
def test_wrong_use_is_told_in_a_line(run, tmp_path, capsys, flags, message):
    places = {"run": run, "pictures": tmp_path / "pictures", "other": tmp_path / "other", "bare": tmp_path / "bare"}
    write_attack(places["other"], ["a.png"], "0123")
    write_attack(places["bare"], ["a.png"], model_hash(run), ("loss", "pia"))
    given = {"--run": run, "--output": tmp_path / "o", "--descriptor": "pixel", "--feature_cache": "none"}
    given[flags[0]] = flags[1].format(**places)
    assert main(["risk", *(str(word) for pair in given.items() for word in pair), "--device", "cpu"]) == 2
    assert message.format(**places) in capsys.readouterr().err
