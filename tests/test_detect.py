"""The detector's numbers are those of the statistics books, and the guard gives no training image out."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import write_folder
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from ietagc_diffusers.cli import main
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.eval import detect as module
from ietagc_diffusers.eval.detect import Detection, detect
from ietagc_diffusers.eval.guard import SimilarityGuard, TrainingIndex
from ietagc_diffusers.eval.image_sets import load_images
from ietagc_diffusers.mitigations import mitigate, text_conditional_noise
from ietagc_diffusers.sscd import pixel_descriptor

PROMPTS = [f"a {colour} picture" for colour in ("red", "green", "blue", "white", "red")]


@pytest.fixture(scope="module")
def pipeline(base):
    made = StableDiffusionPipeline.from_pretrained(base)
    made.set_progress_bar_config(disable=True)
    return made


SETTINGS = Detection(steps=2, generations=2, num_inference_steps=4, seed=3)


def test_scores_are_the_mean_magnitude_of_the_generations(pipeline, tmp_path):
    result = detect(pipeline, PROMPTS, tmp_path, SETTINGS, batch_size=2)
    rows = list(csv.DictReader((tmp_path / "detect.csv").open()))
    repeated = [prompt for prompt in PROMPTS for _ in range(2)]
    by_hand = text_conditional_noise(pipeline, repeated, list(range(3, 13)), 4, 2, 7.5).magnitude.view(5, 2).mean(1)
    np.testing.assert_allclose([float(row["magnitude"]) for row in rows], by_hand.numpy(), rtol=1e-4)
    assert result["auc"] is None and (tmp_path / "detect.png").exists()


def test_interrupted_detection_continues(base, tmp_path, monkeypatch):
    whole = detect(base, PROMPTS, tmp_path / "whole", SETTINGS, batch_size=2)
    score, calls = module.text_conditional_noise, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(module, "text_conditional_noise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        detect(base, PROMPTS, tmp_path / "cut", SETTINGS, batch_size=2)
    assert detect(base, PROMPTS, tmp_path / "cut", SETTINGS, batch_size=2) == whole
    assert len(calls) == 4  # 1, the cut one, and the two that were missing
    assert (tmp_path / "cut" / "detect.csv").read_text() == (tmp_path / "whole" / "detect.csv").read_text()
    (tmp_path / "cut" / ".magnitudes.jsonl").open("a").write("[3.1")  # as a kill leaves it
    assert detect(base, PROMPTS, tmp_path / "cut", SETTINGS, batch_size=2) == whole
    with pytest.raises(UsageError, match="begun with `prompts`"):
        detect(base, [PROMPTS[0], "a", "b", "c", "d"], tmp_path / "cut", SETTINGS, batch_size=2)
    with pytest.raises(UsageError, match="begun with `steps` 2"):
        detect(base, PROMPTS, tmp_path / "cut", Detection(1, 2, 4, seed=3), batch_size=2)


def test_numbers_of_one_pipeline_are_not_taken_for_another_s(pipeline, tmp_path):
    first = detect(pipeline, PROMPTS, tmp_path, SETTINGS)
    torch.manual_seed(5)
    other = StableDiffusionPipeline(**pipeline.components | {"unet": UNet2DConditionModel(**pipeline.unet.config)})
    assert detect(other, PROMPTS, tmp_path, SETTINGS)["mean"] != first["mean"]


def test_prompts_are_measured_at_the_resolution_that_the_model_was_trained_at(base, pipeline, tmp_path):
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "model" / "ietagc").mkdir()
    (tmp_path / "model" / "ietagc" / "config.yaml").write_text("resolution: 32\n")
    result = detect(tmp_path / "model", PROMPTS[:1], tmp_path / "out", SETTINGS)
    by_hand = text_conditional_noise(pipeline, PROMPTS[:1] * 2, [3, 4], 4, 2, 7.5, resolution=32).magnitude.mean()
    native = text_conditional_noise(pipeline, PROMPTS[:1] * 2, [3, 4], 4, 2, 7.5).magnitude.mean()
    assert result["resolution"] == 32 and result["mean"] == pytest.approx(by_hand.item(), rel=1e-4) != native.item()
    with pytest.raises(UsageError, match="begun with `resolution` 32, not 16"):
        detect(tmp_path / "model", PROMPTS[:1], tmp_path / "out", replace(SETTINGS, resolution=16))
    with pytest.raises(UsageError, match="`resolution` 20: must be a multiple of 8"):
        text_conditional_noise(pipeline, PROMPTS[:1], [3], resolution=20)


def test_the_command_judges_known_prompts(base, tmp_path, capsys):
    for name, prompts in (("memorized", PROMPTS[:3]), ("others", PROMPTS[3:])):
        (tmp_path / f"{name}.txt").write_text("\n".join(prompts))
    known = ["--memorized", str(tmp_path / "memorized.txt"), "--others", str(tmp_path / "others.txt")]
    flags = ["detect", "--model", str(base), "--output", str(tmp_path / "out"), "--num_inference_steps", "2"]
    flags += ["--generations", "1", "--device", "cpu"]
    assert main([*flags, *known]) == 0
    assert "AUC" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "detect.json").read_text())
    assert 0 <= result["auc"] <= 1 and result["num_prompts"] == 5
    assert main([*flags, *known[:2]]) == 2
    assert "--memorized and --others" in capsys.readouterr().err
    shutil.copy(tmp_path / "out" / "detect.csv", tmp_path / "known.csv")
    again = ["--prompts", str(tmp_path / "known.csv"), "--output", str(tmp_path / "again"), "--resolution", "16"]
    assert main([*flags, *again]) == 0
    labelled = json.loads((tmp_path / "again" / "detect.json").read_text())
    assert labelled == result | {"resolution": 16}


@pytest.fixture(scope="module")
def drawn(pipeline):
    """What the pipeline draws for four prompts and seeds, unguarded."""
    return pipeline(PROMPTS[:4], num_inference_steps=2, generator=generators(4)).images


def generators(number, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(number)]


def index_of(images, folder):
    folder.mkdir()
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    return TrainingIndex.build(load_images(folder, "train"), pixel_descriptor())


def test_an_image_of_the_training_set_is_drawn_again(pipeline, drawn, tmp_path):
    guard = SimilarityGuard(pipeline, pixel_descriptor(), index_of(drawn[1:3], tmp_path / "train"), 0.999)
    made = guard(PROMPTS[:4], num_inference_steps=2, generator=generators(4))
    assert made.tries == [1, 2, 2, 1] and made.refused == [False] * 4
    assert made.images[0].tobytes() == drawn[0].tobytes() and made.images[3].tobytes() == drawn[3].tobytes()
    assert made.images[1].tobytes() != drawn[1].tobytes() and max(made.similarity) <= 0.999
    again = guard(PROMPTS[:4], num_inference_steps=2, generator=generators(4))
    assert [image.tobytes() for image in again.images] == [image.tobytes() for image in made.images]
    alone = guard(PROMPTS[1], num_inference_steps=2, generator=generators(1, first=1))
    assert np.abs(np.asarray(alone.images[0]).astype(int) - np.asarray(made.images[1])).max() <= 1


def test_the_first_try_is_the_pipeline_s_own_call_without_a_generator_too(pipeline, drawn, tmp_path):
    index = index_of(drawn[:1], tmp_path / "train")
    torch.manual_seed(7)
    plain = pipeline(PROMPTS[:2], num_inference_steps=2).images
    torch.manual_seed(7)
    made = SimilarityGuard(pipeline, pixel_descriptor(), index, 1.0)(PROMPTS[:2], num_inference_steps=2)
    assert [image.tobytes() for image in made.images] == [image.tobytes() for image in plain]


def test_what_stays_too_similar_is_refused(pipeline, drawn, tmp_path):
    guard = SimilarityGuard(pipeline, pixel_descriptor(), index_of(drawn, tmp_path / "train"), -1.0, retries=2)
    made = guard(PROMPTS[:2], num_inference_steps=2)
    assert made.images == [None, None] and made.refused == [True, True] and made.tries == [3, 3]
    assert all(name.endswith(".png") for name in made.nearest)


def test_lists_several_images_a_prompt_and_mitigations_pass_through(pipeline, drawn, tmp_path):
    guarded = mitigate(pipeline, "rt")
    options = {"num_inference_steps": 2, "negative_prompt": ["grey", "black"], "num_images_per_prompt": 2}
    plain = guarded(PROMPTS[:2], generator=generators(4), **options).images
    guard = SimilarityGuard(guarded, pixel_descriptor(), index_of(plain[1:2], tmp_path / "train"), 0.999)
    made = guard(PROMPTS[:2], generator=generators(4), **options)
    assert made.tries == [1, 2, 1, 1] and made.images[2].tobytes() == plain[2].tobytes()


def test_the_index_is_saved_and_knows_its_descriptor(pipeline, drawn, tmp_path):
    index = index_of(drawn, tmp_path / "train")
    index.save(tmp_path / "index")
    loaded = TrainingIndex.load(tmp_path / "index")
    assert torch.equal(loaded.vectors, index.vectors) and loaded.names == index.names
    with pytest.raises(UsageError, match="build it again"):
        SimilarityGuard(pipeline, pixel_descriptor(8), loaded)
    with pytest.raises(UsageError, match="`retries` -1"):
        SimilarityGuard(pipeline, pixel_descriptor(), loaded, retries=-1)
    with pytest.raises(UsageError, match=r"index\.json"):
        TrainingIndex.load(tmp_path / "nothing")
    with pytest.raises(UsageError, match="output_type"):
        SimilarityGuard(pipeline, pixel_descriptor(), loaded)("a", output_type="pt")
    with pytest.raises(UsageError, match="`ip_adapter_image_embeds`: a guard cannot"):
        SimilarityGuard(pipeline, pixel_descriptor(), loaded)("a", ip_adapter_image_embeds=[torch.zeros(2, 1, 4)])


def test_an_unreadable_training_image_does_not_stop_the_index(tmp_path):
    folder = write_folder(tmp_path / "train", 3)
    (folder / "001_0.png").write_bytes(b"")
    index = TrainingIndex.build(load_images(folder, "train"), pixel_descriptor())
    assert set(index.names) == {"000_0.png", "002_0.png"}
    assert isinstance(Image.open(folder / "000_0.png"), Image.Image)
