"""The monitor draws the same images at each measurement, counts copies among them, and acts on request; training stays
the same, bit for bit.
"""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import launch, train_flags, train_here, unet_bytes
from datasets import Dataset
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ietagc_diffusers import UsageError, testing
from ietagc_diffusers.arguments import parse_flags
from ietagc_diffusers.eval.image_sets import ImageSet, load_images
from ietagc_diffusers.eval.monitor import RED, Comparison, comparer, sheet
from ietagc_diffusers.eval.views import Views
from ietagc_diffusers.families import StableDiffusion
from ietagc_diffusers.run_folder import RunFolder
from ietagc_diffusers.sscd import load_descriptor
from ietagc_diffusers.training.callbacks import Monitor
from ietagc_diffusers.training.monitor import Compared, CopyMeter, advice, beside_base
from ietagc_diffusers.training.monitor_page import page
from ietagc_diffusers.training.run import train
from ietagc_diffusers.training.scripts import UnconditionalScript

RUN = ["--mitigation=iet", "--num_shards=2", "--max_train_steps=8", "--steps_per_round=2", "--learning_rate=1e-2"]
NEEDED = ["--pretrained_model_name_or_path=m", "--train_data_dir=d"]
DRAWN = ["--monitor_every=1", "--monitor_images=3", "--monitor_inference_steps=1", "--monitor_descriptor=pixel"]


pytestmark = pytest.mark.usefixtures("no_page")


@pytest.fixture(scope="module")
def watched(base, pictures, tmp_path_factory):
    flags = train_flags(base, pictures, *RUN, *DRAWN, "--save_rounds")
    return train_here(flags, tmp_path_factory.mktemp("watched") / "out")


def rows_of(folder):
    return [json.loads(line) for line in RunFolder(folder).monitor_file.read_text().splitlines()]


def events_of(folder, kind):
    """{tag: steps} of a run's TensorBoard logs."""
    found = {}
    for path in (folder / "logs").rglob("events*"):
        events = EventAccumulator(str(path))
        events.Reload()
        for tag in events.Tags()[kind]:
            found.setdefault(tag, []).extend(event.step for event in getattr(events, kind.capitalize())(tag))
    return found


def script(monkeypatch, *copy_rates):
    """Let the comparisons find these copy rates, measurement by measurement."""
    found = iter(copy_rates)
    picture = Image.new("RGB", (8, 8))

    def compare(images, told):
        return Compared(measured(next(found)), picture)

    monkeypatch.setattr("ietagc_diffusers.eval.monitor.comparer", lambda settings, device: lambda rows: compare)


def measured(rate, **more):
    numbers = {"num_images": 50, "descriptor": "pixel", "copy_similarity": 0.9, "sim_score": 0.7}
    interval = {"copy_rate": rate, "copy_rate_ci95": [max(rate - 0.02, 0), rate + 0.05], "sim_score_ci95": [0.6, 0.8]}
    return numbers | interval | more


# A run


def test_it_changes_nothing_of_the_training_and_a_stopped_run_measures_the_same(base, pictures, watched, tmp_path):
    plain = train_here(train_flags(base, pictures, *RUN, "--report_to=none"), tmp_path / "plain")
    flags = train_flags(base, pictures, *RUN, *DRAWN, "--report_to=none", "--resume_from_checkpoint=latest")
    train_here(flags, tmp_path / "cut", stop_at=7)  # one proxy of the second round is done, the other on its way
    cut = train_here(flags, tmp_path / "cut")
    assert unet_bytes(plain) == unet_bytes(watched) == unet_bytes(cut)
    assert rows_of(cut) == rows_of(watched)
    assert RunFolder(cut).rounds()[-1]["disagreement"] == rows_of(cut)[-1]["disagreement"] > 0


@pytest.mark.slow
def test_processes_do_not_show(base, pictures, watched, tmp_path):
    launch(train_flags(base, pictures, *RUN, *DRAWN, "--report_to=none"), tmp_path / "two", processes=2)
    assert unet_bytes(tmp_path / "two") == unet_bytes(watched) and rows_of(tmp_path / "two") == rows_of(watched)


def test_a_model_of_classes_is_told_those_of_the_rows(pictures, tmp_path):
    """From scratch: there is no base whose copies would not count."""
    config = tmp_path / "config"
    testing.random_unconditional_pipeline().unet.save_config(config)
    flags = [f"--train_data_dir={pictures}", "--resolution=16", "--train_batch_size=4", "--seed=5", *RUN, *DRAWN]
    flags += [f"--model_config_name_or_path={config}", "--class_labels=column", "--label_column=label"]
    flags += ["--num_classes=3", "--max_train_steps=4", "--report_to=none"]
    rows = rows_of(train_here(flags, tmp_path / "out", kind=UnconditionalScript))
    assert [row["base_copy_rate"] for row in rows] == [None, None]
    assert [row["excess_copy_rate"] for row in rows] == [row["copy_rate"] for row in rows] == [0, 0]


def test_what_it_leaves(watched):
    rows = rows_of(watched)
    assert [row["global_step"] for row in rows] == [0, 4, 8]
    assert not any("gap" in row or "train_loss" in row for row in rows)  # no image is held out
    assert all(row["num_images"] == 3 and row["descriptor"] == "pixel" for row in rows)
    assert all(row["base_sim_score"] == rows[0]["sim_score"] != rows[-1]["sim_score"] for row in rows)
    assert "disagreement" not in rows[0] and all(row["disagreement"] > 0 for row in rows[1:])
    names = [path.name for path in sorted(RunFolder(watched).monitor_sheets.iterdir())]
    assert names == ["step-000000.png", "step-000004.png", "step-000008.png"]


def test_the_tracker_has_the_numbers_and_the_sheet(watched):
    assert events_of(watched, "images") == {"monitor/sheet": [0, 4, 8]}
    scalars = events_of(watched, "scalars")
    assert scalars["monitor/copy_rate"] == scalars["monitor/sim_score"] == [0, 4, 8]
    assert scalars["round/disagreement"] == [4, 8]


def test_numbers_are_those_of_the_saved_models(watched, pictures, base):
    """Drawn again from the files, by a pipeline as diffusers loads it, one by one; compared by brute force."""
    from diffusers import DiffusionPipeline

    training = load_images(pictures, "train").files()
    captions = load_images(pictures, "train").texts
    pipeline = DiffusionPipeline.from_pretrained(watched / "rounds" / "round-0002", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    drawn = [
        pipeline(captions[row], num_inference_steps=1, generator=torch.Generator().manual_seed(5 + number)).images[0]
        for number, row in enumerate((0, 11, 23))
    ]
    similarities = []
    for image in drawn:
        views = [vector for index in range(len(training)) for vector in crops(training.image(index))]
        similarities.append(max(float(vector @ ours) for vector in views for ours in crops(image)))
    last = rows_of(watched)[-1]
    assert last["sim_score"] == pytest.approx(np.percentile(similarities, 95), abs=2e-3)
    assert last["copy_rate"] == sum(value > 0.9 for value in similarities) / 3


def crops(image):
    """Descriptors of all squares of an image of 20 x 23, or of the whole of a square one."""
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None]
    side, describe = min(image.size), load_descriptor("pixel")
    starts = range(0, max(image.size) - side + 1)
    squares = [pixels[..., start : start + side] for start in starts]
    return [describe(square)[0] for square in (squares if len(squares) == 1 else [*squares, pixels])]


# Rules


def test_a_copy_rate_over_the_bases_ends_the_run_with_the_last_model_below_it(
    base, pictures, watched, tmp_path, monkeypatch, caplog
):
    """The base's 20% do not count: 24% are 4% too many."""
    script(monkeypatch, 0.2, 0.21, 0.24, 0.9, 0.9)
    more = ["--max_train_steps=16", "--report_to=none", "--stop_at_copy_rate=0.03", "--keep_best=copies"]
    folder = train_here(train_flags(base, pictures, *RUN, *DRAWN, *more), tmp_path / "out")
    rows = rows_of(folder)
    assert [row["copy_rate"] for row in rows] == [0.2, 0.21, 0.24]
    assert rows[-1]["base_copy_rate"] == 0.2 and rows[-1]["excess_copy_rate"] == pytest.approx(0.04)
    assert unet_bytes(folder) == unet_bytes(watched / "rounds" / "round-0001")
    assert "the copy rate of 4.0% beyond the base's is over `stop_at_copy_rate`" in caplog.text


def kept(folder, rows, *more, finite=True):
    """The rounds whose models are kept, one after another."""
    settings = parse_flags([*NEEDED, *DRAWN, "--keep_best=copies", "--stop_at_copy_rate=0.3", *more])
    monitor, best = Monitor(None, RunFolder(folder), settings, None, None, None), []
    monitor._best = lambda: best[-1] if best else None
    run = SimpleNamespace(weights=SimpleNamespace(is_finite=lambda: finite))
    for row in rows:
        if monitor._is_best(run, row):
            best.append(row)
    return [row["global_step"] for row in best]


def test_of_the_models_below_the_limit_the_one_of_the_lowest_held_out_loss_is_kept_or_the_last(tmp_path):
    found = [(0, 0.1, 0.0), (1, 0.9, 0.0), (2, 0.5, 0.4), (3, 0.8, 0.3), (4, 0.85, 0.0), (5, math.nan, 0.0)]
    rows = [{"global_step": number, "heldout_loss": loss, "excess_copy_rate": rate} for number, loss, rate in found]
    assert kept(tmp_path, rows, "--heldout_dir=h") == [1, 3]
    without = [{"global_step": number, "excess_copy_rate": rate} for number, _, rate in found]
    assert kept(tmp_path, without) == [1, 3, 4, 5]
    assert kept(tmp_path, without, finite=False) == []  # a broken model copies nothing


def test_a_model_from_scratch_has_no_base():
    base = measured(0.25)
    assert beside_base(measured(0.5), base) == {
        "base_copy_rate": 0.25, "base_sim_score": 0.7, "excess_copy_rate": 0.25,
    }  # fmt: skip
    assert beside_base(measured(0.5), None) == {
        "base_copy_rate": None, "base_sim_score": None, "excess_copy_rate": 0.5,
    }  # fmt: skip


def test_advice():
    def said(*rates, base=0.0):
        rows = [measured(rate, round=i, global_step=10 * i) for i, rate in enumerate(rates)]
        return advice([row | beside_base(row, measured(base)) for row in rows])

    assert said(0.0, 0.0).startswith("None of the 50 drawn images is a copy (95% interval of the copy rate: up to 5.0%")
    found = said(0.0, 0.0, 0.1, 0.2)
    assert "10 of the 50 drawn images are copies (20.0%, 18.0% to 25.0%)" in found and "first seen at step 20" in found
    assert "not clearly brought more" in said(0.1, 0.11, base=0.1) and "the base model's 10.0%" in said(0.1, base=0.1)
    gap = {"heldout_loss": 1.0, "gap": 0.0, "gap_ci95": [-1, 1]}
    rows = [measured(0.0, round=i, global_step=i, base_copy_rate=None, **gap) for i in range(3)]
    assert advice(rows).startswith("None of") and "No sign of memorization" in advice(rows)


def test_the_page_has_curves_and_the_sheet_and_loads_nothing(watched):
    rows, file = rows_of(watched), RunFolder(watched).monitor_sheet(8)
    text = page(rows, "out", "see `keep_best`", 8, True, file)
    assert text.count("<svg") == 3 and text.count('<img src="data:image/jpeg;base64,') == 1
    assert "<code>keep_best</code>" in text and "Loss of training" not in text
    assert not re.findall(r'(?:src|href)="(?!#|data:)', text.replace("xlink:href", "href"))
    assert "<img" not in page(rows, "out", "said", 8, True, file.with_name("gone.png"))


# Drawing


@pytest.mark.parametrize("classes", [None, 3])
def test_an_image_depends_on_its_own_seed_only(base, pictures, classes):
    if classes:
        family = testing.family_of_pipeline(testing.random_unconditional_pipeline(classes=classes))
        told = [2, 2, 0]
    else:
        family = StableDiffusion.load(parse_flags(train_flags(base, pictures)))
        told = ["a red picture", "a red picture", "a blue picture"]
    torch.manual_seed(3)
    state, mode = torch.get_rng_state(), family.denoiser.training
    together, alone = (
        [np.asarray(image, dtype=int) for image in family.draw_told(told, [7, 8, 7], size, 2)] for size in (3, 1)
    )
    assert torch.equal(torch.get_rng_state(), state) and family.denoiser.training == mode
    for one, other in zip(together, alone, strict=True):
        assert np.abs(one - other).max() <= 1
    assert not np.array_equal(together[0], together[1])  # another seed
    assert not np.array_equal(together[0], together[2])  # told something else


def test_rows_are_spread_evenly_and_bad_ones_left_out(monkeypatch):
    family = testing.family_of_pipeline(testing.random_pipeline(["a red picture"]))
    rows = Dataset.from_dict({"image": [None] * 5, "text": ["a", None, "c", "d", "e"], "sample_id": [*range(5)]})
    flags = ["--pretrained_model_name_or_path=m", "--train_data_dir=d", "--monitor_every=1", "--caption_dropout=0.9"]
    for number, told in ((3, ["a", "c", "e"]), (5, ["a", "c", "d", "e"]), (9, ["a", "a", "c", "c", "d", "d", "e"])):
        settings = parse_flags([*flags, f"--monitor_images={number}", "--seed=4"])
        meter = CopyMeter.of(rows, settings, family, None)
        assert meter.told == told and meter.seeds == [*range(4, 4 + len(told))]


# Comparing


def pictures_of(number, seed, size=24):
    noise = np.random.default_rng(seed).integers(0, 256, (number, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


def training_of(images):
    import io

    def encoded(index):
        data = io.BytesIO()
        images[index].save(data, "png")
        return data.getvalue()

    return ImageSet("here", [str(i) for i in range(len(images))], [None] * len(images), [{}] * len(images), encoded)


@pytest.mark.parametrize("mirrored", [False, True])
def test_planted_copies_are_counted_and_mirrored_ones_where_training_mirrors(mirrored, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    training, others = pictures_of(12, 0), pictures_of(6, 1)
    planted = [training[4], training[9].transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    compare = Comparison.of(training_of(training), load_descriptor("pixel"), 0.9, Views(False, mirrored))
    found = compare([*others, *planted], [None] * 8)
    assert found.numbers["copy_rate"] == (2 if mirrored else 1) / 8
    assert found.numbers["num_images"] == 8 and found.numbers["copy_similarity"] == 0.9
    low, high = found.numbers["copy_rate_ci95"]
    n, share, z = 8, found.numbers["copy_rate"], 1.959964
    for end in (low, high):  # Wilson's interval are the rates that the found one is z deviations from
        assert abs(share - end) == pytest.approx(z * (end * (1 - end) / n) ** 0.5, rel=1e-3)
    wide = compare([*others, *planted], ["a caption"] * 8).numbers["copy_rate_ci95"]
    assert wide[0] < low and wide[1] > high  # images of one caption are not independent


def test_the_sheet_has_the_most_similar_first_and_frames_copies():
    red, blue = (Image.new("RGB", (10, 20), colour) for colour in ("#0000f0", "#00f000"))
    plain, framed = (np.asarray(sheet([(red, blue, value)] * 4, 0.9)) for value in (0.5, 0.95))
    frame = tuple(int(RED[i : i + 2], 16) for i in (1, 3, 5))
    assert not (plain == frame).all(axis=2).any() and (framed == frame).all(axis=2).sum() > 4 * 800
    assert plain.shape == framed.shape and (plain == (0, 0, 240)).all(axis=2).sum() > 4 * 5000


# Wrong use


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--monitor_images=3"], "`monitor_images`: belongs to `monitor_every`"),
        (["--stop_at_copy_rate=0.1"], "`stop_at_copy_rate`: belongs to `monitor_every`"),
        (["--monitor_every=1", "--heldout_dir=h", "--monitor_descriptor=pixel"], "`monitor_descriptor`: belongs to"),
        (["--monitor_every=1", "--heldout_dir=h", "--stop_at_copy_rate=0.1"], "`stop_at_copy_rate`: belongs to"),
        ([*DRAWN, "--stop_at_gap=0.1"], "`stop_at_gap` 0.1: needs images that are not trained on"),
        ([*DRAWN, "--keep_best=heldout"], "`keep_best` heldout: needs images that are not trained on"),
        ([*DRAWN, "--keep_best=copies"], "`keep_best` copies: keeps a model whose copy rate is not over"),
        ([*DRAWN, "--stop_at_copy_rate=1"], re.escape("`stop_at_copy_rate` 1.0: must be in [0, 1)")),
        ([*DRAWN, "--monitor_copy_similarity=nan"], "`monitor_copy_similarity` nan: must be from -1 to 1"),
        ([*DRAWN[:3], "--stop_at_copy_rate=0.1"], "`stop_at_copy_rate`: a limit must mean the same on every machine"),
        (["--monitor_every=1", "--monitor_images=0"], "`monitor_images` 0: must be at least 1"),
        ([*DRAWN, "--monitor_inference_steps=1001"], "`monitor_inference_steps` 1001: must be from 1 to 1000"),
    ],
)
def test_flags_that_do_not_go_together(more, message):
    with pytest.raises(UsageError, match=message):
        parse_flags([*NEEDED, *more])


def test_an_unknown_descriptor_is_refused_before_anything_is_loaded(base, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("ietagc_diffusers.training.run.load_family", lambda *about: pytest.fail("it was loaded"))
    flags = train_flags(base, pictures, *RUN, *DRAWN, "--monitor_descriptor=pixle")
    with pytest.raises(UsageError, match=r"`monitor_descriptor` pixle: neither .* did you mean pixel"):
        train_here(flags, tmp_path / "out")


def test_a_descriptor_without_a_threshold_needs_one(tmp_path):
    class Mean(torch.nn.Module):
        def forward(self, images):
            return images.mean(dim=(2, 3))

    torch.jit.script(Mean()).save(str(tmp_path / "own.pt"))
    flags = [*NEEDED, "--monitor_every=1", "--monitor_images=3", f"--monitor_descriptor={tmp_path / 'own.pt'}"]
    with pytest.raises(UsageError, match="`monitor_copy_similarity`: nobody has measured"):
        comparer(parse_flags(flags), "cpu")
    assert comparer(parse_flags([*flags, "--monitor_copy_similarity=0.7"]), "cpu")


def test_who_calls_train_says_what_compares():
    with pytest.raises(ValueError, match="needs a `comparer`"):
        train(parse_flags([*NEEDED, *DRAWN]))
