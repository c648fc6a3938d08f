"""The reduced reproduction and the demo on photographs: what they train on and what they show."""

import json

import numpy as np
import torch
from conftest import ROOT
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image

from benchmarks import photos as study
from demo import photos as demo
from ietagc_diffusers.eval.benchmark import Benchmark
from ietagc_diffusers.eval.image_sets import load_images
from ietagc_diffusers.eval.report import Scored


def test_smaller_sets_are_parts_of_larger_ones():
    labels = np.array([0, 1, 2] * 10)
    rows = np.arange(30)
    small, large = (study.first_of_each_class(labels, rows, number) for number in (6, 15))
    assert set(small) <= set(large) and np.bincount(labels[large]).tolist() == [5, 5, 5]
    others = np.setdiff1d(rows, large)
    assert not set(study.first_of_each_class(labels, others, 9)) & set(large)


def test_captions_stand_for_labels():
    found = [study.captions(number % 2, number, 2) for number in range(40)]
    assert {row["text"] for row in found} == {demo.CAPTION}
    assert len({row["unique_class"] for row in found}) == 40
    assert {row["own_class"] for row in found} == {row["random_class"] for row in found}
    same = sum(row["own_class"] == row["random_class"] for row in found)
    assert 8 < same < 32  # random labels say nothing of the class


def test_the_shipped_photographs_are_small_named_and_apart():
    folders = [ROOT / "demo" / "photos" / name for name in ("pictures", "heldout")]
    names = [{path.name for path in folder.glob("*.png")} for folder in folders]
    assert [len(each) for each in names] == [60, 98] and not names[0] & names[1]
    assert all(Image.open(path).size == (32, 32) for folder in folders for path in folder.glob("*.png"))
    assert sum(path.stat().st_size for path in (ROOT / "demo" / "photos").rglob("*")) < 2e6
    licence = (ROOT / "demo" / "photos" / "LICENSE.md").read_text()
    assert "CC BY 4.0" in licence and "Unsplash" in licence


def test_a_base_has_the_vae_and_random_weights_of_its_own(tmp_path):
    vae = AutoencoderKL.from_pretrained(ROOT / "demo" / "photo-vae")
    demo.write_base(tmp_path / "base", vae)
    demo.write_base(tmp_path / "again", vae)
    first, second = (StableDiffusionPipeline.from_pretrained(tmp_path / name) for name in ("base", "again"))
    assert all(torch.equal(a, b) for a, b in zip(first.unet.parameters(), second.unet.parameters(), strict=True))
    pictures = load_images(ROOT / "demo" / "photos" / "pictures", "train")
    shown = torch.stack([torch.from_numpy(np.array(pictures.image(i))) for i in range(20)])
    shown = shown.permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(shown).latent_dist.mode()
        errors = (vae.decode(latents).sample.clamp(-1, 1) - shown) / 2
    assert -10 * errors.square().mean().log10() > 24  # dB
    assert 0.5 < (latents * vae.config.scaling_factor).std() < 1.5


def test_the_runs_are_benchmarks(monkeypatch):
    monkeypatch.chdir(ROOT)
    for path in (demo.RUNS, study.RUNS):
        runs = Benchmark(path)
        steps = {flags["max_train_steps"] for flags in runs.effective.values()}
        assert len(steps) == 1  # equal sample visits
    assert set(study.SAMPLED) | set(study.SHEET) <= runs.training.keys()


def test_the_sheet_has_the_photographs_that_the_first_model_copies_best(tmp_path):
    (tmp_path / "train").mkdir()
    for folder in ("train", "first", "second"):
        (tmp_path / folder).mkdir(exist_ok=True)
        for number in range(3):
            Image.new("RGB", (8, 8), (50 * number, 0, 0)).save(tmp_path / folder / f"{number}.png")
    (tmp_path / "train" / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": f"{number}.png", "text": "a"}) + "\n" for number in range(3))
    )

    def scored(name, nearest, similarity):
        columns = {"file_name": ["0.png", "1.png", "2.png"], "nearest": nearest, "similarity": similarity}
        return Scored(name, {"generated": str(tmp_path / name)}, columns, {})

    models = [
        scored("first", ["2.png", "0.png", "2.png"], [0.2, 0.5, 0.9]),
        scored("second", ["2.png", "2.png", "2.png"], [0.1, 0.3, 0.2]),
    ]
    figure = demo.sheet(models, tmp_path / "train")
    cells = np.array(figure.axes).reshape(3, 2)
    reds = [[int(cell.images[0].get_array()[0, 0, 0]) if cell.images else None for cell in row] for row in cells]
    assert reds == [[100, 0], [100, 50], [50, None]]
    assert [row[0].get_ylabel() for row in cells] == ["training", "first", "second"]
