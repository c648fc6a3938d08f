"""The monitor measures the model of each round on fixed noise, changes nothing of the training, and acts on request."""

import json
import math
import re

import pytest
import torch
from conftest import train_flags, train_here, unet_bytes
from monitored import measured, rows_of, script
from safetensors.torch import load, load_file

from ietagc_diffusers import UsageError, testing
from ietagc_diffusers.arguments import parse_flags
from ietagc_diffusers.families import StableDiffusion
from ietagc_diffusers.run_folder import ADAPTER_FILE, RunFolder
from ietagc_diffusers.training.fixed_losses import FixedLosses
from ietagc_diffusers.training.monitor import Meter, advice
from ietagc_diffusers.training.monitor_page import page

RUN = ["--mitigation=iet", "--num_shards=2", "--report_to=none", "--max_train_steps=16", "--steps_per_round=2"]
RUN += ["--noise_offset=0.1", "--learning_rate=1e-2"]
pytestmark = pytest.mark.usefixtures("no_page")


@pytest.fixture(scope="module")
def flags(base, pictures, heldout):
    return train_flags(base, pictures, *RUN, f"--heldout_dir={heldout}", "--monitor_every=1")


@pytest.fixture(scope="module")
def watched(flags, tmp_path_factory):
    return train_here([*flags, "--save_rounds"], tmp_path_factory.mktemp("watched") / "out")


@pytest.mark.parametrize("more", [[], ["--mitigation=none", "--num_shards=1", "--max_train_steps=4"]])
def test_it_changes_nothing_of_the_training(base, pictures, flags, watched, tmp_path, more):
    with_it = train_here([*flags, *more], tmp_path / "with") if more else watched
    assert unet_bytes(with_it) == unet_bytes(train_here(train_flags(base, pictures, *RUN, *more), tmp_path / "without"))


def test_numbers_are_those_of_the_saved_models(flags, watched, pictures, heldout):
    """Measured again from the files, image by image, without the training's flags."""
    family = StableDiffusion.load(parse_flags(flags))
    names = {}
    for folder in (pictures, heldout):
        lines = (folder / "metadata.jsonl").read_text().splitlines()
        names[folder] = [json.loads(line) for line in lines]
    rows = rows_of(watched)
    assert [row["round"] for row in rows] == [0, 1, 2, 3, 4]
    assert [round(row["visits_per_image"] * 24) for row in rows] == [0, 16, 32, 48, 64]
    for row in rows[1::3]:
        denoiser = family.load_denoiser(watched / "rounds" / f"round-{row['round']:04d}", "unet")
        for key, folder in (("train_loss", pictures), ("heldout_loss", heldout)):
            images = torch.stack([_shown(folder / entry["file_name"]) for entry in names[folder]])
            told = [entry["text"] for entry in names[folder]]
            losses = FixedLosses(family, images, told)
            losses = FixedLosses.of_batches(
                family.objective.plain(),
                family.device,
                [family.batch(images[i : i + 4], told[i : i + 4]) for i in range(0, len(images), 4)],
                len(images),
            )
            assert row[key] == pytest.approx(losses(denoiser).mean().item(), rel=1e-5)


def _shown(path):
    from PIL import Image
    from torchvision.transforms import functional as F

    image = F.center_crop(F.resize(Image.open(path).convert("RGB"), 16, F.InterpolationMode.LANCZOS), 16)
    return F.to_tensor(image) * 2 - 1


@pytest.fixture(scope="module")
def single(base, pictures, heldout):
    """Flags of one proxy in rounds of five steps, which has an average, and of looks at every third step."""
    more = ["--mitigation=agc", "--num_shards=1", "--steps_per_round=5", "--max_train_steps=8", "--use_ema"]
    return train_flags(base, pictures, *RUN, *more), [f"--heldout_dir={heldout}", "--monitor_steps=3"]


def test_one_proxy_is_measured_in_the_middle_of_a_round(single, tmp_path):
    """Which changes nothing of the training, and a stopped run measures the same."""
    plain, looks = single
    watched = train_here([*plain, *looks], tmp_path / "watched")
    assert [(row["global_step"], row["round"]) for row in rows_of(watched)] == [(0, 0), (3, 0), (6, 1), (8, 2)]
    assert [round(row["visits_per_image"] * 24) for row in rows_of(watched)] == [0, 12, 24, 32]
    assert unet_bytes(watched) == unet_bytes(train_here(plain, tmp_path / "plain"))
    train_here([*plain, *looks, "--checkpointing_steps=2"], tmp_path / "cut", stop_at=4)
    again = [*plain, *looks, "--resume_from_checkpoint=checkpoint-2"]  # from before the look at step 3
    assert unet_bytes(train_here(again, tmp_path / "cut")) == unet_bytes(watched)
    assert rows_of(tmp_path / "cut") == rows_of(watched)


def test_a_gap_in_the_middle_of_the_first_round_ends_the_run_with_the_model_before(single, tmp_path, monkeypatch):
    plain, looks = single
    script(monkeypatch, (0.9, 0), (0.8, 0.1), (0.7, 0.3))
    rules = ["--monitor_steps=1", "--stop_at_gap=0.2", "--keep_best=gap", "--checkpointing_steps=1"]
    folder = train_here([*plain, *looks, *rules], tmp_path / "out")
    assert [row["global_step"] for row in rows_of(folder)] == [0, 1, 2]
    average = load_file(RunFolder(folder).checkpoint(1) / "unet_ema" / "diffusion_pytorch_model.safetensors")
    saved = load(unet_bytes(folder))
    assert all(torch.equal(tensor, saved[name]) for name, tensor in average.items())


def test_several_proxies_are_measured_at_the_first_average_at_or_after_each_step(flags, tmp_path):
    """Rounds end at steps 4, 8, 12 and 16."""
    flags = [flag for flag in flags if not flag.startswith("--monitor_every")]
    for every, steps in ((4, [0, 4, 8, 12, 16]), (5, [0, 8, 12, 16]), (9, [0, 12, 16])):
        rows = rows_of(train_here([*flags, f"--monitor_steps={every}"], tmp_path / str(every)))
        assert [row["global_step"] for row in rows] == steps


def test_the_base_has_no_gap_at_any_noise_level(watched):
    first, *_, last = rows_of(watched)
    assert first["gap"] == 0 and first["gap_ci95"] == [0, 0] and {level["gap"] for level in first["levels"]} == {0}
    assert len(last["levels"]) == 10 and last["levels"][0]["from"] == 0 and last["levels"][-1]["to"] == 999
    assert all(a["to"] + 1 == b["from"] for a, b in zip(last["levels"], last["levels"][1:], strict=False))


def test_the_interval_is_that_of_a_bootstrap():
    generator = torch.Generator().manual_seed(0)
    losses = [torch.rand(3, number, generator=generator) for number in (80, 50)]
    base = [torch.rand(3, number, generator=generator) for number in (80, 50)]
    meter = Meter(_Levels(3, 80), _Levels(3, 50))
    row = meter.measurement(tuple(losses), tuple(base))
    changes = [(found - start).mean(dim=0) for found, start in zip(losses, base, strict=True)]
    drawn = [change[torch.randint(len(change), (4000, len(change)), generator=generator)].mean(1) for change in changes]
    low, high = (drawn[1] - drawn[0]).quantile(torch.tensor([0.025, 0.975])).tolist()
    assert row["gap"] == pytest.approx((changes[1].mean() - changes[0].mean()).item(), abs=1e-6)
    assert row["gap_ci95"] == pytest.approx([low, high], abs=0.01)


class _Levels:
    """What a measurement asks of fixed losses."""

    class objective:
        num_levels = 1000

    def __init__(self, draws, number):
        self.levels = torch.arange(draws * number).view(draws, number) * 7 % 1000


@pytest.mark.parametrize(
    "lora",
    [[], pytest.param(["--lora_rank=2", "--lora_average=fold", "--train_text_encoder"], marks=pytest.mark.slow)],
)
def test_a_stopped_run_measures_the_same(flags, watched, tmp_path, lora):
    """It measures its base again, which is no longer what it trains."""
    more = [*lora, "--resume_from_checkpoint=latest"]
    wanted = rows_of(train_here([*flags, *lora], tmp_path / "whole") if lora else watched)
    train_here([*flags, *more], tmp_path / "cut", stop_at=10)
    rows = rows_of(train_here([*flags, *more], tmp_path / "cut"))
    assert len(rows) == len(wanted)
    for row, other in zip(rows, wanted, strict=True):
        assert row["heldout_loss"] == other["heldout_loss"] and row["gap"] == pytest.approx(other["gap"], abs=1e-7)


@pytest.mark.parametrize("more", [[], ["--lora_rank=2"]])
def test_the_best_model_is_saved(flags, tmp_path, more, monkeypatch):
    script(monkeypatch, (0.9, 0), (0.5, 0.1), (0.4, 0.2), (0.6, 0.3), (0.7, 0.4))
    folder = train_here([*flags, "--save_rounds", "--keep_best=heldout", *more], tmp_path / "out")
    saved, last = (folder / "rounds" / f"round-{number:04d}" for number in (2, 4))
    weights = ADAPTER_FILE if more else "unet/diffusion_pytorch_model.safetensors"
    assert (folder / weights).read_bytes() == (saved / weights).read_bytes() != (last / weights).read_bytes()


def test_a_gap_ends_the_run_with_the_last_model_below_it(flags, watched, tmp_path, monkeypatch):
    script(monkeypatch, (0.9, 0), (0.8, 0.1), (0.7, 0.2), (0.6, 0.3), (0.5, 0.4))
    folder = train_here([*flags, "--stop_at_gap=0.25", "--keep_best=gap"], tmp_path / "out")
    assert [row["round"] for row in rows_of(folder)] == [0, 1, 2, 3]
    assert unet_bytes(folder) == unet_bytes(watched / "rounds" / "round-0002")
    assert (folder / "model_index.json").is_file()


def test_without_a_kept_model_the_one_that_was_stopped_is_saved(flags, watched, tmp_path, monkeypatch):
    script(monkeypatch, (0.9, 0), (0.8, 0.4), (0.7, 0.5))
    folder = train_here([*flags, "--stop_at_gap=0.25"], tmp_path / "out")
    assert unet_bytes(folder) == unet_bytes(watched / "rounds" / "round-0001")


def test_a_disk_that_is_full_costs_the_page_and_not_the_run(flags, watched, tmp_path, monkeypatch, caplog):
    def full(path, text):
        raise OSError("No space left on device")

    monkeypatch.setattr("ietagc_diffusers.training.callbacks.monitor.write_text", full)
    assert unet_bytes(train_here(flags, tmp_path / "out")) == unet_bytes(watched)
    assert "The monitor could not write: No space left on device; training continues" in caplog.text


def test_a_loss_that_is_not_a_number_is_not_the_best(flags, tmp_path, monkeypatch):
    script(monkeypatch, (0.9, 0), (math.nan, 0.1), (0.4, 0.2), (0.6, 0.3), (0.7, 0.4))
    folder = train_here([*flags, "--save_rounds", "--keep_best=heldout"], tmp_path / "out")
    assert unet_bytes(folder) == unet_bytes(folder / "rounds" / "round-0002")


def test_a_budget_leaves_out_all_but_the_first_and_the_last(flags, tmp_path):
    folder = train_here([*flags, "--monitor_budget=1e-6"], tmp_path / "out")
    assert [row["round"] for row in rows_of(folder)] == [0, 4]


def test_the_page_says_it_and_loads_nothing(watched):
    assert RunFolder(watched).monitor_page.read_text().endswith(", 16, True)")
    text = page(rows_of(watched), "out", "said", 16, ended=True)
    assert text.count("<svg") == 4 and "ended at step 16" in text and "refresh" not in text
    assert not re.findall(r'(?:src|href)="(?!#)', text.replace("xlink:href", "href"))
    shown = page(rows_of(watched), "<b>", "a & b", 100, ended=False)
    assert "&lt;b&gt;: step 16 of 100" in shown and "a &amp; b" in shown and "refresh" in shown


def test_advice():
    assert "too few" in advice(measured((1, 0), (0.9, 0.1)))
    assert "No sign" in advice(measured((1, 0), (0.9, 0.1), (0.8, 0.2)))
    assert "still learns" in advice(measured((1, 0), (0.9, 0.1), (0.8, 0.2), low=-0.1))
    risen = advice(measured((1, 0), (0.8, 0.1), (0.85, 0.2), (0.9, 0.3)))
    assert "lowest at step 10 (0.8000)" in risen and "risen to 0.9000" in risen and "from 0.1000 to 0.3000" in risen


def test_what_training_adds_is_not_measured():
    pipeline = testing.random_pipeline(["a red picture"])
    plain, noisy = (testing.family_of_pipeline(pipeline, **more) for more in ({}, {"noise_offset": 0.5}))
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    drawn = []
    for objective in (plain.objective, noisy.objective.plain(), noisy.objective):
        torch.manual_seed(0)
        drawn.append(objective.draw(objective.encode(plain.batch(images, ["a red picture"] * 4))).noise)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert noisy.objective.noise_offset == 0.5


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--monitor_every=1"], "`monitor_every` 1: compares with images that are not trained on"),
        (["--monitor_steps=7"], "`monitor_steps` 7: compares with images that are not trained on"),
        (["--monitor_every=1", "--monitor_steps=7"], "`monitor_every` and `monitor_steps` were both given"),
        (["--stop_at_gap=0.1"], "`stop_at_gap`: belongs to `monitor_every` or `monitor_steps`"),
        (["--keep_best=heldout"], "`keep_best`: belongs to `monitor_every`"),
        (["--monitor_every=1", "--heldout_dir=h", "--keep_best=gap"], "`keep_best` gap: keeps a model whose gap"),
        (["--monitor_every=1", "--heldout_dir=h", "--monitor_budget=0"], "`monitor_budget` 0.0: must be over 0"),
        (["--monitor_every=1", "--heldout_dir=h", f"--stop_at_gap={math.nan}"], "`stop_at_gap` nan: must be 0 or more"),
    ],
)
def test_flags_that_do_not_go_together(more, message):
    with pytest.raises(UsageError, match=message):
        parse_flags(["--pretrained_model_name_or_path=m", "--train_data_dir=d", *more])
