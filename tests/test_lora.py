"""Adapters: means are of products, files are what diffusers loads, and no layout or interruption shows."""

import json

import numpy as np
import pytest
import torch
from conftest import launch, train_flags, train_here
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from ietagc_diffusers import RunFolder, UsageError, testing
from ietagc_diffusers.arguments import parse_flags
from ietagc_diffusers.families import StableDiffusion
from ietagc_diffusers.method.factors import Factors, shrinking, total, truncate
from ietagc_diffusers.run_folder import ADAPTER_FILE
from ietagc_diffusers.tensor_files import TensorFile
from ietagc_diffusers.training.cost import checkpoint_steps, cost_of
from ietagc_diffusers.training.layout import Layout
from ietagc_diffusers.training.lora import LoraWeights, adapted, add_adapter, targeted
from ietagc_diffusers.training.rounds import Rounds

METHOD = ["--lora_rank=2", "--num_shards=2", "--steps_per_round=2", "--max_train_steps=8", "--checkpointing_steps=3"]
LORA_TARGETS = StableDiffusion.denoiser_targets
AVERAGES = ("svd", "concatenate", "fold")
SHARDS, RANK, ALPHA = 3, 2, 3.0
CONVOLUTIONS = "to_q to_out.0 conv1 proj_in ff.net.2"  # layers of two kinds, in attention and outside


def generator(seed):
    return torch.Generator().manual_seed(seed)


def some_factors(seed, rows=7, columns=5, rank=RANK):
    return Factors(
        torch.randn(rows, rank, generator=generator(seed)), torch.randn(rank, columns, generator=generator(seed + 99))
    )


# The mathematics


def test_a_truncated_update_is_the_best_of_its_rank():
    whole = total([some_factors(seed) for seed in range(SHARDS)])
    left, values, right = torch.linalg.svd(whole.product(), full_matrices=False)
    best = left[:, :RANK] * values[:RANK] @ right[:RANK]
    nearest = truncate(whole, RANK)
    assert nearest.factors.rank == RANK
    torch.testing.assert_close(nearest.factors.product(), best, rtol=0, atol=1e-5)
    assert nearest.energy == pytest.approx(whole.product().square().sum().item())
    assert nearest.discarded == pytest.approx((whole.product() - best).square().sum().item())


def test_a_truncated_update_keeps_the_length_of_the_rows_that_up_learns_through():
    whole = total([some_factors(seed, columns=50) for seed in range(SHARDS)])
    down = truncate(whole, RANK).factors.down
    length = whole.down.square().sum(1).mean()
    torch.testing.assert_close(down @ down.T, length * torch.eye(RANK), rtol=1e-5, atol=1e-4)


def test_an_update_of_low_rank_stays_as_it_is():
    factors = some_factors(0)
    assert truncate(factors, RANK).factors is factors


@pytest.mark.parametrize("limit", [0.1, 3.0, 100.0])
def test_shrunk_factors_have_a_product_within_the_limit_in_the_same_direction(limit):
    factors = some_factors(0)
    dense = factors.product()
    scale = shrinking(factors, limit)
    shrunk = Factors(factors.up * scale, factors.down * scale).product()
    torch.testing.assert_close(shrunk, dense * min(1.0, limit / dense.norm().item()), rtol=1e-6, atol=1e-6)
    assert (scale == 1) == (dense.norm() <= limit)


def test_an_update_of_zero_is_not_shrunk():
    assert shrinking(Factors(torch.zeros(7, 2), torch.randn(2, 5)), 1.0) == 1


# The weights


def settings(*more, base="m"):
    flags = [f"--pretrained_model_name_or_path={base}", "--train_data_dir=d", f"--lora_rank={RANK}", *more]
    return parse_flags(flags)


def weights(average="svd", num_shards=SHARDS, targets=CONVOLUTIONS, seed=0, *more):
    torch.manual_seed(0)
    family = testing.family_of_pipeline(testing.random_pipeline(["a red picture"]))
    about = settings(
        f"--lora_average={average}", f"--lora_alpha={ALPHA}", "--lora_target_modules", *targets.split(), *more
    )
    add_adapter(family, about)
    return LoraWeights(family, num_shards, about, seed)


def randomise(weights, seed):
    """Other factors on the device. Returns the updates of all layers, which a model has in its weights, float64."""
    (live,) = weights.live().values()
    for number, tensor in enumerate(live.values()):
        tensor.copy_(torch.randn(tensor.shape, generator=generator(1000 * seed + number)))
    return {layer: updates_on_device(weights, layer) for layer in weights.layers}


def updates_on_device(weights, layer):
    (live,) = weights.live().values()
    return ALPHA / RANK * weights._factors(live, layer).product()


def base_of(weights):
    return {layer: module.base_layer.weight.detach().double().flatten(1) for layer, module in weights.layers.items()}


def one_round(weights, first_seed):
    """Train all proxies of a round, so to speak. Returns the mean update of each layer."""
    updates = []
    for shard in range(SHARDS):
        weights.put()
        updates.append(randomise(weights, first_seed + shard))
        weights.add_to_mean(shard)
    weights.aggregate(lambda tensor: tensor)
    return {layer: torch.stack([update[layer] for update in updates]).mean(0) for layer in weights.layers}


def saved_update(weights, layer):
    return ALPHA / RANK * weights._factors(weights.deployable()["lora"], layer).product()


def close(one, other):
    scale = other.abs().max()
    torch.testing.assert_close(one / scale, other / scale, rtol=0, atol=2e-6)


def test_with_one_shard_nothing_is_averaged():
    alone = weights(num_shards=1)
    updates = randomise(alone, 0)
    alone.add_to_mean(0)
    alone.aggregate(lambda tensor: tensor)
    assert all(torch.equal(updates_on_device(alone, layer), update) for layer, update in updates.items())


def test_concatenated_factors_are_the_mean_and_rounds_start_from_the_nearest():
    run = weights("concatenate")
    for layer, mean in one_round(run, 0).items():
        close(saved_update(run, layer), mean)
        left, values, right = torch.linalg.svd(mean, full_matrices=False)
        close(updates_on_device(run, layer), left[:, :RANK] * values[:RANK] @ right[:RANK])


def test_svd_is_the_nearest_to_the_mean_and_its_loss_is_recorded():
    run = weights("svd")
    lost = energy = 0.0
    for layer, mean in one_round(run, 0).items():
        left, values, right = torch.linalg.svd(mean, full_matrices=False)
        close(saved_update(run, layer), left[:, :RANK] * values[:RANK] @ right[:RANK])
        assert torch.equal(saved_update(run, layer), updates_on_device(run, layer))
        lost, energy = lost + values[RANK:].square().sum(), energy + values.square().sum()
    assert run.notes["lora_discarded"] == pytest.approx((lost / energy).item(), rel=1e-4)
    assert run.notes["lora_discarded"] > 0.1  # or this could not fail


def test_folded_rounds_add_up_exactly():
    """More rounds than a layer has ranks: 3 x 3 x 2 of at most 16."""
    run = weights("fold")
    before, means = base_of(run), [one_round(run, 10 * number) for number in range(3)]
    assert run.notes["lora_discarded"] == 0
    for layer, weight in base_of(run).items():
        update = sum(mean[layer] for mean in means)
        close(saved_update(run, layer), update)
        close(weight - before[layer], update)
        assert not updates_on_device(run, layer).any()  # a fresh adapter changes nothing
        assert run._factors(run.deployable()["lora"], layer).rank <= min(weight.shape)


def test_after_a_step_no_update_is_over_the_limit_and_those_under_it_keep_their_bits():
    updates = randomise(weights(), 0)
    limit = sorted(update.norm().item() for update in updates.values())[len(updates) // 2] + 1e-3
    run = weights("svd", SHARDS, CONVOLUTIONS, 0, f"--scale_weight_norms={limit}")
    updates = randomise(run, 0)
    run.after_step()
    short = [layer for layer, update in updates.items() if update.norm() <= limit]
    assert 0 < len(short) < len(updates)
    for layer, update in updates.items():
        after = updates_on_device(run, layer)
        if layer in short:
            assert torch.equal(after, update)
        else:
            torch.testing.assert_close(after, update * (limit / update.norm()), rtol=1e-5, atol=1e-5)


def test_fresh_adapters_are_drawn_by_round_and_seed():
    def downs(run):
        (live,) = run.live().values()
        return torch.cat([t.flatten() for name, t in live.items() if "down" in name or "lora_A" in name])

    run, again, other = weights("fold"), weights("fold"), weights("fold", seed=1)
    first = downs(run).clone()
    assert torch.equal(first, downs(again)) and not torch.equal(first, downs(other))
    assert first.std() == pytest.approx(1 / RANK, rel=0.05)
    one_round(run, 0)
    assert not torch.equal(first, downs(run))


def test_the_mean_of_factors_is_not_the_mean_of_models():
    """One model, written in two ways: the mean of its factors with themselves turned round is nothing at all."""
    factors = some_factors(0)
    same = Factors(-factors.up, -factors.down)
    naive = Factors((factors.up + same.up) / 2, (factors.down + same.down) / 2)
    mean = total([Factors(part.up / 2, part.down) for part in (factors, same)])
    assert not naive.product().any()
    torch.testing.assert_close(truncate(mean, RANK).factors.product(), factors.product(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("average", AVERAGES)
def test_neither_order_nor_processes_show_in_the_mean(average):
    one, two, three = (weights(average) for _ in range(3))
    for shard in range(SHARDS):
        randomise(one, shard)
        one.add_to_mean(shard)
    for run, shards in ((two, (2, 0)), (three, (1,))):
        for shard in shards:
            randomise(run, shard)
            run.add_to_mean(shard)
    theirs = iter([torch.tensor(1.0), *three.means["lora"].sums.values()])
    one.aggregate(lambda tensor: tensor)
    two.aggregate(lambda tensor: tensor + next(theirs))
    for name, tensor in one.deployable()["lora"].items():
        assert torch.equal(tensor, two.deployable()["lora"][name])


# Runs


@pytest.fixture(scope="module")
def flags(base, pictures):
    return train_flags(base, pictures, *METHOD, "--validation_prompts", "a red picture")


@pytest.fixture(scope="module")
def runs(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    return {name: train_here([*flags, f"--lora_average={name}", "--save_merged"], folder / name) for name in AVERAGES}


def adapter_bytes(folder):
    return (folder / ADAPTER_FILE).read_bytes()


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a red picture", num_inference_steps=2, generator=generator(3), output_type="np").images
    return np.asarray(images[0], dtype=np.float32)


@pytest.mark.parametrize("average", AVERAGES)
def test_a_stock_pipeline_draws_what_ours_draws(base, runs, average):
    stock = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    plain = draw(stock)
    stock.load_lora_weights(runs[average])
    adapted = draw(stock)
    merged = draw(DiffusionPipeline.from_pretrained(runs[average], safety_checker=None))
    assert np.abs(adapted - merged).max() < 1e-4 < 1e-3 < np.abs(adapted - plain).max()


def denoiser_of(base):
    return UNet2DConditionModel.from_pretrained(base, subfolder="unet")


@pytest.mark.parametrize("more", [["--use_dora"], ["--lora_target_modules", *CONVOLUTIONS.split()], []])
def test_all_kinds_of_layers_load_with_their_alpha(base, pictures, tmp_path, more):
    flags = [*train_flags(base, pictures, "--mitigation=none", "--rank=3", "--max_train_steps=2"), "--lora_alpha=6"]
    train_here([*flags, *more, "--save_merged", "--learning_rate=0.05"], tmp_path)
    stock = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    plain = draw(stock)
    stock.load_lora_weights(tmp_path)
    layers = adapted(stock.unet)
    assert layers.keys() == targeted(denoiser_of(base), more[1:] if len(more) > 1 else LORA_TARGETS).keys()
    assert {module.scaling["default_0"] for module in layers.values()} == {2.0}
    assert all(module.lora_B["default_0"].weight.any() for module in layers.values())
    merged = draw(DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None))
    assert np.abs(draw(stock) - merged).max() < 1e-4 < 1e-3 < np.abs(merged - plain).max()


@pytest.mark.parametrize("average", AVERAGES)
def test_a_run_that_is_cut_anywhere_ends_the_same(flags, runs, tmp_path, average):
    """Once within a round, with a proxy done and one on its way, and once between rounds."""
    flags = [*flags, f"--lora_average={average}"]
    train_here(flags, tmp_path, stop_at=3)
    train_here([*flags, "--resume_from_checkpoint=latest"], tmp_path, stop_at=4)
    train_here([*flags, "--resume_from_checkpoint=latest"], tmp_path)
    assert adapter_bytes(tmp_path) == adapter_bytes(runs[average])


@pytest.mark.parametrize("average", ["svd", pytest.param("fold", marks=pytest.mark.slow)])
def test_two_processes_give_the_same_adapter(flags, runs, tmp_path, average):
    launch([*flags, f"--lora_average={average}", "--checkpointing_steps=100"], tmp_path, processes=2)
    assert adapter_bytes(tmp_path) == adapter_bytes(runs[average])


def test_one_shard_goes_on_after_a_kill_and_caches_latents(base, pictures, tmp_path):
    """What a kill leaves is the last checkpoint."""
    flags = [*train_flags(base, pictures, "--mitigation=agc", "--lora_rank=2", "--center_crop", "--max_train_steps=4")]
    flags += ["--checkpointing_steps=3"]
    whole = train_here(flags, tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    (whole / "checkpoint-3").rename(tmp_path / "cut" / "checkpoint-3")
    cached = [*flags, f"--cache_latents={tmp_path / 'cache'}"]
    cut = train_here([*cached, "--resume_from_checkpoint=latest"], tmp_path / "cut")
    assert adapter_bytes(cut) == adapter_bytes(whole)


@pytest.mark.parametrize("average", ["svd", pytest.param("concatenate", marks=pytest.mark.slow)])
def test_a_limit_of_norms_holds_for_the_saved_adapter_over_interruptions(flags, runs, tmp_path, average):
    def norms(folder):
        tensors = load_file(folder / ADAPTER_FILE)
        ups = [name for name in tensors if ".up." in name]
        return torch.stack([(tensors[up] @ tensors[up.replace(".up.", ".down.")]).norm() for up in ups])

    free = norms(runs[average])
    limit = free.median().item() / 2
    limited = [*flags, f"--lora_average={average}", f"--scale_weight_norms={limit}"]
    whole = train_here(limited, tmp_path / "whole")
    found = norms(whole)
    assert (found <= limit * (1 + 1e-5)).all() and (free > limit).any() and found.max() > limit / 2
    train_here(limited, tmp_path / "cut", stop_at=3)
    train_here([*limited, "--resume_from_checkpoint=latest"], tmp_path / "cut")
    assert adapter_bytes(tmp_path / "cut") == adapter_bytes(whole)


def test_what_a_run_leaves(runs, flags, tmp_path):
    folder = train_here([*flags, "--save_rounds"], tmp_path)
    run = RunFolder(folder)
    assert run.is_finished and run.is_adapter and not (folder / "unet").exists()
    assert not RunFolder(runs["svd"]).is_adapter  # it has a pipeline too
    assert [path.name for _, path in run.saved_models("unet")] == ["round-0001", "round-0002"]
    assert all(0 <= row["lora_discarded"] < 1 for row in run.rounds())
    assert adapter_bytes(run.round(2)) == adapter_bytes(folder)
    assert run.config()["optimizer_state"] == "reset"
    train_here([*flags, "--seed=6"], folder)
    assert (folder / "earlier-run-1" / ADAPTER_FILE).exists()


def test_only_adapters_are_trained(base, runs):
    """The base's weights in a merged pipeline, but for those of the targeted layers."""
    before = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    after = load_file(runs["svd"] / "unet" / "diffusion_pytorch_model.safetensors")
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {f"{name}.weight" for name in targeted(denoiser_of(base), LORA_TARGETS)}


@pytest.mark.parametrize("average", AVERAGES)
def test_the_arithmetic_of_the_cost_is_that_of_real_checkpoints(flags, runs, average):
    about = parse_flags([*flags, f"--lora_average={average}"])
    family = testing.family_of_pipeline(testing.random_pipeline([f"a {c} picture" for c in ("red", "blue")]))
    add_adapter(family, about)
    cost, rounds = cost_of(about, family, Layout(2)), Rounds(2, 4, 2)
    for step in checkpoint_steps(rounds, 3):
        checkpoint = runs[average] / f"checkpoint-{step}"
        large = [p for k in ("optimizer", "mean", "weights") for p in checkpoint.glob(f"ietagc/{k}-*.safetensors")]
        paths = [checkpoint / ADAPTER_FILE, *large]
        content = sum(t.nbytes for path in paths for t in TensorFile(path).values())
        assert content == sum(cost.files(rounds, step).values()), step
    assert cost.output(2) == sum(t.nbytes for t in TensorFile(runs[average] / ADAPTER_FILE).values())


def test_room_is_asked_for_a_merged_pipeline_as_it_is_saved(base, pictures, tmp_path):
    """What was trained beside adapters in half precision is merged, and saved, in float32."""
    flags = train_flags(base, pictures, "--mitigation=none", "--max_train_steps=1", "--lora_rank=2", "--save_merged")
    flags += ["--mixed_precision=bf16", "--train_text_encoder", "--save_rounds"]
    saved = train_here(flags, tmp_path / "out")
    about = parse_flags(flags)
    family = StableDiffusion.load(about, dtype=torch.bfloat16)
    add_adapter(family, about)
    paths = [saved / ADAPTER_FILE, *saved.glob("*/*.safetensors")]
    adapter, *_ = sizes = [sum(t.nbytes for t in TensorFile(path).values()) for path in paths]
    cost, weights = cost_of(about, family, Layout(1)), LoraWeights(family, 1, about)
    assert cost.output(1) == weights.output_bytes == sum(sizes)
    assert weights.unfinished_bytes == adapter
    assert [path.name for path in RunFolder(saved).round(1).iterdir()] == [ADAPTER_FILE]  # is not merged


def test_half_precision_is_for_what_is_frozen(base):
    family = testing.family_of_pipeline(testing.random_pipeline(["a red picture"]))
    family.dtype = torch.bfloat16
    add_adapter(family, settings())
    kinds = {(p.requires_grad, p.dtype) for p in family.denoiser.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    run = LoraWeights(family, 2, settings("--lora_average=fold"))
    assert all(layer.base_layer.weight.dtype == torch.float32 for layer in run.layers.values())  # small updates add up


# Wrong use


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lora_rank=0"], "`lora_rank` 0: must be at least 1"),
        (["--lora_rank=4", "--use_ema"], "`use_ema`: the moving average of an adapter's factors"),
        (["--lora_rank=4", "--use_dora"], "`use_dora`: the mean of the models of `num_shards` 4"),
        (["--lora_rank=4", "--optimizer_state=average"], "`optimizer_state` average: with `lora_rank`"),
        (["--lora_alpha=4"], "`lora_alpha`: is for a LoRA; give `lora_rank` too"),
        (["--lora_target_modules", "to_q"], "`lora_target_modules`: is for a LoRA"),
        (["--save_merged"], "`save_merged`: is for a LoRA"),
        (["--scale_weight_norms=1"], "`scale_weight_norms`: is for a LoRA"),
        (["--lora_rank=4", "--scale_weight_norms=0"], "`scale_weight_norms` 0.0: must be over 0"),
        (
            ["--lora_rank=4", "--scale_weight_norms=1", "--lora_average=fold"],
            "`scale_weight_norms`: with `lora_average`",
        ),
        (["--rank=4", "--scale_weight_norms=1", "--use_dora", "--num_shards=1"], "`scale_weight_norms`: DoRA's update"),
    ],
)
def test_flags_that_do_not_go_together(more, message):
    with pytest.raises(UsageError, match=message):
        parse_flags(["--pretrained_model_name_or_path=m", "--train_data_dir=d", *more])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lora_rank=17"], "`lora_rank` 17: larger than down_blocks.*, which is 16 x 16; give 16 or less"),
        (["--lora_target_modules", "to_q", "to_x"], "`lora_target_modules` to_x: fits no layer .* to_out.0"),
        (["--lora_target_modules", "attn1"], "`lora_target_modules` attn1: .* is a Attention, not a layer"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_before_training(base, pictures, tmp_path, more, message):
    with pytest.raises(UsageError, match=message):
        train_here([*train_flags(base, pictures), "--lora_rank=4", *more], tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_run_of_all_weights_and_one_of_adapters_do_not_continue_each_other(base, pictures, runs, tmp_path):
    flags = [flag for flag in train_flags(base, pictures, *METHOD) if not flag.startswith("--lora")]
    with pytest.raises(UsageError, match="lora_rank was 2, is None"):
        train_here([*flags, f"--resume_from_checkpoint={runs['svd'] / 'checkpoint-3'}"], tmp_path / "one")
    full = train_here([*flags, "--max_train_steps=4"], tmp_path / "full")
    saved = json.loads((full / "checkpoint-3" / "ietagc" / "checkpoint.json").read_text())["fingerprint"]
    assert not [key for key in saved if "lora" in key]  # so that runs from before there were adapters continue
    with pytest.raises(UsageError, match="lora_rank was None, is 2"):
        train_here([*flags, "--lora_rank=2", "--resume_from_checkpoint=latest"], full)
