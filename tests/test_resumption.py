"""A resumed run takes over what the first run drew, takes what may change, and refuses what may not."""

import json
import pickle
import shutil

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from conftest import launch, train_flags, train_here, unet_bytes

from ietagc_diffusers import RunFolder, UsageError
from ietagc_diffusers.arguments import parse_flags
from ietagc_diffusers.checkpoint import Checkpoint
from ietagc_diffusers.settings import Resume
from ietagc_diffusers.training.build import build_run, load_family, moving_average
from ietagc_diffusers.training.resumption import extend, fingerprint, resume
from ietagc_diffusers.training.rows import load_rows

METHOD = ["--num_shards=2", "--steps_per_round=2", "--skip_threshold=0.9", "--augment_range=1.3", "--bank_buckets=2"]
# Another value for every setting that must agree unless it is allowed to differ.
OTHER = {
    "mitigation": "iet-agc", "bank_decay": 0.7, "bank_bias_correction": False, "skip_threshold": 0.5,
    "augment_range": 1.2, "augment_decay": 3.0, "randaugment_magnitude": 9, "randaugment_num_ops": 1,
    "randaugment_operations": "graded", "redistribute_fraction": 0.5, "redistribute_mode": "copy",
    "redistribute_by": "random", "redistribute_counts": "total", "optimizer_state": "reset", "wen_threshold": 3.0,
    "embedding_noise": 0.2, "pixel_noise": 0.2, "noisy_data_sigma": 0.2,
    "caption_mitigation": "rt", "caption_mitigation_probability": 0.3, "random_skip_rate": 0.1,
    "random_augment_rate": 0.1, "random_augment_strength": 0.2, "variant": None, "revision": "r",
    "non_ema_revision": "r", "pretrained_model_name_or_path": None, "image_column": None, "resolution": 24,
    "center_crop": True, "random_flip": True, "image_interpolation_mode": "bilinear",
    "seed": 6, "caption_column": None, "prediction_type": "epsilon", "snr_gamma": 5.0, "noise_offset": 0.1,
    "input_perturbation": 0.1, "dream_training": True, "dream_detail_preservation": 0.5, "learning_rate": 7e-4,
    "scale_lr": True, "lr_scheduler": "cosine", "lr_warmup_steps": 4, "adam_beta1": 0.8, "adam_beta2": 0.9,
    "adam_weight_decay": 0.1, "adam_epsilon": 1e-6, "max_grad_norm": 0.5, "mixed_precision": "bf16",
    "alpha": "official", "prior_loss_weight": 2.0, "caption_dropout": 0.5,
    "timestep_bias_strategy": "later", "timestep_bias_multiplier": 3.0, "timestep_bias_begin": 100,
    "timestep_bias_end": 800, "timestep_bias_portion": 0.5, "pretrained_vae_model_name_or_path": None,
    "max_sequence_length": 99, "weighting_scheme": "mode", "logit_mean": 0.5, "logit_std": 2.0, "mode_scale": 0.7,
    "precondition_outputs": 0,
}  # fmt: skip
# Needs other settings beside it.
WITH = {
    "caption_mitigation": {"caption_mitigation_probability": 0.1},
    "caption_mitigation_probability": {"caption_mitigation": "rt"},
    "random_skip_rate": {"skip_threshold": 0.0, "augment_range": 1.0},
    "random_augment_rate": {"skip_threshold": 0.0, "augment_range": 1.0},
    "random_augment_strength": {"skip_threshold": 0.0, "augment_range": 1.0, "random_augment_rate": 0.1},
    "lr_warmup_steps": {"lr_scheduler": "constant_with_warmup"},
    "dream_training": {"prediction_type": "epsilon"},
    "timestep_bias_strategy": {"timestep_bias_multiplier": 2.0},
    "timestep_bias_multiplier": {"timestep_bias_strategy": "earlier"},
    "timestep_bias_begin": {"timestep_bias_strategy": "range", "timestep_bias_multiplier": 2.0},
    "timestep_bias_end": {"timestep_bias_strategy": "range", "timestep_bias_multiplier": 2.0},
    "timestep_bias_portion": {"timestep_bias_strategy": "earlier", "timestep_bias_multiplier": 2.0},
    "dream_detail_preservation": {"prediction_type": "epsilon", "dream_training": True},
}
# What they mean is seen elsewhere: a label, a Hub revision, where things lie, the whole precision of a run, a set of
# prior pictures (test_prior.py), or what only Stable Diffusion 3 has (test_sd3.py).
ELSEWHERE = {
    "mitigation", "variant", "revision", "non_ema_revision", "pretrained_model_name_or_path", "image_column",
    "caption_column", "mixed_precision", "prior_loss_weight", "pretrained_vae_model_name_or_path",
    "max_sequence_length", "weighting_scheme", "logit_mean", "logit_std", "mode_scale", "precondition_outputs",
}  # fmt: skip


def words(values):
    flags = []
    for key, value in values.items():
        flags.append((f"--{key}" if value else f"--no-{key}") if isinstance(value, bool) else f"--{key}={value}")
    return flags


def built(flags, found=None):
    """A run as the script builds it, resumed from ``found`` if that is given."""
    settings = parse_flags(flags)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=settings.mixed_precision)
    settings.mixed_precision = accelerator.mixed_precision
    set_seed(settings.seed)
    family = load_family(settings, accelerator)
    average = moving_average(family, settings, accelerator.device)
    condition = family.condition(settings, settings.method)
    rows, groups, *_ = load_rows(settings, condition, accelerator)
    buckets = settings.method.bank_buckets
    extend(settings, found)
    run, _ = build_run(settings, accelerator, family, average, condition, rows, groups)
    marks = fingerprint(settings, rows, condition, run, buckets)
    if found:
        resume(settings, run, found, marks, RunFolder(found.folder.parent))
    return run


def plain(value):
    """Values of attributes that compare, whatever they are."""
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, dict):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return f"{type(value).__name__}"


def attributes(thing):
    """All but state: what is a tensor, and the share of batches that a control has kept as they are."""
    values = {key: value for key, value in vars(thing).items() if not torch.is_tensor(value) and key != "whole_share"}
    return {key: plain(value) for key, value in values.items()}


def what_shapes(run):
    """Everything that steps from now on depend on, except state."""
    proxy = run.proxies[0]
    control, objective, samples = proxy.control, run.objective, proxy.loader.samples
    rates = []
    if hasattr(proxy.schedule, "lr_lambdas"):
        rates = [[rate(step) for step in (0, 1, 3, 7)] for rate in proxy.schedule.lr_lambdas]
    group = {key: value for key, value in proxy.optimizer.param_groups[0].items() if key not in ("params", "lr")}
    inner = getattr(control, "inner", control)
    bank = getattr(inner, "bank", None)
    return {
        "control": [type(control).__name__, attributes(control), attributes(inner)],
        "bank": None if bank is None else {k: v for k, v in attributes(bank).items() if k != "num_buckets"},
        "augment": None if control.augment is None else repr(control.augment.by_magnitude[-1]),
        "objective": attributes(objective) | {"prediction": objective.scheduler.config.prediction_type},
        "timesteps": None if objective.timestep_weights is None else objective.timestep_weights.tolist(),
        "unconditional": None if objective.unconditional is None else sorted(objective.unconditional),
        "transform": [repr(samples.transform), samples.alpha],
        "condition": attributes(samples.condition),
        "optimizer": plain(group),
        "rates": [rates, plain(getattr(proxy.schedule, "base_lrs", None))],
        "clip": proxy.max_grad_norm,
        "method": run.config.to_dict() | {"mitigation": None, "bank_buckets": None},
        "seed": [run.seed, proxy.loader.seed],
    }


@pytest.fixture(scope="module")
def first(base, pictures, tmp_path_factory):
    """Flags of a run, and its checkpoint."""
    flags = train_flags(base, pictures, *METHOD, "--max_train_steps=8", "--checkpointing_steps=4")
    folder = train_here(flags, tmp_path_factory.mktemp("runs") / "first")
    return flags, RunFolder(folder).checkpoints()[0]


def test_every_setting_that_may_differ_is_in_the_table(first):
    same = parse_flags(first[0]).shaping(Resume.SAME)
    assert same == OTHER.keys()


@pytest.fixture(scope="module")
def unchanged(first):
    return what_shapes(built(first[0]))


@pytest.mark.parametrize("name", sorted(OTHER.keys() - ELSEWHERE))
def test_what_may_change_takes_effect(first, unchanged, name):
    flags, checkpoint = first
    changes = WITH.get(name, {}) | {name: OTHER[name]}
    changed = [*flags, *words(changes)]
    with pytest.raises(UsageError, match=f"{name} was"):
        built(changed, Checkpoint(checkpoint))
    if name in ("random_skip_rate", "random_augment_rate", "random_augment_strength"):
        return  # another control, which has no bank to take the checkpoint's
    allowed = [*changed, "--resume_allow", *changes]
    resumed, fresh = what_shapes(built(allowed, Checkpoint(checkpoint))), what_shapes(built(changed))
    assert resumed == fresh
    assert resumed != unchanged


def test_a_learning_rate_that_changes_is_the_rate_of_the_next_step(first):
    flags, checkpoint = first
    changed = [*flags, "--learning_rate=7e-4", "--lr_scheduler=linear"]
    run = built([*changed, "--resume_allow", "learning_rate", "lr_scheduler"], Checkpoint(checkpoint))
    proxy = run.proxies[0]
    assert proxy.steps == 2 and proxy.optimizer.param_groups[0]["lr"] == pytest.approx(7e-4 * (4 - 2) / 4)
    assert proxy.schedule.get_last_lr() == [proxy.optimizer.param_groups[0]["lr"]]


@pytest.mark.parametrize("mitigation", ["none", "iet-agc"])
def test_a_run_without_a_seed_is_resumed_with_the_one_it_drew(base, pictures, tmp_path, mitigation):
    flags = [flag for flag in train_flags(base, pictures, f"--mitigation={mitigation}") if "--seed" not in flag]
    flags += ["--max_train_steps=8", "--checkpointing_steps=4", "--num_shards=1"]
    whole = train_here(flags, tmp_path / "whole")
    shutil.copytree(whole / "checkpoint-4", tmp_path / "cut" / "checkpoint-4")
    cut = train_here([*flags, "--resume_from_checkpoint=latest"], tmp_path / "cut")
    assert unet_bytes(cut) == unet_bytes(whole)
    assert RunFolder(cut).config()["seed"] == RunFolder(whole).config()["seed"]


@pytest.mark.parametrize(
    "method", [pytest.param(["--mitigation=none"], marks=pytest.mark.slow), [*METHOD, "--use_ema"]]
)
def test_a_run_that_is_given_more_steps_equals_one_that_had_them(base, pictures, tmp_path, method):
    flags = train_flags(base, pictures, *method, "--checkpointing_steps=4")
    whole = train_here([*flags, "--max_train_steps=16"], tmp_path / "whole")
    short = train_here([*flags, "--max_train_steps=8"], tmp_path / "short")
    longer = train_here([*flags, "--max_train_steps=16", "--resume_from_checkpoint=latest"], short)
    assert unet_bytes(longer) == unet_bytes(whole)
    assert RunFolder(longer).rounds()[-1]["global_step"] == 16


def test_rounds_go_on_from_where_the_shorter_run_ended(base, pictures, tmp_path):
    """10 steps in rounds of 4 end with a round of 2; what follows are rounds of 4 again."""
    flags = train_flags(base, pictures, "--mitigation=agc", "--steps_per_round=4")
    train_here([*flags, "--max_train_steps=10", "--checkpointing_steps=10"], tmp_path)
    train_here([*flags, "--max_train_steps=17", "--resume_from_checkpoint=latest"], tmp_path)
    assert [row["global_step"] for row in RunFolder(tmp_path).rounds()] == [4, 8, 10, 14, 17]
    with pytest.raises(UsageError, match="`max_train_steps`: 6 steps are fewer than the 10"):
        train_here([*flags, "--max_train_steps=6", "--resume_from_checkpoint=latest"], tmp_path)


@pytest.mark.parametrize("wanted", ["latest", "checkpoint-500"])
def test_a_checkpoint_of_the_official_script_is_refused_unread(base, pictures, tmp_path, wanted):
    class Mark:
        def __reduce__(self):
            return (exec, ("raise SystemExit('a pickle was loaded')",))

    folder = tmp_path / "checkpoint-500"
    shutil.copytree(base / "unet", folder / "unet")
    (folder / "optimizer.bin").write_bytes(pickle.dumps(Mark()))
    with pytest.raises(UsageError, match="checkpoint-500 was written by Diffusers' own script"):
        train_here([*train_flags(base, pictures), f"--resume_from_checkpoint={wanted}"], tmp_path)
    assert not (tmp_path / "model_index.json").exists()


def test_a_checkpoint_in_another_format_is_refused_in_a_sentence(first, tmp_path):
    copy = tmp_path / "checkpoint-4"
    shutil.copytree(first[1], copy)
    about = copy / "ietagc" / "checkpoint.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"format": 1, "version": "0.1.0"}))
    with pytest.raises(UsageError, match=r"written by version 0\.1\.0 in another format"):
        Checkpoint(copy)


def test_another_training_set_of_the_same_captions_is_noticed(base, pictures, first, tmp_path):
    """One image exchanged for another of the same name and caption."""
    other = tmp_path / "pictures"
    shutil.copytree(pictures, other)
    shutil.copy(other / "003_0.png", other / "004_0.png")
    flags = [flag.replace(str(pictures), str(other)) for flag in first[0]]
    with pytest.raises(UsageError, match="data was"):
        built(flags, Checkpoint(first[1]))
    shutil.copytree(pictures, tmp_path / "moved")
    moved = [flag.replace(str(pictures), str(tmp_path / "moved")) for flag in first[0]]
    assert built(moved, Checkpoint(first[1])).global_step == 4


def test_another_base_is_noticed_and_a_moved_one_is_not(base, first, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    flags = [flag.replace(str(base), str(moved)) for flag in first[0]]
    assert built(flags, Checkpoint(first[1])).global_step == 4
    config = json.loads((moved / "scheduler" / "scheduler_config.json").read_text())
    (moved / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"beta_end": 0.02}))
    with pytest.raises(UsageError, match="pretrained_model_name_or_path was"):
        built(flags, Checkpoint(first[1]))


def test_processes_agree_that_a_checkpoint_cannot_be_used(base, pictures, tmp_path):
    flags = train_flags(base, pictures, "--num_shards=2", "--max_train_steps=4")
    done = launch([*flags, "--resume_from_checkpoint=checkpoint-7"], tmp_path, processes=2, check=False)
    assert done.returncode and "--resume_from_checkpoint checkpoint-7: not found" in done.stderr
