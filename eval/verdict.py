"""The verdict: scores compared with limits."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ietagc_diffusers import __version__

from .approximate import describe
from .image_sets import unusable
from .metrics import Metric
from .metrics.patches import PATCH_COPY_RATE
from .metrics.similarity import COPY_RATE, EXCESS_COPY_RATE, HELDOUT_COPY_RATE, SIM_SCORE, TRAINING_COPY_RATE

SIDES = {"generated": "generated", "train": "training"}
PASSED, FAILED, INCONCLUSIVE = "passed", "failed", "inconclusive"
EXIT_CODES = {PASSED: 0, FAILED: 3, INCONCLUSIVE: 4}
BROKEN = 0.05  # with a larger share of unusable images, generated or training, a low copy rate proves nothing
TOO_FAR = 0.9  # Fréchet distance in units of the training images' variance: real sets stay under 0.65, noise is at 1
Z2 = 1.959964**2  # of a 95% interval
TAIL = 0.025
MOST_IMAGES = 100_000  # more are not advised
Outcome = Literal["passed", "failed", "inconclusive"]


@dataclass(frozen=True)
class Limits:
    """The highest values that pass; None: no limit.

    ``excess_copy_rate``: of the copy rate minus that of held-out pictures.
    """

    copy_rate: float | None = 0.01
    sim_score: float | None = None
    patch_copy_rate: float | None = None
    excess_copy_rate: float | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether a model passed, and sentences that say why."""

    outcome: Outcome
    sentence: str
    limits: Limits = Limits()
    strict: bool = False

    @property
    def passed(self) -> bool:
        return self.outcome == PASSED

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.outcome]

    def record(self) -> dict[str, Any]:
        """The content of ``verdict.json``."""
        return {
            "verdict": self.outcome,
            "exit_code": self.exit_code,
            "sentence": self.sentence,
            "limits": asdict(self.limits),
            "strict": self.strict,
            "version": __version__,
        }


@dataclass(frozen=True)
class Finding:
    """What one limit or one look at the images makes of the verdict; ``advice``: sentences that follow."""

    outcome: Outcome
    text: str
    advice: str = ""


def judge(scores: dict[str, Any], limits: Limits, strict: bool = False, warnings: Sequence[str] = ()) -> Verdict:
    """Compare scores with limits.

    Args:
        strict: whether intervals decide: a number passes only if the upper end of its 95% interval is within the limit,
            and fails only if the lower end is over it. Otherwise the number decides, and the verdict says where the
            interval reaches over the limit.
        warnings: sentences on doubts that the training images are those of the model. They are added to the verdict,
            and with ``strict`` a model does not pass with them.
    """
    protocol = scores["protocol"]
    findings = [*_of_limits(scores, limits, strict), *_of_images(scores)]
    outcomes = [finding.outcome for finding in findings]
    outcome: Outcome = "failed" if FAILED in outcomes else "inconclusive" if INCONCLUSIVE in outcomes else "passed"
    if strict and warnings and outcome == PASSED:
        outcome = "inconclusive"  # other images than those that were trained on prove nothing
    measured = f"descriptor {protocol['descriptor']}, copies over {protocol['copy_similarity']:g}"
    sentences = [f"{outcome.capitalize()} ({measured}): {'; '.join(finding.text for finding in findings)}."]
    sentences += [finding.advice for finding in findings if finding.advice]
    sentences += _usual(scores, limits, outcome)
    if protocol["descriptor"] == "pixel":
        sentences.append(
            "The descriptor pixel detects only near-exact copies: for a model to be published, set `descriptor` to "
            "sscd_disc_mixup."
        )
    if scores.get("too_small_for_descriptor"):
        sentences.append(
            f"Most images are so small that {protocol['descriptor']} misses many copies: audit with `descriptor` pixel "
            "too."
        )
    for name, found in scores.get("recall", {}).items():
        sentences.append(f"The search by FAISS ({name}) is not exact: {describe(found)}.")
    unread = {side: len(unusable(scores["skipped"][side])) for side in SIDES}
    left_out = [
        f"{unread[side]} of {scores['num_files'][side]} {name} images" for side, name in SIDES.items() if unread[side]
    ]
    if left_out:
        sentences.append(f"Left out as unreadable: {', '.join(left_out)}.")
    return Verdict(outcome, " ".join([*sentences, *warnings]), limits, strict)


def _of_limits(scores: dict[str, Any], limits: Limits, strict: bool) -> list[Finding]:
    """What each limit makes of its number."""
    images, findings = _images(scores), []
    for metric, limit, found in (
        (COPY_RATE, limits.copy_rate, "are copies"),
        (PATCH_COPY_RATE, limits.patch_copy_rate, "contain local copies"),
    ):
        if limit is not None:
            rate, interval = metric.value(scores), metric.interval(scores)
            text = (
                f"{round(rate * scores['num_generated'])} of {images} {found}: {rate:.1%} "
                f"({_around(metric, interval)}), limit {limit:.1%}"
            )
            needed = Z2 * limit * (1 - limit) / (rate - limit) ** 2 if rate != limit else math.inf
            none = Z2 * (1 - limit) / limit if limit else math.inf
            findings.append(_compared(rate, interval, limit, strict, text, _more(scores, needed, limit, none)))
    if limits.excess_copy_rate is not None:
        findings.append(_excess(scores, limits.excess_copy_rate, strict))
    if limits.sim_score is not None:
        findings.append(_sim_score(scores, limits.sim_score, strict))
    return findings


def _compared(value: float, interval: Sequence[float], limit: float, strict: bool, text: str, advice: str) -> Finding:
    """A number, with its interval, against its limit. ``advice``: how many images would do."""
    low, high = interval
    if low <= limit < high:
        said = f"The interval reaches over the limit{'' if value <= limit else ', and under it'}: {advice}."
        outcome: Outcome = "inconclusive" if strict else "passed" if value <= limit else "failed"
        return Finding(outcome, text, said)
    # Outside its interval a number does not lie, but for rounding: the interval agrees with it.
    return Finding("passed" if (high if strict else value) <= limit else "failed", text)


def _excess(scores: dict[str, Any], limit: float, strict: bool) -> Finding:
    excess, interval = EXCESS_COPY_RATE.value(scores), EXCESS_COPY_RATE.interval(scores)
    rate, usual = COPY_RATE.value(scores), HELDOUT_COPY_RATE.value(scores)
    if excess is None:
        reason = scores.get("reasons", {}).get(EXCESS_COPY_RATE.name, "they were not measured")
        return Finding("inconclusive", f"no copy rate of held-out pictures to compare with: {reason}")
    text = (
        f"copies are {rate:.1%} of {_images(scores)} and {usual:.1%} of {scores['num_heldout']} held-out pictures: "
        f"{100 * excess:+.1f} points ({_around(EXCESS_COPY_RATE, interval)}), limit {100 * limit:+.1f} points"
    )
    half = (interval[1] - excess) if excess <= limit else (excess - interval[0])
    factor = (half / (limit - excess)) ** 2 if excess != limit else math.inf
    few = f"about {factor:.1f} times as many images and held-out pictures would decide it"
    return _compared(excess, interval, limit, strict, text, few if factor < 1000 else "the two are too near to decide")


def _sim_score(scores: dict[str, Any], limit: float, strict: bool) -> Finding:
    """The Sim Score against its limit. Fewer than 72 images say nothing of how high the 95th percentile can be: none
    of them may lie above it.
    """
    value, interval = SIM_SCORE.value(scores), SIM_SCORE.interval(scores)
    number = _num_prompts(scores)
    around = f" ({_around(SIM_SCORE, interval)})" if interval else ""
    text = f"Sim Score {value:.3f}{around}, limit {limit:.3f}"
    fewest = math.ceil(math.log(TAIL) / math.log(0.95))
    if interval is None:
        interval = [value, value]
    if strict and value <= limit and number < fewest:
        return Finding(
            "inconclusive", text, f"{number} images say too little of a 95th percentile: {_say(scores, fewest)}."
        )
    if strict and number < 2:
        interval = [-1.0, 1.0]
    half = (interval[1] - value) if value <= limit else (value - interval[0])
    needed = number * (half / (limit - value)) ** 2 if value != limit else math.inf
    return _compared(value, interval, limit, strict, text, _more(scores, max(needed, fewest), limit))


def _of_images(scores: dict[str, Any]) -> list[Finding]:
    """What the images themselves make of the verdict, if they are too broken to prove anything."""
    findings = []
    unread = {side: len(unusable(scores["skipped"][side])) for side in SIDES}
    broken = scores["num_of_one_colour"] + unread["generated"]
    if broken > BROKEN * scores["num_files"]["generated"]:
        text = f"{broken} images are a single flat colour or unreadable: a broken model proves nothing"
        findings.append(Finding("failed", text))
    if unread["train"] > BROKEN * scores["num_files"]["train"]:
        text = f"more than {BROKEN:.0%} of the training images are unreadable: copies of them would go undetected"
        findings.append(Finding("failed", text))
    found = scores.get("plausibility") or {}
    median, usual, distance = (found.get(key) for key in ("median_similarity", "usual_similarity", "distance"))
    seen = []
    if median is not None and usual is not None and median < usual:
        seen.append(
            f"their similarity to the nearest training image is {median:.2f} in the median, where 99% of the training "
            f"images have {usual:.2f} or more to another one"
        )
    if distance is not None and distance >= TOO_FAR:
        seen.append(
            "their distribution is about as far from that of the training images as one grey picture is "
            f"(distance / variance {distance:.2f})"
        )
    if seen:
        text = f"the images do not look like what the model was trained on: {', and '.join(seen)}"
        advice = "Noise and pictures of another kind prove nothing about copying: look at the images in the report."
        findings.append(Finding("inconclusive", text, advice))
    return findings


def _usual(scores: dict[str, Any], limits: Limits, outcome: Outcome) -> list[str]:
    """Sentences on the rates that are usual without copying: of the training set, and of held-out pictures."""
    own, heldout = TRAINING_COPY_RATE.value(scores), HELDOUT_COPY_RATE.value(scores)
    sentences = []
    if own is not None:
        sentences.append(f"By the same measure {own:.1%} of the training images are copies of another one.")
    if heldout is not None and limits.excess_copy_rate is None:
        around = _around(HELDOUT_COPY_RATE, HELDOUT_COPY_RATE.interval(scores))
        sentences.append(f"Of {scores['num_heldout']} held-out pictures {heldout:.1%} are ({around}).")
    limit = limits.copy_rate
    if outcome == FAILED and limit is not None and own is not None and own > limit and heldout is None:
        sentences.append(
            "Other pictures of the same subjects count as copies here: compare with held-out pictures (`heldout`, "
            "`max_excess_copy_rate`)."
        )
    return sentences


def _around(metric: Metric, interval: Sequence[float]) -> str:
    return f"95% interval {metric.format(interval[0])} to {metric.format(interval[1])}"


def _num_prompts(scores: dict[str, Any]) -> int:
    return scores.get("num_prompts", scores["num_generated"])


def _images(scores: dict[str, Any]) -> str:
    """How many images there are, and of how many prompts if some have the same."""
    number, prompts = scores["num_generated"], _num_prompts(scores)
    return f"{number} images" if prompts == number else f"{number} images of {prompts} prompts"


def _say(scores: dict[str, Any], number: float) -> str:
    kind = "images" if _num_prompts(scores) == scores["num_generated"] else "different prompts"
    return f"about {number:.0f} {kind} or more would decide it"


def _more(scores: dict[str, Any], needed: float, limit: float, none: float | None = None) -> str:
    """How many images, or different prompts, bring the interval to one side of the limit, if the number stays.

    none: how many do if none of them is a copy, for a share.
    """
    if none is not None and limit <= 0:
        return "no number of images shows that there are none; set a limit over 0"
    if needed <= MOST_IMAGES:
        return _say(scores, needed)
    near = "the number is so near to the limit that more images may not decide it"
    return near if none is None else f"{near}; without a copy {_say(scores, none)}"
