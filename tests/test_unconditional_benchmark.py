"""A matrix of models without prompts: trained by their own script, drawn from seeds, and labels where there are any."""

import csv
import json
import shutil
import signal
from concurrent.futures import Future
from contextlib import nullcontext

import pytest
import yaml
from accelerate.state import AcceleratorState
from conftest import write_folder

from ietagc_diffusers import testing
from ietagc_diffusers.cli import main
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.eval import benchmark as module
from ietagc_diffusers.eval import jobs
from ietagc_diffusers.eval.benchmark import Benchmark, run

COLUMNS = ["mq_0.4", "mq_0.5_count", "mq_0.6", "memorization_ratio", "frechet_distance", "sim_score", "clip_score"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with training images without captions, the configuration of a UNet and a given model."""
    folder = tmp_path_factory.mktemp("matrix")
    (write_folder(folder / "train", 12, size=16) / "metadata.jsonl").rename(folder / "metadata.jsonl")
    pipeline = testing.random_unconditional_pipeline()
    pipeline.unet.save_config(folder / "unet")
    pipeline.save_pretrained(folder / "given")
    return folder


def config(places, output, **changes):
    rows = [{"label": name, "training": name} for name in ("plain", "ours", "given")]
    values = {
        "script": "unconditional",
        "train": str(places / "train"),
        "output": str(output),
        "num_images": 6,
        "seeds": [0, 1],
        "common": {
            "model_config_name_or_path": str(places / "unet"), "resolution": 16, "train_batch_size": 4,
            "max_train_steps": 4, "report_to": "none", "center_crop": True,
        },
        "training": {
            "plain": {"mitigation": "none"},
            "ours": {"mitigation": "iet-agc", "num_shards": 2, "steps_per_round": 2},
            "given": {"model": str(places / "given")},
        },
        "generate": {"num_inference_steps": 2, "scheduler": "ddim", "batch_size": 4},
        "score": {"descriptor": "pixel", "views": "image"},
        "columns": COLUMNS,
        "tables": {"I": {"title": "All", "rows": rows}},
    } | changes  # fmt: skip
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return path


def call_here(self, command, log):
    """Stands in for the processes of a benchmark: the same commands in this one."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        assert main([*map(str, command[command.index("ietagc_diffusers") + 1 :])]) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class InThisThread(nullcontext):
    """Stands in for the pool of threads: training listens for signals, which only the main thread can."""

    def __init__(self, max_workers):
        super().__init__(self)

    def submit(self, function, *args):
        done = Future()
        done.set_result(function(*args))
        return done


def test_the_matrix_trains_draws_and_scores_without_prompts(places, tmp_path, monkeypatch):
    monkeypatch.setattr(module.Processes, "call", call_here)
    monkeypatch.setattr(jobs, "ThreadPoolExecutor", InThisThread)
    path = config(places, tmp_path / "out")
    assert run(path) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "tables.csv").open()))
    titles = ["MQ 0.4 %", "MQ 0.5 of 65,536", "MQ 0.6 %", "memorization ratio %", "Fréchet distance", "Sim Score"]
    assert [row["column"] for row in rows if row["method"] == "ours"] == titles  # no CLIP score without prompts
    assert all(row["seeds"] == "2" for row in rows)
    made = Benchmark(path)
    seeds = {}
    for cell in made.cells:
        metadata = (made.drawn(cell) / "images" / "metadata.jsonl").read_text().splitlines()
        seeds.setdefault(cell.training, []).append([json.loads(line)["seed"] for line in metadata])
        scores = json.loads((made.folder(cell) / "scores.json").read_text())
        assert scores["clip_score"] is None and "clip_score" in scores["reasons"] and scores["num_train"] == 12
    assert all(found == [[*range(6)], [*range(6, 12)]] for found in seeds.values())
    assert len(list((tmp_path / "out" / "trained").glob("*/seed-*/model_index.json"))) == 4
    monkeypatch.setattr(module.Processes, "call", lambda *_: pytest.fail("runs a finished cell again"))
    assert run(path) == 0


def test_training_is_by_the_script_that_the_matrix_names(places, tmp_path):
    made = Benchmark(config(places, tmp_path / "out"))
    command = made.training_command("ours", 3)
    assert command[1:5] == ["-m", "ietagc_diffusers", "train", "--script=unconditional"]
    assert "--num_shards=2" in command and not any("pretrained_model" in word for word in command)
    assert made.effective["plain"]["ddpm_beta_schedule"] == "linear"


def test_the_configuration_of_a_model_from_scratch_counts_by_its_content(places, tmp_path):
    unet = tmp_path / "unet"
    shutil.copytree(places / "unet", unet)
    common = yaml.safe_load(config(places, tmp_path / "out").read_text())["common"]
    common |= {"model_config_name_or_path": str(unet)}

    def folder():
        return Benchmark(config(places, tmp_path / "out", common=common)).model("ours", 0)

    before = folder()
    (unet / "config.json").write_text((unet / "config.json").read_text().replace("silu", "gelu"))
    assert folder() != before


def test_each_class_is_drawn_as_often(places, tmp_path):
    testing.random_unconditional_pipeline(classes=3).save_pretrained(tmp_path / "classes")
    training = {"given": {"model": str(tmp_path / "classes")}}
    made = Benchmark(
        config(places, tmp_path / "out", training=training, tables={"I": {"rows": [{"training": "given"}]}})
    )
    made.run_cell(made.cells[1])
    rows = map(json.loads, (made.drawn(made.cells[1]) / "images" / "metadata.jsonl").read_text().splitlines())
    assert sorted(row["label"] for row in rows) == [0, 0, 1, 1, 2, 2]


def test_images_are_in_the_column_that_training_reads(places, tmp_path):
    training = {"plain": {"image_column": "img"}, "given": {"model": str(places / "given")}}
    tables = {"I": {"rows": [{"training": "plain"}, {"training": "given"}]}}
    made = Benchmark(config(places, tmp_path / "out", training=training, tables=tables))
    assert [made._image_column(name) for name in training] == ["img", "image"]


CHAIN = {"inference": {"noise": "gni"}, "tables": {"I": {"rows": [{"training": "plain", "inference": "noise"}]}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"script": "unconditionel"}, "script: unknown key 'unconditionel'; did you mean 'unconditional'"),
        ({"prompts": "p.txt"}, r"prompts p.txt: plain draws without prompts; leave it out"),
        ({"prompts": "p.txt", "script": None, "training": {"given": {"model": "{given}"}},
          "tables": {"I": {"rows": [{"training": "given"}]}}}, "prompts p.txt: given draws without prompts"),
        ({"num_images": None}, "num_images: plain draws without prompts; say how many"),
        (CHAIN, "`mitigation` gni: a DDPMPipeline takes no prompt"),
        ({"generate": {"negative_prompt": "x"}}, "`negative_prompt` x: a DDPMPipeline takes no prompt"),
        ({"common": {"caption_column": "text"}}, "training ours: flags: unknown key 'caption_column'"),
        ({"script": None}, "training ours: give 'base'"),
    ],
)  # fmt: skip
def test_what_such_models_cannot_be_told_is_said_before_anything_runs(places, tmp_path, changes, message):
    if changes.get("training"):
        changes = changes | {"training": {"given": {"model": str(places / "given")}}}
    with pytest.raises(UsageError, match=message):
        Benchmark(config(places, tmp_path / "out", **changes))
