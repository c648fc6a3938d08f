"""The gate: generate, score, report, and a verdict that can fail a build."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.files import write_text

from .generate import Settings, generate, model_hash
from .image_sets import ImageSet, load_images, unusable
from .metrics.patches import PATCH_COPY_RATE
from .metrics.similarity import COPY_RATE, SIM_SCORE
from .prompts import Prompt
from .report import SIDES, Scored, table_rows, write_report
from .score import Tools, score

PASSED, OVER = 0, 3
BROKEN = 0.05  # with a larger share of unusable images, generated or training, a low copy rate proves nothing
CARD_START, CARD_END = "<!-- memorization audit -->", "<!-- end of memorization audit -->"


@dataclass(frozen=True)
class Limits:
    """The highest values that pass; None: no limit."""

    copy_rate: float | None = 0.01
    sim_score: float | None = None
    patch_copy_rate: float | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether a model passed, and a sentence that says why."""

    passed: bool
    sentence: str

    @property
    def exit_code(self) -> int:
        return PASSED if self.passed else OVER


def judge(scores: dict[str, Any], limits: Limits) -> Verdict:
    """Compare scores with limits."""
    protocol = scores["protocol"]
    unread = {side: len(unusable(scores["skipped"][side])) for side in SIDES}
    findings = _findings(scores, limits, unread)
    passed = not any(fails for fails, _ in findings)
    measured = f"descriptor {protocol['descriptor']}, copies over {protocol['copy_similarity']:g}"
    sentence = f"{'Passed' if passed else 'Failed'} ({measured}): {'; '.join(text for _, text in findings)}."
    if protocol["descriptor"] == "pixel":
        sentence += (
            " The descriptor pixel detects only near-exact copies: for a model to be published, set `descriptor` to "
            "sscd_disc_mixup."
        )
    left_out = [
        f"{unread[side]} of {scores['num_files'][side]} {name} images" for side, name in SIDES.items() if unread[side]
    ]
    if left_out:
        sentence += f" Left out as unreadable: {', '.join(left_out)}."
    if passed and limits.copy_rate is not None and COPY_RATE.interval(scores)[1] > limits.copy_rate:
        sentence += f" The upper end of the interval is over the limit: generate {_enough(limits.copy_rate)} images."
    return Verdict(passed, sentence)


def _findings(scores: dict[str, Any], limits: Limits, unread: dict[str, int]) -> list[tuple[bool, str]]:
    """(whether it fails the audit, what was found) of each limit, and of images too broken to prove anything.

    unread: how many images of each side are unreadable.
    """
    findings = []
    for metric, limit, found in (
        (COPY_RATE, limits.copy_rate, "are copies"),
        (PATCH_COPY_RATE, limits.patch_copy_rate, "contain local copies"),
    ):
        if limit is not None:
            rate, (low, high) = metric.value(scores), metric.interval(scores)
            text = (
                f"{round(rate * scores['num_generated'])} of {scores['num_generated']} images {found}: {rate:.1%} "
                f"(95% interval {low:.1%} to {high:.1%}), limit {limit:.1%}"
            )
            findings.append((rate > limit, text))
    broken = scores["num_of_one_colour"] + unread["generated"]
    if broken > BROKEN * scores["num_files"]["generated"]:
        text = f"{broken} images are a single flat colour or unreadable: a broken model proves nothing"
        findings.append((True, text))
    if unread["train"] > BROKEN * scores["num_files"]["train"]:
        text = f"more than {BROKEN:.0%} of the training images are unreadable: copies of them would go undetected"
        findings.append((True, text))
    if limits.sim_score is not None:
        sim_score = SIM_SCORE.value(scores)
        findings.append((sim_score > limits.sim_score, f"Sim Score {sim_score:.3f}, limit {limits.sim_score:.3f}"))
    return findings


def _enough(rate: float) -> str:
    """How many images without a copy bring the end of the Wilson interval, z^2 / (n + z^2), under ``rate``."""
    return "more" if rate <= 0 else f"about {round(3.84 * (1 - rate) / rate)} or more"


def audit(
    model: str | Path,
    train: ImageSet,
    prompts: list[Prompt],
    output: str | Path,
    settings: Settings,
    tools: Tools | None,
    limits: Limits,
    cache: str | Path | None = None,
    device: str = "cpu",
    state: PartialState | None = None,
    reference: ImageSet | None = None,
) -> Verdict | None:
    """Generate an image for each prompt, compare the images with the training set, and write ``images/``,
    ``scores.json``, ``report.html`` and ``summary.md`` into ``output``.

    Args:
        model: a pipeline's folder, or its id on the Hub.
        tools: for scoring; None on processes that only generate.
        state: of the processes, if several generate.
        cache, reference: see ``score``.

    Returns:
        The verdict; None on processes that only generated images.
    """
    output = Path(output)
    generate(model, prompts, output / "images", settings, device, state, desc="Drawing")
    if tools is None:
        return None
    generated = load_images(output / "images", "output")
    about = {"model": str(model), "model_hash": model_hash(model, lora=settings.lora), "settings": asdict(settings)}
    scores = score(generated, train, output, tools, cache, reference, about)
    verdict = judge(scores, limits)
    scored = [Scored.load(output, Path(str(model)).name)]
    write_report(scored, output / "report.html", verdict=(verdict.passed, verdict.sentence))
    write_text(output / "summary.md", summary(scored, verdict))
    return verdict


def summary(scored: list[Scored], verdict: Verdict) -> str:
    """The verdict and the numbers of one model in Markdown."""
    lines = [f"### {'✅' if verdict.passed else '❌'} Memorization audit of {scored[0].name}", "", verdict.sentence, ""]
    lines += [f"| | {scored[0].name} |", "|---|---|"]
    for heading, cells, show in table_rows(scored):
        value, interval = cells[0]
        around = f" ({show(interval[0])} – {show(interval[1])})" if interval else ""
        lines.append(f"| {heading} | {show(value)}{around} |")
    protocol = scored[0].scores["protocol"]
    name = f", protocol `{protocol['name']}`" if protocol["name"] else ""
    lines += ["", f"Descriptor `{protocol['descriptor']}`{name}, {protocol['neighbours']} search for neighbours."]
    for side, title in SIDES.items():
        if skipped := scored[0].scores["skipped"][side]:
            num_others = len(skipped) - len(unusable(skipped))
            lines.append(f"{len(skipped)} {title} files were left out (not images: {num_others}).")
    return "\n".join(lines) + "\n"


def card_path(model: str | Path) -> Path:
    """Where the model's card is. Raises ``UsageError`` if the model is not a folder."""
    folder = Path(model)
    if not folder.is_dir():
        raise UsageError(f"`card`: {model} is not a folder; download the model and audit the download")
    return folder / "README.md"


def write_card(model: str | Path, text: str) -> None:
    """Put the summary into the model's card; it replaces that of an earlier audit."""
    path = card_path(model)
    card = path.read_text(encoding="utf-8") if path.exists() else ""
    before, start, rest = card.partition(CARD_START)
    after = rest.partition(CARD_END)[2] if start else ""
    section = text.replace("### ", "## ", 1)
    write_text(path, f"{before.rstrip()}\n\n{CARD_START}\n{section}{CARD_END}\n{after.lstrip()}".lstrip())


def report_to_github(text: str, verdict: Verdict) -> None:
    """Append the summary to the job's page, and annotate a failure, in the format of GitHub Actions."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    else:
        print(text)
    if not verdict.passed:
        print(f"::error title=Memorization audit::{verdict.sentence}")
