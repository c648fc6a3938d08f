"""A LoRA of Stable Diffusion XL through the commands: trained, audited, and as a row of a benchmark."""

import json

import pytest
import yaml
from conftest import COLOURS, train_flags, train_here

from ietagc_diffusers import testing
from ietagc_diffusers.cli import main

LORA = ["--lora_rank=2", "--max_train_steps=8", "--num_shards=2", "--steps_per_round=2", "--report_to=none"]


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "xl"
    testing.random_xl_pipeline([f"a {colour} picture" for colour in COLOURS]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("more", [[], ["--train_text_encoder"]], ids=["unet", "text encoders"])
def test_an_audit_draws_with_the_adapter(xl, pictures, tmp_path, more):
    run = train_here(train_flags(xl, pictures, *LORA, *more), tmp_path / "lora")
    audit = ["audit", "--num_images", "4", "--num_inference_steps", "2", "--descriptor", "pixel", "--device", "cpu"]
    assert main([*audit, "--model", str(run), "--output", str(tmp_path / "run")]) == 0
    given = ["--model", str(xl), "--lora", str(run), "--train", str(pictures)]
    assert main([*audit, *given, "--output", str(tmp_path / "given")]) == 0
    assert main([*audit, "--model", str(xl), "--train", str(pictures), "--output", str(tmp_path / "base")]) == 0
    drawn = [(tmp_path / name / "images" / "000001.png").read_bytes() for name in ("run", "given", "base")]
    assert drawn[0] == drawn[1] != drawn[2]
    assert json.loads((tmp_path / "run" / "scores.json").read_text())["num_generated"] == 4


@pytest.mark.slow
def test_adapters_are_rows_of_a_benchmark(xl, pictures, tmp_path):
    common = dict(
        flag.removeprefix("--").split("=") for flag in train_flags(xl, pictures, *LORA) if "model_name" not in flag
    )
    common.pop("train_data_dir")
    config = {
        "base": str(xl),
        "train": str(pictures),
        "output": str(tmp_path / "out"),
        "num_images": 4,
        "common": {key: yaml.safe_load(value) for key, value in common.items()},
        "training": {"none": {"mitigation": "none", "num_shards": 1}, "ours": {}, "dropout": {"caption_dropout": 0.5}},
        "generate": {"num_inference_steps": 2, "scheduler": "ddim"},
        "score": {"descriptor": "pixel"},
        "columns": ["sim_score", "copy_rate"],
        "tables": {"t": {"title": "T", "rows": [{"training": name} for name in ("none", "ours", "dropout")]}},
    }
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(config))
    assert main(["benchmark", "--config", str(tmp_path / "b.yaml")]) == 0
    table = (tmp_path / "out" / "tables.md").read_text()
    assert all(f"| {name} |" in table for name in ("none", "ours", "dropout"))
