"""Sources that are damaged, or that mean harm: what can be used is, the rest is named, and nothing else happens."""

import bz2
import gzip
import io
import json
import lzma
import sys
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sources
from conftest import write_folder
from fake_hub import TOKEN
from sources import files_of, picture, read_rows, some_items, tar_files, write_tar

from ietagc_diffusers.cli import main
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.prepare import Options, items, prepare, publish
from ietagc_diffusers.prepare.items import (
    BAD_NAME,
    BAD_TEXT,
    BROKEN,
    DAMAGED,
    LARGE,
    NO_CAPTION,
    NO_FILE,
    NO_IMAGE,
    OTHER_SPLIT,
    PICKLE,
    UNSUPPORTED,
)

EVIL = b"cos\nsystem\n(S'touch evil'\ntR."  # a pickle that would run a command


def prepared(source, output, **options):
    report = prepare(source, output, Options(**options), progress=False)
    return report, {why: about["count"] for why, about in report["left_out"].items()}


def special(name, kind, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


def test_a_tar_is_only_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image, text = picture(1), b"a caption"
    source = write_tar(
        tmp_path / "in" / "a.tar",
        [
            ("../../up.png", image), ("../../up.txt", text),
            ("/etc/absolute.png", picture(2)), ("/etc/absolute.txt", text),
            special("link.png", tarfile.SYMTYPE, "/etc/passwd"),
            special("hard.png", tarfile.LNKTYPE, "../../up.png"),
            special("device.png", tarfile.CHRTYPE), special("pipe.png", tarfile.FIFOTYPE),
            ("evil.pkl", EVIL), ("evil.pyd", EVIL), ("evil.PTH", EVIL),
            ("n" * 1001 + ".png", image), ("clip.mp4", b"x"), ("mask.seg.png", image),
            ("\udcff\n.png", picture(3)), ("\udcff\n.txt", text),
        ],
    )  # fmt: skip
    before = files_of(tmp_path)
    _, left_out = prepared(source, tmp_path / "out")
    assert left_out == {NO_FILE: 4, PICKLE: 3, BAD_NAME: 1, UNSUPPORTED: 2}
    assert [row["image"]["bytes"] for row in read_rows(tmp_path / "out")] == [image, picture(2), picture(3)]
    assert {path for path in files_of(tmp_path) if not path.startswith("out/")} == set(before)
    assert (tmp_path / "out" / "report.md").read_text(encoding="ascii").count("\n") < 25  # names do not break lines


def end_of(name, tar):
    """Where a tar's member of this name ends."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        member = opened.getmember(name)
        return member.offset_data + member.size


@pytest.mark.parametrize("ending", ["inside an image", "after a member", "without its mark", "a damaged header"])
def test_of_a_tar_that_is_cut_the_whole_part_is_kept(tmp_path, ending):
    whole = write_tar(tmp_path / "whole.tar", tar_files(some_items(6))).read_bytes()
    place = end_of("000000003.png", whole)
    cut = {
        "inside an image": whole[: place - 10],
        "after a member": whole[: -(-place // 512) * 512],
        "without its mark": whole[: -(-end_of("000000005.json", whole) // 512) * 512],
        "a damaged header": whole[: -(-place // 512) * 512] + b"\xff" * 512 + whole[-(-place // 512) * 512 + 512 :],
    }[ending]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(cut)
    write_tar(tmp_path / "in" / "1.tar", tar_files([("last", picture(9), ["last"])]))
    report, left_out = prepared(tmp_path / "in", tmp_path / "out")
    kept = 6 if ending == "without its mark" else 3
    captions = [row["text"] for row in read_rows(tmp_path / "out")]
    assert captions == [f"picture {n}, caption 0" for n in range(kept)] + ["last"]
    assert left_out[DAMAGED] == 1 and report["left_out"][DAMAGED]["first"][0].startswith("0.tar: ")
    assert set(left_out) <= {DAMAGED, NO_CAPTION}  # the image whose caption is gone


def test_a_compressed_tar_is_the_same_and_may_be_cut(tmp_path):
    whole = write_tar(tmp_path / "0.tar", tar_files(some_items(30)))
    for number, module in enumerate((gzip, bz2, lzma), 1):
        (tmp_path / f"{number}.tar.gz").write_bytes(module.compress(whole.read_bytes()))
    zipped = gzip.compress(whole.read_bytes())
    (tmp_path / "4.tgz").write_bytes(zipped[: len(zipped) // 2])
    damaged, rows = [], []
    for number, source in enumerate(sorted(tmp_path.iterdir())):
        damaged.append(DAMAGED in prepared(source, tmp_path / f"out-{number}")[1])
        rows.append(read_rows(tmp_path / f"out-{number}"))
    assert damaged == [False, False, False, False, True]
    assert rows[0] == rows[1] == rows[2] == rows[3] and rows[4] == rows[0][: len(rows[4])] and len(rows[4]) >= 10


def header(name, size, kind):
    """A tar header that claims a size, which may be negative."""
    made = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    made[156:157] = kind
    made[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    made[148:156] = b" " * 8
    made[148:156] = b"%06o\0 " % sum(made)
    return bytes(made)


@pytest.mark.parametrize("size", [-512, -1024, 1 << 40, (1 << 62)])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_size_that_is_a_lie_ends_the_tar_and_nothing_else(tmp_path, size, kind):
    whole = write_tar(tmp_path / "good.tar", tar_files(some_items(2))).read_bytes()
    place = -(-end_of("000000001.json", whole) // 512) * 512
    (tmp_path / "in.tar").write_bytes(whole[:place] + header("lie.png", size, kind) + b"\0" * 4096)
    report, left_out = prepared(tmp_path / "in.tar", tmp_path / "out")
    assert report["rows"] == {"train": 2} and left_out[DAMAGED] == 1
    assert set(left_out) <= {DAMAGED, LARGE}


def test_a_header_that_would_fill_the_memory_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(items, "MAX_BYTES", 1 << 20)
    good = write_tar(tmp_path / "good.tar", tar_files(some_items(1))).read_bytes()
    place, size = -(-end_of("000000000.json", good) // 512) * 512, 1 << 22
    bomb = good[:place] + header("x", size, tarfile.XHDTYPE) + bytes(size) + good[place:]
    (tmp_path / "in.tar.gz").write_bytes(gzip.compress(bomb))
    report, _ = prepared(tmp_path / "in.tar.gz", tmp_path / "out")
    assert report["rows"] == {"train": 1} and f"a header of {size} bytes" in str(report["left_out"][DAMAGED])


def test_texts_beside_images_that_are_none(tmp_path):
    deep = b"[" * (sys.getrecursionlimit() * 20)
    texts = {"deep.json": deep, "cut.json": b'{"caption": "x', "list.json": b'["a"]', "odd.json": b'{"caption": 5}',
             "bytes.txt": b"caf\xe9 \xff", "class.cls": b"9" * 5000, "null.json": b'{"caption": null}',
             "good.json": b'{"caption": "fine", "captions": ["fine", 3, null, " "]}'}  # fmt: skip
    files = [
        file
        for number, (name, content) in enumerate(texts.items())
        for file in ((f"{name.partition('.')[0]}.png", picture(number)), (name, content))
    ]
    report, left_out = prepared(write_tar(tmp_path / "a.tar", files), tmp_path / "out")
    assert [row["captions"] for row in read_rows(tmp_path / "out")] == [["fine"]]
    assert left_out == {BAD_TEXT: 4, NO_CAPTION: 7}
    assert "not UTF-8" in str(report["left_out"][BAD_TEXT]["first"])


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a.png": ', '["a.png"]', "{}", '"a"'])
def test_a_captions_file_that_is_none_is_refused(tmp_path, text):
    source = sources.write_images(tmp_path / "source", some_items(2))
    (tmp_path / "captions.json").write_text(text)
    with pytest.raises(UsageError, match=r"`(captions|source)`"):
        prepared(source, tmp_path / "out", captions=str(tmp_path / "captions.json"))
    assert not list(tmp_path.glob("out/*"))


def test_parquet_with_addresses_only_is_refused(tmp_path):
    for number, table in enumerate(({"URL": ["https://x/a.jpg"], "TEXT": ["a"]}, {"image": ["https://x/a.jpg"]})):
        pq.write_table(pa.table(table), tmp_path / f"{number}.parquet")
        with pytest.raises(UsageError, match=r"addresses of images.*img2dataset"):
            prepared(tmp_path / f"{number}.parquet", tmp_path / "out")


def test_paths_in_parquet_do_not_lead_out_of_their_folder(tmp_path):
    secret = write_folder(tmp_path / "secret", 1)
    inside = sources.write_images(tmp_path / "in" / "pictures", some_items(1))
    (inside / "link.png").symlink_to(next(secret.glob("*.png")))
    paths = ["../../secret/000_0.png", str(secret / "000_0.png"), "link.png", "000000000.png", "none.png", None, "\0"]
    table = pa.table({"image_path": paths, "text": ["a caption"] * len(paths)})
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    _, left_out = prepared(tmp_path / "in" / "a.parquet", tmp_path / "out", images=str(inside))
    assert [row["image"]["bytes"] for row in read_rows(tmp_path / "out")] == [picture(0)]
    assert left_out == {BAD_NAME: 4, BROKEN: 1, NO_IMAGE: 1}


def test_damaged_parquet_does_not_stop_the_rest(tmp_path):
    source = sources.hub_parquet(tmp_path / "source", some_items(6))
    second = sorted((source / "data").iterdir())[1]
    content = bytearray(second.read_bytes())
    content[100:400] = b"\xff" * 300
    (source / "data" / "train-00002.parquet").write_bytes(b"PAR1 no parquet")
    pq.write_table(pa.table({"other": [1]}), source / "data" / "train-00003.parquet")
    second.write_bytes(content)
    report, left_out = prepared(source, tmp_path / "out")
    assert [row["text"] for row in read_rows(tmp_path / "out")][:3] == [f"picture {n}, caption 0" for n in range(3)]
    assert left_out[DAMAGED] >= 2 and "train-00002.parquet" in str(report["left_out"][DAMAGED])


def test_strings_in_parquet_that_are_no_text(tmp_path):
    texts = pa.array([b"one", b"\xff\xfe", b"three"]).view(pa.string())
    table = pa.table({"image": [picture(n) for n in range(3)], "text": texts, "label": [1, 2, 3]})
    table = table.replace_schema_metadata({"huggingface": '{"info": {"features": {"label": {"_type": "Nonsense"}}}}'})
    pq.write_table(table, tmp_path / "a.parquet")
    _, left_out = prepared(tmp_path / "a.parquet", tmp_path / "out")
    assert left_out == {BAD_TEXT: 1}
    assert [(row["text"], row["label"]) for row in read_rows(tmp_path / "out")] == [("one", 1), ("three", 3)]
    with pytest.raises(UsageError, match="`caption_column` x: not a column"):
        prepared(tmp_path / "a.parquet", tmp_path / "other", caption_column="x")


def test_folders_with_all_that_people_leave_in_them(tmp_path):
    source = sources.kohya(tmp_path / "source", some_items(3))
    inside = source / "10_dog"
    (inside / "000000001.png").write_bytes(picture(1)[:100])
    (inside / "000000002.txt").write_bytes(b"caf\xe9")
    (inside / "new.heic").write_bytes(b"x")
    (inside / "old.ckpt").write_bytes(EVIL)
    (inside / "huge.png").write_bytes(b"")
    with (inside / "huge.png").open("rb+") as file:
        file.truncate(1 << 30)  # of zeros, which take no room
    sources.write_images(source / "test", some_items(2))
    report, left_out = prepared(source, tmp_path / "out")
    assert report["rows"] == {"train": 1}
    assert left_out == {BROKEN: 1, BAD_TEXT: 1, UNSUPPORTED: 1, PICKLE: 1, LARGE: 1, OTHER_SPLIT: 2}


def test_nothing_that_can_be_used_is_told_with_the_reason(tmp_path):
    source = sources.write_images(tmp_path / "source", some_items(2))
    with pytest.raises(UsageError, match="no image can be used, most often because: there is no caption"):
        prepared(source, tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="neither images nor tar or Parquet"):
        prepared(tmp_path / "empty", tmp_path / "out")


def test_a_set_is_uploaded_private_and_without_what_was_left_out(tmp_path, hub, waits, capsys, monkeypatch):
    monkeypatch.setattr(publish, "AT_ONCE", 1)
    files = [*tar_files(some_items(8)), ("secret-name.png", picture(20))]
    source = write_tar(tmp_path / "a.tar", files)
    words = [source, "--output", tmp_path / "out", "--shard_size=0.002", "--push_to_hub=me/set", f"--token={TOKEN}"]
    hub.fail("POST", "commit", (503, {}, "busy"), (400, {}, "no"))
    assert main(["prepare", *map(str, words)]) == 1
    assert "Nothing is lost" in capsys.readouterr().err
    assert main(["prepare", *map(str, words)]) == 0
    uploaded = hub.files("me/set")
    own = {name: content for name, content in files_of(tmp_path / "out").items() if name.endswith(".parquet")}
    assert len(own) >= 2 and {name: uploaded[name] for name in own} == own
    assert set(uploaded) == {*own, "README.md", ".gitattributes"} and hub.private == {"me/set": True}
    assert "path: train/*.parquet" in uploaded["README.md"].decode()
    assert all(b"secret-name" not in body for body in hub.bodies)
    assert not [path for method, path in hub.requests if "models" in path]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["left_out"][NO_CAPTION]["first"] == [
        "secret-name"
    ]
