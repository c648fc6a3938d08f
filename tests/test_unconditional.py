"""Unconditional models: from scratch and from a base, with and without classes, as a family like any other."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import train_here
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from ietagc_diffusers import UsageError, family_of, testing
from ietagc_diffusers.arguments import build_parser, flag_names, parse_flags
from ietagc_diffusers.checkpoint import Checkpoint
from ietagc_diffusers.data import ClassLabels, TrainingSamples, load_training_rows
from ietagc_diffusers.families import Unconditional
from ietagc_diffusers.families.unconditional import draw
from ietagc_diffusers.settings import declared
from ietagc_diffusers.training.fixed_losses import FixedLosses
from ietagc_diffusers.training.scripts import UnconditionalScript

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
METHOD = [
    "--num_shards=2", "--steps_per_round=3", "--max_train_steps=12", "--skip_threshold=0.9", "--augment_range=1.3",
    "--bank_buckets=2", "--random_flip", "--report_to=none",
]  # fmt: skip
# The flags of Diffusers' train_unconditional.py and their defaults.
OFFICIAL_DEFAULTS = {
    "dataset_name": None, "dataset_config_name": None, "model_config_name_or_path": None, "train_data_dir": None,
    "output_dir": "ddpm-model-64", "overwrite_output_dir": False, "cache_dir": None, "resolution": 64,
    "center_crop": False, "random_flip": False, "train_batch_size": 16, "eval_batch_size": 16,
    "dataloader_num_workers": 0, "num_epochs": 100, "save_images_epochs": 10, "save_model_epochs": 10,
    "gradient_accumulation_steps": 1, "learning_rate": 1e-4, "lr_scheduler": "cosine", "lr_warmup_steps": 500,
    "adam_beta1": 0.95, "adam_beta2": 0.999, "adam_weight_decay": 1e-6, "adam_epsilon": 1e-8, "use_ema": False,
    "ema_inv_gamma": 1.0, "ema_power": 3 / 4, "ema_max_decay": 0.9999, "push_to_hub": False, "hub_token": None,
    "hub_model_id": None, "hub_private_repo": False, "logger": "tensorboard", "logging_dir": "logs", "local_rank": -1,
    "mixed_precision": "no", "ddpm_num_inference_steps": 1000, "checkpointing_steps": 500,
    "checkpoints_total_limit": None, "resume_from_checkpoint": None,
    "enable_xformers_memory_efficient_attention": False, "preserve_input_precision": False,
}  # fmt: skip
# What a base says, if there is one.
WITHOUT_BASE = {"prediction_type": "epsilon", "ddpm_num_steps": 1000, "ddpm_beta_schedule": "linear"}
ALIASES = {"num_epochs": "num_train_epochs", "logger": "report_to"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The configuration of a tiny UNet."""
    folder = tmp_path_factory.mktemp("config")
    testing.random_unconditional_pipeline().unet.save_config(folder)
    return folder


def flags_of(pictures, *more):
    return [
        f"--train_data_dir={pictures}", "--resolution=16", "--train_batch_size=4", "--learning_rate=1e-3",
        "--lr_warmup_steps=0", "--seed=5", "--checkpointing_steps=100000", *more,
    ]  # fmt: skip


def train(flags, output_dir, stop_at=None):
    return train_here(flags, output_dir, stop_at, kind=UnconditionalScript)


def settings_of(*flags):
    return parse_flags(list(flags), UnconditionalScript)


def drawn_by(family, number=4, seed=0):
    torch.manual_seed(seed)
    images = torch.rand(number, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return images, family.objective.draw(family.objective.encode(family.batch(images, [""] * number)))


def test_official_flags_have_their_defaults(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    actions = {
        name.lstrip("-") for action in build_parser(UnconditionalScript)._actions for name in action.option_strings
    }
    assert actions >= OFFICIAL_DEFAULTS.keys() | WITHOUT_BASE.keys()
    settings = settings_of("--train_data_dir=d")
    wanted = OFFICIAL_DEFAULTS | WITHOUT_BASE | {"train_data_dir": "d"}
    assert {name: getattr(settings, ALIASES.get(name, name)) for name in wanted} == wanted
    assert len(wanted) == 45


def test_flags_that_have_no_meaning_are_not_there():
    names = set(flag_names(UnconditionalScript))
    assert not names & {"caption_column", "lora_rank", "cache_latents", "validation_prompts", "prior_dir", "snr_gamma"}
    of_groups = {entry.name for group in UnconditionalScript.GROUPS.values() for entry in declared(group)}
    assert of_groups == {entry.name for entry in declared(UnconditionalScript)}


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_losses_are_those_of_the_official_script(prediction_type):
    pipeline = testing.random_unconditional_pipeline()
    pipeline.scheduler = DDPMScheduler(prediction_type=prediction_type)
    family = testing.family_of_pipeline(pipeline)
    images, drawn = drawn_by(family, 6)
    torch.manual_seed(0)
    noise = torch.randn(images.shape)
    timesteps = torch.randint(0, 1000, (6,))
    assert torch.equal(drawn.noise, noise) and torch.equal(drawn.levels, timesteps)
    alpha_bar = torch.cumprod(1 - torch.linspace(0.0001, 0.02, 1000), 0)[timesteps].view(-1, 1, 1, 1)
    with torch.no_grad():
        predicted = pipeline.unet(alpha_bar.sqrt() * images + (1 - alpha_bar).sqrt() * noise, timesteps).sample
        losses, plain = (
            compute(pipeline.unet, drawn) for compute in (family.objective.losses, family.objective.plain_loss)
        )
    squares = (predicted - (noise if prediction_type == "epsilon" else images)).square()
    torch.testing.assert_close(losses, squares.flatten(1).mean(1))
    if prediction_type == "sample":
        squares = squares * (alpha_bar / (1 - alpha_bar))
        torch.testing.assert_close(family.objective.weights(drawn), (alpha_bar / (1 - alpha_bar)).flatten())
    torch.testing.assert_close(plain, squares.mean())


def test_the_noise_of_shared_batches_is_that_of_the_whole():
    family = testing.family_of_pipeline(testing.random_unconditional_pipeline())
    _, whole = drawn_by(family)
    batch = family.batch(torch.zeros(2, 3, 16, 16), ["", ""])
    torch.manual_seed(0)
    share = family.objective.draw(family.objective.encode(batch.__class__(batch.images, share=(slice(2, 4), 4))))
    assert torch.equal(share.noise, whole.noise[2:]) and torch.equal(share.timesteps, whole.timesteps[2:])


def test_an_augmented_image_keeps_its_noise():
    family = testing.family_of_pipeline(testing.random_unconditional_pipeline())
    images, drawn = drawn_by(family)
    changed = family.objective.with_images(drawn, [1], torch.ones(1, 3, 16, 16))
    assert torch.equal(changed.images[1], torch.ones(3, 16, 16)) and torch.equal(changed.images[2], images[2])
    assert torch.equal(changed.noise, drawn.noise) and torch.equal(drawn.images, images)


@pytest.mark.parametrize("own_generators", [False, True])
def test_images_are_those_of_the_pipeline(own_generators):
    pipeline = testing.random_unconditional_pipeline()
    pipeline.set_progress_bar_config(disable=True)

    def generator():
        seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        return seeds if own_generators else seeds[0]

    ours = draw(pipeline, generator(), 2, 4)
    theirs = pipeline(batch_size=2, generator=generator(), num_inference_steps=4).images
    assert [np.asarray(image).tolist() for image in ours] == [np.asarray(image).tolist() for image in theirs]


def test_weights_from_scratch_are_those_of_the_seed(config, pictures):
    settings = settings_of(*flags_of(pictures, f"--model_config_name_or_path={config}"))
    torch.manual_seed(5)
    family = Unconditional.load(settings)
    torch.manual_seed(5)
    wanted = UNet2DModel.from_config(UNet2DModel.load_config(config)).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in family.denoiser.state_dict().items())


def test_a_run_stops_and_resumes(config, pictures, tmp_path):
    flags = flags_of(pictures, *METHOD, f"--model_config_name_or_path={config}", "--use_ema", "--label_column=label")
    whole = train(flags, tmp_path / "whole")
    train(flags, tmp_path / "stopped", stop_at=8)
    assert (tmp_path / "stopped" / "unfinished" / "model_index.json").is_file()
    resumed = train([*flags, "--resume_from_checkpoint=latest"], tmp_path / "stopped")
    assert (whole / WEIGHTS).read_bytes() == (resumed / WEIGHTS).read_bytes()
    assert not (resumed / "unfinished").exists()
    pipeline = DDPMPipeline.from_pretrained(whole)
    assert pipeline.unet.config.sample_size == 16 and family_of(whole) is Unconditional
    record = json.loads((whole / "ietagc" / "training_set.json").read_text())
    assert record["num_rows"] == 24 and record["image_interpolation_mode"] == "bilinear"


def test_plain_training_resumes_from_the_middle_of_an_epoch(config, pictures, tmp_path):
    flags = flags_of(pictures, "--mitigation=none", f"--model_config_name_or_path={config}", "--num_epochs=2")
    flags += ["--report_to=none", "--gradient_accumulation_steps=2", "--prediction_type=sample", "--use_ema"]
    whole = train(flags, tmp_path / "whole")
    train(flags, tmp_path / "stopped", stop_at=2)
    resumed = train([*flags, "--resume_from_checkpoint=latest"], tmp_path / "stopped")
    assert (whole / WEIGHTS).read_bytes() == (resumed / WEIGHTS).read_bytes()


def test_a_base_is_trained_on(config, pictures, tmp_path):
    base = tmp_path / "base"
    pipeline = testing.random_unconditional_pipeline(3)
    pipeline.scheduler = DDPMScheduler(prediction_type="sample", beta_schedule="squaredcos_cap_v2")
    pipeline.save_pretrained(base)
    flags = flags_of(pictures, f"--pretrained_model_name_or_path={base}", "--report_to=none")
    out = train([*flags, "--max_train_steps=4", "--learning_rate=0", "--num_shards=2"], tmp_path / "out")
    trained = DDPMPipeline.from_pretrained(out)
    before = pipeline.unet.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.unet.state_dict().items())
    found = trained.scheduler.config
    assert (found.prediction_type, found.beta_schedule) == ("sample", "squaredcos_cap_v2")
    frozen = Unconditional.load_frozen(out)
    images = torch.zeros(4, 3, 16, 16)
    losses = FixedLosses(frozen, images, [""] * 4, draws=2)(Unconditional.load_denoiser(out, "unet"))
    assert losses.shape == (4,) and losses.isfinite().all()


def test_images_are_drawn_along_the_training(config, pictures, tmp_path):
    flags = flags_of(pictures, f"--model_config_name_or_path={config}", "--ddpm_num_inference_steps=2")
    out = train([*flags, "--num_epochs=1", "--eval_batch_size=2", "--mitigation=none"], tmp_path / "out")
    assert list((out / "logs").rglob("events*"))
    without = train([*flags, "--num_epochs=1", "--report_to=none", "--mitigation=none"], tmp_path / "without")
    assert (out / WEIGHTS).read_bytes() == (without / WEIGHTS).read_bytes()  # drawing changes nothing


@pytest.mark.parametrize("kind", ["column", "random", "unique"])
def test_a_model_of_classes_is_trained(config, pictures, tmp_path, kind):
    flags = flags_of(pictures, *METHOD, f"--model_config_name_or_path={config}", f"--class_labels={kind}")
    flags += ["--label_column=label", "--num_classes=24"]
    whole = train(flags, tmp_path / "whole")
    train(flags, tmp_path / "stopped", stop_at=7)
    resumed = train([*flags, "--resume_from_checkpoint=latest"], tmp_path / "stopped")
    assert (whole / WEIGHTS).read_bytes() == (resumed / WEIGHTS).read_bytes()
    pipeline = DDPMPipeline.from_pretrained(whole)
    assert pipeline.unet.config.num_class_embeds == 24
    one, other = (draw(pipeline, torch.Generator().manual_seed(0), 1, 2, [label])[0] for label in (0, 1))
    assert np.asarray(one).tolist() != np.asarray(other).tolist()


def test_labels_are_those_of_the_rows(pictures):
    settings = settings_of(*flags_of(pictures, "--label_column=label"))
    rows = load_training_rows(settings)

    def labels(*about):
        condition = ClassLabels(*about)
        condition.check(rows)
        return [condition.read(row) for row in rows.select_columns(list(condition.columns))]

    assert labels("column", 3, "label") == rows["label"][:]
    assert labels("unique", 24) == list(range(24))
    random = labels("random", 4, None, 7)
    assert random == labels("random", 4, None, 7) != labels("random", 4, None, 8)
    assert set(random) == {0, 1, 2, 3}
    with pytest.raises(UsageError, match="`label_column` label: holds 2, and labels are 0 to 1 for `num_classes` 2"):
        labels("column", 2, "label")
    with pytest.raises(UsageError, match=r"`num_classes` 20: fewer than the rows .* give 24 or more"):
        labels("unique", 20)
    prepared = rows.remove_columns("sample_id").add_column("sample_id", [(1 << 62) + row for row in range(24)])
    with pytest.raises(UsageError, match="`class_labels` unique: takes the rows' numbers"):
        ClassLabels("unique", 24).check(prepared)
    with pytest.raises(UsageError, match="`label_column` kind: not a column"):
        labels("column", 2, "kind")


def test_precise_images_keep_their_bits(tmp_path):
    """Against the official script's transform, written down: a picture of 16 bits has more than 256 levels."""
    deep = np.arange(400, dtype=np.uint16).reshape(20, 20) * 160
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(np.zeros((20, 20, 4), dtype=np.uint8)).save(tmp_path / "four.png")
    settings = settings_of(*flags_of(tmp_path, "--preserve_input_precision", "--center_crop", "--resolution=20"))
    family = testing.family_of_pipeline(testing.random_unconditional_pipeline())
    rows = load_training_rows(settings)
    samples = TrainingSamples(rows, "image", family.view(settings), family.condition(settings, None), settings.decoding)
    images = samples.__getitems__([0, 1]).images
    assert images.shape == (2, 3, 20, 20) and len(images[0].unique()) == 400
    torch.testing.assert_close(images[1], -torch.ones(3, 20, 20))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--class_labels=random"], "`class_labels` random: say how many classes there are: `num_classes`"),
        (["--class_labels=column", "--num_classes=3"], "`class_labels` column: give the column's name"),
        (["--num_classes=3"], "`num_classes` 3: give `class_labels` too"),
        (["--mitigation=none", "--embedding_noise=0.1"], "`embedding_noise`: acts on captions"),
        (["--pretrained_model_name_or_path=b"], "were both given"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config, pictures, flags, message):
    with pytest.raises(UsageError, match=message):
        settings_of(*flags_of(pictures, f"--model_config_name_or_path={config}", *flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resolution=15"], "`resolution` 15: this UNet takes multiples of 2"),
        (["--class_labels=random", "--pretrained_model_name_or_path={base}"], "the base was trained without classes"),
        (["--ddpm_num_steps=100", "--pretrained_model_name_or_path={base}"], "`ddpm_num_steps` 100: the base .* 1000"),
        (["--class_labels=column", "--label_column=label", "--num_classes=2"], "`label_column` label: holds 2"),
    ],
)
def test_what_does_not_fit_is_said_before_training(config, pictures, tmp_path, flags, message):
    testing.random_unconditional_pipeline().save_pretrained(tmp_path / "base")
    flags = [flag.format(base=tmp_path / "base") for flag in flags]
    if not any("base" in flag for flag in flags):
        flags.append(f"--model_config_name_or_path={config}")
    with pytest.raises(UsageError, match=message):
        train(flags_of(pictures, "--report_to=none", "--max_train_steps=1", *flags), tmp_path / "out")


def test_a_folder_without_a_configuration_is_named(pictures, tmp_path):
    flags = flags_of(pictures, f"--model_config_name_or_path={tmp_path}", "--report_to=none")
    with pytest.raises(UsageError, match=r"`model_config_name_or_path` .*: no configuration of a UNet2DModel"):
        train([*flags, "--max_train_steps=1"], tmp_path / "out")


def test_each_script_names_the_other(config, base, pictures, tmp_path):
    flags = flags_of(pictures, f"--pretrained_model_name_or_path={base}", "--report_to=none", "--max_train_steps=1")
    with pytest.raises(UsageError, match=r"this script trains Unconditional; train_text_to_image_ietagc.py trains it"):
        train(flags, tmp_path / "out")
    testing.random_unconditional_pipeline().save_pretrained(tmp_path / "ddpm")
    flags = flags_of(pictures, f"--pretrained_model_name_or_path={tmp_path / 'ddpm'}", "--max_train_steps=1")
    with pytest.raises(UsageError, match=r"is an unconditional model, which train_unconditional_ietagc.py trains"):
        train_here([*flags, "--report_to=none"], tmp_path / "out")


def test_the_schedule_is_as_long_as_the_micro_batches(config, pictures, tmp_path):
    """As the official script gives it to accelerate: 6 micro-batches an epoch, warm-up times the accumulation, and a
    step of the schedule for each step of the optimizer.
    """
    flags = flags_of(pictures, "--mitigation=none", f"--model_config_name_or_path={config}", "--num_epochs=2")
    flags += ["--report_to=none", "--gradient_accumulation_steps=4", "--lr_warmup_steps=1"]  # 2 steps an epoch
    train(flags, tmp_path / "out", stop_at=3)
    schedule = Checkpoint(tmp_path / "out" / "checkpoint-3").state("proxy-0")["schedule"]
    assert schedule["_last_lr"] == [pytest.approx(1e-3 * 3 / 4)]
    train([flag for flag in flags if "warmup" not in flag or "=0" in flag], tmp_path / "cosine", stop_at=3)
    schedule = Checkpoint(tmp_path / "cosine" / "checkpoint-3").state("proxy-0")["schedule"]
    assert schedule["_last_lr"] == [pytest.approx(1e-3 * (1 + math.cos(math.pi * 3 / 12)) / 2)]
