"""The gate opens, shuts and says when it cannot tell; nothing around a verdict changes it."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
from conftest import write_folder
from pages import check_page
from PIL import Image

from ietagc_diffusers.cli import main
from ietagc_diffusers.console import say
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.eval import audit as gate
from ietagc_diffusers.eval.audit import Limits, card_path, check_apart, judge, report_to_github, summary, write_card
from ietagc_diffusers.eval.drawing import drawing_of, sentence_of
from ietagc_diffusers.eval.image_sets import NO_IMAGE
from ietagc_diffusers.eval.metrics.intervals import newcombe_interval, wilson_interval
from ietagc_diffusers.eval.report import Scored, write_report


def scores_of(copies, n, sim=0.4, flat=0, skipped=0, unread=0, notes=0, local=0, descriptor="sscd_disc_mixup"):
    """Scores of ``n`` images and 100 training files, of which ``unread`` cannot be read."""
    return {
        "patch_copy_rate": local / n,
        "patch_copy_rate_ci95": wilson_interval(np.arange(n) < local),
        "num_files": {"generated": n + skipped, "train": 100},
        "copy_rate": copies / n,
        "copy_rate_ci95": wilson_interval(np.arange(n) < copies),
        "num_generated": n,
        "sim_score": sim,
        "num_of_one_colour": flat,
        "skipped": {
            "generated": [["x", "y"]] * skipped,
            "train": [["x", "y"]] * unread + [["x", NO_IMAGE]] * notes,
        },
        "protocol": {"descriptor": descriptor, "copy_similarity": 0.5},
    }


@pytest.mark.parametrize(
    ("scores", "limits", "exit_code", "words"),
    [
        (scores_of(0, 1000), Limits(0.01), 0, "Passed (descriptor sscd_disc_mixup, copies over 0.5): 0 of 1000"),
        (scores_of(0, 1000, descriptor="pixel"), Limits(0.01), 0, "only near-exact copies"),
        (scores_of(1, 100), Limits(0.01), 0, "reaches over the limit: the number is so near"),
        (scores_of(2, 100), Limits(0.01), 3, "2 of 100 images are copies"),
        (scores_of(0, 100, flat=6), Limits(0.01), 3, "6 images are a single flat colour"),
        (scores_of(0, 100, flat=2, skipped=2), Limits(0.01), 0, "Passed"),
        (scores_of(0, 90, skipped=10), Limits(0.01), 3, "a broken model proves nothing"),
        (scores_of(0, 100, unread=60), Limits(0.01), 3, "more than 5% of the training images are unreadable"),
        (scores_of(0, 100, unread=60), Limits(0.01), 3, "Left out as unreadable: 60 of 100 training"),
        (scores_of(0, 99, skipped=1, unread=5), Limits(0.01), 0, "1 of 100 generated images, 5 of 100 training"),
        (scores_of(0, 500, notes=60), Limits(0.01), 0, "limit 1.0%."),
        (scores_of(0, 100, local=3), Limits(0.01, patch_copy_rate=0.02), 3, "3 of 100 images contain local copies"),
        (scores_of(0, 100, local=3), Limits(0.01), 0, "Passed"),
        (scores_of(0, 1000, 0.6), Limits(0.01, 0.5), 3, "Sim Score 0.600, limit 0.500"),
        (scores_of(50, 100), Limits(None, 0.5), 0, "0.5): Sim Score"),
        (scores_of(0, 50), Limits(0.0), 0, "Passed"),
    ],
)
def test_the_verdict(scores, limits, exit_code, words):
    verdict = judge(scores, limits)
    assert verdict.exit_code == exit_code and words in verdict.sentence


@pytest.fixture(scope="module")
def audited(base, training, tmp_path_factory):
    output = tmp_path_factory.mktemp("audit") / "audit"
    flags = ["audit", "--model", str(base), "--train", str(training), "--output", str(output), "--num_images", "6"]
    flags += ["--num_inference_steps", "2", "--descriptor", "pixel", "--feature_cache", "none", "--batch_size", "4"]
    return flags, output, main(flags)


def test_audit_passes_a_model_that_copies_nothing_and_leaves_its_proof(audited):
    _, output, exit_code = audited
    assert exit_code == 0
    assert {"images", "scores.json", "nearest.parquet", "report.html", "summary.md"} <= {
        p.name for p in output.iterdir()
    }
    check_page(output / "report.html")
    assert "Passed" in (output / "report.html").read_text()
    scores = json.loads((output / "scores.json").read_text())
    assert len(scores["model_hash"]) == 16 and scores["settings"]["num_inference_steps"] == 2
    assert "| copy rate ↓ | 0.0%" in (output / "summary.md").read_text()


def test_files_of_another_origin_among_the_drawn_images_do_not_dilute_the_rate(audited, tmp_path):
    flags, output, _ = audited
    again = shutil.copytree(output, tmp_path / "again")
    for number in range(20):
        shutil.copy(again / "images" / "000000.png", again / "images" / f"own-{number}.png")
    assert main([str(again) if flag == str(output) else flag for flag in flags]) == 0
    assert json.loads((again / "scores.json").read_text())["num_generated"] == 6


def test_audit_fails_over_the_limits_with_3_and_tells_github(audited, monkeypatch, capsys):
    flags, output, _ = audited
    page = output.parent / "summary"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    assert main([*flags, "--max_sim_score", "-1", "--github"]) == 3
    assert "::error title=Memorization audit::Failed" in capsys.readouterr().out
    assert "❌" in page.read_text() and "Failed" in (output / "report.html").read_text()


def test_the_card_carries_the_last_audit(tmp_path):
    (tmp_path / "README.md").write_text("---\ntags: [x]\n---\n# Model\n\nText.\n")
    write_card(tmp_path, "### first\n")
    (tmp_path / "README.md").write_text((tmp_path / "README.md").read_text() + "\nMore.\n")
    write_card(tmp_path, "### second\n")
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\ntags: [x]\n---\n# Model\n\nText.\n\n<!--") and "\n## second\n" in card
    assert "first" not in card and card.endswith("More.\n")
    (tmp_path / "new").mkdir()
    write_card(tmp_path / "new", "### only\n")
    assert (tmp_path / "new" / "README.md").read_text().startswith("<!-- memorization audit -->\n## only\n")
    with pytest.raises(UsageError, match="is not a folder"):
        write_card("owner/model", "")


def test_audit_measures_the_distance_to_the_reference_and_limits_local_copies(audited, fresh, tmp_path):
    flags, output, _ = audited
    flags = [*flags, "--output", str(tmp_path), "--reference", str(fresh), "--patches", "--max_patch_copy_rate", "0.5"]
    shutil.copytree(output / "images", tmp_path / "images")
    assert main(flags) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["protocol"]["frechet_reference"] == str(fresh)
    assert "contain local copies" in (tmp_path / "summary.md").read_text()


def test_audit_says_what_it_left_out_and_fails_if_that_is_much(audited, training, tmp_path, capsys):
    flags, output, _ = audited
    shutil.copytree(training, tmp_path / "training")
    for path in sorted((tmp_path / "training").glob("*.png"))[20:]:
        path.write_bytes(path.read_bytes()[:60])
    (tmp_path / "training" / "notes.txt").write_text("no image")
    shutil.copytree(output / "images", tmp_path / "out" / "images")
    assert main([*flags, "--train", str(tmp_path / "training"), "--output", str(tmp_path / "out")]) == 3
    assert "43 of 63 training images" in capsys.readouterr().out
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "44 training files were left out (not images: 1)." in summary


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--card", "--model", "owner/model"], "--card: owner/model is not a folder"),
        (["--output", __file__], "is a file; give a folder"),
        (["--max_patch_copy_rate", "0.1"], "without --patches local copies are not looked for"),
        (["--reference", "nowhere"], "--reference nowhere"),
    ],
)
def test_wrong_use_of_audit_is_told_before_it_draws(audited, tmp_path, capsys, more, message):
    flags, _, _ = audited
    assert main([*flags, "--output", str(tmp_path / "out"), *more]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--max_copy_rate", "--max_sim_score", "--copy_similarity"])
@pytest.mark.parametrize("value", ["nan", "5"])
def test_a_limit_that_lets_everything_pass_is_refused(audited, capsys, flag, value):
    flags, _, _ = audited
    assert main([*flags, flag, value]) == 2
    assert flag in capsys.readouterr().err


def test_a_model_that_draws_black_does_not_pass(base, training, tmp_path, capsys):
    from diffusers import StableDiffusionPipeline

    broken = StableDiffusionPipeline.from_pretrained(base)
    for parameter in broken.unet.parameters():
        parameter.data.fill_(float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    flags = ["audit", "--model", str(tmp_path / "broken"), "--train", str(training), "--output", str(tmp_path / "out")]
    flags += ["--num_images", "4", "--num_inference_steps", "1", "--descriptor", "pixel", "--feature_cache", "none"]
    assert main(flags) == 3
    assert "4 images are a single flat colour" in capsys.readouterr().out


def test_audit_exits_with_2_before_it_draws(audited, tmp_path, capsys):
    flags, _, _ = audited
    assert main([*flags, "--output", str(tmp_path / "out"), "--descriptor", "absent"]) == 2
    assert not (tmp_path / "out").exists()


def with_heldout(scores, copies, n):
    """Scores with held-out pictures, of which some are as similar as copies."""
    hits, drawn = np.arange(n) < copies, scores["num_generated"]
    first = np.arange(drawn) < round(scores["copy_rate"] * drawn)
    return scores | {
        "num_heldout": n,
        "heldout_copy_rate": copies / n,
        "heldout_copy_rate_ci95": wilson_interval(hits),
        "excess_copy_rate": first.mean() - hits.mean(),
        "excess_copy_rate_ci95": newcombe_interval(first, hits),
    }


NOISE = {"median_similarity": 0.13, "usual_similarity": 0.28, "distance": 1.02}
PICTURES = {"median_similarity": 0.55, "usual_similarity": 0.28, "distance": 0.2}
RELATIVE = Limits(None, excess_copy_rate=0.02)


@pytest.mark.parametrize(
    ("scores", "limits", "exit_code", "words"),
    [
        (scores_of(0, 500), Limits(0.01), 0, "Passed"),
        (scores_of(0, 300), Limits(0.01), 4, "The interval reaches over the limit: about 380 images or more"),
        (scores_of(1, 500), Limits(0.01), 4, "Inconclusive"),
        (scores_of(9, 500), Limits(0.01), 4, "over the limit, and under it: about 594 images"),
        (scores_of(20, 500), Limits(0.01), 3, "Failed"),
        (scores_of(5, 500), Limits(0.01), 4, "without a copy about 380 images or more would decide it"),
        (scores_of(0, 500), Limits(0.0), 4, "no number of images shows that there are none"),
        (scores_of(0, 500) | {"num_prompts": 100}, Limits(0.01), 0, "0 of 500 images of 100 prompts are copies"),
        (scores_of(0, 500, local=2), Limits(0.01, patch_copy_rate=0.01), 4, "contain local copies"),
        (scores_of(0, 500, 0.4) | {"sim_score_ci95": [0.3, 0.6]}, Limits(0.01, 0.5), 4, "about 2000 images"),
        (scores_of(0, 500, 0.4) | {"sim_score_ci95": [0.3, 0.45]}, Limits(0.01, 0.5), 0, "(95% interval 0.300"),
        (scores_of(0, 500, 0.7) | {"sim_score_ci95": [0.6, 0.8]}, Limits(0.01, 0.5), 3, "limit 0.500"),
        (scores_of(0, 40, 0.4) | {"sim_score_ci95": [0.4, 0.4]}, Limits(None, 0.5), 4, "about 72 images"),
        (scores_of(0, 1, 0.9) | {"sim_score_ci95": [0.9, 0.9]}, Limits(None, 0.5), 4, "Inconclusive"),
        (with_heldout(scores_of(50, 500), 50, 500), RELATIVE, 4, "10.0% of 500 images and 10.0% of 500 held-out"),
        (with_heldout(scores_of(50, 5000), 500, 5000), RELATIVE, 0, "-9.0 points"),
        (with_heldout(scores_of(500, 5000), 50, 5000), RELATIVE, 3, "+9.0 points"),
        (scores_of(0, 500), RELATIVE, 4, "no copy rate of held-out pictures"),
        (scores_of(0, 500, flat=60), Limits(0.01), 3, "a broken model"),
    ],
)
def test_a_strict_verdict_is_the_interval_s(scores, limits, exit_code, words):
    verdict = judge(scores, limits, strict=True)
    assert verdict.exit_code == exit_code and words in verdict.sentence
    assert verdict.record()["exit_code"] == exit_code and verdict.record()["strict"]


def test_noise_is_inconclusive_whatever_the_limits_and_copies_are_not_excused_by_it():
    for strict in (False, True):
        verdict = judge(scores_of(0, 1000) | {"plausibility": NOISE}, Limits(0.01), strict)
        assert verdict.exit_code == 4 and "0.13 in the median" in verdict.sentence and "one grey" in verdict.sentence
        assert judge(scores_of(0, 1000) | {"plausibility": PICTURES}, Limits(0.01), strict).passed
        assert judge(scores_of(0, 1000) | {"plausibility": dict.fromkeys(NOISE)}, Limits(0.01), strict).passed
    assert judge(scores_of(500, 1000) | {"plausibility": NOISE}, Limits(0.01)).exit_code == 3


def test_a_verdict_stands_beside_the_rates_that_are_usual():
    scores = scores_of(20, 100) | {"train_train_copy_rate": 0.19, "train_train_copy_rate_ci95": [0.1, 0.3]}
    sentence = judge(scores, Limits(0.01), warnings=["A word of warning."]).sentence
    assert "19.0% of the training images are copies of another one" in sentence and "`heldout`" in sentence
    assert sentence.endswith("A word of warning.")
    sentence = judge(with_heldout(scores, 3, 20), Limits(0.01)).sentence
    assert "Of 20 held-out pictures 15.0% are (95% interval 5.2% to 36.0%)" in sentence


def test_a_strict_audit_does_not_pass_in_doubt_of_the_training_images():
    scores, doubt = scores_of(0, 1000), ["The model records that it was trained on others."]
    assert judge(scores, Limits(0.01), True).passed and judge(scores, Limits(0.01), False, doubt).passed
    assert judge(scores, Limits(0.01), True, doubt).exit_code == 4
    assert judge(scores_of(500, 1000), Limits(0.01), True, doubt).exit_code == 3


def test_the_three_verdicts_have_three_colours_and_marks(training, fresh, audited):
    _, output, _ = audited
    scored = Scored.load(output, "model | $5 <b>")
    for number, (copies, mark) in enumerate(((0, "✅"), (100, "❌"), (3, "⚠️"))):
        verdict = judge(scores_of(copies, 1000) if copies != 3 else scores_of(3, 500), Limits(0.01), strict=True)
        assert verdict.exit_code == (0, 3, 4)[number]
        text = summary([scored], verdict)
        assert f"### {mark} Memorization audit of model \\| \\$5 &lt;b>" in text and "**" not in text
        page = write_report([scored], output.parent / "r.html", verdict=(verdict.outcome, verdict.sentence))
        assert f'<p class="verdict {verdict.outcome}">' in page.read_text()
        assert f".verdict.{verdict.outcome} {{" in page.read_text()


def test_scores_report_and_summary_say_how_the_images_were_drawn(audited, tmp_path):
    _, output, _ = audited
    drawing = json.loads((output / "scores.json").read_text())["drawing"]
    assert drawing["num_inference_steps"] == 2 and drawing["mitigation"] is None and drawing["num_images"] == 6
    assert drawing["scheduler"].endswith("Scheduler") and drawing["seeds"] == [0, 5] and drawing["dtype"] == "float32"
    sentence = sentence_of(drawing)
    width, height = Image.open(output / "images" / "000000.png").size
    assert f"{width} x {height} pixels" in sentence and "captions of training images" in sentence
    assert sentence in (output / "summary.md").read_text() and sentence in (output / "report.html").read_text()
    mitigated = sentence_of(drawing | {"mitigation": "rt:num_words=4", "negative_prompt": "text", "prompts": "p.txt"})
    assert "with the mitigation rt:num_words=4, negative prompt “text”" in mitigated and "p.txt" in mitigated
    shutil.copytree(output / "images", tmp_path / "more")
    shutil.copy(tmp_path / "more" / "000000.png", tmp_path / "more" / "other.png")
    assert drawing_of(tmp_path / "more", 6) is not None and drawing_of(tmp_path / "more", 7) is None


@pytest.mark.parametrize("flags", [["--mitigation", "rt:num_words=4"], ["--negative_prompt", "a photograph"]])
def test_a_card_refuses_all_but_plain_drawing(audited, base, tmp_path, capsys, flags):
    known, _, _ = audited
    assert main([*known, "--output", str(tmp_path / "out"), "--card", *flags]) == 2
    assert f"--card with {flags[0]} {flags[1]}" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert not (base / "README.md").exists()


def test_strict_and_held_out_pictures_from_the_command_line(audited, fresh, tmp_path, capsys):
    flags, output, _ = audited
    shutil.copytree(output / "images", tmp_path / "images")
    flags = [*flags, "--output", str(tmp_path), "--heldout", str(fresh)]
    assert main([*flags, "--strict"]) == 4
    assert "Inconclusive" in capsys.readouterr().out
    record = json.loads((tmp_path / "verdict.json").read_text())
    assert (record["verdict"], record["exit_code"], record["strict"]) == ("inconclusive", 4, True)
    assert (
        record["limits"]["copy_rate"] == 0.01
        and 'class="verdict inconclusive"' in (tmp_path / "report.html").read_text()
    )
    assert main([*flags, "--max_excess_copy_rate", "0.1"]) == 0
    record = json.loads((tmp_path / "verdict.json").read_text())
    assert record["limits"]["copy_rate"] is None and "held-out pictures: +0.0 points" in record["sentence"]


def test_a_mistaken_held_out_set_is_refused_before_anything_is_drawn(audited, training, tmp_path, capsys):
    flags, _, _ = audited
    (tmp_path / "held").mkdir()
    shutil.copy(training / "010_0.png", tmp_path / "held" / "renamed.png")
    shutil.copy(write_folder(tmp_path / "other", 1, seed=77) / "000_0.png", tmp_path / "held")
    assert main([*flags, "--output", str(tmp_path / "out"), "--heldout", str(tmp_path / "held")]) == 2
    assert "1 of its 2 pictures are also among the training images" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*flags, "--output", str(tmp_path / "out"), "--max_excess_copy_rate", "0.1"]) == 2
    assert "give --heldout" in capsys.readouterr().err


class Narrow(io.TextIOWrapper):
    """A console that shows only what its encoding has."""

    def __init__(self):
        super().__init__(io.BytesIO(), encoding="cp1252")


def full_disk(path, *args, **kwargs):
    raise OSError(28, "No space left on device", str(path))


@pytest.mark.parametrize("harm", ["report", "disk", "card", "github", "console", "name"])
def test_nothing_around_it_changes_a_verdict(audited, base, tmp_path, monkeypatch, capsys, harm):
    flags, output, _ = audited
    model, out = tmp_path / "price_$5_$6", tmp_path / "out"
    shutil.copytree(base, model)
    shutil.copytree(output / "images", out / "images")
    more = ["--model", str(model), "--output", str(out), "--max_sim_score", "-1", "--github"]
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    if harm == "report":
        monkeypatch.setattr(gate, "write_report", lambda *args, **kwargs: 1 / 0)
    elif harm == "disk":
        for name in ("write_text", "write_json"):
            monkeypatch.setattr(gate, name, full_disk)
        monkeypatch.setattr("ietagc_diffusers.eval.score.write_json", full_disk)
    elif harm == "card":
        (model / "README.md").write_bytes(b"\xff\xfe not text")
        more.append("--card")
    elif harm == "github":
        monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "no" / "such" / "folder"))
    elif harm == "console":
        monkeypatch.setattr(sys, "stdout", Narrow())
    assert main([*flags, *more]) == 3
    if harm == "console":
        return
    said = capsys.readouterr().out
    assert "Failed (descriptor pixel" in said
    told = {"report": "report.html", "disk": "verdict.json", "card": "the model's card", "github": "GitHub's summary"}
    assert harm not in told or f"{told[harm]} could not be written" in said
    if harm == "name":
        assert "price_$5_$6" in (out / "report.html").read_text()
        assert "Memorization audit of price_\\$5_\\$6" in (out / "summary.md").read_text()
    if harm != "disk":
        assert json.loads((out / "verdict.json").read_text())["exit_code"] == 3


def test_an_earlier_verdict_does_not_outlive_a_crash(audited, tmp_path, monkeypatch):
    flags, output, _ = audited
    shutil.copytree(output, tmp_path / "out")

    def crash(*args, **kwargs):
        raise RuntimeError

    monkeypatch.setattr(gate, "compare", crash)
    with pytest.raises(RuntimeError):
        main([*flags, "--output", str(tmp_path / "out")])
    assert not any((tmp_path / "out" / name).exists() for name in ("verdict.json", "report.html", "summary.md"))


def test_lines_reach_any_console_and_none(monkeypatch):
    narrow = Narrow()
    say("✅ 5 – 6 ↓", narrow)
    assert narrow.buffer.getvalue().decode("cp1252").split("\n")[0].rstrip() == "? 5 – 6 ?"
    with open("/dev/full", "w") as full:
        say("lost", full)
        say("lost too", full)
    closed = io.StringIO()
    closed.close()
    say("lost", closed)
    monkeypatch.setattr(sys, "stdout", None)
    say("lost")


def test_annotations_are_escaped_and_said_where_the_page_cannot_be_written(tmp_path, monkeypatch, capsys):
    verdict = judge(scores_of(50, 100), Limits(0.01))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))
    with pytest.raises(OSError):
        report_to_github("page", verdict)
    said = capsys.readouterr().out
    assert said.startswith("::error title=Memorization audit::Failed") and "50.0%25" in said and "0% " not in said


def test_a_card_without_the_end_of_its_section_is_left_as_it_is(tmp_path):
    card = "# Model\n\n<!-- memorization audit -->\n## old\n\nText that someone wrote.\n"
    (tmp_path / "README.md").write_text(card)
    with pytest.raises(UsageError, match="without <!-- end of memorization audit -->"):
        write_card(tmp_path, "### new\n")
    assert card_path(tmp_path).read_text() == card


def test_what_is_written_does_not_get_into_what_is_read(tmp_path, base):
    pictures, elsewhere = tmp_path / "pictures", tmp_path / "set" / "images"
    for folder in (pictures / "sub", elsewhere, tmp_path / "audit"):
        folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(pictures)
    model = tmp_path / "model"
    shutil.copytree(base, model)
    (tmp_path / "audit" / "summary.md").write_text("a prompt")
    for output, inputs in (
        (pictures, {"train": pictures}),
        (pictures / "audit", {"train": pictures}),
        (tmp_path / "link" / "audit", {"heldout": pictures}),
        (pictures / "audit", {"reference": tmp_path / "link"}),
        (tmp_path / "set", {"train": elsewhere}),
        (tmp_path / "set", {"train": elsewhere / ".." / "images"}),
        (tmp_path / "audit", {"prompts": tmp_path / "audit" / "summary.md"}),
    ):
        with pytest.raises(UsageError, match=f"`output` {output}: .*`{next(iter(inputs))}`"):
            check_apart(output, inputs, model)
    for output in (model, model / "unet", model / "vae" / "audit"):
        with pytest.raises(UsageError, match="is the model's folder or inside one of its parts"):
            check_apart(output, {}, model)
    (model / "audit").mkdir()
    (model / "audit" / "scores.json").write_text("{}")
    for output in (tmp_path, model / "audit", tmp_path / "audit"):
        check_apart(output, {"train": pictures, "heldout": None, "reference": "owner/set"}, model)
    check_apart(tmp_path / "audit", {"train": pictures}, "owner/model")


@pytest.mark.parametrize("command", ["audit", "score", "generate"])
def test_no_command_writes_into_the_training_set(audited, training, capsys, command):
    flags, _, _ = audited
    before = sorted(training.iterdir())
    flags = ["--generated", str(training), "--train", str(training)] if command == "score" else flags[1:7]
    flags += ["--descriptor", "pixel"] if command == "audit" else []
    assert main([command, *flags, "--output", str(training / "x")]) == 2
    assert "--output" in capsys.readouterr().err and sorted(training.iterdir()) == before
    if command != "generate":
        assert main([command, *flags, "--output", "elsewhere", "--feature_cache", str(training / "c")]) == 2
        assert "--feature_cache" in capsys.readouterr().err
