"""Models are compared on training images that all of them were trained on, and on held-out images that none was."""

import json
import shutil
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import write_folder

from ietagc_diffusers.cli import main
from ietagc_diffusers.data.contents import contents
from ietagc_diffusers.data.hashes import pixel_hashes
from ietagc_diffusers.data.rows import held_out
from ietagc_diffusers.data.sources import read_source
from ietagc_diffusers.eval import front, retrigger
from ietagc_diffusers.eval.image_sets import training_settings


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """The folder that runs take their training images from: 20 pictures, the first two of which have two files."""
    return write_folder(tmp_path_factory.mktemp("compared") / "pool", 20, copies=(0, 1))


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("compared") / "others", 4, seed=3)


@pytest.fixture
def run(tmp_path):
    """The folder of a run that has only records: of the rows of a folder that it was trained on."""

    def recorded(name, folder, kept=None, **settings):
        rows = read_source(training_settings(folder), ("text",)).rows
        rows = rows.select(range(len(rows)) if kept is None else kept)
        found = contents(rows, "image", ("text",))
        given = {"train_data_dir": str(folder), "image_column": "image", "caption_column": "text", "resolution": 16}
        given |= {"alpha": "white", "pretrained_model_name_or_path": "base", **settings}
        records = tmp_path / name / "ietagc"
        records.mkdir(parents=True)
        (records / "config.yaml").write_text(yaml.safe_dump(given))
        hashes = {"num_rows": len(rows), "images_hash": found.images, "captions_hash": found.captions}
        (records / "training_set.json").write_text(json.dumps(given | hashes))
        pq.write_table(pa.table({"sample_id": rows["sample_id"]}), records / "training_rows.parquet")
        return records.parent

    return recorded


@pytest.fixture
def with_share(run, pool):
    """A run that holds a share of the images out, by a seed."""
    hashes = pixel_hashes(read_source(training_settings(pool)).rows, "image")

    def of_seed(seed):
        kept = np.flatnonzero(~held_out(hashes, 0.25, seed))
        return run(f"seed{seed}", pool, kept, heldout_share=0.25, seed=seed), kept

    return of_seed


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """The names of training and of held-out images that the front compares runs on, or None where it refuses to."""
    asked = []
    found = types.SimpleNamespace(markdown="")
    monkeypatch.setattr(front, "front", lambda runs, *sets, **_: asked.append(sets[:2]) or found)

    def by_front(*runs, heldout=None):
        flags = [word for number, folder in enumerate(runs) for word in ("--run", f"{number}={folder}")]
        flags += [] if heldout is None else ["--heldout", str(heldout)]
        asked.clear()
        assert main(["front", *flags, "--output", str(tmp_path / "front")]) == (0 if asked else 2)
        return [set(images.names) for images in asked[0]] if asked else None

    return by_front


def names_of(pool, kept=None):
    rows = [json.loads(line)["file_name"] for line in (pool / "metadata.jsonl").read_text().splitlines()]
    return {rows[row] for row in (range(len(rows)) if kept is None else kept)}


def test_what_one_seed_held_out_and_another_was_trained_on_is_not_held_out(with_share, shown, capsys):
    (first, kept), (second, also) = with_share(0), with_share(1)
    assert shown(first)[0].isdisjoint(shown(first)[1])
    assert shown(first, second) is None
    said = capsys.readouterr().err
    number = len(set(also) - set(kept))
    assert (
        f"--heldout: {number} of the " in said and f"that {first} held out" in said and f"images of {second} (" in said
    )
    assert "train runs that are to be compared with one `heldout_dir`" in said


def test_seeds_that_held_out_others_are_compared_on_what_both_were_trained_on(with_share, others, pool, shown, capsys):
    (first, kept), (second, also) = with_share(0), with_share(1)
    assert shown(first, second, heldout=others) == [names_of(pool, set(kept) & set(also)), names_of(others)]
    both = len(set(kept) & set(also))
    assert f"models are compared on the {both} that all know" in capsys.readouterr().err


def test_a_run_on_the_same_images_without_their_duplicates_is_compared_on_all(run, pool, others, shown, capsys):
    whole = run("whole", pool)
    once = run("once", pool, [row for row in range(22) if row not in (1, 3)], deduplicate="exact")
    assert shown(whole, once, heldout=others) == [names_of(pool), names_of(others)]
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("order", [1, -1])
def test_a_run_on_fewer_images_is_compared_on_these(run, pool, others, shown, tmp_path, capsys, order):
    runs = [run("whole", pool), run("few", pool, [4, 7, 9], max_train_samples=3, seed=0)][::order]
    assert shown(*runs, heldout=others) == [names_of(pool, [4, 7, 9]), names_of(others)]
    said = capsys.readouterr().err
    assert ("not on 19 of them: models are compared on the 3 that all know" in said) == (order == 1)
    # A picture that one of them was trained on is no held-out one, though it is not shown as a training image.
    shutil.copytree(others, tmp_path / "mixed")
    shutil.copy(pool / "010_0.png", tmp_path / "mixed" / "known.png")
    assert shown(*runs, heldout=tmp_path / "mixed") is None
    said = capsys.readouterr().err
    assert f"1 of its 5 pictures are also among the training images of {tmp_path / 'whole'} (known.png)" in said


def test_runs_on_different_images_are_not_compared(run, pool, others, shown, tmp_path, capsys):
    another = write_folder(tmp_path / "another", 5, seed=8)
    first, second = run("first", pool), run("second", another)
    assert shown(first, second, heldout=others) is None
    assert f"--train: {first}, {second} have 0 training images in common" in capsys.readouterr().err


def test_models_are_searched_for_images_that_all_were_trained_on(
    with_share, run, pool, others, tmp_path, capsys, monkeypatch
):
    asked = []
    monkeypatch.setattr(retrigger, "retrigger", lambda models, training, heldout, *_: asked.append(training.images))
    monkeypatch.setattr(retrigger, "table", lambda result: "")
    (first, kept), (second, also) = with_share(0), with_share(1)
    flags = ["retrigger", "--model", f"a={first}", "--compare", f"b={second}", "--descriptor", "pixel"]
    flags += ["--output", str(tmp_path / "out")]
    assert main(flags) == 2 and not asked
    assert "that a held out are among the training images of b" in capsys.readouterr().err
    assert main([*flags, "--heldout", str(others)]) == 0
    assert set(asked[0].names) == names_of(pool, set(kept) & set(also))
