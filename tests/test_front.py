"""The front: fixed losses that compare, points that start at the base, and differences read at equal gap."""

import csv
import json
import shutil

import matplotlib.pyplot as plt
import pytest
import torch
import yaml
from conftest import train_flags, train_here, write_folder
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image

from ietagc_diffusers import testing
from ietagc_diffusers.cli import main
from ietagc_diffusers.eval.curves import FrontPoint, at_gap, at_loss, compare, crossing
from ietagc_diffusers.eval.front import SAMPLED, Front
from ietagc_diffusers.eval.losses import Losses, measure, saved_models, spread
from ietagc_diffusers.eval.plots import plot_front, plot_sampled
from ietagc_diffusers.families import family_of
from ietagc_diffusers.training.fixed_losses import FixedLosses


@pytest.fixture(scope="module")
def run_dir(base, pictures, tmp_path_factory):
    flags = train_flags(base, pictures, "--mitigation=none", "--max_train_steps=12", "--steps_per_round=4", "--use_ema")
    return train_here([*flags, "--save_rounds", "--checkpointing_steps=6"], tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def frozen(base):
    """All of the base but its denoiser."""
    return family_of(base).load_frozen(base)


def images(number, colour):
    return torch.rand(number, 3, 16, 16) * 2 - 1, [f"a {colour} picture"] * number


def points_of(base, run_dir, train, heldout, memory=None):
    models = saved_models({"run": [run_dir]}, "unet")
    return [point for point, _ in measure(Losses(base, train, heldout, memory), models)]


def test_front_starts_at_the_base_with_gap_zero(base, run_dir):
    train, heldout = images(6, "red"), images(5, "blue")
    torch.manual_seed(0)
    first = points_of(base, run_dir, train, heldout)
    torch.manual_seed(1)
    assert points_of(base, run_dir, train, heldout) == first
    assert [p.step for p in first] == [0, 4, 8, 12] and first[0].gap == 0
    for p in first[1:]:
        difficulty = first[0].heldout_loss - first[0].train_loss
        assert p.gap == pytest.approx(p.heldout_loss - p.train_loss - difficulty, abs=1e-7)


def test_what_was_measured_is_remembered_and_other_conditions_are_not_mixed(base, run_dir, tmp_path, monkeypatch):
    train, heldout = images(6, "red"), images(5, "blue")
    first = points_of(base, run_dir, train, heldout, tmp_path / "losses")
    assert len((tmp_path / "losses").read_text().splitlines()) == 4
    calls = []
    call = FixedLosses.by_draw
    monkeypatch.setattr(FixedLosses, "by_draw", lambda self, denoiser: calls.append(1) or call(self, denoiser))
    assert points_of(base, run_dir, train, heldout, tmp_path / "losses") == first
    assert not calls
    points_of(base, run_dir, heldout, train, tmp_path / "losses")
    assert len(calls) == 8
    (tmp_path / "losses").open("a").write('["cut')  # as a kill leaves it
    assert points_of(base, run_dir, train, heldout, tmp_path / "losses") == first


def test_the_batch_size_changes_no_draw(frozen):
    pixels, captions = images(7, "red")
    unet = testing.random_pipeline(["a red picture"]).unet
    ours, theirs = (FixedLosses(frozen, pixels, captions, batch_size=size)(unet) for size in (2, 7))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    whole = FixedLosses(frozen, ((pixels + 1) * 127.5).round().to(torch.uint8), captions)(unet)
    torch.testing.assert_close(whole, theirs, rtol=2e-2, atol=1e-3)  # bytes are rounded pixels


def test_checkpoints_are_taken_where_no_rounds_were_saved(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("rounds"))
    found = saved_models({"run": [tmp_path / "run"]}, "unet")
    assert [(model.step, model.folder.name) for model in found] == [(6, "unet_ema"), (12, "unet_ema")]


def test_fewer_points_are_spread_and_end_at_the_last():
    assert spread(list(range(1, 21)), 4) == [5, 10, 15, 20]
    assert spread(list(range(1, 8)), 3)[-1] == 7 and len(set(spread(list(range(1, 8)), 3))) == 3
    assert spread([1, 2], 5) == [1, 2] and spread([1, 2, 3], None) == [1, 2, 3]


def test_fixed_losses_equal_the_objective_s_and_sweep_the_levels(frozen):
    pixels, captions = images(7, "red")
    unet = testing.random_pipeline(["a red picture"]).unet
    losses = FixedLosses(frozen, pixels, captions, batch_size=7)
    by_hand = sum(losses.objective.losses(unet, drawn).detach() for *_, drawn in losses.drawn()) / 3
    torch.testing.assert_close(losses(unet), by_hand)
    swept = FixedLosses(frozen, pixels, captions, draws=5, sweep=True)
    assert swept.levels[:, 0].tolist() == [0, 250, 500, 749, 999]
    assert swept.by_draw(unet).shape == (5, 7)
    assert all((drawn.levels == swept.levels[draw, rows]).all() for draw, rows, drawn in swept.drawn())


def curve(name, values, replicate=0):
    return [FrontPoint(name, step, 0.0, loss, gap, replicate) for step, (loss, gap) in enumerate(values)]


def test_loss_at_a_gap_is_interpolated_both_ways():
    run = curve("r", ((1.0, 0.0), (0.6, 0.2), (0.8, 0.4)))
    assert at_gap(run, 0.1) == pytest.approx(0.8)
    assert at_gap(run, 0.3) == pytest.approx(0.7)
    assert at_gap(run, 0.5) is None
    assert at_loss(run, 0.7) == pytest.approx(0.15)  # the first time
    assert crossing(run, lambda p: p.step, lambda p: p.gap, 1) == pytest.approx(0.2)


def test_a_run_that_is_shifted_lies_so_far_from_the_control():
    plain = curve("none", [(1 - 0.1 * i, 0.05 * i) for i in range(6)])
    better = curve("ours", [(1 - 0.1 * i - 0.02 * (i > 0), 0.05 * i) for i in range(6)])
    (comparison,) = compare([*plain, *better], "none")
    beyond_the_base = [value for gap, value in comparison.at_gap.items() if gap >= 0.05]
    assert beyond_the_base == pytest.approx([-0.02] * len(beyond_the_base))
    assert all(value < 0 for value in comparison.at_loss.values())
    assert "| ours | -0.0" in Front([*plain, *better], "none").markdown


def test_seeds_are_averaged_at_equal_gap():
    plain = curve("none", ((1.0, 0.0), (0.6, 0.4)))
    seeds = [*curve("ours", ((1.0, 0.0), (0.5, 0.4))), *curve("ours", ((1.0, 0.0), (0.3, 0.4)), replicate=1)]
    (comparison,) = compare([*plain, *seeds], "none")
    assert comparison.at_gap[max(comparison.at_gap)] == pytest.approx(-0.2)


def in_view(points):
    axes = plt.figure().subplots()
    plot_front(axes, points, "none")
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    plt.close(axes.figure)
    assert left < right and low < high
    return [(p.run, p.step) for p in points if left <= p.gap <= right and low <= p.heldout_loss <= high]


COURSE = ((2.0, 0.0), (0.5, 0.01), (0.44, 0.02), (0.42, 0.03), (0.41, 0.04), (0.42, 0.05), (9.0, 0.9))


@pytest.mark.parametrize("size", [1, 0.01])
@pytest.mark.parametrize("direction", [1, -1])
def test_the_front_shows_every_run_s_best_and_cuts_off_beginnings_and_ruin(size, direction):
    plain = curve("none", [(loss * size, gap * direction) for loss, gap in COURSE])
    worse = curve("worse", [(2.0 * size, 0), *(((loss + 0.3) * size, gap * direction) for loss, gap in COURSE[1:])])
    assert in_view([*plain, *worse]) == [(run, step) for run in ("none", "worse") for step in range(1, 6)]


@pytest.mark.parametrize("course", [((1.0, 0.0),), ((1.0, 0.0), (0.5, 0.1)), ((1.0, 0.0), (float("nan"), 0.1))])
def test_a_front_of_few_points_has_limits_too(course):
    assert ("none", 0) in in_view(curve("none", course))


def drawn(*runs):
    """What ``plot_sampled`` draws of runs (name, steps, replicate) whose copy rate is step + 100 * replicate."""
    points = [
        FrontPoint(name, step, 0.0, 0.0, 0.0, replicate, {"copy_rate": step + 100 * replicate, "frechet": -step})
        for name, steps, replicate in runs
        for step in steps
    ]
    axes = plt.figure().subplots()
    plot_sampled(axes, points, "copy_rate", "copies")
    plt.close(axes.figure)
    assert axes.get_xlabel() == "copies (memorization →)"
    named = {text.get_text() for text in axes.get_legend().get_texts()}
    return named, [line.get_xdata().tolist() for line in axes.lines]


def test_what_was_sampled_is_averaged_at_the_steps_that_seeds_share():
    named, lines = drawn(("none", (0, 5), 0), ("ours", (0, 10, 20, 30), 0), ("ours", (0, 20, 30, 40), 1))
    assert named == {"none", "ours (2 seeds)"} and lines == [[0, 5], [50, 70, 80]]


@pytest.mark.parametrize("lacking", [("training_preference",), ("frechet", "kernel")])
def test_a_front_is_written_where_a_score_could_not_be_measured(lacking, tmp_path):
    scores = dict.fromkeys(SAMPLED, 0.5) | dict.fromkeys(lacking)
    points = [
        FrontPoint(run, step, 0.0, 1 - step, step / 9, 0, scores | ({} if "frechet" in lacking else {"frechet": -step}))
        for run in ("none", "ours")
        for step in range(3)
    ]
    front = Front(points, "none")
    front.write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"front.csv", "front.png", "front.md"}
    row = front.markdown.splitlines()[-1]
    assert row.count("not measured") == (1 if lacking == ("training_preference",) else 4)
    assert row.count("+0.0000") == 4 - row.count("not measured")
    assert list(csv.DictReader((tmp_path / "front.csv").open()))[-1][lacking[0]] == ""


def test_a_model_whose_score_is_missing_is_left_out_of_the_picture():
    scores = [{"copy_rate": rate, "frechet": 1.0} for rate in (0.1, None, 0.3)]
    axes = plt.figure().subplots()
    points = [FrontPoint("none", step, 0.0, 0.0, 0.0, 0, sampled) for step, sampled in enumerate(scores)]
    plot_sampled(axes, points, "copy_rate", "copies")
    plt.close(axes.figure)
    assert [line.get_xdata().tolist() for line in axes.lines] == [[0.1, 0.3]]


def test_seeds_that_share_no_step_but_the_base_are_drawn_one_by_one():
    named, lines = drawn(("ours", (0, 10, 20), 0), ("ours", (0, 15), 1))
    assert named == {"ours (2 seeds)"} and lines == [[0, 10, 20], [100, 115]]


def test_runs_that_share_nothing_say_so():
    points = [*curve("none", ((1.0, 0.0), (0.9, 0.1))), *curve("ours", ((1.0, 0.0), (1.2, -0.1)))]
    assert "they share no" in Front(points, "none").markdown


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("front") / "heldout", 6, seed=3)


def test_the_front_command_measures_samples_and_goes_on(
    base, run_dir, pictures, heldout, tmp_path, capsys, monkeypatch
):
    flags = ["front", "--run", f"plain={run_dir}", "--run", f"other={run_dir},{run_dir}", "--heldout", str(heldout)]
    flags += ["--output", str(tmp_path), "--points", "1", "--sample", "4", "--num_inference_steps", "2"]
    flags += ["--levels", "4"]
    flags += ["--feature_cache", "none", "--descriptor", "pixel", "--device", "cpu"]
    assert main(flags) == 0
    rows = list(csv.DictReader((tmp_path / "front.csv").open()))
    assert [(row["run"], row["replicate"], row["step"]) for row in rows] == [
        ("plain", "0", "0"), ("other", "0", "0"), ("other", "1", "0"),
        ("plain", "0", "12"), ("other", "0", "12"), ("other", "1", "12"),
    ]  # fmt: skip
    assert all(row["copy_rate"] == "0.0" for row in rows) and float(rows[3]["frechet"]) > 0
    assert (tmp_path / "front.png").read_bytes()[:4] == b"\x89PNG"
    levels = list(csv.DictReader((tmp_path / "front_levels.csv").open()))
    assert len(levels) == 4 * len(rows) and {row["gap"] for row in levels if row["step"] == "0"} == {"0.0"}
    assert [(row["level_from"], row["level_to"]) for row in levels[:4]] == [
        ("0", "250"), ("250", "500"), ("500", "750"), ("750", "1000"),
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert "| other | +0.0000" in said and "front_levels.png" in said
    assert len(list((tmp_path / "samples").iterdir())) == 4
    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", lambda *_, **__: pytest.fail("measures again"))
    assert main(flags) == 0
    capsys.readouterr()
    assert main([*flags, "--levels", "1"]) == 0
    assert not list(tmp_path.glob("front_levels*")) and "front_levels" not in capsys.readouterr().out


@pytest.fixture
def last_row(run_dir, heldout, tmp_path, monkeypatch):
    """The last row of front.csv, given further flags."""
    monkeypatch.setattr(Front, "_picture", lambda self: plt.figure())
    monkeypatch.setattr(Front, "_picture_of_levels", lambda self: plt.figure())

    def measured(*more, run=run_dir, output="out"):
        flags = ["front", f"--run={run}", f"--heldout={heldout}", f"--output={tmp_path / output}", "--points=1"]
        flags += ["--max_images=6", "--draws=1", "--num_inference_steps=1"]
        assert main([*flags, "--feature_cache=none", "--descriptor=pixel", "--device=cpu", *more]) == 0
        return list(csv.DictReader((tmp_path / output / "front.csv").open()))[-1]

    return measured


def test_other_samples_are_not_taken_for_these(last_row, pictures, heldout, tmp_path):
    train = shutil.copytree(pictures, tmp_path / "train")
    first = last_row("--sample=3", f"--train={train}")
    other = last_row("--sample=6", f"--train={train}", "--copy_similarity=-1")
    assert other["frechet"] != first["frechet"] and other["copy_rate"] == "1.0"
    apart = last_row("--sample=3", f"--train={train}", f"--reference={heldout}")
    assert apart["frechet"] != first["frechet"] and apart["sim_score"] == first["sim_score"]
    for number, path in enumerate(sorted(train.glob("*.png"))):
        Image.new("RGB", (20, 20), (9 * number, 90, 0)).save(path)
    assert last_row("--sample=3", f"--train={train}")["sim_score"] != first["sim_score"]


def test_the_base_is_known_by_its_content(base, last_row, tmp_path):
    changed = shutil.copytree(base, tmp_path / "base")
    first = last_row("--sample=3", f"--base={changed}")
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(1.1)
    vae.save_pretrained(changed / "vae")
    second = last_row("--sample=3", f"--base={changed}")
    assert second["train_loss"] != first["train_loss"] and second["frechet"] != first["frechet"]


def test_captions_are_in_the_column_that_the_run_recorded_unless_another_is_named(
    run_dir, last_row, pictures, heldout, tmp_path, capsys
):
    train, run = shutil.copytree(pictures, tmp_path / "train"), shutil.copytree(run_dir, tmp_path / "run")
    metadata, config = train / "metadata.jsonl", run / "ietagc" / "config.yaml"
    metadata.write_text(metadata.read_text().replace('"text"', '"words"'))
    recorded = yaml.safe_load(config.read_text()) | {"train_data_dir": str(train), "caption_column": "words"}
    config.write_text(yaml.safe_dump(recorded))
    for name in ("training_set.json", "training_rows.parquet"):  # as of an earlier version, which had settings only
        (run / "ietagc" / name).unlink()
    assert last_row(run=run) == last_row(output="other")
    captioned = shutil.copytree(heldout, tmp_path / "captioned")  # as the run reads a `heldout_dir`, in either column
    rows = (captioned / "metadata.jsonl").read_text()
    (captioned / "metadata.jsonl").write_text(rows.replace('"text"', '"words"'))
    assert last_row(f"--heldout={captioned}", run=run) == last_row(output="other")
    flags = ["front", "--run", str(run), "--heldout", str(heldout), "--output", str(tmp_path), "--device", "cpu"]
    assert main([*flags, "--caption_column", "text"]) == 2
    assert f"--train {train}: the front needs at least two images with captions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run", "{run}", "--run", "{run}"], "two of them are named run"),
        (["--run", "a=nowhere"], "nowhere: has no ietagc/config.yaml"),
        (["--run", "a={run}", "--control", "b"], "--control b"),
        (["--run", "a="], "--run a="),
        (["--run", "a={run}", "--points", "0"], "--points 0"),
        (["--run", "a={run}", "--levels", "0"], "--levels 0"),
        (["--run", "a={run}", "--levels", "1001"], "--levels 1001: must be from 1 to 1000"),
        (["--run", "a={run}", "--sample", "1"], "--sample 1: one image has no Fréchet distance"),
        (["--run", "a={run}", "--sample", "-1"], "--sample -1: must be 0 (draw nothing), or at least 2"),
        (["--run", "a={run}", "--sample", "4", "--fid", "none"], "--fid none: --sample shows scores over the Fréchet"),
        (["--run", "a={run}", "--train", "{empty}"], "--train {empty}: the folder is empty"),
        (
            ["--run", "a={run}", "--heldout", "{shared}"],
            "5 of its 6 pictures are also among the training images (000_0.png, 001_0.png, 002_0.png, ...)",
        ),
        (["--run", "a={run}", "--heldout", "{bare}"], "the front needs at least two images with captions"),
        (["--run", "a={run}", "--base", "{empty}/nothing"], "nothing: no such folder"),
        (["--run", "a={run}", "--base", "{empty}"], "--base {empty}: has no model_index.json"),
    ],
)
def test_wrong_use_of_front_names_the_flag(run_dir, pictures, heldout, tmp_path, capsys, flags, message):
    (tmp_path / "empty").mkdir()
    (write_folder(tmp_path / "bare", 3, seed=4) / "metadata.jsonl").unlink()
    shared = shutil.copytree(heldout, tmp_path / "shared")
    for number in range(5):
        shutil.copy(pictures / f"00{number}_0.png", shared)
    places = {"run": run_dir, "empty": tmp_path / "empty", "bare": tmp_path / "bare", "shared": shared}
    flags = [flag.format(**places) for flag in flags]
    assert main(["front", "--heldout", str(heldout), "--output", str(tmp_path / "o"), *flags]) == 2
    assert message.format(**places) in capsys.readouterr().err


def test_figures_say_what_they_lack_and_draw_the_rest(run_dir, pictures, heldout, tmp_path, capsys):
    common = ["--descriptor", "pixel", "--feature_cache", "none", "--train", str(pictures)]
    assert main(["score", "--generated", str(heldout), "--output", str(tmp_path / "s"), *common]) == 0
    assert main(["figures", "--scores", f"x={tmp_path / 's'}", "--output", str(tmp_path / "f")]) == 0
    said = capsys.readouterr().out
    assert "fig6.png" in said and "fig9.png not drawn: needs --run" in said
    flags = ["--scores", f"x={tmp_path / 's'}", "--run", str(run_dir), "--train", str(pictures)]
    assert main(["figures", *flags, "--output", str(tmp_path / "g"), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "skipped no sample" in said  # plain training
    assert "share no prompt and seed" in said  # pictures that were not drawn from seeds
    assert {path.name for path in (tmp_path / "g").iterdir()} == {"fig3.png", "fig6.png"}


def test_models_are_drawn_side_by_side_unless_their_pictures_are_gone(heldout, pictures, tmp_path, capsys):
    shutil.copytree(heldout, tmp_path / "drawn")
    rows = [json.loads(line) for line in (heldout / "metadata.jsonl").read_text().splitlines()]
    seeded = "".join(json.dumps(row | {"seed": number}) + "\n" for number, row in enumerate(rows))
    (tmp_path / "drawn" / "metadata.jsonl").write_text(seeded)
    for name in "ab":
        flags = ["--descriptor", "pixel", "--feature_cache", "none", "--train", str(pictures)]
        assert main(["score", "--generated", str(tmp_path / "drawn"), "--output", str(tmp_path / name), *flags]) == 0
    both = ["figures", "--scores", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "f")]
    assert main(both) == 0 and (tmp_path / "f" / "fig7.png").exists()
    shutil.rmtree(tmp_path / "drawn")
    capsys.readouterr()
    assert main([*both[:-1], str(tmp_path / "g")]) == 0
    assert "fig7.png not drawn" in capsys.readouterr().out and (tmp_path / "g" / "fig6.png").exists()


def test_skips_and_energy_are_drawn_for_a_run_that_skips(base, pictures, tmp_path, capsys):
    flags = train_flags(base, pictures, "--mitigation=agc", "--skip_threshold=1", "--max_train_steps=30")
    run = train_here([*flags, "--bank_buckets=1"], tmp_path / "run")
    assert main(["figures", "--run", str(run), "--train", str(pictures), "--output", str(tmp_path / "f")]) == 0
    assert {path.name for path in (tmp_path / "f").iterdir()} == {"fig8.png", "fig9.png"}


def test_energy_is_the_variance_of_the_grey_image():
    from ietagc_diffusers.eval.paper_figures import energy

    pixels = torch.randint(0, 256, (4, 3 * 16 * 16), dtype=torch.uint8)
    grey = pixels.view(4, 3, -1).double().mean(1) / 255
    torch.testing.assert_close(energy(pixels).double(), grey.var(dim=1, unbiased=False), rtol=1e-4, atol=1e-8)


def test_what_a_model_draws_is_compared_with_the_held_out_pictures_too(last_row, tmp_path):
    assert float(last_row("--sample=6")["training_preference"]) > -22 / 6
    drawn = shutil.copytree(next((tmp_path / "out" / "samples").glob("run-*")) / "images", tmp_path / "drawn")
    rows = [{"file_name": path.name, "text": "a picture"} for path in sorted(drawn.glob("*.png"))]
    (drawn / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    # What is drawn is the same as before, so that every image finds itself among the held-out pictures: the lowest
    # that 22 training pictures and 6 others allow.
    preference = last_row("--sample=6", f"--heldout={drawn}")["training_preference"]
    assert float(preference) == pytest.approx(-22 / 6)
