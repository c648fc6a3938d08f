"""Extraction from a fine-tune: clusters by their definition, a planted copy that only guidance shows, and wrong use."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import COLOURS, train_flags, train_here, write_folder
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from ietagc_diffusers import testing
from ietagc_diffusers.cli import extract as command
from ietagc_diffusers.cli import main
from ietagc_diffusers.eval.clusters import clusters_of
from ietagc_diffusers.eval.drawing import drawing_of, sentence_of
from ietagc_diffusers.eval.extract import PLAIN_GUIDANCE, similarity_between
from ietagc_diffusers.eval.features import embed
from ietagc_diffusers.eval.fine_tune import FineTune
from ietagc_diffusers.eval.image_sets import load_images
from ietagc_diffusers.eval.views import ALL_VIEWS
from ietagc_diffusers.run_folder import ADAPTER_FILE
from ietagc_diffusers.sscd import pixel_descriptor

CAPTIONS = [f"a {colour} picture" for colour in COLOURS]
SHIFT = 0.2  # of the planted fine-tune toward its image
FLAGS = ["--descriptor", "pixel", "--feature_cache", "none", "--device", "cpu", "--num_inference_steps", "6"]


def test_clusters_are_of_images_that_are_all_similar_and_joined_most_similar_first():
    torch.manual_seed(0)
    centres = torch.eye(8)[:3]
    vectors = torch.cat([centres[[number]] + 0.05 * torch.randn(size, 8) for number, size in enumerate((2, 4, 3))])
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    similar = vectors @ vectors.T
    found = clusters_of(vectors, 3)
    assert [one.members for one in found] == [[2, 3, 4, 5], [6, 7, 8], [0, 1]]
    for one in found:
        mean = vectors[one.members].mean(dim=0)
        assert one.representative == min(one.members, key=lambda place: (vectors[place] - mean).norm())
        assert one.similarity == pytest.approx(similar[one.members][:, one.members].min().item(), abs=1e-6)
    assert [one.members for one in clusters_of(vectors, 9)] == [[place] for place in range(9)]
    (whole,) = clusters_of(vectors, 1)
    assert whole.members == list(range(9)) and whole.similarity == pytest.approx(similar.min().item(), abs=1e-6)


def test_a_chain_of_similar_images_is_no_cluster():
    """0-1 and 1-2 are similar, 0-2 is not: single linkage would join all three."""
    angles = torch.tensor([0.0, 0.5, 1.1, 3.0])
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert sorted(one.members for one in clusters_of(vectors, 3)) == [[0, 1], [2], [3]]
    assert sorted(one.members for one in clusters_of(vectors, 2)) == [[0, 1, 2], [3]]


def test_similarity_is_the_highest_of_any_view_and_either_way_round(tmp_path):
    training, descriptor = load_images(write_folder(tmp_path / "train", 5), "train"), pixel_descriptor()
    (tmp_path / "drawn").mkdir()
    for number, shift in ((0, 0), (1, 3), (2, 1)):  # crops of the 23 x 20 pictures; the second one mirrored
        image = training.image(number).crop((shift, 0, shift + 20, 20))
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if number == 1 else image
        image.save(tmp_path / "drawn" / f"{number}.png")
    shown = embed(training, ALL_VIEWS.of_training(descriptor))
    drawn = embed(load_images(tmp_path / "drawn", "output"), ALL_VIEWS.of_others(descriptor))
    found, views = similarity_between(shown, drawn), shown.several["views"]
    for i in range(5):
        for j in range(3):
            own = views.vectors[views.owners == i]
            ways = [way.vectors[way.owners == j] for way in drawn.both_ways()]
            assert found[i, j] == pytest.approx(max((own @ way.T).max().item() for way in ways), abs=1e-6)
    assert found[[0, 1, 2], [0, 1, 2]].min() > 0.99 and found[3:].max() < 0.6


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A base that draws noise of variance 1, a fine-tune of it whose prediction lies a fifth of the way to that of a
    model which knows one latent only, and two training images, the first of which this latent decodes to.

    (e_model - e_base) * 5 leads to that latent; the model by itself draws pictures between it and noise.
    """
    pipeline = testing.random_pipeline(CAPTIONS, prediction_type="epsilon")
    alphas_cumprod = pipeline.scheduler.alphas_cumprod
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(99))

    def forward(self, sample, timestep, **inputs):
        a, b = alphas_cumprod[timestep] ** 0.5, (1 - alphas_cumprod[timestep]) ** 0.5
        broad, toward = b * sample, (sample - a * latent) / b
        return (broad + self.conv_out.bias[0] * (toward - broad),)

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    with torch.no_grad():
        for name, shift in (("base", 0), ("model", SHIFT)):
            pipeline.unet.conv_out.bias[0] = shift
            pipeline.save_pretrained(tmp_path / name)
        image = pipeline.vae.decode(latent / pipeline.vae.config.scaling_factor).sample
    folder = write_folder(tmp_path / "train", 2, size=16)
    pixels = ((image[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(folder / "000_0.png")
    return tmp_path


def extracted(planted, *flags):
    places = ["--model", planted / "model", "--base", planted / "base", "--train", planted / "train"]
    words = [*places, "--output", planted / "out", "--num_images", 6, *FLAGS, *flags]
    assert main(["extract", *map(str, words)]) == 0
    with (planted / "out" / "clusters.csv").open() as file:
        rows = list(csv.DictReader(file))
    return json.loads((planted / "out" / "extract.json").read_text()), rows


def test_a_planted_copy_that_plain_draws_do_not_show_is_found_and_drawing_continues(planted, capsys):
    result, rows = extracted(planted, "--guidance", 1 / SHIFT)
    draws = result["draws"]
    assert {name: one["extracted"] for name, one in draws.items()} == {"guided": 1, "plain": 0, "base": 0}
    assert draws["guided"]["representatives_that_are_copies"] == 2 and draws["plain"]["in_any_image"] == 0
    assert result["added_by_guidance"]["extracted"] == 1 and result["correction"] == -0.02
    assert (result["num_train"], result["num_images"], result["guidance"]) == (2, 6, 5)
    similar = {name: one["average_similarity"] for name, one in draws.items()}
    assert similar["guided"] > similar["plain"] > similar["base"]
    guided = [row for row in rows if row["draws"] == "guided"]
    assert [(row["nearest"], row["copy"]) for row in guided] == [("000_0.png", "1")] * 2
    assert sum(int(row["size"]) for row in guided) == 6 == sum(len(row["members"].split()) for row in guided)
    said = capsys.readouterr().out
    assert (
        said.startswith((planted / "out" / "extract.md").read_text())
        and "changes the number of extracted images by +1" in said
    )
    Image.open(planted / "out" / "sheet.png").verify()
    assert "guidance away from the base 5, correction -0.02" in sentence_of(drawing_of(planted / "out" / "guided", 6))
    assert "guidance 3" in sentence_of(drawing_of(planted / "out" / "plain", 6))

    removed = planted / "out" / "guided" / "000003.png"
    before = removed.read_bytes()
    kept = planted / "out" / "guided" / "000004.png"
    removed.unlink()
    age = kept.stat().st_mtime_ns
    again, _ = extracted(planted, "--guidance", 1 / SHIFT, "--batch_size", 1)
    assert removed.read_bytes() == before and kept.stat().st_mtime_ns == age and again == result
    words = ["--model", planted / "model", "--base", planted / "base", "--train", planted / "train"]
    words += ["--output", planted / "out", "--num_images", 6, *FLAGS, "--guidance", 4]
    assert main(["extract", *map(str, words)]) == 2
    assert "begun with `base_guidance` {'base': " in capsys.readouterr().err


@pytest.fixture(scope="module")
def adapter(base, pictures, tmp_path_factory):
    """A LoRA run of one large step."""
    flags = train_flags(base, pictures, "--mitigation=none", "--max_train_steps=1", "--lora_rank=2", "--report_to=none")
    return train_here([*flags, "--learning_rate=0.3"], tmp_path_factory.mktemp("adapter") / "run")


def drawn(model, output, *flags):
    """The result, and the images of each way: int (2, 16, 16, 3)."""
    words = ["--model", model, "--output", output, "--num_images", 2, *FLAGS, "--num_inference_steps", 2, *flags]
    assert main(["extract", *map(str, words)]) == 0
    folders = {way: load_images(output / way, "output") for way in ("guided", "plain", "base")}
    images = {way: np.stack([np.asarray(found.image(n), int) for n in (0, 1)]) for way, found in folders.items()}
    return json.loads((output / "extract.json").read_text()), images


def test_a_lora_run_is_attacked_with_what_it_records(base, adapter, tmp_path):
    result, images = drawn(adapter, tmp_path / "out")
    assert (result["guidance"], result["correction"], result["base"]) == (5, 0, str(base))
    assert result["num_train"] == 22 and result["settings"]["resolution"] == 16
    assert any("2 training images are exact duplicates" in note for note in result["notes"])
    assert any("each image represents itself" in note for note in result["notes"])
    assert all(np.abs(images[way] - images["base"]).max() > 9 for way in ("guided", "plain"))


def test_an_adapter_that_changes_nothing_is_guided_as_a_model_is_by_its_own_empty_prompt(adapter, tmp_path):
    still = shutil.copytree(adapter, tmp_path / "still")
    factors = load_file(adapter / ADAPTER_FILE)
    save_file({name: tensor * (".lora.up." not in name) for name, tensor in factors.items()}, still / ADAPTER_FILE)
    _, images = drawn(still, tmp_path / "out", "--guidance", 3)
    assert all(np.abs(images[way] - images["base"]).max() <= 1 for way in ("guided", "plain"))


def test_numbers_are_the_authors_and_no_correction_where_it_is_not_defined():
    def of(adapter=False, flow=False, **schedule):
        return FineTune("m", "b", (), adapter, schedule, flow).guidance()

    assert (of().scale, of().correction, of().base) == (3, -0.02, "b")
    assert (of(adapter=True).scale, of(adapter=True).correction, of(adapter=True).base) == (5, 0, None)
    assert of(prediction_type="v_prediction").correction == -0.02
    assert of(flow=True).correction == of(rescale_betas_zero_snr=True).correction == 0
    assert of(prediction_type="sample").correction == 0
    assert command.PLAIN_GUIDANCE == PLAIN_GUIDANCE


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "{ddpm}"], "--model {ddpm}: draws without prompts and has no base"),
        (["--base", "{model}"], "--base {model}: is the model itself"),
        (["--base", "{epsilon}"], "--base {epsilon}: has prediction_type epsilon, and the model v_prediction"),
        (["--base", "{ddpm}"], "--base {ddpm}: is Unconditional"),
        (["--base"], "--base: {model} does not record which model its training started from"),
        (["--lora", "{lora}"], "--base {base}: the base of an adapter is the model without it"),
        (["--guidance", "nan"], "--guidance nan"),
        (["--correction", "2"], "--correction 2.0: must be from -1 to 1"),
        (["--num_clusters", "0"], "--num_clusters 0"),
        (["--output", "{train}/here"], "what is written there would get into --train"),
    ],
)
def test_wrong_use_is_told_in_a_line(base, tmp_path, capsys, flags, message):
    places = {"base": base, "train": write_folder(tmp_path / "train", 2), "lora": tmp_path / "a.safetensors"}
    places["lora"].touch()
    made = {
        "model": testing.random_pipeline(CAPTIONS, seed=1),
        "epsilon": testing.random_pipeline(CAPTIONS, prediction_type="epsilon"),
        "ddpm": testing.random_unconditional_pipeline(),
    }
    for name, pipeline in made.items():
        places[name] = tmp_path / name
        if any(f"{{{name}}}" in word for word in (*flags, message)) or name == "model":
            pipeline.save_pretrained(places[name])
    given = {"--model": places["model"], "--base": base, "--train": places["train"], "--output": tmp_path / "o"}
    if flags == ["--base"]:
        del given["--base"]
    else:
        given[flags[0]] = flags[1].format(**places)
    words = [str(word) for pair in given.items() for word in pair]
    assert main(["extract", *words, *FLAGS]) == 2
    assert message.format(**places) in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
