"""The demo's pictures show what their captions tell, and its base is the model it says."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from ietagc_diffusers.eval.front import FrontPoint
from ietagc_diffusers.eval.score import load_scores

from demo import page
from demo.arms import CONTROLS, DEMO
from demo.measure import BASE, Pictures, score_folder, write_pictures
from demo.renders import COLOURS, RESOLUTION, SIDES, draw_scenes, make_set, render_all, write_image_folder
from demo.run import filled, slug
from ietagc_diffusers.arguments import parse_args


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


def test_arms_are_valid_flags_and_folders():
    arms = {**DEMO, **filled(CONTROLS, {"skip_rate": 0.2, "augment_rate": 0.3})}
    for flags in arms.values():
        parse_args(["--pretrained_model_name_or_path=m", "--train_data_dir=d", *flags])
    assert len({slug(name) for name in arms}) == len(arms) and all(" " not in slug(name) for name in arms)


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    """The demo's pictures, and scores of two models: one gives back the training pictures, one draws fresh ones."""
    pictures, folder = Pictures(), tmp_path_factory.mktemp("demo")
    pictures.write(folder)
    for number, name in enumerate(DEMO):
        run_dir = folder / slug(name)
        run_dir.mkdir()
        front = [
            {"run": name, "step": s, "train_loss": 0.3, "heldout_loss": 0.34 - s / 100 + number / 1e3, "gap": s / 100}
            for s in range(4)
        ]
        (run_dir / "front.json").write_text(json.dumps(front))
        images = pictures.training if number == 0 else pictures.fresh(3)
        write_pictures(run_dir / "drawn", pictures.captions * 2, torch.cat([images] * 2))
        score_folder(pictures, run_dir / "drawn", run_dir / "scored", folder)
    score_folder(pictures, folder / "fresh", folder / "fresh_scored", folder)
    return folder


def test_scores_tell_copies_from_fresh_pictures(demo_folder):
    copies, fresh = (load_scores(demo_folder / slug(name) / "scored")[0] for name in DEMO)
    assert copies["copy_rate"] == copies["copy_rate_duplicated"] == copies["copy_rate_single"] == 1
    assert copies["memorized_quantity"]["0.4"] == 1
    assert fresh["copy_rate"] < 0.05 and fresh["memorized_quantity"]["0.4"] < 0.2
    assert fresh["frechet_distance"] < copies["frechet_distance"]


def test_the_page_is_written_from_the_measurements(demo_folder):
    arms = {name: demo_folder / slug(name) for name in DEMO}
    path, numbers = page.write(demo_folder, arms, arms)
    text = path.read_text()
    assert "none copied 100.0%" in text and "fresh pictures" in text and text.count("<figure>") == 2
    assert "+0.0010 at gap 0.02" in numbers and "copies of duplicated pictures" in numbers
    assert (demo_folder / "figure.png").stat().st_size > 10_000


def test_the_reading_says_who_lies_below():
    runs = [FrontPoint("none", s, 0, 0.5 - s / 10, s / 100) for s in range(4)]
    runs += [FrontPoint("iet-agc+", s, 0, 0.49 - s / 10, s / 100) for s in range(3)]
    assert "-0.0100 at gap 0.01" in page.reading(
        runs
    ) and "Lowest held-out loss: 0.2900 against 0.2000" in page.reading(runs)
