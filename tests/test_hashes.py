"""Images are hashed by what is stored and by what they show, and decoded once."""

import numpy as np
import pytest
from conftest import write_folder
from PIL import Image

from ietagc_diffusers import UsageError
from ietagc_diffusers.data import DataSettings, hashes, load_training_rows
from ietagc_diffusers.data.rows import decode


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "pictures", 9, copies=(0, 3))


def load(folder, **changes):
    return load_training_rows(DataSettings(train_data_dir=str(folder), **changes))


@pytest.fixture
def decoded(monkeypatch):
    """The rows that were decoded."""
    seen = []
    monkeypatch.setattr(hashes, "decode", lambda rows, column, row: seen.append(row) or decode(rows, column, row))
    return seen


def test_stored_hashes_are_of_the_content_wherever_it_lies(folder, tmp_path):
    rows = load(folder)
    found = hashes.stored_hashes(rows, "image")
    assert len(found) == 11 and len(set(found)) == 9
    (tmp_path / "parquet").mkdir()
    rows.to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    embedded = load_training_rows(DataSettings(dataset_name=str(tmp_path / "parquet")))
    assert hashes.stored_hashes(embedded, "image") == found


def test_an_image_is_decoded_once_whatever_the_run(folder, tmp_path, decoded):
    cache = tmp_path / "cache" / "hashes.sqlite"
    first = hashes.pixel_hashes(load(folder), "image", cache)
    assert len(decoded) == 9  # files of the same bytes once
    again = hashes.pixel_hashes(load(folder).select([10, 2, 3]), "image", cache)
    assert len(decoded) == 9
    assert len(np.unique(again)) == len(np.unique(first[[10, 2, 3]])) == 3


def test_a_changed_file_is_decoded_again(folder, tmp_path, decoded):
    cache = tmp_path / "hashes.sqlite"
    before = hashes.pixel_hashes(load(folder), "image", cache)
    Image.open(folder / "001_0.png").save(folder / "000_1.png")  # row 1 now shows what row 2 shows
    after = hashes.pixel_hashes(load(folder), "image", cache)
    assert before[0] == before[1] != before[2]
    assert after[0] != after[1] == after[2]


def test_the_same_pixels_in_another_file_are_the_same_image(folder):
    Image.open(folder / "000_0.png").save(folder / "000_1.png", compress_level=0)
    rows = load(folder)
    stored = hashes.stored_hashes(rows, "image")
    pixels = hashes.pixel_hashes(rows, "image")
    assert stored[0] != stored[1] and pixels[0] == pixels[1]


def test_a_broken_image_is_named_or_different_from_all_others(folder, tmp_path):
    for name in ("000_0.png", "000_1.png"):
        (folder / name).write_bytes(b"no image")
    rows, cache = load(folder, on_bad_sample="skip"), tmp_path / "hashes.sqlite"
    with pytest.raises(UsageError, match=r"row 0 .*does not decode"):
        hashes.pixel_hashes(rows, "image", cache)
    found = hashes.pixel_hashes(rows, "image", cache, allow_bad=True)
    assert len(np.unique(found)) == 10  # 7 images, one of them twice, and two broken ones


def test_a_cache_that_cannot_be_written_is_done_without(folder, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    found = hashes.pixel_hashes(load(folder), "image", tmp_path / "file" / "hashes.sqlite")
    assert len(np.unique(found)) == 9
