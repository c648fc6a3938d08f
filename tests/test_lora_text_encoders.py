"""Adapters on the text encoders: trained with gradient, averaged, saved, resumed and measured like the denoiser's."""

import numpy as np
import pytest
import torch
from conftest import COLOURS, launch, train_flags, train_here
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from ietagc_diffusers import UsageError, testing
from ietagc_diffusers.arguments import parse_flags
from ietagc_diffusers.data import Batch
from ietagc_diffusers.eval.losses import Losses
from ietagc_diffusers.method.control import PlainControl
from ietagc_diffusers.run_folder import ADAPTER_FILE
from ietagc_diffusers.tensor_files import TensorFile
from ietagc_diffusers.training.cost import checkpoint_steps, cost_of
from ietagc_diffusers.training.layout import Layout
from ietagc_diffusers.training.lora import LoraWeights, add_adapter
from ietagc_diffusers.training.rounds import Rounds
from ietagc_diffusers.training.settings import TrainingSettings

METHOD = ["--lora_rank=2", "--num_shards=2", "--steps_per_round=2", "--max_train_steps=8", "--checkpointing_steps=3"]
METHOD += ["--learning_rate=1e-2"]  # so that text encoders, too, change what is drawn
ALONE = ["--mitigation=none", "--lora_rank=2", "--lora_alpha=6", "--max_train_steps=4", "--train_text_encoder"]
AVERAGES = ("svd", "concatenate", "fold")
CAPTIONS = ["a red picture", "a green picture"]
CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


def settings(*more):
    flags = ["--pretrained_model_name_or_path=m", "--train_data_dir=d", "--lora_rank=2", "--train_text_encoder"]
    return parse_flags([*flags, *more])


def adapter_bytes(folder):
    return (folder / ADAPTER_FILE).read_bytes()


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    some = torch.Generator().manual_seed(3)
    image = pipeline(CAPTIONS[0], num_inference_steps=2, generator=some, output_type="np").images[0]
    return np.asarray(image, dtype=np.float32)


def randomise(family, seed=0):
    """Adapters that do something."""
    some = torch.Generator().manual_seed(seed)
    for module in family.trained.values():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=some) / 4


@pytest.fixture
def family():
    torch.manual_seed(0)
    family = testing.family_of_pipeline(testing.random_pipeline(CAPTIONS), trains_text=True)
    add_adapter(family, settings())
    randomise(family)
    return family


def batch_of(family):
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    return Batch(images, family.tokenize(CAPTIONS))


# The objective


def test_losses_and_gradients_are_those_of_captions_encoded_in_the_forward(family):
    objective = family.objective
    drawn = objective.draw(objective.encode(batch_of(family)))
    objective.losses(family.denoiser, drawn).mean().backward()
    found = [p.grad.clone() for module in family.trained.values() for p in module.parameters() if p.requires_grad]
    assert all(gradient.any() for gradient in found)

    for module in family.trained.values():
        module.zero_grad()
    told = family.text_encoders["text_encoder"](family.tokenize(CAPTIONS)["input_ids"])[0]
    noisy = objective.scheduler.add_noise(drawn.latents, drawn.noise, drawn.timesteps)
    target = objective.scheduler.get_velocity(drawn.latents, drawn.noise, drawn.timesteps)
    prediction = family.denoiser(noisy, drawn.timesteps, told).sample
    ((prediction - target) ** 2).mean().backward()
    wanted = [p.grad for module in family.trained.values() for p in module.parameters() if p.requires_grad]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_the_plain_step_gives_the_text_encoder_a_gradient_and_the_deciding_forward_none(family):
    PlainControl().step(family.denoiser, family.objective, batch_of(family)).loss.backward()
    assert all(p.grad.any() for p in family.text_encoders["text_encoder"].parameters() if p.requires_grad)
    with torch.no_grad():
        drawn = family.objective.draw(family.objective.encode(batch_of(family)))
        assert not family.objective.losses(family.denoiser, drawn).requires_grad


def test_magnitudes_are_of_the_encoder_as_it_is(family):
    objective = family.objective
    objective.unconditional = objective.encode_inputs(family.tokenize([""]))
    drawn = objective.draw(objective.encode(batch_of(family)))
    for seed in (0, 1):
        randomise(family, seed)
        losses, magnitudes = objective.losses_and_magnitudes(family.denoiser, drawn)
        noisy = objective.scheduler.add_noise(drawn.latents, drawn.noise, drawn.timesteps)
        with torch.no_grad():
            told, nothing = (
                family.text_encoders["text_encoder"](family.tokenize(t)["input_ids"])[0] for t in (CAPTIONS, ["", ""])
            )
            one, other = (family.denoiser(noisy, drawn.timesteps, tell).sample for tell in (told, nothing))
        torch.testing.assert_close(magnitudes, (one - other).flatten(1).norm(dim=1))
        assert losses.requires_grad and not magnitudes.requires_grad


# Several encoders


@pytest.mark.parametrize("average", AVERAGES)
def test_a_stock_pipeline_loads_adapters_of_two_encoders_with_their_alpha(tmp_path, average):
    base = testing.random_xl_pipeline(CAPTIONS)
    base.save_pretrained(tmp_path / "base")
    family = testing.family_of_pipeline(base, trains_text=True)
    add_adapter(family, settings("--lora_alpha=3"))
    weights = LoraWeights(family, 2, settings("--lora_alpha=3", f"--lora_average={average}"))
    for shard in range(2):
        weights.put()
        randomise(family, shard)
        weights.add_to_mean(shard)
    weights.aggregate(lambda tensor: tensor)
    weights.save(tmp_path)
    stock = StableDiffusionXLPipeline.from_pretrained(tmp_path / "base")
    stock.load_lora_weights(tmp_path)
    for part in ("unet", "text_encoder", "text_encoder_2"):
        loaded = {name: m for name, m in getattr(stock, part).named_modules() if hasattr(m, "lora_A")}
        assert {f"{part}.{name}" for name in loaded} == {name for name in weights.layers if name.startswith(f"{part}.")}
        for name, module in loaded.items():
            update = module.scaling["default_0"] * module.lora_B["default_0"].weight @ module.lora_A["default_0"].weight
            wanted = 1.5 * weights._factors(weights.deployable()["lora"], f"{part}.{name}").product()
            assert wanted.any()
            torch.testing.assert_close(update.double(), wanted, rtol=1e-4, atol=1e-5)


def test_files_have_the_names_that_diffusers_writes(tmp_path):
    """As the official script saves them: ``save_lora_weights`` of what peft gives, converted."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    base = testing.random_xl_pipeline(CAPTIONS)
    family = testing.family_of_pipeline(base, trains_text=True)
    add_adapter(family, settings())
    randomise(family)
    LoraWeights(family, 1, settings()).save(tmp_path / "ours")
    unet, one, two = (
        convert_state_dict_to_diffusers(get_peft_model_state_dict(module)) for module in family.trained.values()
    )
    StableDiffusionXLPipeline.save_lora_weights(tmp_path / "theirs", unet, one, two)
    ours, theirs = (load_file(tmp_path / name / ADAPTER_FILE) for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("make", [testing.random_xl_pipeline, testing.random_sd3_pipeline])
def test_families_with_several_encoders_train_those_of_clip(pictures, tmp_path, make):
    base = make([f"a {colour} picture" for colour in COLOURS])
    base.save_pretrained(tmp_path / "base")
    flags = [*train_flags(tmp_path / "base", pictures, *ALONE), "--learning_rate=1e-2", "--save_merged"]
    folder = train_here(flags, tmp_path / "run")
    saved = load_file(folder / ADAPTER_FILE)
    ups = {name: tensor for name, tensor in saved.items() if ".up." in name or ".lora_B." in name}
    trained = {name.split(".")[0] for name, tensor in ups.items() if tensor.any()}
    assert trained == {"transformer" if hasattr(base, "transformer") else "unet", "text_encoder", "text_encoder_2"}
    stock = type(base).from_pretrained(tmp_path / "base")
    plain = draw(stock)
    stock.load_lora_weights(folder)
    merged = draw(DiffusionPipeline.from_pretrained(folder))
    assert np.abs(draw(stock) - merged).max() < 1e-3 < np.abs(plain - merged).max()


# Runs


@pytest.fixture(scope="module")
def flags(base, pictures):
    return train_flags(base, pictures, *METHOD, "--train_text_encoder", "--validation_prompts", CAPTIONS[0])


@pytest.fixture(scope="module")
def runs(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return {name: train_here([*flags, f"--lora_average={name}", "--save_merged"], folder / name) for name in AVERAGES}


def without_text(folder, target):
    """The denoiser's adapter only."""
    target.mkdir()
    tensors = {name: t for name, t in load_file(folder / ADAPTER_FILE).items() if name.startswith("unet.")}
    save_file(tensors, target / ADAPTER_FILE)
    return target


@pytest.mark.parametrize("average", AVERAGES)
def test_a_stock_pipeline_draws_what_ours_draws(base, runs, average, tmp_path):
    stock = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    stock.load_lora_weights(runs[average])
    adapted = draw(stock)
    merged = draw(DiffusionPipeline.from_pretrained(runs[average], safety_checker=None))
    stock.unload_lora_weights()
    stock.load_lora_weights(without_text(runs[average], tmp_path / "half"))
    assert np.abs(adapted - merged).max() < 1e-4 < 3e-4 < np.abs(adapted - draw(stock)).max()


def test_only_the_attention_of_the_text_encoder_changes(base, runs):
    before, after = (load_file(folder / "text_encoder" / "model.safetensors") for folder in (base, runs["svd"]))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert before.keys() == after.keys()
    assert changed == {name for name in before if name.endswith(tuple(f"{kind}.weight" for kind in CLIP_ATTENTION))}


@pytest.mark.parametrize("average", ["fold", *(pytest.param(name, marks=pytest.mark.slow) for name in AVERAGES[:2])])
def test_a_run_that_is_cut_anywhere_ends_the_same(flags, runs, tmp_path, average):
    flags = [*flags, f"--lora_average={average}"]
    train_here(flags, tmp_path, stop_at=3)
    train_here([*flags, "--resume_from_checkpoint=latest"], tmp_path, stop_at=4)
    train_here([*flags, "--resume_from_checkpoint=latest"], tmp_path)
    assert adapter_bytes(tmp_path) == adapter_bytes(runs[average])


@pytest.mark.slow
def test_two_processes_give_the_same_adapter(flags, runs, tmp_path):
    launch([*flags, "--checkpointing_steps=100"], tmp_path, processes=2)
    assert adapter_bytes(tmp_path) == adapter_bytes(runs["svd"])


@pytest.mark.parametrize("more", [[], ["--lora_dropout=0.3"]])
def test_gradient_checkpointing_and_validation_change_nothing(base, pictures, tmp_path, more):
    flags = [*train_flags(base, pictures, *ALONE), "--max_train_steps=8", *more]
    flags += ["--steps_per_round=8"]  # an epoch has 6: images are drawn within a round
    plain = train_here(flags, tmp_path / "plain")
    assert any(
        t.any() for name, t in load_file(plain / ADAPTER_FILE).items() if "text_encoder" in name and "up" in name
    )
    drawing = ["--validation_prompts", "a red picture", "--validation_epochs=1"]
    other = train_here([*flags, "--gradient_checkpointing", *drawing], tmp_path / "other")
    assert adapter_bytes(plain) == adapter_bytes(other)


def test_with_a_cache_only_images_are_cached(base, pictures, tmp_path):
    flags = train_flags(base, pictures, "--mitigation=agc", "--center_crop", *ALONE[1:])
    plain = train_here(flags, tmp_path / "plain")
    cached = train_here([*flags, f"--cache_latents={tmp_path / 'cache'}"], tmp_path / "cached")
    assert adapter_bytes(plain) == adapter_bytes(cached)
    assert [path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()] == ["latents"]


@pytest.mark.parametrize("more", [ALONE[:1], ["--num_shards=2", "--steps_per_round=1", "--lora_average=fold"]])
def test_half_precision_trains_the_text_encoder(base, pictures, tmp_path, more):
    flags = [*train_flags(base, pictures, *ALONE[1:], *more), "--mixed_precision=bf16", "--save_merged"]
    adapter = load_file(train_here(flags, tmp_path) / ADAPTER_FILE)
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in adapter.values())
    assert any(tensor.any() for name, tensor in adapter.items() if name.startswith("text_encoder.") and "up" in name)
    merged = load_file(tmp_path / "text_encoder" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values() if tensor.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("average", AVERAGES)
def test_the_arithmetic_of_the_cost_is_that_of_real_checkpoints(flags, runs, average):
    about = parse_flags([*flags, f"--lora_average={average}"])
    captions = [f"a {colour} picture" for colour in ("red", "blue")]
    family = testing.family_of_pipeline(testing.random_pipeline(captions), trains_text=True)
    add_adapter(family, about)
    cost, rounds = cost_of(about, family, Layout(2)), Rounds(2, 4, 2)
    for step in checkpoint_steps(rounds, 3):
        checkpoint = runs[average] / f"checkpoint-{step}"
        large = [p for k in ("optimizer", "mean", "weights") for p in checkpoint.glob(f"ietagc/{k}-*.safetensors")]
        content = sum(t.nbytes for path in [checkpoint / ADAPTER_FILE, *large] for t in TensorFile(path).values())
        assert content == sum(cost.files(rounds, step).values()), step


# Measured losses


def test_losses_count_the_text_encoders_adapters(base, runs, tmp_path):
    """As of the merged pipeline, whose text encoder is a plain one."""
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shown = (images, [CAPTIONS[0]] * 3), (images, [CAPTIONS[1]] * 3)
    losses = Losses(base, *shown, memory=tmp_path / "memory.jsonl")
    before = losses.of_base()
    found = losses(runs["svd"])
    assert found == pytest.approx(Losses(runs["svd"], *shown)(runs["svd"], "unet"), rel=1e-5)
    half = losses(without_text(runs["svd"], tmp_path / "half"))
    assert abs(half[0] / found[0] - 1) > 1e-4
    losses.known.clear()
    assert losses.of_base() == before and losses(tmp_path / "half") == half  # the encoder is the base's again


# Wrong use


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--train_text_encoder"], "`train_text_encoder`: is for a LoRA; give `lora_rank` too"),
        (["--train_text_encoder", "--lora_rank=2", "--embedding_noise=0.1"], "`embedding_noise`: .*leave out one"),
    ],
)
def test_flags_that_do_not_go_together(more, message):
    with pytest.raises(UsageError, match=message):
        parse_flags(["--pretrained_model_name_or_path=m", "--train_data_dir=d", *more])


def test_a_family_whose_text_encoders_cannot_be_trained_refuses():
    family = testing.family_of_pipeline(testing.random_pipeline(CAPTIONS))
    with pytest.raises(UsageError, match="`train_text_encoder`: not for Stable Diffusion; leave it out"):
        add_adapter(family, settings())


def test_a_rank_beyond_the_text_encoder_is_refused():
    pipeline = testing.random_pipeline(CAPTIONS)
    pipeline.text_encoder = testing.build_text_encoder(pipeline.tokenizer, width=8, layers=1)
    family = testing.family_of_pipeline(pipeline, trains_text=True)
    with pytest.raises(UsageError, match=r"`lora_rank` 9: larger than text_encoder\..*, which is 8 x 8; give 8 or"):
        add_adapter(family, settings("--lora_rank=9"))


def test_checkpoints_from_before_these_flags_continue_with_their_defaults(base, pictures, tmp_path, monkeypatch):
    flags = train_flags(base, pictures, "--mitigation=none", "--lora_rank=2", "--max_train_steps=4")
    whole = train_here(flags, tmp_path / "whole")
    shaping = TrainingSettings.shaping
    newer = {"train_text_encoder", "scale_weight_norms"}
    with monkeypatch.context() as earlier:
        earlier.setattr(TrainingSettings, "shaping", lambda self, resume: shaping(self, resume) - newer)
        cut = train_here([*flags, "--checkpointing_steps=2"], tmp_path / "cut", stop_at=2)
    flags += ["--resume_from_checkpoint=checkpoint-2"]
    with pytest.raises(UsageError, match="train_text_encoder was False, is True"):
        train_here([*flags, "--train_text_encoder"], cut)
    train_here(flags, cut)
    assert adapter_bytes(cut) == adapter_bytes(whole)
