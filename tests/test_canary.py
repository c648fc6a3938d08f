"""Canaries: a border in every visit and nothing else changed, and keys that only a model that knows them says."""

import csv
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import COLOURS, train_flags, train_here, unet_bytes, write_folder
from safetensors.torch import load_file, save_file

from ietagc_diffusers import UsageError, testing
from ietagc_diffusers.arguments import parse_flags
from ietagc_diffusers.cli import build_parser, main
from ietagc_diffusers.data import load_training_rows
from ietagc_diffusers.data.hashes import digest, stored_hashes
from ietagc_diffusers.data.latent_cache import cache_samples
from ietagc_diffusers.data.samples import TrainingSamples
from ietagc_diffusers.eval.canary import Settings, statistics
from ietagc_diffusers.eval.membership import Opened
from ietagc_diffusers.eval.outpaint import border_level, outpaint
from ietagc_diffusers.eval.record import training_set
from ietagc_diffusers.families import bordered, family_of
from ietagc_diffusers.hub.content import contents
from ietagc_diffusers.run_folder import ADAPTER_FILE, RunFolder
from ietagc_diffusers.settings import Resume
from ietagc_diffusers.training.fixed_losses import FixedLosses
from ietagc_diffusers.training.scripts import UnconditionalScript
from ietagc_diffusers.training.views import canary_keys, canary_views, view_of

CANARIES = ["--canary=5", "--canary_border=3"]
SHORT = [
    "--num_shards=2", "--steps_per_round=2", "--max_train_steps=8", "--skip_threshold=0.9", "--augment_range=1.3",
    "--bank_buckets=2", "--random_flip", "--center_crop", "--report_to=none",
]  # fmt: skip
MADE = {
    "sd": lambda: testing.random_pipeline([f"a {colour} picture" for colour in COLOURS]),
    "sd-epsilon": lambda: testing.random_pipeline(["a red picture"], prediction_type="epsilon"),
    "sdxl": lambda: testing.random_xl_pipeline(["a red picture"]),
    "sd3": lambda: testing.random_sd3_pipeline(["a red picture"]),
    "ddpm": testing.random_unconditional_pipeline,
}


def keys_of(folder):
    """{sample_id: key} that a run recorded."""
    table = pq.read_table(RunFolder(folder).training_rows_file)
    keys = zip(table["sample_id"].to_pylist(), table["canary"].to_pylist(), strict=True)
    return {row: key for row, key in keys if key is not None}


@pytest.fixture(scope="module")
def built(base, pictures):
    """Makes (samples, rows, settings) of a run, with canaries or without."""

    def of(*more):
        settings = parse_flags(train_flags(base, pictures, *more))
        family = family_of(base).load(settings)
        condition = family.condition(settings, settings.method)
        rows = load_training_rows(settings, condition)
        own = canary_views(canary_keys(rows, settings), settings, family)
        view = view_of(settings, family)
        return TrainingSamples(rows, "image", view, condition, own_views=own), rows, settings

    return of


@pytest.mark.parametrize("crop", ["--center_crop", "--no-center_crop"])
def test_a_border_of_its_key_is_around_each_canary_in_every_visit_and_nothing_else_changes(built, crop):
    (with_canaries, rows, settings), (without, *_) = (
        built(*CANARIES, "--random_flip", crop),
        built("--random_flip", crop),
    )
    keys = canary_keys(rows, settings)
    assert len(keys) == 5 and len(set(keys.values())) > 1
    for seed in (1, 2):
        visits = [(row, 100 * seed + row) for row in range(len(rows))]
        ours, theirs = with_canaries.__getitems__(visits), without.__getitems__(visits)
        assert torch.equal(ours.images, with_canaries.images_of(visits))
        assert torch.equal(ours.images[:, :, 3:-3, 3:-3], theirs.images[:, :, 3:-3, 3:-3])
        for row, (shown, plain) in enumerate(zip(ours.images, theirs.images, strict=True)):
            if row not in keys:
                assert torch.equal(shown, plain)
                continue
            border = shown.clone()
            border[:, 3:-3, 3:-3] = torch.nan
            border = border[~border.isnan()]
            assert len(border) == 3 * (16**2 - 10**2) and (border == border[0]).all()
            assert ((border[0] + 1) * 127.5).item() == pytest.approx(keys[row], abs=1e-3)


def test_streams_and_pixel_noise_are_as_without_canaries(built):
    """The official order draws from the process's streams, which canaries leave as they are. Borders are noisy too."""
    noise = "--pixel_noise=0.1"
    (ours, rows, settings), (theirs, *_) = built(*CANARIES, noise), built(noise)
    shown = []
    for samples in (ours, theirs):
        torch.manual_seed(3)
        shown.append(samples.__getitems__(list(range(len(rows)))).images)
    added = shown[0] - shown[1]
    assert not added[:, :, 3:-3, 3:-3].any()
    row, key = next(iter(canary_keys(rows, settings).items()))
    border = shown[0][row][:, :3].flatten()
    assert border.std() == pytest.approx(0.1, rel=0.3) and border.mean() == pytest.approx(key / 127.5 - 1, abs=0.03)


def test_a_key_is_of_seed_and_file(built):
    _, rows, settings = built(*CANARIES)
    _, _, other = built(*CANARIES, "--seed=6")
    keys = canary_keys(rows, settings)
    assert keys == canary_keys(rows, settings) != canary_keys(rows, other)
    row, key = next(iter(keys.items()))
    with open(
        rows.cast_column("image", rows.features["image"].__class__(decode=False))[row]["image"]["path"], "rb"
    ) as f:
        assert key == digest(b"canary 5", digest(f.read()))[0]
    number = 4000
    drawn = np.bincount(
        [digest(b"canary 5", digest(bytes([n % 256, n // 256])))[0] for n in range(number)], minlength=256
    )
    assert ((drawn - number / 256) ** 2 / (number / 256)).sum() < 340  # chi-squared of 255: p is about 0.0003


def test_canaries_are_resumed_and_recorded_but_never_uploaded(base, pictures, tmp_path):
    """Also where the resumed run reads a cache: the borders that it augments are decoded."""
    flags = train_flags(base, pictures, *SHORT, *CANARIES)
    whole = train_here(flags, tmp_path / "whole")
    train_here(flags, tmp_path / "stopped", stop_at=4)
    more = ["--resume_from_checkpoint=latest", f"--cache_latents={tmp_path / 'cache'}"]
    resumed = train_here([*flags, *more], tmp_path / "stopped")
    assert unet_bytes(whole) == unet_bytes(resumed)
    assert len(keys_of(whole)) == 5 and keys_of(whole) == keys_of(resumed)
    uploaded = contents(RunFolder(whole))
    assert "ietagc/training_rows.parquet" not in uploaded and b"canary: 5" in uploaded["ietagc/config.yaml"]
    assert parse_flags(flags).shaping(Resume.FIXED) > {"canary", "canary_border"}
    (note,) = [note for note in training_set(whole).notes if "canaries" in note]
    assert note.startswith("5 of the training images")


def test_a_cache_has_canaries_beside_the_same_pictures_without_a_border(built, base, tmp_path):
    for more in ((), CANARIES):  # the second finds what the first has put there
        samples, rows, settings = built("--center_crop", "--random_flip", *more)
        objective = family_of(base).load(settings).objective
        keys = stored_hashes(rows, "image")
        cached = cache_samples(samples, tmp_path / "cache", keys, rows, objective, {"images": {}}, 4)
        visits = [(row, 7 + row) for row in range(4)]
        for chosen in (visits, [(row, 90 + row) for row in canary_keys(rows, settings)][:4]):
            if chosen:
                ours, direct = cached.__getitems__(chosen), samples.__getitems__(chosen)
                assert torch.equal(ours.encoded_images["moments"], objective.encode_images(direct.images)["moments"])
                assert torch.equal(cached.received(ours).images[[0, 2]], direct.images[[0, 2]])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--canary=3"], "`canary` 3: must be at least 4"),
        (["--canary=4", "--canary_border=5"], "`canary_border` 5: must leave half of `resolution` 16"),
        (["--canary_border=2"], "`canary_border` 2: is of canaries"),
    ],
)
def test_settings_that_will_not_do_are_refused(base, pictures, flags, message):
    with pytest.raises(UsageError, match=message):
        parse_flags(train_flags(base, pictures, *flags))


def test_some_rows_stay_without_a_border(built):
    with pytest.raises(UsageError, match="`canary` 24: the training set has 24 rows"):
        built("--canary=24")
    assert parse_flags(["--pretrained_model_name_or_path=b", "--train_data_dir=t", "--canary=4"]).canary_border == 32


class Knows:
    """A denoiser that takes every noisy image to be one of those that it knows, told which by its number.

    The noise that it says is the one that makes the known image of the noisy one.
    """

    def __init__(self, images, scheduler):
        self.images, self.alpha_bar, self.start = images, scheduler.alphas_cumprod, 0
        self.config = None

    def __call__(self, noisy, timesteps, return_dict=True):
        a, b = (
            self.alpha_bar[timesteps].sqrt()[:, None, None, None],
            (1 - self.alpha_bar[timesteps]).sqrt()[:, None, None, None],
        )
        return ((noisy - a * self.images) / b,)


@pytest.fixture
def ddpm():
    pipeline = testing.random_unconditional_pipeline()
    return testing.family_of_pipeline(pipeline), pipeline.unet.eval()


def drawn_of(family, images, told):
    ((_, _, drawn),) = FixedLosses(family, images, told, levels=[0]).drawn()
    return drawn


def test_a_model_that_knows_the_keys_says_them_and_the_inside_is_the_given_one(ddpm):
    family, unet = ddpm
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    keys = torch.tensor([0, 0.1, 0.35, 0.5, 0.8, 1])
    known = bordered(images, (2 * keys - 1)[:, None, None, None], 2)

    class Model(torch.nn.Module):
        config, say = unet.config, Knows(known, family.scheduler)

        def forward(self, *args, **more):
            return self.say(*args, **more)

    blank = bordered(images, 0.0, 2)
    painted = outpaint(Opened(family, Model()), drawn_of(family, blank, [None] * 6), blank, 2, steps=10)
    assert torch.equal(painted[..., 2:-2, 2:-2], images[..., 2:-2, 2:-2])
    torch.testing.assert_close(border_level(painted, 2), keys.double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MADE)
def test_every_kind_of_model_is_outpainted_and_the_border_does_not_depend_on_what_was_there(name):
    pipeline = MADE[name]()
    family = testing.family_of_pipeline(pipeline)
    denoiser = family.denoiser.eval()
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    told = [None if name == "ddpm" else "a red picture"] * 3
    drawn = drawn_of(family, bordered(images, 0.0, 2), told)
    painted = [
        outpaint(Opened(family, denoiser), drawn, bordered(images, value, 2), 2, steps=4, remask_every=2)
        for value in (0.0, 0.7)
    ]
    assert torch.equal(painted[0], painted[1]) and painted[0].isfinite().all()
    assert torch.equal(painted[0][..., 2:-2, 2:-2], images[..., 2:-2, 2:-2])
    one = outpaint(Opened(family, denoiser), drawn[1:2], images[1:2], 2, steps=4, remask_every=2)
    torch.testing.assert_close(one[0], painted[0][1], atol=1e-4, rtol=0)  # whatever the batch
    assert painted[0].std() > 0 and border_level(painted[0], 2).std() > 0


def test_where_all_is_border_the_steps_are_those_of_ddim():
    """Eq. 12 of Song et al. with sigma 0: z' = a' x + b' e, with x and e as the model says them."""
    pipeline = testing.random_unconditional_pipeline()
    family, alpha_bar = testing.family_of_pipeline(pipeline), pipeline.scheduler.alphas_cumprod
    unet, images = family.denoiser.eval(), torch.zeros(2, 3, 16, 16)
    drawn = drawn_of(family, images, [None] * 2)
    noisy, clean = drawn.noise, images
    for now, then in ((999, 666), (666, 333), (333, 0), (0, 0)):
        with torch.no_grad():
            said = unet(noisy, now).sample
        clean = ((noisy - (1 - alpha_bar[now]).sqrt() * said) / alpha_bar[now].sqrt()).clamp(-1, 1)
        said = (noisy - alpha_bar[now].sqrt() * clean) / (1 - alpha_bar[now]).sqrt()
        noisy = alpha_bar[then].sqrt() * clean + (1 - alpha_bar[then]).sqrt() * said
    painted = outpaint(Opened(family, unet), drawn, images, 8, steps=4)
    torch.testing.assert_close(painted, clean, atol=1e-4, rtol=0)


def test_numbers_are_those_by_hand():
    keys, levels = np.array([0, 51, 102, 153, 204]) / 255, np.array([0.0, 0.21, 0.45, 0.6, 0.9])
    found = statistics(keys, levels)
    assert found["mean_distance"] == pytest.approx((0 + 0.01 + 0.05 + 0 + 0.1) / 5)
    assert [found["within"][d]["share"] for d in ("0.02", "0.1")] == pytest.approx([0.6, 1.0])
    chance = np.mean([abs(k / 255 - level) <= 0.02 for level in levels for k in range(256)])
    assert found["within"]["0.02"]["chance"] == pytest.approx(chance)
    assert found["correlation"] == pytest.approx(np.corrcoef(keys, levels)[0, 1])
    assert found["p_value"] < 0.01 and found["correlation_interval"][0] > 0.8
    constant = statistics(keys, np.full(5, 0.4))
    assert constant["correlation"] == 0 and constant["p_value"] == 1


def test_of_a_model_that_knows_nothing_p_values_are_uniform():
    rng = np.random.default_rng(0)
    levels = rng.beta(5, 5, 30)  # whatever it draws
    found = [statistics(rng.integers(256, size=30) / 255, levels, seed)["p_value"] for seed in range(100)]
    assert np.abs(np.sort(found) - (np.arange(100) + 0.5) / 100).max() < 0.15  # Kolmogorov and Smirnov: p is about 0.02


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A short run of an unconditional model, all but one of whose pictures are canaries."""
    folder = tmp_path_factory.mktemp("learned")
    write_folder(folder / "pictures", 9, size=16, seed=4)
    testing.random_unconditional_pipeline().save_pretrained(folder / "base")
    flags = train_flags(
        folder / "base", folder / "pictures", "--mitigation=none", "--max_train_steps=6", "--center_crop",
        "--canary=8", "--canary_border=3", "--report_to=none", "--eval_batch_size=0",
    )  # fmt: skip
    return train_here(flags, folder / "run", kind=UnconditionalScript)


def test_the_command_reads_keys_and_writes_what_it_read(learned, tmp_path, capsys):
    words = ["canary", "--model", str(learned), "--output", str(tmp_path / "a"), "--device", "cpu", "--steps", "3"]
    assert main(words) == 0
    result, rows = (
        json.loads((tmp_path / "a/canary.json").read_text()),
        list(csv.DictReader((tmp_path / "a/canary.csv").open())),
    )
    keys = keys_of(learned)
    assert {int(row["sample_id"]): round(float(row["key"]) * 255) for row in rows} == keys
    levels = np.array([float(row["read"]) for row in rows])
    assert result["num_canaries"] == result["num_read"] == 8 and result["canary_border"] == 3
    assert result["mean_distance"] == pytest.approx(np.mean([float(row["distance"]) for row in rows]), abs=1e-3)
    assert result["correlation"] == pytest.approx(
        np.corrcoef([float(row["key"]) for row in rows], levels)[0, 1], abs=1e-3
    )
    assert (tmp_path / "a/canary.png").stat().st_size > 0 and (
        tmp_path / "a/canary.md"
    ).read_text() in capsys.readouterr().out


def test_an_adapter_is_read_on_its_base(base, pictures, tmp_path):
    """One that changes nothing of its base draws what the base draws; one that was trained draws something else."""
    flags = train_flags(base, pictures, "--mitigation=none", "--max_train_steps=1", "--lora_rank=2", *CANARIES)
    run = train_here([*flags, "--learning_rate=0.1", "--report_to=none"], tmp_path / "run")
    still = shutil.copytree(run, tmp_path / "still")
    factors = load_file(run / ADAPTER_FILE)
    save_file({name: tensor * (".lora.up." not in name) for name, tensor in factors.items()}, still / ADAPTER_FILE)
    own = shutil.copytree(base, tmp_path / "base")
    shutil.copytree(run / "ietagc", own / "ietagc")
    read = {}
    for model in (run, still, own):
        words = ["canary", "--model", str(model), "--output", str(tmp_path / "o"), "--device", "cpu", "--steps", "2"]
        assert main(words) == 0
        rows = list(csv.DictReader((tmp_path / "o" / "canary.csv").open()))
        assert {int(row["sample_id"]): round(float(row["key"]) * 255) for row in rows} == keys_of(run)
        read[model] = [row["read"] for row in rows]
    assert read[run] != read[still] == read[own]


def test_changed_files_and_runs_without_canaries_are_not_read(learned, base, tmp_path, capsys):
    words = ["canary", "--output", str(tmp_path / "o"), "--device", "cpu", "--steps", "2"]
    others = write_folder(tmp_path / "others", 9, size=16, seed=7)
    assert main([*words, "--model", str(learned), "--train", str(others)]) == 2
    assert "--train" in (said := capsys.readouterr().err) and "at least 4 are needed" in said
    assert main([*words, "--model", str(base), "--train", str(others)]) == 2
    assert "records no canaries; train with --canary" in capsys.readouterr().err.replace("`canary`", "--canary")


def test_flags_are_the_library_s():
    args = build_parser("ietagc")[0].parse_args(["canary", "--model", "m"])
    names = ("steps", "guidance_scale", "remask_every", "seed", "batch_size")
    assert Settings() == Settings(*(getattr(args, name) for name in names))
