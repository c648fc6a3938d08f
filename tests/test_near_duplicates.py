"""Near duplicates: a descriptor, a threshold measured on the set, and clusters without chains."""

import math

import numpy as np
import pytest
import torch
from conftest import scene
from PIL import Image, ImageEnhance, ImageOps

from ietagc_diffusers.data import near_duplicates as module
from ietagc_diffusers.data.near_duplicates import (
    Vectors,
    altered,
    both_ways,
    calibrate,
    cluster,
    largest_first,
    limit_of_different,
    low_frequencies,
    nearest_others,
)


def tensor(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None]


def describe(image):
    return low_frequencies(tensor(image))[0]


def described(images):
    return both_ways(torch.stack([describe(image) for image in images]))


def directions(number, dim):
    generator = torch.Generator().manual_seed(0)
    return Vectors(*torch.nn.functional.normalize(torch.randn(2, number, dim, generator=generator), dim=2))


def cosine_transform(values):
    """The orthonormal DCT-II along the last axis, by the Fourier transform of the mirrored values."""
    number = values.shape[-1]
    waves = np.fft.fft(np.concatenate([values, values[..., ::-1]], axis=-1))[..., :number]
    found = (waves * np.exp(-0.5j * np.pi * np.arange(number) / number)).real / np.sqrt(2 * number)
    found[..., 0] /= np.sqrt(2)
    return found


def test_the_descriptor_is_the_low_frequencies_of_brightness_and_colour():
    image = tensor(scene(1, (64, 64)))
    red, green, blue = image[0].double().numpy()
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    values = []
    for plane, number in ((luma, 10), (blue - luma, 6), (red - luma, 6)):
        found = cosine_transform(cosine_transform(plane).T).T[:number, :number]
        values.append((found * np.hypot(*np.indices((number, number)))).ravel()[1:])
    expected = np.concatenate(values)
    expected = np.sign(expected) * np.sqrt(np.abs(expected))
    torch.testing.assert_close(
        low_frequencies(image)[0].double(), torch.from_numpy(expected / np.linalg.norm(expected)), atol=5e-4, rtol=0
    )


def test_a_mirrored_image_has_the_mirrored_vector_and_one_of_a_single_colour_none():
    images = [scene(seed) for seed in range(4)]
    mirrored = torch.stack([describe(ImageOps.mirror(image)) for image in images])
    torch.testing.assert_close(described(images).mirrored, mirrored, atol=2e-3, rtol=0)
    flat = tensor(Image.new("RGB", (30, 20), (200, 30, 77)))
    assert not low_frequencies(flat).any()
    vectors = low_frequencies(tensor(images[0]))
    assert torch.equal(module.of_half(vectors.half()), vectors)  # a cache changes nothing


def test_altered_images_are_more_similar_than_different_ones():
    images = [scene(seed) for seed in range(12)]
    vectors = described(images)
    for row, image in enumerate(images):
        versions = altered(image, np.random.default_rng(row))
        assert [one.size for one in versions] == [(91, 76), (48, 40), (96, 80), (96, 80)]
        similarity = torch.stack([describe(one) for one in versions]) @ vectors.plain.T
        assert (similarity.argmax(dim=1) == row).all() and similarity[:, row].min() > 0.7
    assert nearest_others(vectors).max() < 0.6


def planted(images, copies):
    """The images, and an altered copy of each of the first."""
    kinds = [ImageOps.mirror, lambda image: altered(image, np.random.default_rng(0))[1], ImageOps.mirror]
    return [*images, *(kinds[row % 3](images[row]) for row in range(copies))]


@pytest.mark.parametrize("copies", [0, 3, 14, 30])
def test_the_threshold_finds_planted_copies_and_nothing_else(copies):
    """Whatever their share of the set is."""
    images = planted([scene(seed) for seed in range(30)], copies)
    vectors = described(images)
    found = cluster(vectors, calibrate(vectors, images.__getitem__, describe).threshold)
    assert found.kept.tolist() == [*range(30), *range(copies)]


def test_a_set_of_nearly_identical_pictures_is_one_cluster():
    image = scene(0)
    images = [ImageEnhance.Brightness(image).enhance(0.9 + 0.01 * row) for row in range(20)]
    vectors = described(images)
    measured = calibrate(vectors, images.__getitem__, describe)
    assert cluster(vectors, measured.threshold).kept.tolist() == [0] * 20
    assert measured.threshold == pytest.approx(measured.altered_median, abs=1e-4)


def test_a_threshold_is_not_lower_than_a_weak_descriptor_deserves():
    images = [scene(seed) for seed in range(20)]
    generator = torch.Generator().manual_seed(0)

    def noise(image):
        return torch.nn.functional.normalize(torch.randn(1000, generator=generator), dim=0)

    vectors = torch.stack([noise(image) for image in images])
    measured = calibrate(Vectors(vectors, vectors), images.__getitem__, noise)
    assert measured.weak and measured.threshold == module.LOWEST
    flat = Vectors(torch.zeros(3, 5), torch.zeros(3, 5))  # nothing to measure
    assert calibrate(flat, images.__getitem__, noise).threshold == 1.0
    single = described(images[:1])
    measured = calibrate(single, images.__getitem__, describe)
    assert module.LOWEST <= measured.threshold <= measured.altered_median and measured.different == -1


def test_the_limit_of_different_images_is_that_of_the_law_of_extremes():
    rng = np.random.default_rng(0)
    values = rng.gumbel(0.3, 0.04, 5000)
    expected = 0.3 - 0.04 * math.log(-math.log(1 - module.FALSE))
    assert limit_of_different(values) == pytest.approx(expected, abs=0.015)
    assert (values > limit_of_different(values)).mean() < 0.004


def greedy(similarity, threshold, order):
    """The rule, word by word."""
    kept, best, leaders = list(range(len(similarity))), [1.0] * len(similarity), []
    for row in order:
        near = [(similarity[row][leader], -place) for place, leader in enumerate(leaders)]
        if near and max(near)[0] > threshold:
            best[row], place = max(near)
            kept[row] = leaders[-place]
        else:
            leaders.append(row)
    return kept, best


@pytest.mark.parametrize(("rows", "columns"), [(1024, 16384), (7, 5), (1, 1)])
@pytest.mark.parametrize("threshold", [0.3, 0.75])
def test_clusters_are_the_same_in_blocks_of_any_size(monkeypatch, rows, columns, threshold):
    monkeypatch.setattr(module, "ROWS", rows)
    monkeypatch.setattr(module, "COLUMNS", columns)
    vectors = directions(90, 4)
    similarity = torch.maximum(vectors.plain @ vectors.plain.T, vectors.plain @ vectors.mirrored.T)
    order = np.random.default_rng(1).permutation(90)
    kept, best = greedy(similarity.tolist(), threshold, order.tolist())
    found = cluster(vectors, threshold, order)
    assert found.kept.tolist() == kept and 1 < found.is_kept.sum() < 90
    np.testing.assert_allclose(found.similarity, best, atol=1e-6)
    assert found.sizes.tolist() == [kept.count(one) for one in kept]
    others = similarity.fill_diagonal_(-torch.inf).amax(dim=1)
    torch.testing.assert_close(nearest_others(vectors), others, atol=1e-6, rtol=0)
    torch.testing.assert_close(nearest_others(vectors, torch.tensor([3, 80])), others[[3, 80]], atol=1e-6, rtol=0)


def test_links_are_not_followed_along_a_chain():
    """Each picture is like the next, and the ends are not alike: both stay."""
    angles = torch.arange(5) * math.pi / 9  # neighbours have a cosine of 0.94, the next ones of 0.77
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert cluster(Vectors(vectors, vectors), 0.9).kept.tolist() == [0, 0, 2, 2, 4]
    assert cluster(Vectors(vectors, vectors), 0.9, [1, 3, 0, 2, 4]).kept.tolist() == [1, 1, 1, 3, 3]
    assert cluster(Vectors(vectors, vectors), 1.0).is_kept.all()
    assert nearest_others(Vectors(vectors[:1], vectors[:1])).tolist() == [-math.inf]


def test_the_largest_image_is_preferred_and_of_equal_ones_the_first():
    sizes = np.array([[10, 10], [20, 20], [40, 10], [5, 5]])
    assert largest_first(sizes).tolist() == [1, 2, 0, 3]
    vectors = torch.ones(4, 1)
    assert cluster(Vectors(vectors, vectors), 0.5, largest_first(sizes)).kept.tolist() == [1] * 4
