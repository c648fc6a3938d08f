"""The gate: generate, score, report, and a verdict that a build can fail on."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.files import write_text

from .generate import generate, model_hash
from .image_sets import load_images, unusable
from .report import Scored, table_rows, write_report
from .score import score

PASSED, OVER = 0, 3
BROKEN = 0.05  # share of unusable images, of either side, beyond which a low copy rate says nothing
SIDES = {"generated": "generated", "train": "training"}
CARD_START, CARD_END = "<!-- memorization audit -->", "<!-- end of memorization audit -->"


@dataclass(frozen=True)
class Limits:
    """Highest values that pass; None is no limit."""

    copy_rate: float | None = 0.01
    sim_score: float | None = None
    patch_copy_rate: float | None = None


@dataclass(frozen=True)
class Verdict:
    passed: bool
    sentence: str

    @property
    def exit_code(self):
        return PASSED if self.passed else OVER


def judge(scores, limits):
    """Compare scores with limits."""
    protocol, num_files = scores["protocol"], scores["num_files"]
    unread = {side: len(unusable(scores["skipped"][side])) for side in SIDES}
    broken = scores["num_of_one_colour"] + unread["generated"]
    parts, over = [], []
    for key, limit, what in (
        ("copy_rate", limits.copy_rate, "are copies"),
        ("patch_copy_rate", limits.patch_copy_rate, "hold local copies"),
    ):
        if limit is not None:
            (low, high), copies = scores[f"{key}_ci95"], round(scores[key] * scores["num_generated"])
            over.append(scores[key] > limit)
            parts.append(
                f"{copies} of {scores['num_generated']} images {what}: {scores[key]:.1%} "
                f"(95% interval {low:.1%} to {high:.1%}), limit {limit:.1%}"
            )
    if broken > BROKEN * num_files["generated"]:
        over.append(True)
        parts.append(f"{broken} images are of one colour or cannot be read: the model is broken, which proves nothing")
    if unread["train"] > BROKEN * num_files["train"]:
        over.append(True)
        parts.append("so many training images cannot be read that their copies would not be known")
    if limits.sim_score is not None:
        over.append(scores["sim_score"] > limits.sim_score)
        parts.append(f"Sim Score {scores['sim_score']:.3f}, limit {limits.sim_score:.3f}")
    passed = not any(over)
    by = f"by descriptor {protocol['descriptor']}, copies over {protocol['copy_similarity']:g}"
    sentence = f"{'Passed' if passed else 'Failed'} {by}: {'; '.join(parts)}."
    if protocol["descriptor"] == "pixel":
        sentence += " It knows near-exact copies alone: for anything that ships give --descriptor sscd_disc_mixup."
    left_out = [f"{unread[side]} of {num_files[side]} {name} images" for side, name in SIDES.items() if unread[side]]
    if left_out:
        sentence += f" Left out, since they cannot be read: {', '.join(left_out)}."
    if passed and limits.copy_rate is not None and scores["copy_rate_ci95"][1] > limits.copy_rate:
        sentence += f" The interval reaches over the limit: {_enough(limits.copy_rate)} images would tell more."
    return Verdict(passed, sentence)


def _enough(rate):
    """How many images without a copy bring the interval's end under ``rate``: n / (n + z^2) of Wilson's, solved."""
    return "more" if rate <= 0 else f"about {round(3.84 * (1 - rate) / rate)} or more"


def audit(model, train, prompts, output, settings, tools, limits, cache=None, device="cpu", state=None, reference=None):
    """Draw ``prompts`` with the model, compare with the training set, write ``images/``, ``scores.json``,
    ``report.html`` and ``summary.md`` into ``output``.

    Args:
        train: ``ImageSet``; tools: ``score.Tools`` or a function that makes them, called after the drawing.
        state: accelerate's ``PartialState`` if several processes draw; the first one scores.
        reference: of ``score``.

    Returns:
        A ``Verdict``, or None on the processes that only drew.
    """
    output = Path(output)
    generate(model, prompts, output / "images", settings, device, state, desc="Drawing")
    if state is not None and not state.is_main_process:
        return None
    drawn = load_images(output / "images", "output")
    tools = tools() if callable(tools) else tools
    about = {"model": str(model), "model_hash": model_hash(model), "settings": asdict(settings)}
    scores = score(drawn, train, output, tools, cache, reference, about)
    verdict = judge(scores, limits)
    scored = [Scored.load(output, Path(str(model)).name)]
    write_report(scored, output / "report.html", verdict=(verdict.passed, verdict.sentence))
    write_text(output / "summary.md", summary(scored, verdict))
    return verdict


def summary(scored, verdict):
    """The verdict and the table in Markdown."""
    lines = [f"### {'✅' if verdict.passed else '❌'} Memorization audit of {scored[0].name}", "", verdict.sentence, ""]
    lines += [f"| | {scored[0].name} |", "|---|---|"]
    for title, cells, show in table_rows(scored):
        value, interval = cells[0]
        around = f" ({show(interval[0])} – {show(interval[1])})" if interval else ""
        lines.append(f"| {title} | {show(value)}{around} |")
    protocol = scored[0].scores["protocol"]
    name = f", protocol `{protocol['name']}`" if protocol["name"] else ""
    lines += ["", f"Descriptor `{protocol['descriptor']}`{name}, {protocol['neighbours']} neighbours."]
    for side, title in SIDES.items():
        if skipped := scored[0].scores["skipped"][side]:
            no_images = len(skipped) - len(unusable(skipped))
            lines.append(f"{len(skipped)} {title} files were left out, {no_images} of them no images.")
    return "\n".join(lines) + "\n"


def card_path(model):
    """Where the model's card is. Raises ``UsageError`` without a folder."""
    folder = Path(model)
    if not folder.is_dir():
        raise UsageError(f"--card: {model} is no folder; download the model and audit that")
    return folder / "README.md"


def write_card(model, text):
    """Put the summary into the model's card, in place of an earlier one."""
    path = card_path(model)
    card = path.read_text(encoding="utf-8") if path.exists() else ""
    before, start, rest = card.partition(CARD_START)
    after = rest.partition(CARD_END)[2] if start else ""
    section = text.replace("### ", "## ", 1)
    write_text(path, f"{before.rstrip()}\n\n{CARD_START}\n{section}{CARD_END}\n{after.lstrip()}".lstrip())


def report_to_github(text, verdict):
    """Append the summary to the job's page, and annotate a failure, as GitHub Actions reads it."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    else:
        print(text)
    if not verdict.passed:
        print(f"::error title=Memorization audit::{verdict.sentence}")
