"""The pictures show what their captions tell, the base is what it says, and the page holds what was measured."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline

from demo import lora, page
from demo.pictures import CAPTIONS, fresh_pictures, training_pictures, write_sets
from demo.renders import COLOURS, RESOLUTION, SIDES, draw_scenes, make_set, render_all, write_image_folder
from demo.run import ROOT, RUNS, write_runs
from ietagc_diffusers.eval.benchmark import Benchmark
from ietagc_diffusers.eval.curves import FrontPoint
from ietagc_diffusers.eval.image_sets import load_images
from ietagc_diffusers.eval.protocol import Protocol
from ietagc_diffusers.eval.report import Scored
from ietagc_diffusers.eval.score import Tools, score

BASE = ROOT / "demo" / "tiny-sd"


@pytest.mark.parametrize("style", ["waves", "mosaic"])
def test_pictures_show_their_captions(style):
    scenes = draw_scenes(200, [0])
    pictures = render_all(scenes, style, [1]) / 255
    right_background = right_object = 0
    for scene, picture in zip(scenes, pictures, strict=True):
        names = list(COLOURS)
        distances = [np.abs(picture - np.array(COLOURS[name])).sum(-1) for name in names]
        found = np.bincount(np.argmin(distances, 0).flatten(), minlength=len(names))
        right_background += names[found.argmax()] == scene.background
        third = RESOLUTION // 2 + int(SIDES[scene.side] * RESOLUTION / 2)
        columns = slice(max(0, third - 8), third + 8)
        right_object += distances[names.index(scene.colour)][:, columns].min() < 0.35
    assert right_background > 170 and right_object == 200


def test_another_seed_is_another_picture_of_the_same_caption():
    scenes = draw_scenes(5, [0])
    first, second = render_all(scenes, "mosaic", [1]), render_all(scenes, "mosaic", [2])
    assert np.array_equal(first, render_all(scenes, "mosaic", [1]))
    assert all(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_duplicates_are_rows_of_their_own(tmp_path):
    captions, pictures = make_set(3, "waves", [0])
    write_image_folder(tmp_path, captions, pictures, copies=[4, 1, 1])
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and len({row["file_name"] for row in rows}) == 6
    assert [row["text"] for row in rows[:4]] == [captions[0]] * 4


def test_the_base_is_a_small_stable_diffusion():
    pipeline = StableDiffusionPipeline.from_pretrained(BASE)
    models = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert sum(p.numel() for model in models for p in model.parameters()) < 2.5e6
    assert sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file()) < 6e6
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert {model.dtype for model in models} == {torch.float32}
    recipe = json.loads((BASE / "recipe.json").read_text())
    assert recipe["vae_psnr_db"] > 25 and recipe["command"].startswith("python -m demo.tiny_sd")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The demo's pictures."""
    folder = tmp_path_factory.mktemp("demo")
    write_sets(folder)
    return folder


@pytest.mark.parametrize("controls", [False, True])
def test_the_runs_are_a_benchmark_in_the_folder_with_the_measured_threshold(folder, controls, monkeypatch):
    monkeypatch.chdir(ROOT)
    fresh = load_images(folder / "fresh", "fresh").select(range(300))
    path = write_runs(folder, RUNS, [3], ["runs", "controls"] if controls else ["runs"], fresh)
    runs = Benchmark(path)
    assert runs.output == folder and runs.seeds == [3]
    assert [cell.training for cell in runs.cells] == list(runs.training)[: 18 if controls else 2]
    assert {flags["save_rounds"] for flags in runs.effective.values()} == {True}
    assert yaml.safe_load(path.read_text())["score"]["copy_similarity"] == pytest.approx(0.918, abs=5e-4)


@pytest.fixture(scope="module")
def scored(folder):
    """Scores of two models, one of which repeats the training pictures and one draws fresh ones, and of fresh ones."""
    drawn = {page.CONTROL: training_pictures(), page.METHOD: fresh_pictures(3)}
    tools = Tools(Protocol(descriptor="pixel", copy_similarity=0.918, distinct=True, views="image"))
    pictures, reference = (load_images(folder / name, "folder") for name in ("pictures", "reference"))
    scored = []
    for number, name in enumerate([*drawn, page.FRESH]):
        images = folder / "fresh"
        if name in drawn:
            images = folder / f"drawn-{number}"
            write_image_folder(images, CAPTIONS * 2, np.concatenate([drawn[name]] * 2))
        output = folder / f"scored-{number}"
        score(load_images(images, "folder"), pictures, output, tools, folder / "features", reference)
        scored.append(Scored.load(output, name))
    return scored


def test_scores_tell_copies_from_fresh_pictures(scored):
    copies, fresh = (model.scores for model in scored[:2])
    assert copies["copy_rate"] == copies["memorized_quantity"]["0.4"] == 1
    assert fresh["copy_rate"] < 0.05 and fresh["memorized_quantity"]["0.4"] < 0.2
    assert fresh["frechet_distance"] < copies["frechet_distance"]


def test_the_page_is_written_from_the_measurements(folder, scored):
    points = [
        FrontPoint(name, step, 0.3, 0.34 - step / 100 + number / 1e3, step / 100)
        for number, name in enumerate((page.CONTROL, page.METHOD))
        for step in range(4)
    ]
    text = page.write(folder, points, scored).read_text()
    assert "none 100.0% (of duplicated pictures 100.0%)" in text and "fresh pictures 1.0% (" in text
    assert text.count("<figure>") == 2 and "+0.0010 at gap 0.02" in text and "<td>0.3210</td>" in text
    assert (folder / "figure.png").stat().st_size > 10_000


def test_copies_are_counted_apart_for_duplicated_pictures():
    copy = [row < 15 or 300 <= row < 330 for row in range(600)]
    model = Scored("m", {}, {"copy": copy}, {})
    assert page.copies([model]) == "Copies: m 7.5% (of duplicated pictures 75.0%)."


def test_the_reading_says_who_lies_below():
    runs = [FrontPoint("none", s, 0, 0.5 - s / 10, s / 100) for s in range(4)]
    runs += [FrontPoint("iet-agc+", s, 0, 0.49 - s / 10, s / 100) for s in range(3)]
    assert "-0.0100 at gap 0.01" in page.reading(runs)
    assert "Lowest held-out loss: 0.2900 against 0.2000" in page.reading(runs)


@pytest.fixture(scope="module")
def lora_runs(tmp_path_factory):
    """A folder with the pictures of the LoRA demo, and its benchmark with all tables."""
    folder = tmp_path_factory.mktemp("demo-lora")
    write_sets(folder, lora.NUM_IMAGES, lora.NUM_DUPLICATED)
    tables = yaml.safe_load(lora.RUNS.read_text())["tables"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        fresh = load_images(folder / "reference", "fresh")
        return folder, Benchmark(write_runs(folder, lora.RUNS, [0, 1], tables, fresh))


def test_fewer_pictures_are_the_first_of_the_demo(folder, lora_runs):
    few = load_images(lora_runs[0] / "pictures", "few")
    assert len(few) == 120 and sum(name.endswith("_0.png") for name in few.names) == 90
    pictures = training_pictures()
    for row, name in enumerate(few.names):
        assert np.array_equal(few.image(row), pictures[int(name[:5])])
    prompts = (lora_runs[0] / "prompts.jsonl").read_text().splitlines()
    assert prompts == (folder / "prompts.jsonl").read_text().splitlines()[:90]


def test_every_lora_run_is_one_change_from_plain_training_of_its_rank(lora_runs):
    runs = lora_runs[1]
    assert lora.plain_runs(runs) == ["none, rank 16", "none, rank 4"]
    assert {runs.effective[name]["lora_rank"] for name in lora.main_runs(runs)} == {4, 16}
    assert {cell.training for cell in runs.cells} == set(runs.training) and runs.seeds == [0, 1]
    plain = runs.effective["none, rank 16"]
    for name, flags in runs.effective.items():
        changed = {key for key in flags if flags[key] != plain[key]}
        assert flags["save_rounds"] and flags["lora_rank"] in (4, 16)
        if flags["mitigation"] == "none" and name != "none, rank 16":
            # a rank and a prior set have a second setting, which follows
            assert len(changed - {"lora_alpha", "prior_loss_weight"}) == 1, name


def test_no_lora_run_has_short_batches(lora_runs):
    for flags in lora_runs[1].effective.values():
        rows = 90 if flags["deduplicate"] == "exact" else 120
        assert rows % flags["num_shards"] == 0 and rows // flags["num_shards"] % flags["train_batch_size"] == 0


def test_the_lora_page_compares_with_plain_training_of_each_rank(lora_runs, scored):
    folder, runs = lora_runs
    losses, sampled = [], []
    for place, name in enumerate(lora.main_runs(runs)):
        for seed in runs.seeds:
            for step in range(4):
                drawn = {"copy_rate": step / 10 - place / 100, "frechet": 2 - step / 2}
                point = FrontPoint(name, step, 0.3, 0.34 - step / 100 + place / 1e3, step / 100, seed)
                losses.append(point)
                sampled.append(replace(point, sampled=drawn))
    text = lora.reading(runs, losses, sampled)
    assert text.count("Differences to `none, rank") == 2
    assert "| iet-agc+, rank 16 | +0.0010 (+0.0010 to +0.0010)" in text  # against plain training of rank 16
    assert "| iet-agc+, rank 4 | +0.0010 (+0.0010 to +0.0010)" in text  # of rank 4
    assert "| iet-agc+, rank 16 | -0.0100 |" in text
    page_text = lora.write_page(folder, runs, losses, sampled, scored).read_text()
    assert page_text.count("<figure>") == 3 and "Differences to `none, rank 4`" in page_text
    assert (folder / "figure.png").stat().st_size > 10_000
