"""A run that reads its encodings from a cache is the run that computes them, bit for bit."""

import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import COLOURS, launch, train_flags, train_here, unet_bytes, write_folder
from safetensors.torch import load_file, save_file

from ietagc_diffusers import TrainingSettings, UsageError, testing
from ietagc_diffusers.data import latent_cache, load_training_rows
from ietagc_diffusers.data.hashes import stored_hashes
from ietagc_diffusers.data.latent_cache import CachedSamples, cache_samples
from ietagc_diffusers.data.samples import TrainingSamples
from ietagc_diffusers.families import StableDiffusion

FULL = [
    "--num_shards=2", "--steps_per_round=3", "--max_train_steps=12", "--skip_threshold=0.9", "--augment_range=1.3",
    "--bank_buckets=2", "--use_ema", "--random_flip", "--center_crop",
]  # fmt: skip
PLAIN = ["--mitigation=none", "--max_train_steps=9", "--random_flip", "--center_crop"]


@pytest.fixture(scope="module")
def real_base(tmp_path_factory):
    """A tiny base whose latents lie in memory with their channels last, as those of the real size do."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    captions = [f"a {colour} picture" for colour in COLOURS]
    testing.random_pipeline(captions, attention=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "flags",
    [
        FULL,
        pytest.param([*FULL, "--dataloader_num_workers=2"], marks=pytest.mark.slow),
        PLAIN,
        [*PLAIN, "--train_batch_size=23"],  # the epoch's last batch is a single image
        [*PLAIN, "--train_batch_size=1"],
        [*PLAIN, "--train_batch_size=7"],  # 22 images: the last is encoded by itself
        [*PLAIN, "--dataloader_num_workers=2"],
        [*PLAIN, "--caption_mitigation=rt", "--caption_mitigation_probability=0.5", "--embedding_noise=0.1"],
        ["--mitigation=agc", "--max_train_steps=6", "--center_crop", "--wen_threshold=3", "--noise_offset=0.1"],
    ],
    ids=[
        "full",
        "full, workers",
        "plain",
        "a last batch of one",
        "batches of one",
        "filled up",
        "workers",
        "rewritten",
        "wen",
    ],
)
def test_a_cache_does_not_change_a_bit(real_base, pictures, tmp_path, flags):
    flags = train_flags(real_base, pictures, *flags)
    without = train_here(flags, tmp_path / "without")
    cache = f"--cache_latents={tmp_path / 'cache'}"
    made = train_here([*flags, cache], tmp_path / "made")
    read = train_here([*flags, cache], tmp_path / "read")
    assert unet_bytes(without) == unet_bytes(made) == unet_bytes(read)


def test_several_processes_make_a_cache_together(base, pictures, tmp_path):
    flags = train_flags(base, pictures, *FULL)
    without = train_here(flags, tmp_path / "without")
    launch([*flags, f"--cache_latents={tmp_path / 'cache'}"], tmp_path / "with", processes=2)
    assert unet_bytes(without) == unet_bytes(tmp_path / "with")
    parts = [load_file(path)["0.moments"] for path in tmp_path.glob("cache/latents-*/*.safetensors")]
    assert sorted(map(len, parts)) == [11, 11]  # 22 images, each once


def test_a_row_without_image_is_replaced_by_the_same_one(base, tmp_path):
    folder = write_folder(tmp_path / "pictures", 8)
    (folder / "003_0.png").write_bytes(b"no image")
    flags = train_flags(base, folder, *FULL, "--on_bad_sample=skip")
    without = train_here(flags, tmp_path / "without")
    cached = train_here([*flags, f"--cache_latents={tmp_path / 'cache'}"], tmp_path / "cached")
    assert unet_bytes(without) == unet_bytes(cached)
    named = [(path / "ietagc" / "bad_samples.jsonl").read_text() for path in (without, cached)]
    assert named[0] == named[1] and '"sample_id": 3' in named[0]


def test_a_random_crop_is_refused(base, pictures):
    with pytest.raises(UsageError, match=r"`cache_latents`: .* set `center_crop`"):
        TrainingSettings(
            pretrained_model_name_or_path=str(base), train_data_dir=str(pictures), cache_latents="somewhere"
        )


class Bench:
    """A cache of a folder of pictures, made as a run makes it, and a count of what was encoded."""

    def __init__(self, base, pictures, cache):
        self.base, self.pictures, self.cache = base, pictures, cache

    def make(self, batch_size=4, allow_bad=False, **changes):
        settings = TrainingSettings(
            **{
                "pretrained_model_name_or_path": str(self.base),
                "train_data_dir": str(self.pictures),
                "center_crop": True,
                "random_flip": True,
                "resolution": 16,
                "caption_column": "text",
                "on_bad_sample": "skip",  # what is met later is tested here
            }
            | changes
        )
        self.family = StableDiffusion.load(settings)
        condition = self.family.condition(settings, settings.method)
        rows = load_training_rows(settings, condition)
        self.plain = TrainingSamples(rows, "image", self.family.view(settings), condition)
        self.encoded = {"images": 0, "texts": 0}
        objective, keys = self.family.objective, stored_hashes(rows, "image")
        encoder = SimpleNamespace(
            encode_images=self._counted("images", objective.encode_images),
            encode_inputs=self._counted("texts", objective.encode_inputs),
        )
        marks = self.family.encoder_marks()
        return cache_samples(self.plain, self.cache, keys, rows, encoder, marks, batch_size, "cpu", allow_bad=allow_bad)

    def _counted(self, kind, encode):
        def counted(batch):
            self.encoded[kind] += 1
            return encode(batch)

        return counted

    def files(self, kind="latents"):
        return sorted(self.cache.glob(f"{kind}-*/*.safetensors"))


@pytest.fixture
def bench(real_base, tmp_path, monkeypatch):
    monkeypatch.setattr(latent_cache, "FILE_ITEMS", 4)
    return Bench(real_base, write_folder(tmp_path / "pictures", 10), tmp_path / "cache")


def same_batches(bench, cached):
    keys = [(row, 100 + row) for row in (0, 9, 3, 3)]
    objective = bench.family.objective
    one, other = (objective.encode(samples.__getitems__(keys)) for samples in (bench.plain, cached))
    assert torch.equal(one.mean, other.mean) and torch.equal(one.std, other.std)
    assert one.mean.stride() == other.mean.stride()
    assert torch.equal(one.condition["encoder_hidden_states"], other.condition["encoder_hidden_states"])


def test_everything_is_encoded_once(bench):
    same_batches(bench, bench.make())
    assert bench.encoded == {"images": 2 * 3, "texts": 1}  # both views of 4 + 4 + 2 images; 4 texts
    assert [len(bench.files(kind)) for kind in ("latents", "texts")] == [3, 1]
    same_batches(bench, bench.make())
    assert bench.encoded == {"images": 0, "texts": 0}


def test_an_interrupted_cache_is_continued(bench, monkeypatch):
    write = latent_cache.Store._write

    def killed(store, rows, left):
        if len(bench.files()) == 2:
            raise KeyboardInterrupt
        write(store, rows, left)

    monkeypatch.setattr(latent_cache.Store, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        bench.make()
    assert len(bench.files()) == 2
    monkeypatch.setattr(latent_cache.Store, "_write", write)
    same_batches(bench, bench.make())
    assert bench.encoded["images"] == 2  # the views of the last 2 images


def damage_bytes(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def foreign(path):
    tensors = load_file(path)
    save_file(tensors, path, metadata={"mark": "other", "keys": "", "crc": "", "channels_last": "[]"})


@pytest.mark.parametrize("spoil", [damage_bytes, cut, empty, foreign])
@pytest.mark.parametrize("kind", ["latents", "texts"])
def test_a_damaged_file_is_named_and_made_again(bench, caplog, spoil, kind):
    bench.make()
    spoiled = bench.files(kind)[0]
    spoil(spoiled)
    with caplog.at_level(logging.WARNING):
        cached = bench.make()
    assert str(spoiled) in caplog.text and "computed again" in caplog.text
    same_batches(bench, cached)
    assert sum(bench.encoded.values()) in (1, 2)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"resolution": 8}, "views"),
        ({"random_flip": False}, "views"),
        ({"image_interpolation_mode": "nearest"}, "views"),
    ],
)
def test_another_view_has_a_cache_of_its_own(bench, caplog, changes, named):
    bench.make()
    with caplog.at_level(logging.INFO):
        cached = bench.make(**changes)
    assert bench.encoded["images"] and not bench.encoded["texts"]
    assert "was made with other views" in caplog.text
    same_batches(bench, cached)


def test_other_weights_have_a_cache_of_their_own(bench, tmp_path, caplog):
    bench.make()
    bench.base = shutil.copytree(bench.base, tmp_path / "moved")
    bench.make()
    assert bench.encoded == {"images": 0, "texts": 0}  # where the base lies does not count
    path = bench.base / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["encoder.conv_in.weight"][0, 0, 0, 0] += 0.5
    save_file(weights, path, metadata={"format": "pt"})
    with caplog.at_level(logging.INFO):
        cached = bench.make()
    assert bench.encoded == {"images": 6, "texts": 0} and "was made with other vae" in caplog.text
    same_batches(bench, cached)


def test_a_changed_image_is_encoded_again(bench):
    bench.make()
    shutil.copy(bench.pictures / "005_0.png", bench.pictures / "009_0.png")
    same_batches(bench, bench.make())
    assert bench.encoded["images"] == 0  # it is known under its content
    write_folder(bench.pictures.parent / "more", 1, seed=9)
    shutil.copy(bench.pictures.parent / "more" / "000_0.png", bench.pictures / "003_0.png")
    same_batches(bench, bench.make())
    assert bench.encoded["images"] == 2


def test_lists_of_captions_are_encoded_each(bench):
    path = bench.pictures / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [json.dumps(row | {"text": [row["text"], "a picture"]}) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    cached = bench.make()
    assert len(cached.texts.places) == 5
    same_batches(bench, cached)


def test_images_are_decoded_only_where_they_are_augmented(bench, monkeypatch):
    cached = bench.make()
    plain = bench.plain.__getitems__([(2, 7), (5, 8), (1, 9)])
    decoded = []
    image = TrainingSamples._image
    monkeypatch.setattr(TrainingSamples, "_image", lambda self, row: decoded.append(row) or image(self, row))
    batch = cached.received(cached.__getitems__([(2, 7), (5, 8), (1, 9), (0, 3)]).to("cpu"))
    assert len(batch) == 4 and not decoded
    assert torch.equal(batch.images[[2, 0]], plain.images[[2, 0]])
    assert decoded == [1, 2]


def test_an_image_that_does_not_decode_is_named_before_training(bench):
    (bench.pictures / "004_0.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"row 4 .*does not decode"):
        bench.make()
    cached = bench.make(allow_bad=True)
    with pytest.raises(UsageError, match=r"row 4 .*does not decode"):
        cached._read(4)


def test_too_small_a_disk_is_named_before_it_is_full(bench, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UsageError, match=r"needs .* GB, and 0.0 GB are free"):
        bench.make()
    assert not bench.files()


def test_encoders_rest_on_the_host_but_while_images_are_drawn(real_base, bench, monkeypatch):
    bench.make()
    family = bench.family
    moves = []
    for name, part in {"vae": family.vae, **family.text_encoders}.items():
        monkeypatch.setattr(part, "to", lambda device, name=name: moves.append((name, str(device))))
    family.rest(images=True, inputs=True)
    assert moves == [("vae", "cpu"), ("text_encoder", "cpu")]
    monkeypatch.setattr(family, "device", "the device")
    moves.clear()
    with pytest.raises(RuntimeError), family._awake():
        assert moves == [("vae", "the device"), ("text_encoder", "the device")]
        raise RuntimeError
    assert moves[2:] == [("vae", "cpu"), ("text_encoder", "cpu")]


def test_a_batch_of_another_length_is_encoded_as_without_a_cache(bench):
    cached = bench.make()
    assert isinstance(cached, CachedSamples)
    assert cached.__getitems__([(0, 1)]).encoded_images is None
    assert cached.__getitems__([(0, 1)] * 4).encoded_images is not None
