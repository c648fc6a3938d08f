"""The training scripts under the names of Diffusers' own take their flags, with their defaults."""

import pytest
from conftest import COLOURS, ROOT, launch, train_flags, write_index
from official import NEEDED, OFFICIAL_DEFAULTS

from ietagc_diffusers import testing
from ietagc_diffusers.arguments import build_parser, parse_args
from ietagc_diffusers.cli import main, train
from ietagc_diffusers.run_folder import ADAPTER_FILE
from ietagc_diffusers.training import scripts
from ietagc_diffusers.training.scripts import LoraScript, LoraSdxlScript, SdxlScript

# What each official script has other than train_text_to_image.py: flags and defaults.
NOT_THERE = {
    "input_perturbation", "validation_prompts", "dream_training", "dream_detail_preservation", "offload_ema",
    "foreach_ema", "non_ema_revision", "tracker_project_name",
}  # fmt: skip
VALIDATION = {"validation_prompt": None, "num_validation_images": 4, "validation_epochs": 1}
OF_XL = {
    "pretrained_vae_model_name_or_path": None, "resolution": 1024, "enable_npu_flash_attention": False,
}  # fmt: skip
OF_LORA = {"rank": 4, "output_dir": "sd-model-finetuned-lora"}
DEFAULTS = {
    LoraScript: VALIDATION | OF_LORA,
    SdxlScript: VALIDATION
    | OF_XL
    | {
        "output_dir": "sdxl-model-finetuned", "proportion_empty_prompts": 0, "timestep_bias_strategy": "none",
        "timestep_bias_multiplier": 1.0, "timestep_bias_begin": 0, "timestep_bias_end": 1000,
        "timestep_bias_portion": 0.25,
    },
    LoraSdxlScript: VALIDATION | OF_XL | OF_LORA | {"train_text_encoder": False, "debug_loss": False},
}  # fmt: skip
SCRIPTS = {
    "train_text_to_image_lora_ietagc.py": LoraScript,
    "train_text_to_image_sdxl_ietagc.py": SdxlScript,
    "train_text_to_image_lora_sdxl_ietagc.py": LoraSdxlScript,
}


@pytest.mark.parametrize("kind", DEFAULTS, ids=lambda kind: kind.__name__)
def test_official_flags_have_their_defaults(kind, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    actions = {name.lstrip("-"): action for action in build_parser(kind)._actions for name in action.option_strings}
    wanted = {name: value for name, value in OFFICIAL_DEFAULTS.items() if name not in NOT_THERE} | DEFAULTS[kind]
    assert {name: actions[name].default for name in wanted} == wanted
    args = parse_args([*NEEDED, "--num_validation=2", "--checkpointing=3"], kind)  # abbreviated, as argparse takes them
    assert args.num_validation_images == 2 and args.checkpointing_steps == 3
    assert args.lora_rank == DEFAULTS[kind].get("rank") and args.resolution == DEFAULTS[kind].get("resolution", 512)


def run(script, flags, output_dir, **more):
    return launch(flags, output_dir, check=False, script=ROOT / script, **more)


def test_a_script_trains_its_own_kind(pictures, tmp_path):
    testing.random_xl_pipeline([f"a {colour} picture" for colour in COLOURS]).save_pretrained(tmp_path / "xl")
    (tmp_path / "xl" / "model_index.json").unlink()
    script, flags = "train_text_to_image_lora_sdxl_ietagc.py", train_flags(tmp_path / "xl", pictures)
    done = run(script, [*flags, "--mitigation=none", "--max_train_steps=2"], tmp_path / "out")
    assert done.returncode == 2 and "has no model_index.json" in done.stderr  # said before the first step
    index = write_index(tmp_path / "with", "StableDiffusionXLPipeline") / "model_index.json"
    assert index.is_file()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_base_of_another_kind_is_refused(script, tmp_path, capsys):
    kind = SCRIPTS[script]
    other = "StableDiffusion3Pipeline"
    base = write_index(tmp_path / "base", other)
    (tmp_path / "pictures").mkdir()
    done = run(script, [f"--pretrained_model_name_or_path={base}", f"--train_data_dir={tmp_path}"], tmp_path / "out")
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert f"is a {other}, and this script trains {kind.family}; train_text_to_image_ietagc.py" in last


def test_the_help_says_the_default_of_the_script():
    text = run("train_text_to_image_lora_ietagc.py", ["--help"], "out", COLUMNS="200").stdout
    assert "Default: 4." in text and ADAPTER_FILE not in text


@pytest.mark.parametrize("name", scripts.SCRIPTS)
def test_the_command_trains_as_the_script_that_it_is_told(name, monkeypatch):
    kind, settings = scripts.SCRIPTS[name], []
    assert f"main(kind={kind.__name__})" in (ROOT / f"train_{name}_ietagc.py").read_text()
    monkeypatch.setattr(train, "train", lambda given, say, comparer: settings.append(given))
    needed = ["--train_data_dir=d", "--pretrained_model_name_or_path=m"]
    assert main(["train", *needed, f"--script={name}"]) == 0 and type(settings[0]) is kind
    assert main(["train", *needed]) == 0 and type(settings[1]) is scripts.TrainingSettings


def test_a_script_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--script", "video"])
    assert end.value.code == 2 and "--script: invalid choice: 'video'" in capsys.readouterr().err
