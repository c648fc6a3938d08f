"""The mean of the proxies is exact: independent of their order, and rounded once."""

import itertools

import pytest
import torch

from ietagc_diffusers import ModelAverage


def models(k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-6, 6, 7)
    return [
        {"a": torch.randn(7, generator=generator) * scale, "b": torch.randn(2, 3, generator=generator)}
        for _ in range(k)
    ]


def average(order):
    mean = ModelAverage(order[0])
    for model in order:
        mean.add(model)
    return dict(mean.mean())


@pytest.mark.parametrize("k", [2, 3, 4])
def test_equals_the_float64_mean_in_any_order(k):
    proxies = models(k)
    for order in itertools.permutations(proxies):
        for name, value in average(list(order)).items():
            exact = torch.stack([p[name].double() for p in proxies]).mean(0).float()
            assert torch.equal(value, exact)


def test_mean_of_one_is_itself():
    (model,) = models(1)
    assert all(torch.equal(value, model[name]) for name, value in average([model]).items())


def test_starts_over_after_the_mean():
    first, second = models(2)
    mean = ModelAverage(first)
    mean.add(first)
    dict(mean.mean())
    mean.add(second)
    assert all(torch.equal(value, second[name]) for name, value in mean.mean())
