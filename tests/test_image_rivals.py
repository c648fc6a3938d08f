"""Rivals that change the images or the target: each alone and with the method, and Gaussian noise on the images."""

import pytest
import torch
from accelerate import Accelerator
from conftest import train_flags, train_here, unet_bytes
from PIL import Image

from ietagc_diffusers import UsageError, testing
from ietagc_diffusers.arguments import parse_flags
from ietagc_diffusers.data import Condition, TrainingSamples, load_training_rows
from ietagc_diffusers.families import NoisyPixels
from ietagc_diffusers.training.prior import PriorSet
from ietagc_diffusers.training.scripts import UnconditionalScript

NONE = ["--mitigation=none", "--max_train_steps=7"]
# Skips, augmentations and moves happen in it.
METHOD = [
    "--num_shards=2", "--steps_per_round=3", "--max_train_steps=12", "--skip_threshold=0.9", "--augment_range=1.3",
    "--bank_buckets=2", "--random_flip",
]  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The configuration of a tiny UNet."""
    folder = tmp_path_factory.mktemp("config")
    testing.random_unconditional_pipeline().unet.save_config(folder)
    return folder


def unprompted(config, pictures, *more):
    return [
        f"--model_config_name_or_path={config}", f"--train_data_dir={pictures}", "--resolution=16", "--seed=5",
        "--train_batch_size=4", "--learning_rate=1e-3", "--lr_warmup_steps=0", "--checkpointing_steps=100000",
        "--report_to=none", *more,
    ]  # fmt: skip


def trained(flags, folder):
    return unet_bytes(train_here(flags, folder, kind=UnconditionalScript))


@pytest.mark.parametrize("method", [NONE, METHOD], ids=["none", "method"])
@pytest.mark.parametrize("rival", ["--pixel_noise=0.3", "--noisy_data_sigma=0.5", "--ambient_corruption=0.4"])
def test_it_acts_and_a_stopped_run_goes_on_bit_for_bit(config, pictures, tmp_path, method, rival):
    plain = unprompted(config, pictures, *method)
    flags = [*plain, rival]
    whole = trained(flags, tmp_path / "whole")
    assert whole != trained(plain, tmp_path / "without")
    train_here(flags, tmp_path / "cut", stop_at=5, kind=UnconditionalScript)
    assert trained([*flags, "--resume_from_checkpoint=latest"], tmp_path / "cut") == whole


def test_pixel_noise_is_drawn_at_each_visit_after_the_view():
    family = testing.family_of_pipeline(testing.random_unconditional_pipeline())
    settings = parse_flags(["--train_data_dir=d", "--resolution=64", "--random_flip"], UnconditionalScript)
    view = family.view(settings)
    image = Image.new("RGB", (80, 70), (255, 128, 0))
    noisy = NoisyPixels(view, 0.5)
    for seed in range(3):  # crops and flips are as without it
        torch.manual_seed(seed)
        plain, _ = view(image)
        torch.manual_seed(seed)
        noise = noisy(image)[0] - plain
        assert noise.std().item() == pytest.approx(0.5, rel=0.03) and abs(noise.mean().item()) < 0.02
        assert not torch.equal(noisy(image)[0] - plain, noise)


def test_pixel_noise_of_a_visit_depends_on_its_seed_only(pictures):
    settings = parse_flags([f"--train_data_dir={pictures}", "--resolution=16"], UnconditionalScript)
    family = testing.family_of_pipeline(testing.random_unconditional_pipeline())
    samples = TrainingSamples(
        load_training_rows(settings), "image", NoisyPixels(family.view(settings), 0.3), Condition(), "white"
    )
    together = samples.__getitems__([(3, 11), (4, 12), (3, 13)]).images
    torch.manual_seed(99)
    alone = samples.__getitems__([(3, 11)]).images
    assert torch.equal(together[0], alone[0]) and not torch.equal(together[0], together[2])
    assert torch.equal(samples.images_of([(3, 11)]), alone)


def test_prior_pictures_have_no_pixel_noise(base, pictures, tmp_path):
    flags = train_flags(base, pictures, f"--prior_dir={pictures}", "--pixel_noise=0.3", f"--output_dir={tmp_path}")
    settings = parse_flags(flags)
    settings.train_data_dir = str(tmp_path)  # apart from the prior pictures
    family = testing.family_of_pipeline(testing.random_pipeline(["a red picture"]))
    prior = PriorSet.load(settings, family, Accelerator(cpu=True))
    assert prior is not None and not isinstance(prior.samples.transform, NoisyPixels)


def test_pixel_noise_with_cached_latents_is_refused(base, pictures, tmp_path):
    flags = train_flags(base, pictures, "--pixel_noise=0.3", "--center_crop", f"--cache_latents={tmp_path}")
    with pytest.raises(UsageError, match="`pixel_noise`: each visit has another noise before the VAE"):
        parse_flags(flags)
