"""Every official flag is there; recipes and the command line are one language."""

import math
from pathlib import Path

import pytest
import yaml
from official import NEEDED, OFFICIAL_DEFAULTS

from ietagc_diffusers.arguments import flag_names, parse_args
from ietagc_diffusers.method.config import MitigationConfig
from ietagc_diffusers.settings import declared
from ietagc_diffusers.training.scripts import UnconditionalScript
from ietagc_diffusers.training.settings import TrainingSettings

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = sorted(
    path
    for path in CONFIGS.glob("*.yaml")
    if not {"tables", "configurations"} & yaml.safe_load(path.read_text()).keys()
)  # of one run


def refused(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        parse_args(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_official_flags_have_their_defaults(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    args = parse_args(NEEDED)
    assert {name: getattr(args, name) for name in OFFICIAL_DEFAULTS} == OFFICIAL_DEFAULTS
    assert args.method.mitigation == "iet-agc+" and args.method.augment_range == math.inf


def test_the_command_line_wins_over_the_recipe(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "mitigation: agc\nskip_threshold: 0.7\nuse_ema: true\nlearning_rate: 2.5e-6\nvalidation_prompts: [a b, c]\n"
    )
    args = parse_args([*NEEDED, f"--config={recipe}"])
    assert (args.method.skip_threshold, args.use_ema, args.learning_rate) == (0.7, True, 2.5e-6)
    assert args.validation_prompts == ["a b", "c"]
    args = parse_args([*NEEDED, f"--config={recipe}", "--skip_threshold", "0.6", "--no-use_ema"])
    assert (args.method.skip_threshold, args.use_ema) == (0.6, False)


ALIASES = {"rank": ("lora_rank", 8), "validation_prompt": ("validation_prompts", ["a red cat"])}
ALIASES |= {"proportion_empty_prompts": ("caption_dropout", 0.25)}


def test_other_names_of_a_flag_are_understood_on_the_command_line_and_in_recipes(tmp_path):
    """The flags of Diffusers' LoRA and SDXL scripts that have another name here."""
    entries = [*declared(MitigationConfig), *declared(TrainingSettings)]
    assert {alias: entry.name for entry in entries for alias in entry.metadata["aliases"]} == {
        alias: name for alias, (name, _) in ALIASES.items()
    }
    recipe = tmp_path / "r.yaml"
    recipe.write_text("rank: 8\nvalidation_prompt: a red cat\nproportion_empty_prompts: 0.25\n")
    argv = [*NEEDED, "--rank=8", "--validation_prompt", "a red cat", "--proportion_empty_prompts=0.25"]
    for args in (parse_args(argv), parse_args([*NEEDED, f"--config={recipe}"])):
        assert {name: getattr(args, name) for name, _ in ALIASES.values()} == dict(ALIASES.values())
    args = parse_args([*NEEDED, f"--config={recipe}", "--lora_rank=2", "--validation_prompts", "b", "c"])
    assert (args.lora_rank, args.validation_prompts) == (2, ["b", "c"])
    recipe.write_text("validation_prompts: [a, b]\n")
    assert parse_args([*NEEDED, f"--config={recipe}", "--validation_prompt=c"]).validation_prompts == ["c"]
    assert set(ALIASES) < set(flag_names())


def test_abbreviated_flags_are_accepted_as_argparse_accepts_them(capsys):
    args = parse_args(
        [*NEEDED, "--max_train_st=7", "--cent", "--validation_p", "a cat", "--num_val=4", "--lora_r", "2"]
    )
    assert (args.max_train_steps, args.center_crop, args.lora_rank) == (7, True, 2)
    assert (args.validation_prompts, args.num_validation_images) == (["a cat"], 4)
    message = refused(capsys, [*NEEDED, "--validation=2"])
    assert "ambiguous option: --validation=2 could match" in message and "--validation_epochs" in message


def test_recipe_values_are_checked_like_flags(tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("num_shards: many\n")
    assert "--num_shards" in refused(capsys, [*NEEDED, f"--config={recipe}"])
    recipe.write_text("num_shard: 4\n")
    assert "did you mean 'num_shards'" in refused(capsys, [*NEEDED, f"--config={recipe}"])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_the_repository_parse(path):
    recipe = yaml.safe_load(path.read_text())
    unconditional = "model_config_name_or_path" in recipe
    kind, needed = (UnconditionalScript, NEEDED[1:]) if unconditional else (TrainingSettings, NEEDED)
    args = parse_args([*needed, f"--config={path}"], kind)
    defaults = parse_args(needed, kind)
    for key in recipe:
        same_as_default = args.values()[key] == defaults.values()[key]
        assert not same_as_default, f"{key} is the default: it says nothing"


def test_effective_flags_repeat_the_run_and_hide_the_token(tmp_path):
    args = parse_args(
        [*NEEDED, "--hub_token=secret", "--report_to=tensorboard", "--skip_threshold=0.6", "--random_flip"]
    )
    flags = args.values()
    assert "secret" not in str(flags) and flags["skip_threshold"] == 0.6 and flags["num_shards"] == 4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train_data_dir=d"], "--pretrained_model_name_or_path is needed"),
        (["--pretrained_model_name_or_path=m"], "--dataset_name or --train_data_dir is needed"),
        ([*NEEDED, "--resolution=0"], "--resolution 0: must be at least 1"),
        ([*NEEDED, "--max_train_steps=0"], "--max_train_steps 0"),
        ([*NEEDED, "--epochs_per_round=1", "--steps_per_round=1"], "were both given"),
        ([*NEEDED, "--skip_threshold=2"], "--skip_threshold 2.0: must be in [0, 1]"),
        ([*NEEDED, "--mitigation=all"], "invalid choice: 'all'"),
        ([*NEEDED, "--report_to=wandb", "--hub_token=t"], "use `hf auth login` instead"),
        ([*NEEDED, "--seed=-1"], "--seed -1: must be in 0 to 2^32 - 1"),
        ([*NEEDED, "--adam_beta1=2"], "--adam_beta1 2.0: must be in [0, 1)"),
        ([*NEEDED, "--adam_weight_decay=-1"], "--adam_weight_decay -1.0: must be 0 or more"),
        ([*NEEDED, "--num_validation_images=-1"], "--num_validation_images -1: must be 0 or more"),
        ([*NEEDED, "--prior_loss_weight=-1"], "--prior_loss_weight -1.0: must be 0 or more"),
        ([*NEEDED, "--prior_loss_weight=2"], "--prior_loss_weight 2.0: weighs the pictures of --prior_dir"),
        ([*NEEDED, "--snr_gamma=0"], "--snr_gamma 0.0: must be over 0"),
        ([*NEEDED, "--logit_mean=nan"], "--logit_mean nan: must be finite"),
        ([*NEEDED, "--max_sequence_length=513"], "--max_sequence_length 513: must be in [1, 512]"),
        ([*NEEDED, "--no_such_flag"], "unrecognized arguments"),
    ],
)
def test_wrong_use_exits_with_2_and_names_the_flag(capsys, argv, message):
    assert message in refused(capsys, argv)
