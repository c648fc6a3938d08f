"""Strength falls from 1 at the threshold; an image's augmentation depends on its seed and magnitude alone."""

import math

import pytest
import torch
from torchvision.transforms import RandAugment

from ietagc_diffusers import StrengthRandAugment, augmentation_strength


def test_strength_is_the_paper_s_formula():
    ratios = [0.8, 0.9, 1.0, 2.0, 0.7, math.inf]
    wanted = [math.exp(-5 * abs(r - 0.8) / 0.8) for r in ratios]
    torch.testing.assert_close(augmentation_strength(torch.tensor(ratios), 0.8, 5.0), torch.tensor(wanted))


def test_magnitude_is_rounded_strength():
    augment = StrengthRandAugment(magnitude=5)
    assert augment.magnitudes(torch.tensor([1.0, 0.71, 0.5, 0.11, 0.09, 0.0])).tolist() == [5, 4, 2, 1, 0, 0]


def test_equals_torchvision_on_the_same_seed():
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    augmented = StrengthRandAugment(magnitude=9)(images / 127.5 - 1, [9, 3, 7], [11, 12, 13])
    for image, magnitude, seed, result in zip(images, [9, 3, 7], [11, 12, 13], augmented, strict=True):
        torch.manual_seed(seed)
        torch.testing.assert_close((result + 1) * 127.5, RandAugment(2, magnitude)(image).float(), atol=1e-3, rtol=0)


def test_neither_the_batch_nor_the_global_stream_matters():
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    augment = StrengthRandAugment(magnitude=10)
    torch.manual_seed(0)
    together = augment(images, [10, 9, 8, 7], [1, 2, 3, 4])
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))
    assert torch.equal(augment(images[2:3], [8], [3])[0], together[2])


@pytest.mark.parametrize("magnitude", [0, 1, 30])
def test_range_shape_and_dtype_are_kept(magnitude):
    images = torch.rand(2, 3, 17, 13).half() * 2 - 1
    result = StrengthRandAugment(magnitude=magnitude)(images, [magnitude] * 2, [0, 1])
    assert result.shape == images.shape and result.dtype == images.dtype
    assert result.min() >= -1 and result.max() <= 1
