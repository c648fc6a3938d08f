"""Scores beside those of pictures that were not trained on: copies, and the preference for training images."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import write_folder
from PIL import Image, ImageOps
from scoring import PIXEL

from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.eval.heldout import load_other_images
from ietagc_diffusers.eval.image_sets import load_again, load_images, training_images, training_settings
from ietagc_diffusers.eval.metrics import similarity
from ietagc_diffusers.eval.record import TrainingRecord, TrainingSet
from ietagc_diffusers.eval.report import Scored, write_report
from ietagc_diffusers.eval.score import Tools, score


def test_held_out_pictures_are_compared_like_generated_ones(training, fresh, tmp_path):
    """Copies of the model are set against those of pictures that were not trained on."""
    training_images, images = load_images(training, "x"), load_images(training, "x").select(range(4, 14))
    held = write_folder(tmp_path / "held", 9, seed=4)
    soft = Image.open(training / "020_0.png").convert("RGB")
    noise = Image.open(held / "000_0.png").resize(soft.size)
    Image.blend(soft, noise, 0.3).save(held / "000_0.png")
    Image.fromarray((np.asarray(soft) * 0.98).astype(np.uint8)).save(held / "darker.png")
    tools = Tools(PIXEL)
    scores = score(images, training_images, tmp_path / "s", tools, heldout=load_images(held, "heldout"))
    assert scores["num_heldout"] == 9 and scores["num_heldout_near_duplicates"] == 1
    assert scores["heldout_copy_rate"] == pytest.approx(1 / 9) and scores["copy_rate"] == 1
    assert scores["excess_copy_rate"] == pytest.approx(8 / 9)
    assert scores["excess_copy_rate_ci95"][0] < 8 / 9 < scores["excess_copy_rate_ci95"][1] <= 1
    assert scores["heldout_sim_score"] < 0.95 and any("taken for other versions" in x for x in scores["notes"])
    assert scores["training_preference"] == 1  # all are training images
    # The same file under another name is refused.
    shutil.copy(training / "030_0.png", held / "other.png")
    with pytest.raises(UsageError, match=r"1 of its 11 pictures are also among .* \(other.png\); give pict"):
        score(images, training_images, tmp_path / "s", tools, heldout=load_images(held, "heldout"))


def test_held_out_pictures_that_equal_training_images_in_other_files_are_left_out(training, fresh, tmp_path):
    """Whether in another format, or blank ones of another size, which resemble nothing by any descriptor."""
    train, held = shutil.copytree(training, tmp_path / "train"), write_folder(tmp_path / "held", 9, seed=4)
    Image.open(train / "030_0.png").save(held / "other.bmp")
    Image.new("RGB", (64, 64), "white").save(train / "blank.png")
    Image.new("RGB", (80, 64), "white").save(held / "white.png")
    sets = load_images(fresh, "x"), load_images(train, "x")
    scores = score(*sets, tmp_path / "s", Tools(PIXEL), heldout=load_images(held, "heldout"))
    assert scores["num_heldout"] == 9 and scores["num_heldout_near_duplicates"] == 2
    assert any("2 of 11 held-out pictures" in note for note in scores["notes"])


def stickers(folder, number, seed):
    """Pictures whose hidden colours lie around a small part that is seen."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for index in range(number):
        values = rng.integers(0, 256, (20, 20, 4), dtype=np.uint8)
        values[..., 3] = 0
        values[5:9, 5:9, 3] = 255
        Image.fromarray(values).save(folder / f"{index}.png")
    return folder


def test_all_sets_are_decoded_as_the_training_images_are(tmp_path):
    """Held-out and reference pictures of a training set with ``alpha`` official show their hidden colours too."""
    settings = training_settings(stickers(tmp_path / "train", 12, 0), alpha="official")
    training, others = (
        training_images(settings),
        [stickers(tmp_path / name, 8, seed) for seed, name in ((1, "h"), (2, "r"))],
    )
    drawn = training_images(training_settings(stickers(tmp_path / "drawn", 6, 3), alpha="official"))

    def numbers(alpha):
        heldout, reference = (load_images(folder, "x") for folder in others)
        heldout.alpha = reference.alpha = alpha
        found = score(drawn, training, tmp_path / "s", Tools(PIXEL), reference=reference, heldout=heldout)
        return [found[name] for name in ("training_preference", "heldout_sim_score", "frechet_distance")]

    assert numbers("white") == numbers("official")


@pytest.fixture
def as_recorded(tmp_path):
    """A training set of which a run recorded how it is read, as far as this is given."""

    def recorded(**settings):
        images = training_images(training_settings(stickers(tmp_path / "train", 1, 0), alpha="official"))
        return TrainingSet(images, TrainingRecord(settings, {}))

    return recorded


@pytest.mark.parametrize(
    ("metadata", "caption"),
    [
        ('{"file_name": "0.png", "words": "a cat", "text": "other"}', "a cat"),
        ('{"file_name": "0.png", "text": "a cat"}', "a cat"),
        ('{"photo_file_name": "0.png", "words": "a cat"}', "a cat"),
        (None, "the first line"),
    ],
)
def test_held_out_images_are_read_as_training_reads_a_heldout_dir(as_recorded, metadata, caption, tmp_path):
    training = as_recorded(image_column="photo", caption_column="words", caption_lines="first")
    folder = stickers(tmp_path / "held", 1, 1)
    if metadata is None:
        (folder / "0.txt").write_text("the first line\nand more")
    else:
        (folder / "metadata.jsonl").write_text(metadata)
    images = load_other_images(str(folder), "heldout", training)
    assert images.texts == [caption] and images.alpha == "official"
    again = load_again(folder, "heldout", images.columns)
    assert again.texts == [caption]


@pytest.mark.parametrize("column", ["photo", "image"])
def test_a_held_out_dataset_may_have_the_default_columns(as_recorded, column, tmp_path):
    stored = [{"bytes": path.read_bytes()} for path in stickers(tmp_path / "held", 2, 1).glob("*.png")]
    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.table({column: stored, "text": ["a", "b"]}), tmp_path / "parquet" / "0.parquet")
    training = as_recorded(image_column="photo", caption_column="words")
    images = load_other_images(str(tmp_path / "parquet"), "heldout", training)
    assert images.texts == ["a", "b"] and images.image(0).size == (20, 20)
    with pytest.raises(UsageError, match="has no column 'other'"):
        load_images(tmp_path / "parquet", "heldout", "other")


def test_held_out_versions_of_training_images_are_left_out_though_the_descriptor_sees_others(
    training, fresh, tmp_path, monkeypatch
):
    """To SSCD a smaller version is less similar than a near duplicate, and would make copies look usual."""
    monkeypatch.setattr(similarity, "NEAR_DUPLICATE", 2)
    held = write_folder(tmp_path / "held", 9, seed=4)
    picture = Image.open(training / "020_0.png").convert("RGB")
    ImageOps.mirror(picture).save(held / "mirrored.jpg", quality=90, subsampling=0)
    sets = load_images(fresh, "x"), load_images(training, "x")
    scores = score(*sets, tmp_path / "s", Tools(PIXEL), heldout=load_images(held, "heldout"))
    assert scores["num_heldout"] == 9 and scores["num_heldout_near_duplicates"] == 1


def test_a_part_of_a_held_out_picture_is_as_near_as_one_of_a_training_image(training, fresh, tmp_path):
    """Both sets are shown as training shows its images: by crops along the long side, and mirrored."""
    wide = write_folder(tmp_path / "wide", 2, size=40, seed=4)
    for path in wide.glob("*.png"):
        Image.open(path).crop((0, 10, 43, 30)).save(path)
    (tmp_path / "drawn").mkdir()
    left = Image.open(wide / "000_0.png").crop((0, 0, 20, 20))
    ImageOps.mirror(left).save(tmp_path / "drawn" / "0.png")
    drawn, training_images = load_images(tmp_path / "drawn", "x"), load_images(training, "x")
    scores = score(drawn, training_images, tmp_path / "s", Tools(PIXEL), heldout=load_images(wide, "heldout"))
    assert scores["num_heldout"] == 2 and scores["training_preference"] == pytest.approx(-60 / 2)
    unlike = load_images(fresh, "x")
    scores = score(unlike, training_images, tmp_path / "t", Tools(PIXEL), heldout=load_images(wide, "heldout"))
    low, high = scores["training_preference_ci95"]
    assert -30 <= low <= scores["training_preference"] <= high <= 1


def test_the_preference_is_zero_by_chance_and_one_for_copies():
    """Of sets that one distribution gives, however unequal in size."""
    generator = torch.Generator().manual_seed(0)
    for num_training, num_heldout in ((200, 200), (300, 20), (20, 300)):
        vectors = torch.nn.functional.normalize(
            torch.randn(4000 + num_training + num_heldout, 8, generator=generator), dim=1
        )
        images, training, heldout = vectors.split([4000, num_training, num_heldout])
        nearest = [(images @ others.T).amax(dim=1) for others in (training, heldout)]
        chance, hits = num_training / (num_training + num_heldout), similarity.prefers_training(*nearest)
        # The sets themselves are random: their share varies as if each of their images were drawn once.
        spread = (hits.std() / 4000**0.5) / (1 - chance)
        spread += (num_training / num_heldout / min(num_training, num_heldout)) ** 0.5
        assert abs(similarity.above_chance(hits, torch.tensor(chance))) < 3 * spread
        nearest = [(training @ others.T).amax(dim=1) for others in (training, heldout)]
        assert similarity.above_chance(similarity.prefers_training(*nearest), torch.tensor(chance)) == pytest.approx(1)
    same = torch.rand(9)
    assert similarity.above_chance(similarity.prefers_training(same, same), torch.tensor(0.5)) == 0


def test_a_single_prompt_has_no_bootstrap_interval(training, fresh, tmp_path):
    """Drawn again and again it would have no width, as if it were sure."""
    images = load_images(fresh, "x")
    images.texts = ["one"] * len(images)
    held = load_images(write_folder(tmp_path / "held", 9, seed=4), "heldout")
    scores = score(images, load_images(training, "x"), tmp_path / "s", Tools(PIXEL), heldout=held)
    assert scores["num_prompts"] == 1 and scores["sim_score_ci95"] is None and scores["sim_mean_ci95"] is None
    low, high = scores["training_preference_ci95"]
    assert high - low > 1 and low <= scores["training_preference"] <= high
    write_report([Scored.load(tmp_path / "s", "model")], tmp_path / "r.html")
