"""Every flag is declared once, with its type, its help, and what it means for a resumed run."""

import dataclasses

import pytest

from ietagc_diffusers import MitigationConfig, TrainingSettings, UsageError
from ietagc_diffusers.arguments import build_parser, flag_names, parse_flags
from ietagc_diffusers.errors import with_flags
from ietagc_diffusers.settings import Resume, at_least, check_values, declared, setting

NEEDED = {"pretrained_model_name_or_path": "m", "train_data_dir": "d"}


def test_every_field_is_classified_and_explained():
    for kind in (MitigationConfig, TrainingSettings):
        unclassified = {f.name for f in dataclasses.fields(kind)} - {f.name for f in declared(kind)} - {"method"}
        assert not unclassified
        for entry in declared(kind):
            assert isinstance(entry.metadata["resume"], Resume) and len(entry.metadata["help"]) > 5


def test_a_field_that_is_not_classified_is_a_type_error():
    with pytest.raises(TypeError, match="resume"):
        setting(1, "a number", type=int)


def test_every_flag_is_in_a_group_and_every_group_in_the_parser():
    of_groups = [entry.name for group in TrainingSettings.GROUPS.values() for entry in declared(group)]
    assert set(of_groups) == {entry.name for entry in declared(TrainingSettings)}
    options = {name.removeprefix("--") for action in build_parser()._actions for name in action.option_strings}
    options -= {"-h", "help"} | {f"no-{name}" for name in flag_names()}
    assert options == {*flag_names(), "config"}


def test_what_shapes_a_run_is_known_for_each_flag():
    """The list, so that a change of it is a decision."""
    settings = TrainingSettings(**NEEDED)
    assert settings.shaping(Resume.FIXED) == {
        "num_shards", "epochs_per_round", "steps_per_round", "bank_buckets", "train_batch_size", "use_ema",
        "gradient_accumulation_steps", "use_8bit_adam", "max_train_samples", "deduplicate", "group_duplicates",
        "deduplicate_similarity",
        "label_column", "lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "use_dora", "lora_average",
        "train_text_encoder", "scale_weight_norms", "shard_data", "ambient_corruption",
        "ambient_further_corruption", "dp_noise_multiplier", "dp_max_grad_norm",
        "skip_rate", "skip_false_rate", "calibrate", "heldout_share", "canary", "canary_border",
    }  # fmt: skip
    assert settings.shaping(Resume.BUDGET) == {"max_train_steps", "num_train_epochs"}
    assert settings.shaping(Resume.FREE) == {
        "cache_dir", "cache_latents", "channels_last", "compile", "fused_adam", "model_config",
        "dataset_name", "dataset_config_name", "dataset_split", "caption_lines", "train_data_dir",
        "dataloader_num_workers",
        "gradient_checkpointing", "offload_ema", "foreach_ema", "allow_tf32", "max_nonfinite", "local_rank",
        "enable_xformers_memory_efficient_attention", "output_dir", "checkpointing_steps", "checkpoints_total_limit",
        "resume_from_checkpoint", "resume_allow", "logging_dir", "report_to", "tracker_project_name",
        "validation_prompts", "num_validation_images", "validation_epochs", "debug_loss", "enable_npu_flash_attention",
        "prior_dir", "heldout_dir", "exclude_rows", "monitor_every", "monitor_steps", "monitor_budget",
        "stop_at_gap", "keep_best",
        "monitor_images", "monitor_descriptor", "monitor_copy_similarity", "monitor_inference_steps",
        "stop_at_copy_rate",
        "on_bad_sample", "log_every", "save_shards", "save_rounds",
        "push_to_hub", "hub_strategy", "hub_revision", "hub_model_id", "hub_token", "hub_private_repo",
        "proxy_state", "save_merged", "dp_delta",
    }  # fmt: skip
    for name in ("alpha", "image_column", "pretrained_model_name_or_path", "revision", "variant", "seed"):
        assert name in settings.shaping(Resume.SAME)


def test_values_are_checked_wherever_settings_are_made():
    @dataclasses.dataclass
    class Two:
        number: int = setting(1, "a number", resume=Resume.FREE, type=int, **at_least(1))
        word: str | None = setting(None, "a word", resume=Resume.FREE, choices=["a", "b"])

    check_values(Two())
    check_values(Two(word="b"))
    with pytest.raises(UsageError, match="`number` 0: must be at least 1"):
        check_values(Two(number=0))
    with pytest.raises(UsageError, match="`number` nan: must be at least 1"):
        check_values(Two(number=float("nan")))
    with pytest.raises(UsageError, match="`word` c: must be one of a, b"):
        check_values(Two(word="c"))
    with pytest.raises(UsageError, match="`resolution` 0: must be at least 1"):
        TrainingSettings(**NEEDED, resolution=0)


def test_the_command_line_is_the_settings():
    argv = [f"--{key}={value}" for key, value in NEEDED.items()]
    assert parse_flags(argv) == TrainingSettings(**NEEDED)
    given = parse_flags([*argv, "--mitigation=agc", "--skip_threshold=0.7", "--use_ema", "--learning_rate=3e-5"])
    method = MitigationConfig.preset("agc", skip_threshold=0.7)
    assert given == TrainingSettings(**NEEDED, method=method, use_ema=True, learning_rate=3e-5)


def test_messages_show_flags_only_where_there_are_flags():
    message = "`num_shards` 0 and `other` 1: `num_shards` must be at least 1"
    assert with_flags(message, {"num_shards"}) == "--num_shards 0 and `other` 1: --num_shards must be at least 1"
