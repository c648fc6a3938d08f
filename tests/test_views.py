"""Whatever training showed of a picture is found in what a model draws, and the papers' rules stay as they are."""

import itertools
import json
from dataclasses import dataclass

import numpy as np
import pytest
import shown
import torch
from PIL import Image, ImageOps

from ietagc_diffusers.data import image_transform
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.eval.calibrate import calibrate
from ietagc_diffusers.eval.features import Pixels, embed
from ietagc_diffusers.eval.guard import SimilarityGuard, TrainingIndex
from ietagc_diffusers.eval.image_sets import load_images
from ietagc_diffusers.eval.score import Protocol, Tools, score
from ietagc_diffusers.eval.vectors import Several, Vectors
from ietagc_diffusers.eval.views import ALL_VIEWS, Views, mirrored_pixels, nearest_of_both, places
from ietagc_diffusers.sscd import pixel_descriptor

SIZES = [(96, 72), (72, 96), (150, 50), (64, 64)]  # width, height


def picture(seed, size):
    """Smooth colours with some detail, as in a photograph."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((size[1], size[0], 3))
    for cells, weight in ((3, 0.5), (6, 0.35), (12, 0.15)):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        picture += weight * np.asarray(coarse.resize(size, Image.Resampling.BICUBIC))
    return Image.fromarray(picture.round().astype(np.uint8))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("views") / "train"
    folder.mkdir()
    for number in range(24):
        picture(number, SIZES[number % 4]).save(folder / f"{number:02d}.png")
    return folder


def saved(images, folder):
    folder.mkdir()
    for number, image in enumerate(images):
        image.save(folder / f"{number:02d}.png")
    return load_images(folder, "generated")


@pytest.fixture(scope="module")
def drawn(pictures, tmp_path_factory):
    """What training with random crops and flips shows of each picture, as a model would draw it."""
    transform = image_transform(48, center_crop=False, random_flip=True, interpolation="lanczos")
    torch.manual_seed(0)
    views = [transform(Image.open(path)) for path in sorted(pictures.iterdir())]
    images = [Image.fromarray(((view + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()) for view in views]
    return saved(images, tmp_path_factory.mktemp("views") / "drawn")


def scored(drawn, pictures, folder, **protocol):
    tools = Tools(Protocol(descriptor="pixel", fid="none", **protocol))
    return score(drawn, load_images(pictures, "train"), folder, tools)


def test_every_view_of_the_training_is_a_copy(pictures, drawn, tmp_path):
    scores = scored(drawn, pictures, tmp_path, pixels=32)
    assert scores["copy_rate"] == 1 and scores["num_copied_train"] == 24
    assert scores["memorized_quantity"]["0.4"] == 1
    assert scores["protocol"]["views"] == {"crops": "random", "mirrored": True}


def test_whole_images_only_are_compared_on_request(pictures, drawn, tmp_path):
    scores = scored(drawn, pictures, tmp_path, pixels=32, views="image")
    assert scores["copy_rate"] < 0.5 and scores["memorized_quantity"]["0.4"] < 0.8
    assert scores["protocol"]["views"] is None


def test_views_that_training_did_not_show_are_none(pictures, drawn, tmp_path):
    """Without flips a mirror image is no copy, and with centre crops an end of a panorama is none."""
    images = [Image.open(path) for path in sorted(pictures.iterdir())]
    mirrored = saved([ImageOps.mirror(image) for image in images if image.size == (64, 64)], tmp_path / "mirrored")
    assert scored(mirrored, pictures, tmp_path / "a", random_flip=False)["copy_rate"] == 0
    assert scored(mirrored, pictures, tmp_path / "b", random_flip=True)["copy_rate"] == 1
    ends = saved([image.crop((0, 0, 50, 50)) for image in images if image.size == (150, 50)], tmp_path / "ends")
    assert scored(ends, pictures, tmp_path / "c", center_crop=True)["copy_rate"] == 0
    assert scored(ends, pictures, tmp_path / "d", center_crop=False)["copy_rate"] == 1


def test_the_similarity_is_the_highest_of_all_views(pictures, drawn, tmp_path):
    scored(drawn, pictures, tmp_path)
    training = load_images(pictures, "train")
    from ietagc_diffusers.eval.score import load_scores

    found = load_scores(tmp_path)[1]["similarity"]
    for row in range(0, 24, 5):
        ways, originals = shown.both_ways(drawn.image(row)), [training.image(n) for n in range(24)]
        by_hand = max(shown.similarity(ways, o, pixel_descriptor(), min(o.size) / 16) for o in originals)
        assert found[row] == pytest.approx(by_hand, abs=1e-5)


@dataclass
class Drawn:
    images: list


def test_a_guard_refuses_mirrored_and_cropped_copies(pictures, drawn, tmp_path):
    index = TrainingIndex.build(load_images(pictures, "train"), pixel_descriptor())
    index.save(tmp_path)
    guard = SimilarityGuard(
        lambda **_: Drawn([drawn.image(n) for n in range(24)]),
        pixel_descriptor(),
        TrainingIndex.load(tmp_path),
        retries=0,
    )
    result = guard("a prompt")
    assert all(result.refused) and result.nearest == [f"{n:02d}.png" for n in range(24)]
    assert not all(
        SimilarityGuard(
            lambda **_: Drawn([drawn.image(n) for n in range(24)]),
            pixel_descriptor(),
            TrainingIndex.build(load_images(pictures, "train"), pixel_descriptor(), views=Views(False, False)),
            retries=0,
        )("a prompt").refused
    )


def test_an_index_of_an_earlier_version_is_built_again(pictures, tmp_path):
    TrainingIndex.build(load_images(pictures, "train"), pixel_descriptor()).save(tmp_path)
    about = json.loads((tmp_path / "index.json").read_text())
    del about["format"]
    (tmp_path / "index.json").write_text(json.dumps(about))
    with pytest.raises(UsageError, match="build it again"):
        TrainingIndex.load(tmp_path)


def test_a_threshold_is_calibrated_with_the_comparison_that_uses_it(pictures, drawn):
    def threshold(views):
        training = load_images(pictures, "train")
        return calibrate(pixel_descriptor(), training, drawn, 0.1, views=views).copy_similarity

    assert threshold(ALL_VIEWS) > 0.95 > threshold(None)


@pytest.mark.parametrize(("edge", "side", "spacing"), [(100, 75, 75 / 16), (75, 75, 5), (300, 100, 50), (101, 100, 7)])
def test_crops_reach_both_ends_and_are_no_further_apart_than_asked(edge, side, spacing):
    starts = places(edge, side, spacing)
    assert starts[0] == 0 and starts[-1] == edge - side
    assert all(0 < later - earlier <= spacing + 1 for earlier, later in itertools.pairwise(starts))


def test_an_image_found_both_ways_round_counts_where_it_is_nearer():
    rng = torch.Generator().manual_seed(0)
    queries = [torch.randn(7, 5, generator=rng) for _ in range(2)]
    references, owners = torch.randn(30, 5, generator=rng), torch.arange(10).repeat_interleave(3)

    def search(query):
        distances = torch.cdist(query, references).view(-1, 10, 3).min(dim=2)
        nearest = distances.values.topk(6, largest=False)
        return nearest.values, distances.indices.gather(1, nearest.indices) + 3 * nearest.indices

    distances, rows = nearest_of_both(search, queries, owners, 6)
    of_all = torch.minimum(*(torch.cdist(query, references) for query in queries)).view(-1, 10, 3).amin(dim=2)
    torch.testing.assert_close(distances, of_all.sort(dim=1).values[:, :6])
    torch.testing.assert_close(of_all.gather(1, owners[rows]), distances)


def test_mirrored_pixels_are_the_pixels_of_the_mirror_image():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(mirrored_pixels(Pixels(8)(images)), Pixels(8)(images.flip(3)))


def test_several_vectors_of_an_image_come_from_the_cache_as_they_were(pictures, tmp_path):
    extractors = {"views": ALL_VIEWS.crops(pixel_descriptor(), 1 / 16), "pixels": Pixels(8)}
    fresh, first, again = (
        embed(load_images(pictures, "train"), extractors, cache) for cache in (None, tmp_path, tmp_path)
    )
    for found in (first, again):
        assert torch.equal(found.several["views"].vectors, fresh.several["views"].vectors)
        assert torch.equal(found.several["views"].owners, fresh.several["views"].owners)
    assert fresh.several["views"].counts.tolist()[:4] == [8, 8, 34, 1]  # crops, and the whole if it is not square
    some = fresh.select([3, 2])
    assert some.several["views"].owners.tolist() == [0] + [1] * 34
    assert torch.equal(some.several["views"].vectors[1:], fresh.several["views"].vectors[16:50])


def test_the_middle_view_of_each_image_is_its_centre(pictures):
    found = embed(load_images(pictures, "train"), {"views": ALL_VIEWS.crops(Pixels(8), 1 / 16, whole=False)})
    middle, centre = found.several["views"].middle(), embed(load_images(pictures, "train"), {"pixels": Pixels(8)})
    assert (middle.float() - centre.features["pixels"].float()).abs().mean() < 6
    assert torch.equal(Several.of_one(middle).middle(), middle)


def test_no_room_for_temporary_files_is_said(monkeypatch):
    vectors = Vectors(2)
    vectors.append(np.zeros((2, 3), np.float32))

    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(vectors, "file", Full())
    with pytest.raises(UsageError, match="TMPDIR"):
        vectors.append(np.zeros((2, 3), np.float32))


# Local copies


def pasted(seed, source):
    """Another picture, with the upper left quarter of a training picture in its upper left corner."""
    scene = picture(seed, (64, 64))
    scene.paste(source.resize((64, 64)).crop((0, 0, 32, 32)), (0, 0))
    return scene


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local") / "train"
    folder.mkdir()
    for number in range(30):
        picture(1000 + number, (64, 64)).save(folder / f"{number:02d}.png")
    return folder


@pytest.mark.parametrize("near_duplicates", [False, True])
def test_near_duplicates_in_the_training_set_hide_no_local_copies(squares, tmp_path, near_duplicates):
    folder = tmp_path / "train"
    folder.mkdir()
    originals = [Image.open(path) for path in sorted(squares.iterdir())]
    for number, image in enumerate(originals):
        image.save(folder / f"{number:02d}.png")
    if near_duplicates:  # as a whole, and in one corner only
        Image.fromarray(np.asarray(originals[0]) // 2 * 2).save(folder / "again.png")
        pasted(5000, originals[1]).save(folder / "same_corner.png")
    drawn = saved([pasted(2000 + n, image) for n, image in enumerate(originals)], tmp_path / "drawn")
    scores = scored(drawn, folder, tmp_path / "scores", patches=True)
    assert scores["patch_copy_rate"] == 1 and scores["patch_copy_similarity"] <= 0.98
    assert any(f"over a similarity of {scores['patch_copy_similarity']:.3f}" in note for note in scores["notes"])


def test_local_copies_are_found_mirrored_and_shown_where_they_are(squares, tmp_path):
    originals = [Image.open(path) for path in sorted(squares.iterdir())]
    drawn = [ImageOps.mirror(pasted(3000 + n, image)) for n, image in enumerate(originals[:4])]
    scores = scored(saved(drawn, tmp_path / "drawn"), squares, tmp_path / "scores", patches=True)
    from ietagc_diffusers.eval.score import load_scores

    nearest = load_scores(tmp_path / "scores")[1]
    assert scores["patch_copy_rate"] == 1
    assert nearest["patch"] == [2] * 4 and nearest["patch_of_nearest"] == [0] * 4  # upper right, upper left
