"""Near duplicates before the training: what the command writes, and what the training makes of it."""

import csv
import json
import re
import shutil
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from accelerate import PartialState
from conftest import scene, train_flags, train_here, unet_bytes
from PIL import ImageOps

from ietagc_diffusers import RunFolder, UsageError
from ietagc_diffusers.arguments import parse_flags
from ietagc_diffusers.cli import main
from ietagc_diffusers.data import Captions, DataSettings, hashes, load_training_rows
from ietagc_diffusers.eval.record import recorded_training, training_set
from ietagc_diffusers.hub.card import write_card_of_records
from ietagc_diffusers.training import processes
from ietagc_diffusers.training import rows as training_rows

NUMBER = 20
SCRIPT_NAME = "<script>.png"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Pictures, three of which have near duplicates: of 3 a larger one, of 5 two others, of 7 the same pixels."""
    folder = tmp_path_factory.mktemp("scenes") / "pictures"
    folder.mkdir()
    images = {f"{row:02d}.png": scene(row, (48, 40)) for row in range(NUMBER)}
    images["large.png"] = images["03.png"].resize((96, 80))
    images[SCRIPT_NAME] = ImageOps.mirror(images["05.png"])
    images["cropped.png"] = images["05.png"].crop((1, 1, 47, 39))
    images["same.png"] = images["07.png"]
    for name, image in images.items():
        image.save(folder / name, compress_level=0 if name == "same.png" else 6)
    lines = [json.dumps({"file_name": name, "text": f"a red {row}"}) for row, name in enumerate(images)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


LEFT_OUT = {"03.png": 3, SCRIPT_NAME: 21, "cropped.png": 22, "same.png": 23}


def deduplicated(folder, output, *flags):
    words = ["dedup", "--train", folder, "--output", output, "--feature_cache", "none", "--device", "cpu", *flags]
    assert main([*map(str, words)]) == 0
    with (output / "duplicates.csv").open(newline="") as file:
        return json.loads((output / "dedup.json").read_text()), list(csv.DictReader(file))


@pytest.fixture(scope="module")
def found(scenes, tmp_path_factory):
    output = tmp_path_factory.mktemp("dedup") / "out"
    return output, *deduplicated(scenes, output)


def test_clusters_are_listed_and_shown(found, scenes):
    output, result, rows = found
    assert (output / "exclude.txt").read_text().splitlines() == [*LEFT_OUT]
    assert result["num_images"] == 24 and result["num_left_out"] == 4 and result["num_clusters"] == 3
    assert result["largest_cluster"] == 3 and result["num_identical_files"] == 0 and result["num_unreadable"] == 0
    assert result["calibration"]["different"] < result["similarity"] < result["calibration"]["altered_median"]
    clusters = [[row for row in rows if row["cluster"] == number] for number in ("1", "2", "3")]
    assert [[row["file_name"] for row in cluster] for cluster in clusters] == [
        ["05.png", SCRIPT_NAME, "cropped.png"],
        ["07.png", "same.png"],
        ["large.png", "03.png"],
    ]
    assert all([row["kept"] for row in cluster] == ["1", "0", "0"][: len(cluster)] for cluster in clusters)
    assert (rows[5]["width"], rows[5]["height"], rows[5]["sample_id"]) == ("96", "80", "20")
    assert all(result["similarity"] < float(row["similarity"]) <= 1 for row in rows)
    page = (output / "dedup.html").read_text()
    assert page.count("<figure") == 7 == page.count("data:image/") and page.count("class=kept") == 3
    assert "<script" not in page and "&lt;script&gt;" in page and "<svg" in page
    assert not re.search(r'(src|href)="(?!data:)', page.replace("xlink:href", "").split("<section")[1])


def test_rows_of_one_file_are_listed_by_their_numbers(scenes, tmp_path):
    folder = shutil.copytree(scenes, tmp_path / "pictures")
    (folder / "metadata.jsonl").write_text(
        (scenes / "metadata.jsonl").read_text() + '\n{"file_name": "00.png", "text": "again"}'
    )
    output = tmp_path / "out"
    result, _ = deduplicated(folder, output, "--similarity", "0.9999", "--max_shown", "1")
    assert (output / "exclude.txt").read_text().splitlines() == [SCRIPT_NAME, "same.png", "24"]
    assert result["similarity"] == 0.9999 and result["calibration"] is None and result["num_identical_files"] == 1
    assert "1 of 3 clusters" in (output / "dedup.html").read_text()


def test_rows_of_a_prepared_set_are_shown_by_their_names_and_listed_by_their_ids(scenes, tmp_path):
    assert main(["prepare", str(scenes), "--output", str(tmp_path / "prepared")]) == 0
    _, rows = deduplicated(tmp_path / "prepared", tmp_path / "out", "--similarity", "0.9999")
    assert [row["file_name"] for row in rows if row["kept"] == "0"] in ([SCRIPT_NAME, "same.png"], ["same.png"])
    listed = (tmp_path / "out" / "exclude.txt").read_text().splitlines()
    assert sorted(listed) == sorted(row["sample_id"] for row in rows if row["kept"] == "0")
    assert "<b>same.png</b><br>a red 23<br>" in (tmp_path / "out" / "dedup.html").read_text()


def test_a_set_without_duplicates_says_so(scenes, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for row in range(NUMBER):
        shutil.copy(scenes / f"{row:02d}.png", folder)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.pdf").write_bytes(b"%PDF")  # no image that cannot be read
    result, rows = deduplicated(folder, tmp_path / "out", "--descriptor", "pixel")
    assert rows == [] and result["num_left_out"] == 0 and result["num_unreadable"] == 1
    assert result["descriptor"]["descriptor"] == "pixel" and (tmp_path / "out" / "exclude.txt").read_text() == ""
    page = (tmp_path / "out" / "dedup.html").read_text()
    assert "There are no near duplicates." in page and "Cannot be read: broken.png." in page


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--similarity", "2"], "--similarity 2.0: must be from 0 to 1"),
        (["--max_shown", "0"], "--max_shown 0"),
        (["--descriptor", "dtc"], "--descriptor dtc: neither a known name nor a file"),
        (["--output", "{scenes}/out"], "would get into"),
        (["--train", "{scenes}/absent"], "absent"),
    ],
)
def test_wrong_use_is_told_in_a_line(scenes, tmp_path, capsys, flags, message):
    given = {"--train": str(scenes), "--output": str(tmp_path / "out"), "--feature_cache": "none"}
    given[flags[0]] = flags[1].format(scenes=scenes)
    assert main(["dedup", *(word for pair in given.items() for word in pair)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


PLAIN = ("--mitigation=none", "--max_train_steps=2", "--report_to=none")


def used_rows(run):
    return pq.read_table(RunFolder(run).training_rows_file)["sample_id"].to_pylist()


@pytest.fixture(scope="module")
def excluded(base, scenes, found, tmp_path_factory):
    """A run without the rows that the command listed."""
    flags = train_flags(base, scenes, *PLAIN, f"--exclude_rows={found[0] / 'exclude.txt'}")
    return train_here(flags, tmp_path_factory.mktemp("run") / "excluded")


def test_excluded_rows_are_not_trained_on(base, scenes, excluded, tmp_path):
    """The weights are those of a training on the other rows, and evaluation compares with these."""
    assert used_rows(excluded) == [row for row in range(24) if row not in LEFT_OUT.values()]
    rest = shutil.copytree(scenes, tmp_path / "rest")
    lines = (scenes / "metadata.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["file_name"] not in LEFT_OUT]
    (rest / "metadata.jsonl").write_text("\n".join(kept))
    other = train_here(train_flags(base, rest, *PLAIN), tmp_path / "other")
    assert unet_bytes(other) == unet_bytes(excluded)
    compared = training_set(excluded)
    assert not set(compared.images.names) & set(LEFT_OUT) and len(compared.images) == 20 and not compared.warnings
    record = RunFolder(excluded).training_set_file.read_text()
    assert json.loads(record)["num_left_out"] == 4 and not any(name in record for name in LEFT_OUT)
    write_card_of_records(RunFolder(excluded), "me/model")
    assert "left out (excluded, near duplicates) | 4 |" in RunFolder(excluded).card_file.read_text()


def test_training_leaves_out_what_the_command_shows(base, scenes, found, excluded, tmp_path, caplog, monkeypatch):
    """And a resumed run takes the threshold from its checkpoint."""
    flags = train_flags(base, scenes, *PLAIN, "--deduplicate=near", "--checkpointing_steps=1")
    run = train_here(flags, tmp_path / "run", stop_at=1)
    assert "20 are kept, 4 are near duplicates of these" in caplog.text and "1 of them exact ones" in caplog.text
    assert RunFolder(run).config()["deduplicate_similarity"] == found[1]["similarity"]
    monkeypatch.setattr(hashes, "calibrate", None)
    run = train_here([*flags, "--resume_from_checkpoint=latest"], run)
    assert sorted(used_rows(run)) == used_rows(excluded) and unet_bytes(run) == unet_bytes(excluded)
    RunFolder(run).training_rows_file.unlink()  # as of a model that comes from the Hub
    assert recorded_training(run).selection.deduplicate_similarity == found[1]["similarity"]
    compared = training_set(run, str(scenes))
    assert len(compared.images) == 20 and not compared.warnings


def test_all_processes_train_on_what_the_main_one_found_and_raise_what_it_raises(base, scenes, found, monkeypatch):
    """The others decode nothing for it."""
    sent, broadcast = [], {True: lambda answer, group: sent.append(answer)}
    broadcast[False] = lambda answer, group: answer.__setitem__(slice(None), sent.pop(0))

    def loaded(is_main, folder=scenes):
        """Of the main process first, then of the other."""
        PartialState()  # what the log asks for
        process = SimpleNamespace(is_main_process=is_main, num_processes=2)
        monkeypatch.setattr(processes.dist, "broadcast_object_list", broadcast[is_main])
        settings = parse_flags(train_flags(base, folder, *PLAIN, "--deduplicate=near"))
        rows = training_rows.load_rows(settings, Captions("text", None, None), process)
        return settings.deduplicate_similarity, rows.training["sample_id"][:], rows.left_out.tolist()

    monkeypatch.setattr(processes.dist, "new_group", lambda **about: "group")
    of_main = loaded(True)
    with monkeypatch.context() as context:
        context.setattr(training_rows, "described", None)
        assert loaded(False) == of_main
    assert of_main[0] == found[1]["similarity"] and len(of_main[1]) == 20 and not sent

    def fails(*about, **more):
        raise UsageError("row 1: the image does not decode")

    monkeypatch.setattr(training_rows, "described", fails)
    for is_main in (True, False):
        with pytest.raises(UsageError, match="row 1: the image does not decode"):
            loaded(is_main)


def test_a_near_duplicate_is_not_held_out(base, scenes, tmp_path):
    flags = train_flags(base, scenes, *PLAIN, "--deduplicate=near", "--heldout_share=0.3", "--monitor_every=9")
    run = train_here(flags, tmp_path / "run")
    heldout = {row["sample_id"] for row in training_set(run).heldout.rows}
    assert len(heldout) == 6 and heldout | set(used_rows(run)) == set(range(24)) - set(LEFT_OUT.values())
    RunFolder(run).training_rows_file.unlink()
    assert training_set(run, str(scenes)).heldout is None  # which were left out is not uploaded


def load(folder, names, tmp_path, **changes):
    (tmp_path / "rows.txt").write_text(names)
    settings = DataSettings(train_data_dir=str(folder), exclude_rows=str(tmp_path / "rows.txt"), **changes)
    return load_training_rows(settings, Captions("text", None, None))


def test_rows_are_excluded_by_name_or_number_before_any_are_drawn(scenes, tmp_path):
    rows = load(scenes, "\ufeff00.png\r\n\r\n  21 \r\n", tmp_path)
    assert rows["sample_id"][:] == [*range(1, 21), 22, 23]
    drawn = load(scenes, "00.png\n", tmp_path, max_train_samples=23, seed=1)
    assert sorted(drawn["sample_id"][:]) == [*range(1, 24)]


def test_what_is_excluded_may_be_bad(scenes, tmp_path):
    folder = shutil.copytree(scenes, tmp_path / "pictures")
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    lines[0] = json.dumps({"file_name": "00.png"})
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    (folder / "01.png").write_bytes(b"no image")
    assert len(load(folder, "00.png\n1", tmp_path)) == 22
    with pytest.raises(UsageError, match=r"row 1 \(.*01.png\): the image does not decode"):
        load(folder, "0", tmp_path)
    with pytest.raises(UsageError, match=r"row 0 has no caption in column 'text' \(00.png\)"):
        load(folder, "01.png", tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("00.png\n03.pgn", r"`exclude_rows` .*rows.txt: line 2: the training set has no row 03.pgn; did you mean 0"),
        ("24", r"line 1: the training set has no row 24"),
        ("\n".join(map(str, range(24))), r"names all 24 rows of the training set: nothing is left to train on"),
    ],
)
def test_a_line_that_names_no_row_is_an_error(scenes, tmp_path, names, message):
    with pytest.raises(UsageError, match=message):
        load(scenes, names, tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--deduplicate_similarity=0.7"], "`deduplicate_similarity` 0.7: is for `deduplicate` near"),
        (["--deduplicate=near", "--deduplicate_similarity=0"], "`deduplicate_similarity` 0.0: must be over 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(scenes, flags, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        parse_flags(["--pretrained_model_name_or_path=m", f"--train_data_dir={scenes}", *flags])
