"""The matrix runs what is missing, survives what fails, and its tables say what was measured."""

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from conftest import train_here, write_folder

from ietagc_diffusers.arguments import parse_flags, recipe_to_argv
from ietagc_diffusers.cli import main
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.eval import benchmark as module
from ietagc_diffusers.eval import jobs
from ietagc_diffusers.eval.benchmark import Benchmark, Cell, run
from ietagc_diffusers.eval.configuration import short_hash
from ietagc_diffusers.eval.record import recorded_training

BOTH = {"T": {"rows": [{"training": "none"}, {"training": "given"}]}}


def config(tmp_path, pipeline, pictures, **changes):
    values = {
        "base": str(pipeline),
        "train": str(pictures),
        "output": str(tmp_path / "out"),
        "num_images": 5,
        "seeds": [0, 1],
        "common": {"resolution": 16, "train_batch_size": 4, "max_train_steps": 2},
        "training": {"none": {"mitigation": "none"}, "given": {"model": str(pipeline)}},
        "inference": {"rt": "rt:num_words=2"},
        "generate": {"num_inference_steps": 2, "scheduler": "ddim", "batch_size": 5},
        "score": {"descriptor": "pixel"},
        "columns": ["sim_score", "copy_rate", "clip_score", "fid", "frechet_distance"],
        "tables": {"T": {"title": "All", "rows": [
            {"label": "base", "training": "given"},
            {"label": "RT", "training": "given", "inference": "rt", "phase": "inference"},
        ]}},
    } | changes  # fmt: skip
    path = tmp_path / "benchmark.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_matrix_is_filled_kept_and_tabled(base, pictures, tmp_path, capsys, monkeypatch):
    rows = [{"label": "RT", "training": "given", "inference": "rt", "phase": "inference"}]
    path = config(tmp_path, base, pictures, seeds=[0], tables={"T": {"title": "All", "rows": rows}})
    flags = ["benchmark", "--config", str(path), "--device", "cpu", "--feature_cache", str(tmp_path / "cache")]
    assert main(flags) == 0
    text = capsys.readouterr().out
    assert "| inference | RT |" in text and "CLIP" not in text.partition("Table T")[2].partition("images a cell")[0]
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"tables.md", "tables.csv", "tables.tex", "results.json"}
    (metadata,) = (tmp_path / "out" / "cells").glob("given-rt-*/seed-0/images/metadata.jsonl")
    assert json.loads(metadata.read_text().splitlines()[0])["mitigation"] == "rt:num_words=2"
    monkeypatch.setattr(module.Processes, "call", lambda *_: pytest.fail("runs a finished cell again"))
    assert main(flags) == 0


def test_tables_before_any_run_say_that_nothing_was_run(base, pictures, tmp_path, capsys):
    path = config(tmp_path, base, pictures, output=str(tmp_path / "new" / "out"))
    assert main(["benchmark", "--config", str(path), "--tables", "--device", "cpu"]) == 1
    assert "No cell is finished." in capsys.readouterr().out
    assert all("was not run" in one["failed"] for one in json.loads((tmp_path / "new/out/results.json").read_text()))


def test_one_failed_cell_does_not_lose_the_others(base, pictures, tmp_path, monkeypatch):
    heldout = write_folder(tmp_path / "heldout", 5, seed=8)
    calls = []

    def call(self, command, log):
        """Stands in for the processes: training of `none` fails, cells are scored at once."""
        calls.append(command)
        if "--cell" not in command:
            return "exit 1: out of memory"
        cell = Cell(*json.loads(command[command.index("--cell") + 1]))
        Benchmark(path).run_cell(cell)
        return None

    rows = [{"label": "plain", "training": "none"}, {"label": "base", "training": "given"}]
    changes = {"tables": {"T": {"title": "x", "rows": rows}}, "heldout": str(heldout)}
    path = config(tmp_path, base, pictures, columns=["copy_rate", "training_preference"], **changes)
    monkeypatch.setattr(module.Processes, "call", call)
    assert run(path) == 2
    text = (tmp_path / "out" / "tables.md").read_text()
    assert "failed: seed 0: training: exit 1: out of memory" in text and "| plain (0 of 2 seeds) | – |" in text
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [("scores" in r, r["seed"]) for r in results if r["training"] == "given"] == [(True, 0), (True, 1)]
    assert all(r["scores"]["num_heldout"] == 5 for r in results if "scores" in r) and "preference for training" in text
    calls.clear()
    assert run(path) == 2 and all("--cell" not in command for command in calls) and len(calls) == 2  # only what failed


def test_cells_of_another_configuration_are_not_taken_for_these(base, pictures, tmp_path):
    def places(**changes):
        made = Benchmark(config(tmp_path, base, pictures, **changes))
        cell = made.cells[0]
        return made.drawn(cell), made.folder(cell), made.model("none", 0)

    drawn, scored, trained = places()
    assert places() == (drawn, scored, trained)
    assert places(score={"descriptor": "pixel", "copy_similarity": 0.8})[0] == drawn
    assert places(score={"descriptor": "pixel", "copy_similarity": 0.8})[1] != scored
    assert places(heldout=str(pictures))[0] == drawn and places(heldout=str(pictures))[1] != scored
    assert places(num_images=4)[0] != drawn and places(num_images=4)[2] == trained
    assert places(common={"resolution": 16})[2] != trained


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Ten pictures with captions in columns of other names than text."""
    folder = write_folder(tmp_path_factory.mktemp("captioned") / "pictures", 10)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows = [{"file_name": row["file_name"], "caption": row["text"], "captions": ["a", "b"]} for row in rows]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


FEW = {"mitigation": "none", "max_train_samples": 4, "alpha": "official"}
SEVERAL = {"mitigation": "none", "caption_mitigation": "mc", "caption_column": "captions"}
CAPTIONED = {
    "common": {"resolution": 16, "train_batch_size": 4, "max_train_steps": 1, "caption_column": "caption"},
    "tables": {"T": {"rows": [{"training": name} for name in ("few", "several", "given")]}},
    "num_images": None,
    "seeds": [0],
}


def test_a_variant_is_compared_with_the_rows_that_it_was_trained_on(base, captioned, tmp_path):
    training = {"few": FEW, "several": SEVERAL, "given": {"model": str(base)}}
    made = Benchmark(config(tmp_path, base, captioned, training=training, **CAPTIONED))
    for name in ("few", "several"):
        words = made.training_command(name, 0)[5:]
        train_here([word for word in words if not word.startswith("--output_dir=")], made.model(name, 0))
    counts, drawn = {}, {}
    for cell in made.cells:
        made.run_cell(cell)
        scores = json.loads((made.folder(cell) / "scores.json").read_text())
        counts[cell.training] = scores["num_train"], scores["num_generated"]
        lines = (made.drawn(cell) / "images" / "metadata.jsonl").read_text().splitlines()
        drawn[cell.training] = [json.loads(line) for line in lines]
        is_few = cell.training == "few"
        assert ("only these are compared" in str(scores["notes"])) is is_few
        assert scores["columns"]["train"]["alpha"] == ("official" if is_few else "white")
    assert counts == {"few": (4, 4), "several": (10, 10), "given": (10, 10)}
    used = recorded_training(made.model("few", 0)).rows.tolist()
    assert sorted(row["sample_id"] for row in drawn["few"]) == sorted(used)
    assert all(row["text"].endswith("picture") for rows in drawn.values() for row in rows)  # not of `captions`


def test_other_rows_are_another_cell_and_others_keep_their_folders(base, captioned, tmp_path):
    training = {"none": {"mitigation": "none"}, "few": FEW, "several": SEVERAL, "given": {"model": str(base)}}
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red picture")

    def are_plain(**changes):
        made = Benchmark(config(tmp_path, base, captioned, training=training, **CAPTIONED | changes))
        found = {}
        for name in training:
            model, cell = made.model(name, 0), Cell(name, "none", 0)
            about = [model if name != "given" else made.content(model), "none", made.generate, made.num_images]
            drawn = short_hash([*about, made.content(made.prompts), made.train])
            found[name] = made.drawn(cell).parent.name.endswith(drawn), made.folder(cell).name.endswith(scored)
        return found

    scored = short_hash([{"descriptor": "pixel"}, None])
    text = {"resolution": 16}
    assert are_plain() == {name: (False, name != "few") for name in training}  # captions of another column
    assert are_plain(common=text) == {name: (name != "few",) * 2 for name in training}
    assert are_plain(prompts=str(prompts)) == {name: (True, name != "few") for name in training}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("caption_column: caption\nalpha: official\n")
    assert are_plain(common=text | {"config": str(recipe)}) == dict.fromkeys(training, (False, False))


def test_captions_that_are_missing_are_told_before_anything_is_trained(base, captioned, tmp_path, monkeypatch):
    monkeypatch.setattr(module.Processes, "call", lambda *_: pytest.fail("trains"))
    training = {"few": FEW, "several": SEVERAL, "given": {"model": str(base)}}
    path = config(tmp_path, base, captioned, training=training, **CAPTIONED | {"common": {"resolution": 16}})
    with pytest.raises(UsageError, match=r"its images have no captions \(a metadata.jsonl with text\)"):
        run(path)
    assert not (tmp_path / "out").exists()


def test_a_training_records_what_it_is_trained_with(base, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(module.Processes, "call", lambda self, command, log: "exit 1")
    path = config(tmp_path, base, pictures, tables=BOTH)
    run(path)
    made = Benchmark(path)
    values = yaml.safe_load((Path(made.model("none", 0)) / "settings.yaml").read_text())
    assert values == made.values("none") and values["mitigation"] == "none" and "output_dir" not in values


def test_what_a_path_holds_counts_not_its_name(base, pictures, tmp_path):
    recipe, model = tmp_path / "recipe.yaml", tmp_path / "model"
    shutil.copytree(base, model)
    training = {"none": {"config": str(recipe)}, "given": {"model": str(model)}}

    def folders():
        made = Benchmark(config(tmp_path, base, pictures, training=training, tables=BOTH))
        return [made.drawn(cell) for cell in made.cells]

    recipe.write_text("mitigation: none\nwen_threshold: 2.0\n")
    before = folders()
    assert folders() == before
    recipe.write_text("mitigation: none\nwen_threshold: 4.0\n")
    scheduler = model / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("v_prediction", "epsilon"))
    assert not set(folders()) & set(before)


def test_whatever_goes_wrong_with_a_model_the_others_continue(base, pictures, tmp_path, monkeypatch):
    def call(self, command, log):
        if "--cell" not in command:
            raise OSError(28, "No space left on device")
        return "exit 1: scored"

    path = config(tmp_path, base, pictures, tables=BOTH)
    monkeypatch.setattr(module.Processes, "call", call)
    assert run(path) == 4
    text = (tmp_path / "out" / "tables.md").read_text()
    assert "given (0 of 2 seeds) failed: seed 1: exit 1: scored" in text and "was not run" in text


def test_an_interruption_ends_what_runs_and_begins_no_more(base, pictures, tmp_path):
    running = module.Processes()
    rows = [{"training": "given"}, {"training": "given", "inference": "rt"}]
    made = Benchmark(config(tmp_path, base, pictures, seeds=[0], tables={"T": {"rows": rows}}))
    begun = []

    def long(self, command, log):
        begun.append(command)
        return call(self, [sys.executable, "-c", "import time; time.sleep(60)"], log)

    call = module.Processes.call
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.Processes, "call", long)
        patch.setattr(jobs, "Processes", lambda: running)
        threading.Timer(1.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        started = time.monotonic()
        module._fill(made, 1, "cpu", None)
    assert time.monotonic() - started < 20 and len(begun) == 1
    assert not list((tmp_path / "out").rglob(module.FAILED))


def test_a_training_that_a_signal_ended_is_no_failure(base, pictures, tmp_path, monkeypatch):
    """The script then exits with 0 and a checkpoint."""
    monkeypatch.setattr(module.Processes, "call", lambda *_: None)
    made = Benchmark(config(tmp_path, base, pictures, seeds=[0], tables={"T": {"rows": [{"training": "none"}]}}))
    module._fill(made, 1, "cpu", None)
    assert not list((tmp_path / "out").rglob(module.FAILED)) and not list((tmp_path / "out").rglob("seconds.json"))


def test_training_is_the_script_with_the_variant_s_flags(base, pictures, tmp_path):
    training = {
        "x": {"mitigation": "iet-agc+", "num_shards": 2, "max_train_steps": 9, "use_ema": True, "snr_gamma": None}
    }
    rows = [{"training": "x"}]
    made = Benchmark(config(tmp_path, base, pictures, training=training, tables={"T": {"rows": rows}}))
    command = made.training_command("x", 7)
    line = " ".join(command)
    assert command[1:4] == ["-m", "ietagc_diffusers", "train"] and f"--train_data_dir={pictures}" in line
    assert "--max_train_steps=9" in line and "--max_train_steps=2" not in line and "--seed=7" in line
    assert command.count("--use_ema") == 1 and "--snr_gamma" not in line and "seed-7" in line
    assert made.cells == [Cell("x", "none", 0), Cell("x", "none", 1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainings": {}}, "unknown key 'trainings'; did you mean 'training'"),
        ({"tables": {"T": {"rows": [{"training": "nome"}]}}}, "unknown key 'nome'; did you mean 'none'"),
        ({"tables": {"T": {"rows": [{"training": "none", "inference": "rtt"}]}}}, "did you mean 'rt'"),
        ({"inference": {"x": "rt:words=3"}}, "unknown option 'words'"),
        ({"columns": ["simscore"]}, "did you mean 'sim_score'"),
        ({"generate": {"steps": 3}}, "generate .*: unknown key 'steps'"),
        ({"generate": {"seed": 3}}, "unknown key 'seed'"),
        ({"generate": {"scheduler": "heun"}}, "generate: `scheduler` heun: must be one of"),
        ({"training": {"none": {"mitigaton": "none"}}}, "training none: flags: unknown key 'mitigaton'; did you mean"),
        ({"training": {"none": {"num_shards": "many"}}}, "training none: argument --num_shards"),
        ({"training": {"none": "plain"}}, "training none: should hold keys and values, holds"),
        ({"seeds": 3}, "seeds: should hold a list"),
        ({"num_images": 0}, "num_images 0"),
        ({"tables": {"T": {"title": "x"}}}, "table T: rows: should hold a list"),
        ({"inference": {"rt": 5}}, "inference rt: should hold a text"),
        ({"score": {"descripter": 3}}, "did you mean 'descriptor'"),
        ({"base": None}, "training none: give 'base'"),
        ({"train": None}, "has no 'train'"),
    ],
)
def test_a_wrong_matrix_is_named_before_anything_runs(base, pictures, tmp_path, changes, message):
    path = config(tmp_path, base, pictures, **changes)
    if changes == {"train": None}:
        values = yaml.safe_load(path.read_text())
        del values["train"]
        path.write_text(yaml.safe_dump(values))
    with pytest.raises(UsageError, match=message):
        Benchmark(path)


def test_the_shipped_matrices_are_valid():
    for name in ("benchmark_demo", "benchmark_laion10k"):
        made = Benchmark(f"configs/{name}.yaml")
        assert set(made.tables) == {"II", "IV", "V", "VI"} and len(made.cells) >= 18 * len(made.seeds)


@pytest.mark.parametrize("variant", ["none", "mc", "rc", "cwr", "wen", "agc", "iet-agc", "iet-agc-taa", "iet-agc+"])
def test_the_rows_of_the_paper_s_tables_are_its_recipes(variant):
    """The matrix and the recipe of the same name train the same."""
    made = Benchmark("configs/benchmark_laion10k.yaml")
    recipe = f"configs/laion10k_{variant.replace('-', '_').replace('+', '_plus')}.yaml"
    ours = parse_flags(recipe_to_argv(made.flags(variant)))
    theirs = parse_flags(["--config", recipe, "--pretrained_model_name_or_path=m", "--train_data_dir=d"])
    assert ours.method == theirs.method
    same = vars(theirs).keys() - {
        "config", "seed", "output_dir", "resume_from_checkpoint", "pretrained_model_name_or_path", "train_data_dir",
        "dataset_name",
    }  # fmt: skip
    assert {key: getattr(ours, key) for key in same} == {key: getattr(theirs, key) for key in same}


def test_the_base_folder_of_the_tests_is_not_written_to(base, pictures, tmp_path):
    assert Benchmark(config(tmp_path, base, pictures)).model("given", 1) == str(base)
    pattern = {"x": {"model": str(tmp_path / "run-{seed}")}}
    made = Benchmark(config(tmp_path, base, pictures, training=pattern, tables={"T": {"rows": [{"training": "x"}]}}))
    assert made.model("x", 3) == str(tmp_path / "run-3")


def test_another_training_set_is_scored_against(base, tmp_path):
    other = write_folder(tmp_path / "other", 6, seed=4)
    made = Benchmark(config(tmp_path, base, other, seeds=[0]))
    made.run_cell(made.cells[0])
    assert json.loads((made.folder(made.cells[0]) / "scores.json").read_text())["num_train"] == 6
