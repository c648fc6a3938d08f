"""The same images and captions as sources of every kind."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def picture(number, size=12, kind="PNG"):
    """The bytes of a picture of noise."""
    pixels = np.random.default_rng(number).integers(0, 256, (size, size + 1, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def some_items(number, several=False):
    """(key, image, captions) of each."""
    return [
        (f"{n:09d}", picture(n), [f"picture {n}, caption {c}" for c in range(3 if several else 1)])
        for n in range(number)
    ]


def write_images(folder, items):
    folder.mkdir(parents=True, exist_ok=True)
    for key, image, _ in items:
        (folder / f"{key}.png").write_bytes(image)
    return folder


def write_tar(path, files):
    """A tar of (name, content); a ``TarInfo`` in the place of a name is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = member.size or len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def tar_files(items):
    return [
        file
        for key, image, captions in items
        for file in ((f"{key}.png", image), (f"{key}.json", json.dumps({"captions": captions, "width": 12}).encode()))
    ]


def folder(path, items):
    write_images(path, items)
    rows = [{"file_name": f"{key}.png", "captions": captions} for key, _, captions in items]
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def kohya(path, items):
    write_images(path / "10_dog", items)
    for key, _, captions in items:
        (path / "10_dog" / f"{key}.txt").write_text("\n".join(captions))
    return path


def dcr(path, items):
    write_images(path / "train" / "images_large", items)
    captions = {f"/fs/other/machine/train/images_large/{key}.png": captions for key, _, captions in items}
    (path / "laion_combined_captions.json").write_text(json.dumps(captions))
    (path / "train" / "weights_0.05_seed42.pickle").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    return path


def fetched_files(path, items):
    """img2dataset's folders, of two pictures each."""
    for start in range(0, len(items), 2):
        shard = path / f"{start // 2:05d}"
        write_images(shard, items[start : start + 2])
        for key, _, captions in items[start : start + 2]:
            (shard / f"{key}.txt").write_text("\n".join(captions))
            (shard / f"{key}.json").write_text(json.dumps({"caption": captions[0], "status": "success"}))
        pq.write_table(pa.table({"key": [key for key, _, _ in items[start : start + 2]]}), f"{shard}.parquet")
        (path / f"{shard.name}_stats.json").write_text("{}")
    return path


def fetched_tars(path, items):
    for start in range(0, len(items), 2):
        write_tar(path / f"{start // 2:05d}.tar", tar_files(items[start : start + 2]))
        pq.write_table(pa.table({"url": ["https://x/y.jpg"]}), path / f"{start // 2:05d}.parquet")
    return path


def fetched_parquet(path, items, rows=3):
    path.mkdir()
    keys, images, captions = zip(*items, strict=True)
    table = pa.table({"url": ["https://x/y.jpg"] * len(keys), "key": keys, "captions": captions, "jpg": images})
    pq.write_table(table, path / "00000.parquet", row_group_size=rows)
    return path


def hub_parquet(path, items):
    """As `datasets` stores pictures."""
    (path / "data").mkdir(parents=True)
    for start in range(0, len(items), 3):
        some = items[start : start + 3]
        images = [{"bytes": image, "path": f"{key}.png"} for key, image, _ in some]
        table = pa.table({"image": images, "text": [captions for _, _, captions in some]})
        pq.write_table(table, path / "data" / f"train-{start // 3:05d}-of-00002.parquet")
    return path


def path_parquet(path, items):
    write_images(path / "pictures", items)
    paths = [
        str(path / "pictures" / f"{key}.png") if n % 2 else f"pictures/{key}.png" for n, (key, _, _) in enumerate(items)
    ]
    pq.write_table(
        pa.table({"image_path": paths, "caption": [captions for _, _, captions in items]}), path / "x.parquet"
    )
    return path / "x.parquet"


# name: (writes it, what it is recognised as, the lines of its text files)
KINDS = {
    "folder": (folder, "folder", "whole"),
    "kohya": (kohya, "kohya", "each"),
    "dcr": (dcr, "dcr", "whole"),
    "fetched files": (fetched_files, "img2dataset", "each"),
    "fetched tars": (fetched_tars, "webdataset", "whole"),
    "fetched parquet": (fetched_parquet, "parquet", "whole"),
    "parquet of the Hub": (hub_parquet, "parquet", "whole"),
    "parquet of paths": (path_parquet, "parquet", "whole"),
}


def read_rows(folder):
    """All rows of a prepared set, with their split, in the order of the files."""
    return [
        row | {"split": split}
        for split in ("train", "test")
        for path in sorted((folder / split).glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]


def files_of(folder):
    """The content of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
