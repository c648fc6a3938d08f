"""Membership attacks: each rule against Diffusers' own modules, a planted copy that is found, and wrong use."""

import csv
import json

import numpy as np
import pytest
import torch
from conftest import COLOURS, train_flags, train_here, write_folder
from diffusers import DiffusionPipeline

from ietagc_diffusers import testing
from ietagc_diffusers.cli import attack as command
from ietagc_diffusers.cli import main
from ietagc_diffusers.eval.attack import Settings, middles
from ietagc_diffusers.eval.image_sets import load_images
from ietagc_diffusers.eval.losses import shown
from ietagc_diffusers.eval.membership import ATTACKS, PIA_LEVEL, QUESTIONS, SIMA_LEVEL, Target, ask
from ietagc_diffusers.eval.roc import roc_auc
from ietagc_diffusers.training.fixed_losses import FixedLosses

CAPTIONS = [f"a {colour} picture" for colour in COLOURS]
MADE = {
    "sd-epsilon": lambda: testing.random_pipeline(CAPTIONS, prediction_type="epsilon"),
    "sd-velocity": lambda: testing.random_pipeline(CAPTIONS),
    "sdxl": lambda: testing.random_xl_pipeline(CAPTIONS),
    "ddpm-epsilon": testing.random_unconditional_pipeline,
    "ddpm-image": lambda: predicting_images(testing.random_unconditional_pipeline()),
    "sd3": lambda: testing.random_sd3_pipeline(CAPTIONS),
}


def predicting_images(pipeline):
    pipeline.scheduler.register_to_config(prediction_type="sample")
    return pipeline


def told(pipeline, captions):
    """What Diffusers' pipeline tells its denoiser of captions, and of none."""
    if not hasattr(pipeline, "encode_prompt"):
        return {}, {}
    if hasattr(pipeline, "text_encoder_2"):
        embeds, no_embeds, pooled, no_pooled = pipeline.encode_prompt(captions)
        ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).expand(len(captions), -1)
        return tuple(
            {"encoder_hidden_states": one, "added_cond_kwargs": {"text_embeds": pool, "time_ids": ids}}
            for one, pool in ((embeds, pooled), (no_embeds, no_pooled))
        )
    embeds, no_embeds = pipeline.encode_prompt(captions, "cpu", 1, True)
    return {"encoder_hidden_states": embeds}, {"encoder_hidden_states": no_embeds}


def expected(pipeline, batches, captions):
    """The answers to ``QUESTIONS`` by the definitions in print, with Diffusers' modules only."""
    abar, kind = pipeline.scheduler.alphas_cumprod, pipeline.scheduler.config.prediction_type
    condition, nothing = told(pipeline, captions)

    def output(z, t, c):
        return pipeline.unet(z, t, **c).sample

    def noise(z, t, c):
        a, b = abar[t] ** 0.5, (1 - abar[t]) ** 0.5
        said = output(z, t, c)
        image = {"epsilon": lambda: None, "v_prediction": lambda: a * z - b * said, "sample": lambda: said}[kind]()
        return said if image is None else (z - a * image) / b

    def loss(drawn, c):
        x, t = getattr(drawn, "latents", getattr(drawn, "images", None)), drawn.timesteps
        z = pipeline.scheduler.add_noise(x, drawn.noise, t)
        target = {"epsilon": lambda: drawn.noise, "sample": lambda: x}
        target["v_prediction"] = lambda: pipeline.scheduler.get_velocity(x, drawn.noise, t)
        return (output(z, t, c) - target[kind]()).square().mean(dim=(1, 2, 3))

    drawn = batches[0][2]
    x = getattr(drawn, "latents", getattr(drawn, "images", None))
    at_sima, at_pia = int(1000 * SIMA_LEVEL), int(1000 * PIA_LEVEL)
    start = noise(x, 0, condition)
    noisy = abar[at_pia] ** 0.5 * x + (1 - abar[at_pia]) ** 0.5 * start
    return {
        "loss": torch.stack([loss(one, condition) for *_, one in batches]).mean(dim=0),
        "loss_without_caption": torch.stack([loss(one, nothing) for *_, one in batches]).mean(dim=0),
        "sima": (noise(x, at_sima, condition) ** 4).sum(dim=(1, 2, 3)),
        "pia": ((start - noise(noisy, at_pia, condition)) ** 4).sum(dim=(1, 2, 3)),
    }


@pytest.mark.parametrize("name", [name for name in MADE if name != "sd3"])
def test_each_question_is_the_definition_in_print(made, name):
    pipeline, captions = DiffusionPipeline.from_pretrained(made(name)), [CAPTIONS[0], CAPTIONS[2], CAPTIONS[1]]
    torch.manual_seed(0)
    with Target.of_model(made(name)).opened() as opened, torch.no_grad():
        fixed = FixedLosses(opened.family, torch.rand(3, 3, 16, 16) * 2 - 1, captions, levels=middles(4, 1000))
        assert fixed.levels[:, 0].tolist() == [125, 375, 625, 875] and (fixed.levels == fixed.levels[:, :1]).all()
        answers, by_hand = ask(opened, fixed, QUESTIONS), expected(pipeline, list(fixed.drawn()), captions)
    for question, values in by_hand.items():
        np.testing.assert_allclose(answers[question], values.numpy(), rtol=2e-4, err_msg=question)


def test_scores_are_of_the_signs_that_say_trained_on():
    low, high = np.array([1.0]), np.array([2.0])
    model = {"loss": low, "loss_without_caption": high, "sima": low, "pia": low}
    other = model | {"loss": high, "sima": high, "pia": high}
    base = {"loss": np.array([3.0])}
    for name, one in ATTACKS.items():
        assert one.score(model, base) > one.score(other, base), name
    assert ATTACKS["clid"].score(model, base) == 1 and ATTACKS["calibrated"].score(model, base) == 2


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("members") / "members", 4, seed=1)


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("heldout") / "heldout", 6, seed=2)


@pytest.fixture(scope="module")
def start(members, tmp_path_factory):
    """A base whose latents are those of the image, without a draw, and of variance 1, so that they can be learned."""
    pipeline, (pixels, _) = testing.random_pipeline(CAPTIONS), shown(load_images(members, "train"), 16, 4)
    with torch.no_grad():
        pipeline.vae.quant_conv.weight[4:], pipeline.vae.quant_conv.bias[4:] = 0, -30
        latents = pipeline.vae.encode(pixels.float() / 127.5 - 1).latent_dist.mean
    pipeline.vae.register_to_config(scaling_factor=1 / (latents - latents.mean(dim=0)).std().item())
    pipeline.save_pretrained(folder := tmp_path_factory.mktemp("start") / "model")
    return folder


@pytest.fixture(scope="module")
def planted(start, members, tmp_path_factory):
    """A copy of the base whose denoiser has learned the members by heart."""
    pipeline, (pixels, captions) = DiffusionPipeline.from_pretrained(start), shown(load_images(members, "train"), 16, 4)
    family = testing.family_of_pipeline(pipeline)
    encoded = family.objective.encode(family.batch(pixels.float() / 127.5 - 1, captions))
    optimizer = torch.optim.Adam(pipeline.unet.train().parameters(), lr=1e-2)
    torch.manual_seed(0)
    for _ in range(70):
        optimizer.zero_grad()
        family.objective.losses(pipeline.unet, family.objective.draw(encoded)).mean().backward()
        optimizer.step()
    pipeline.save_pretrained(folder := tmp_path_factory.mktemp("planted") / "model")
    return folder


def attacked(output, *flags):
    assert main(["attack", "--output", str(output), "--device", "cpu", *map(str, flags)]) == 0
    rows = list(csv.DictReader((output / "images.csv").open()))
    return json.loads((output / "attack.json").read_text()), rows


def test_a_planted_copy_is_found_and_the_base_s_own_numbers_say_how_the_sets_differ(
    planted, members, heldout, start, tmp_path, capsys
):
    flags = ["--model", planted, "--train", members, "--heldout", heldout, "--base", start, "--resolution", 16]
    result, rows = attacked(tmp_path / "a", *flags, "--draws", 4)
    assert list(result["attacks"]) == list(ATTACKS) and not result["left_out"]
    assert [row["set"] for row in rows] == ["train"] * 4 + ["heldout"] * 6
    labels = [row["set"] == "train" for row in rows]
    for name, one in result["attacks"].items():
        assert one["auc"] == roc_auc([float(row[name]) for row in rows], labels)
    assert result["attacks"]["ratio"]["auc"] == 1 and result["attacks"]["calibrated"]["auc"] > 0.9
    assert result["attacks"]["ratio"]["auc_interval"][0] < 0.6  # of four images
    assert result["base_by_loss"]["auc"] == roc_auc([-float(row["base_loss"]) for row in rows], labels)
    differences = [float(row["base_loss"]) - float(row["model_loss"]) for row in rows]
    np.testing.assert_allclose([float(row["calibrated"]) for row in rows], differences, rtol=1e-6)
    said = capsys.readouterr().out
    assert "| calibrated (" in said and "| base | for comparison" in said and "less than one" in said
    curves = list(csv.DictReader((tmp_path / "a" / "roc.csv").open()))
    assert {row["attack"] for row in curves} == {*ATTACKS, "base"} and (tmp_path / "a" / "roc.png").stat().st_size > 0
    assert said.startswith((tmp_path / "a" / "attack.md").read_text())
    again, same = attacked(tmp_path / "b", *flags, "--draws", 4, "--batch_size", 3, "--attack", "calibrated")
    assert list(again["attacks"]) == ["calibrated"]
    for first, second in zip(rows, same, strict=True):
        assert float(first["calibrated"]) == pytest.approx(float(second["calibrated"]), abs=1e-5)


def test_a_base_that_tells_the_sets_apart_is_named(planted, start, members, heldout, tmp_path):
    """The planted model as the base of the base: it has seen the members."""
    flags = ["--model", start, "--train", members, "--heldout", heldout, "--base", planted, "--resolution", 16]
    result, _ = attacked(tmp_path, *flags, "--attack", "ratio", "--draws", 4)
    assert result["attacks"]["ratio"]["auc"] == 0
    assert result["base_by_loss"]["auc"] > 0.9 and result["base_by_loss"]["auc_interval"][0] > 0.5
    assert any("The base by itself tells the two sets apart" in note for note in result["notes"])


def test_a_lora_run_is_attacked_with_what_it_records(base, pictures, heldout, tmp_path):
    flags = train_flags(base, pictures, "--mitigation=none", "--max_train_steps=2", "--lora_rank=2")
    run = train_here(flags, tmp_path / "run")
    result, rows = attacked(tmp_path / "a", "--model", run, "--heldout", heldout, "--draws", 1)
    assert list(result["attacks"]) == list(ATTACKS) and result["base"] == str(base)
    assert result["num_train"] == 24 and result["resolution"] == 16
    assert all(row["model_loss"] != row["base_loss"] for row in rows)


def test_what_is_not_defined_for_a_model_is_left_out_and_named(made, members, heldout, tmp_path, capsys):
    sets = ["--train", members, "--heldout", heldout, "--resolution", 16, "--draws", 1]
    result, _ = attacked(tmp_path / "ddpm", "--model", made("ddpm-epsilon"), *sets)
    assert list(result["attacks"]) == ["loss", "sima", "pia"] and result["base_by_loss"] is None
    assert "is told captions" in result["left_out"]["clid"] and "none is recorded" in result["left_out"]["ratio"]
    result, _ = attacked(tmp_path / "sd3", "--model", made("sd3"), *sets)
    assert list(result["attacks"]) == ["loss", "clid"]
    flags = ["--model", made("sd3"), *sets, "--attack", "sima", "--output", tmp_path / "o"]
    assert main(["attack", *map(str, flags)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "--attack sima: asks for the noise" in line and "(Stable Diffusion 3)" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--heldout", "{members}"], "--heldout {members}: 4 of its 4 pictures are also among the training images"),
        (["--heldout", "{one}"], "--heldout {one}: an attack needs at least two images with captions"),
        (["--train", "{one}"], "--train {one}: an attack needs at least two images with captions"),
        (["--heldout", "{empty}"], "--heldout {empty}: no images"),
        (["--base", "{ddpm}"], "--base {ddpm}: is Unconditional, and the model is Stable Diffusion"),
        (["--base", "{epsilon}"], "--base {epsilon}: has prediction_type epsilon, and the model v_prediction"),
        (["--base", "{base}/"], "is the model itself"),
        (["--base", "{empty}"], "--base {empty}: has no model_index.json"),
        (["--attack", "calibrated"], "--attack calibrated: needs the model that the training started from"),
        (["--draws", "0"], "--draws 0"),
        (["--output", "{members}/here"], "--output {members}/here: what is written there would get into"),
        (["--resolution"], "--resolution: {base} does not record at which it was trained"),
        (["--model", "{classes}"], "{classes}: is told a class of each image"),
    ],
)
def test_wrong_use_is_told_in_a_line(base, made, members, heldout, tmp_path, capsys, flags, message):
    (tmp_path / "empty").mkdir()
    if "{classes}" in flags:
        testing.random_unconditional_pipeline(classes=3).save_pretrained(tmp_path / "classes")
    places = {"members": members, "one": write_folder(tmp_path / "one", 1, seed=3), "empty": tmp_path / "empty"}
    places |= {"base": base, "ddpm": made("ddpm-epsilon"), "epsilon": made("sd-epsilon")}
    places |= {"classes": tmp_path / "classes"}
    given = {"--model": base, "--train": members, "--heldout": heldout, "--resolution": 16, "--output": tmp_path / "o"}
    if flags == ["--resolution"]:
        del given["--resolution"]
    else:
        given[flags[0]] = flags[1].format(**places)
    assert main(["attack", *(str(word) for pair in given.items() for word in pair), "--device", "cpu"]) == 2
    assert message.format(**places) in capsys.readouterr().err


def test_flags_are_the_library_s():
    assert list(ATTACKS) == command.ATTACKS
    from ietagc_diffusers.cli import build_parser

    args = build_parser("ietagc")[0].parse_args(["attack", "--model", "m", "--heldout", "h"])
    names = ("draws", "seed", "resolution", "max_images", "batch_size")
    assert Settings() == Settings(tuple(args.attacks), **{name: getattr(args, name) for name in names})
