"""Tensors in files, one at a time: safetensors' own format, read as long as a file is open, whole or not there."""

import errno
import os
import zlib

import pytest
import torch
from safetensors.torch import load_file

from ietagc_diffusers import tensor_files
from ietagc_diffusers.tensor_files import Disk, HostMemory, TensorFile, write

KINDS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)


def tensors():
    made = {str(kind): (torch.arange(24).view(2, 3, 4) * 7 % 5).to(kind) for kind in KINDS}
    return made | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "turned": torch.arange(6.0).view(2, 3).T}


def test_the_format_is_that_of_safetensors(tmp_path):
    file = write(tmp_path / "a.safetensors", tensors(), metadata={"format": "pt"})
    for read in (file, load_file(tmp_path / "a.safetensors"), TensorFile(tmp_path / "a.safetensors")):
        assert read.keys() == tensors().keys()
        for name, wanted in tensors().items():
            assert read[name].dtype == wanted.dtype and torch.equal(read[name], wanted)
    assert file.size == (tmp_path / "a.safetensors").stat().st_size


def test_the_checksum_is_that_of_the_file(tmp_path):
    """Of small tensors and of large ones, whose checksum is made beside the writing."""
    made = tensors() | {"large": torch.randn(200_000), "last": torch.ones(3)}
    assert write(tmp_path / "a", made).crc == zlib.crc32((tmp_path / "a").read_bytes())


def test_one_tensor_at_a_time_is_asked_for_and_let_go(tmp_path):
    """Values are made as they are written: the next only once the one before is done with."""
    alive = []

    def values():
        for number in range(5):
            tensor = torch.full((1000,), float(number))
            alive.append(tensor.untyped_storage()._weak_ref())
            yield str(number), tensor
            del tensor
            assert sum(not torch.UntypedStorage._expired(ref) for ref in alive) <= 1

    like = {str(number): torch.empty(1000, device="meta") for number in range(5)}
    file = write(tmp_path / "a", like, values())
    assert [file[str(number)][0].item() for number in range(5)] == [0, 1, 2, 3, 4]


def test_an_open_file_is_read_whatever_becomes_of_its_name(tmp_path):
    place = Disk(tmp_path / "waiting")
    old = place.keep("x", {"a": torch.ones(3)}, {"a": torch.ones(3)}.items())
    new = place.keep("x", {"a": torch.ones(3)}, {"a": torch.zeros(3)}.items(), old)
    place.clear()
    assert old["a"].tolist() == [1, 1, 1] and new["a"].tolist() == [0, 0, 0]


def test_a_process_that_begins_leaves_the_folder_in_which_others_make_theirs(tmp_path):
    mine, other = (Disk(tmp_path / "waiting" / f"process-{number}") for number in (0, 1))
    mine.folder.parent.mkdir()
    mine.clear()
    assert mine.folder.parent.is_dir()  # where the other one is about to make its folder
    other.keep("x", {"a": torch.ones(3)}, {"a": torch.ones(3)}.items())
    mine.close()
    assert other.folder.is_dir()
    other.close()
    assert not mine.folder.parent.exists()


def test_a_refused_write_leaves_the_old_file(tmp_path, monkeypatch):
    write(tmp_path / "a", {"x": torch.ones(2)})

    def refuse(*paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_files.os, "replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "a", {"x": torch.zeros(2)})
    assert TensorFile(tmp_path / "a")["x"].tolist() == [1, 1]
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_known(tmp_path, bad):
    wrong = torch.zeros(100)
    wrong[57] = bad
    assert write(tmp_path / "a", {"good": torch.ones(3), "wrong": wrong}).not_finite == "wrong"
    assert write(tmp_path / "a", {"good": torch.ones(3), "numbers": torch.arange(3)}).not_finite is None


@pytest.mark.parametrize("make", [lambda folder: HostMemory(), Disk], ids=["host", "disk"])
def test_places_keep_what_they_were_given(tmp_path, make):
    place, live = make(tmp_path), {"a": torch.ones(3)}
    kept = place.keep("x", live, live.items())
    live["a"].zero_()
    assert kept["a"].tolist() == [1, 1, 1]
    again = place.keep("x", live, live.items(), kept)
    assert again["a"].tolist() == [0, 0, 0]
    adopted = place.adopt("y", write(tmp_path / "file", {"b": torch.ones(1)}))
    (tmp_path / "file").unlink()
    assert adopted["b"].tolist() == [1]


def test_files_are_copied_where_links_are_refused(tmp_path, monkeypatch):
    def refuse(*paths):
        raise OSError(errno.EPERM, "Operation not permitted")

    (tmp_path / "a").write_text("content")
    monkeypatch.setattr(tensor_files.os, "link", refuse)
    tensor_files.link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "content"
