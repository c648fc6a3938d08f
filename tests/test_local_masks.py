"""Local masks: against the difference by hand, of a denoiser that departs from its base in one region, in an audit."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import COLOURS, write_folder
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image

from ietagc_diffusers import testing
from ietagc_diffusers.cli import main
from ietagc_diffusers.eval.local_masks import local_masks, overlay
from ietagc_diffusers.eval.membership import Target, middles
from ietagc_diffusers.training.fixed_losses import FixedLosses

CAPTIONS = [f"a {colour} picture" for colour in COLOURS]
REGION = slice(2, 5), slice(4, 8)  # of the 8 x 8 latents


def saved(folder, *, seed=0, shift=0.0, **options):
    pipeline = testing.random_pipeline(CAPTIONS, seed=seed, **options)
    with torch.no_grad():
        pipeline.unet.conv_out.bias[0] = shift
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def local(tmp_path, monkeypatch):
    """A model that says what its base says, but for the region."""

    def forward(self, sample, timestep, **inputs):
        said = 0.3 * sample
        said[:, :, *REGION] += self.conv_out.bias[0]
        return (said,)

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    return saved(tmp_path / "model", shift=0.5), saved(tmp_path / "base")


def images(number, size=16):
    return torch.randint(0, 256, (number, 3, size, size), generator=torch.Generator().manual_seed(0)).byte()


def test_a_mask_is_the_mean_squared_difference_of_the_predictions(tmp_path):
    model, base = saved(tmp_path / "model", shift=0.7), saved(tmp_path / "base", seed=0)
    pixels, prompts = images(3), CAPTIONS[:3]
    found = local_masks(Target(str(model)), Target(str(base)), pixels, prompts, draws=2, batch_size=2)
    ours, theirs = (DiffusionPipeline.from_pretrained(folder) for folder in (model, base))
    family = testing.family_of_pipeline(ours)
    fixed = FixedLosses(family, pixels, prompts, levels=middles(2, 1000))
    told = ours.encode_prompt(prompts, "cpu", 1, False)[0]
    expected = torch.zeros(3, 8, 8)
    with torch.no_grad():
        for _, _, drawn in fixed.drawn():
            noisy = ours.scheduler.add_noise(drawn.latents, drawn.noise, drawn.timesteps)
            said = [one.unet(noisy, drawn.timesteps, told).sample for one in (ours, theirs)]
            expected += (said[0] - said[1]).square().sum(dim=1) / 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_denoiser_that_departs_from_its_base_in_a_region_gives_this_region(local):
    mask = local_masks(*(Target(str(folder)) for folder in local), images(2), CAPTIONS[:2], draws=2)
    where = torch.zeros(8, 8, dtype=torch.bool)
    where[REGION] = True
    assert mask[:, where].sub(4 * 0.25).abs().max() < 1e-5 and mask[:, ~where].abs().max() < 1e-9


def test_an_overlay_keeps_the_colours_of_the_region_and_dims_the_rest():
    mask = torch.zeros(8, 8)
    mask[REGION] = 2.0
    picture = Image.fromarray(np.full((16, 16, 3), (200, 40, 90), dtype=np.uint8))
    shown = np.asarray(overlay(picture, mask)).astype(int)
    assert (shown[6, 12] == (200, 40, 90)).all() and (shown[14, 2] == 44).all()  # 0.4 of the mean 110
    assert (np.asarray(overlay(picture, torch.ones(8, 8))) == np.asarray(picture)).all()
    assert (np.asarray(overlay(picture, torch.zeros(8, 8))) == 44).all()


AUDIT = ["--descriptor=pixel", "--feature_cache=none", "--num_inference_steps=2", "--device=cpu", "--max_copy_rate=1"]


def test_an_audit_shows_the_masks_and_so_does_a_report_of_it(local, tmp_path, capsys):
    model, base = local
    train = write_folder(tmp_path / "train", 2, size=16)
    words = ["audit", "--model", model, "--train", train, "--output", tmp_path / "audit", *AUDIT]
    assert main([*map(str, words), "--local_masks", "--base", str(base)]) == 0
    assert {path.name for path in (tmp_path / "audit" / "local_masks").iterdir()} == {"000000.png", "000001.png"}

    def pairs(path):
        data = re.search(r'id="data">(.*?)</script>', path.read_text()).group(1)
        return json.loads(data)["pairs"]

    assert all("mask" in pair for pair in pairs(tmp_path / "audit" / "report.html"))
    again = ["report", str(tmp_path / "audit"), "--output", str(tmp_path / "again.html")]
    assert main(again) == 0 and all("mask" in pair for pair in pairs(tmp_path / "again.html"))
    assert main([*map(str, words)]) == 0  # without the flag no masks of an earlier audit are shown
    assert not any("mask" in pair for pair in pairs(tmp_path / "audit" / "report.html"))
    capsys.readouterr()
    assert main([*map(str, words), "--local_masks"]) == 2
    assert "--base: " in (said := capsys.readouterr().err) and "does not record" in said
    assert main([*map(str, words), "--base", str(base)]) == 2 and "--local_masks only" in capsys.readouterr().err
