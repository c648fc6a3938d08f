"""What is trained, its mean over proxies, and its moving average: one object."""

import pytest
import torch
from diffusers.training_utils import EMAModel

from ietagc_diffusers import Weights, testing

NAME, AVERAGE = "unet", "unet_ema"


@pytest.fixture
def family():
    return testing.family_of_pipeline(testing.random_pipeline(["a red picture"]))


def randomise(weights, seed):
    generator = torch.Generator().manual_seed(seed)
    for tensors in weights.live().values():
        for tensor in tensors.values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return {key: {name: t.clone() for name, t in tensors.items()} for key, tensors in weights.live().items()}


def moving_average(family):
    return EMAModel(family.denoiser.parameters())


def test_the_mean_of_what_was_counted_in_is_theta_hat(family):
    weights, models = Weights(family, several=True, ema=moving_average(family)), []
    for seed in range(3):
        models.append(randomise(weights, seed))
        weights.add_to_mean()
    weights.aggregate(lambda tensor: tensor)
    for key in (NAME, AVERAGE):
        for name, tensor in weights.live()[key].items():
            wanted = torch.stack([model[key][name].double() for model in models]).mean(0).float()
            assert torch.equal(tensor, wanted) and torch.equal(weights.deployable()[key][name], wanted)


def test_another_space_of_means_needs_encode_and_decode_only(family):
    """Weights whose squares are averaged: the mean is taken where a subclass says."""

    class Squares(Weights):
        def encode(self, tensors, shard=0):
            return {name: tensor.double() ** 2 for name, tensor in tensors.items()}

        def decode(self, means):
            return ((name, mean.sqrt().float()) for name, mean in means)

    weights = Squares(family, several=True)
    for value in (1.0, 7.0):
        for tensor in weights.live()[NAME].values():
            tensor.fill_(value)
        weights.add_to_mean()
    weights.aggregate(lambda tensor: tensor)
    assert all(torch.allclose(tensor, torch.tensor(5.0)) for tensor in weights.live()[NAME].values())


def test_saved_weights_are_loaded_as_they_were(family, tmp_path):
    weights = Weights(family, several=True, ema=moving_average(family))
    model = randomise(weights, 0)
    weights.add_to_mean()
    weights.aggregate(lambda tensor: tensor)
    weights.save(tmp_path)
    randomise(weights, 1)
    weights.load(tmp_path)
    for key, tensors in weights.live().items():
        assert all(torch.equal(tensor, model[key][name]) for name, tensor in tensors.items())
    assert family.load_denoiser(tmp_path / NAME).config.sample_size == family.denoiser.config.sample_size


def test_a_running_mean_goes_through_its_state(family):
    first, second = (Weights(family, several=True) for _ in range(2))
    for seed in range(2):
        randomise(first, seed)
        first.add_to_mean()
    for key, mean in second.means.items():
        mean.add(first.means[key].sums, first.added)
    first.aggregate(lambda tensor: tensor)
    second.aggregate(lambda tensor: tensor)
    pairs = zip(first.aggregated[NAME].values(), second.aggregated[NAME].values(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_the_moving_average_is_in_place_only_within(family):
    weights = Weights(family, several=False, ema=moving_average(family))
    model = randomise(weights, 3)
    with weights.averaged():
        inside = {name: tensor.clone() for name, tensor in weights.live()[NAME].items()}
    assert all(torch.equal(inside[name], model[AVERAGE][name]) for name in inside)
    assert all(torch.equal(tensor, model[NAME][name]) for name, tensor in weights.live()[NAME].items())
