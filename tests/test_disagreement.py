"""How far the proxies of a round are from one another, from sums that training keeps anyway."""

import math

import pytest
import torch

from ietagc_diffusers import Weights, testing
from ietagc_diffusers.arguments import parse_flags
from ietagc_diffusers.method.averaging import ModelAverage, disagreement
from ietagc_diffusers.method.factors import Factors, inner_products
from ietagc_diffusers.tensor_files import Disk
from ietagc_diffusers.training.lora import LoraWeights, add_adapter

SHARDS, RANK = 3, 2


def itself(tensor):
    return tensor


def family():
    torch.manual_seed(0)
    return testing.family_of_pipeline(testing.random_pipeline(["a red picture"]))


def step(weights, seed, size):
    """Train a proxy, so to speak: all of them go some way together, and each some way by itself."""
    generator = torch.Generator().manual_seed(seed)
    for tensors in weights.live().values():
        for tensor in tensors.values():
            tensor.add_(size * (0.3 + torch.randn(tensor.shape, generator=generator)))


def wanted(start, models):
    """The definition, from lists of float64 tensors."""
    hat = [torch.stack(parts).mean(0) for parts in zip(*models, strict=True)]

    def squared(one, other):
        return sum((a - b).square().sum().item() for a, b in zip(one, other, strict=True))

    spread = sum(squared(model, hat) for model in models) / len(models)
    return math.sqrt(spread / squared(hat, start))


def denoiser(weights):
    return [tensor.double().clone() for tensor in weights.live()["unet"].values()]


@pytest.mark.parametrize("size", [1e-2, 1e-6])
@pytest.mark.parametrize("on_disk", [False, True])
def test_it_is_the_definition_however_small_the_steps(size, on_disk, tmp_path):
    weights = Weights(family(), several=True, place=Disk(tmp_path) if on_disk else None)
    for number in range(2):  # the second round starts where the first one ended
        start, models = denoiser(weights), []
        for shard in range(SHARDS):
            weights.put()
            step(weights, 10 * number + shard, size)
            models.append(denoiser(weights))
            weights.add_to_mean(shard)
        weights.aggregate(itself)
        assert weights.notes["disagreement"] == pytest.approx(wanted(start, models), rel=1e-3)
        assert 1 < weights.notes["disagreement"] < 3


def test_processes_and_interruptions_do_not_show():
    one, first, second = (Weights(family(), several=True) for _ in range(3))
    for runs, shards in (((one,), range(SHARDS)), ((first,), (2, 0)), ((second,), (1,))):
        for shard in shards:
            runs[0].put()
            step(runs[0], shard, 1e-3)
            runs[0].add_to_mean(shard)
    state = second.added_state()
    assert state["count"] == 1
    for key, mean in first.means.items():  # as a checkpoint of another process is taken up
        mean.adopt(second.means[key].sums, state["count"], state["squares"][key])
    one.aggregate(itself)
    first.aggregate(itself)
    assert first.notes == one.notes and one.notes["disagreement"]


def test_what_an_earlier_version_did_not_keep_is_not_made_up():
    weights = Weights(family(), several=True)
    for shard in range(2):
        step(weights, shard, 1e-3)
        weights.add_to_mean(shard)
    sums = {name: tensor.clone() for name, tensor in weights.means["unet"].sums.items()}
    resumed = Weights(family(), several=True)
    resumed.means["unet"].adopt(sums, 2)
    step(resumed, 2, 1e-3)
    resumed.add_to_mean(2)
    resumed.aggregate(itself)
    assert resumed.notes == {"disagreement": None}


def test_equal_proxies_agree_and_unrelated_ones_are_at_the_square_root():
    mean = ModelAverage({"a": torch.zeros(4000)}, watched=True)
    for _ in range(3):
        mean.add({"a": torch.ones(4000)})
    list(mean.mean())
    assert disagreement(mean.spread, 4000.0) == pytest.approx(0, abs=1e-6)
    generator, models = torch.Generator().manual_seed(0), []
    for _ in range(5):
        models.append(torch.randn(4000, generator=generator))
        mean.add({"a": models[-1]})
    list(mean.mean())
    assert disagreement(mean.spread, sum(models).div(5).square().sum().item()) == pytest.approx(2, rel=0.05)
    assert disagreement(1.0, 0.0) is None and disagreement(math.nan, 1.0) is None and disagreement(math.inf, 1) is None


def test_inner_products_are_those_of_the_matrices():
    generator = torch.Generator().manual_seed(0)
    parts = [Factors(torch.randn(7, n, generator=generator), torch.randn(n, 5, generator=generator)) for n in (1, 3, 2)]
    matrices = torch.stack([part.product().flatten() for part in parts])
    torch.testing.assert_close(inner_products(parts), matrices @ matrices.T)


@pytest.mark.parametrize("average", ["svd", "concatenate", "fold"])
def test_of_adapters_it_is_that_of_their_updates(average):
    flags = ["--pretrained_model_name_or_path=m", "--train_data_dir=d", f"--lora_rank={RANK}"]
    settings = parse_flags([*flags, f"--lora_average={average}", "--lora_target_modules", "to_q", "conv1"])
    adapted = family()
    add_adapter(adapted, settings)
    weights = LoraWeights(adapted, SHARDS, settings)

    def updates():
        (live,) = weights.live().values()
        return [weights._factors(live, layer).product() for layer in weights.layers]

    for number in range(2):
        weights.put()
        start, models = updates(), []
        for shard in range(SHARDS):
            weights.put()
            step(weights, 10 * number + shard, 0.1)
            models.append(updates())
            weights.add_to_mean(shard)
        weights.aggregate(itself)
        assert weights.notes["disagreement"] == pytest.approx(wanted(start, models), rel=1e-4)
