"""What audits of a run found, for its card, read from the files that ``ietagc audit`` wrote into the run's folder."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult

from ..errors import UsageError
from ..files import read_json, without_places
from ..run_folder import RunFolder
from .sections import SOURCE

logger = logging.getLogger(__name__)

VERDICT, SCORES = "verdict.json", "scores.json"
OUTCOMES = ("passed", "failed", "inconclusive")
ADDRESS = "https://github.com/liuxiao-guan/IET-AGC"
# The numbers of scores.json that a card shows: title, and whether they are shares.
SHOWN = {
    "copy_rate": ("copy rate", True),
    "heldout_copy_rate": ("copy rate of held-out pictures", True),
    "excess_copy_rate": ("copy rate minus that of held-out pictures", True),
    "train_train_copy_rate": ("copy rate of training images among themselves", True),
    "patch_copy_rate": ("patch copy rate (local copies)", True),
    "sim_score": ("Sim Score (95th percentile of similarity)", False),
}
LIMITS = {name: SHOWN[name][0] for name in ("copy_rate", "excess_copy_rate", "patch_copy_rate", "sim_score")}
# What a result says of its protocol, where it is recorded.
PROTOCOL = ("descriptor", "copy_similarity", "neighbours", "views")
DRAWING = ("num_images", "num_prompts", "num_inference_steps", "guidance_scale", "scheduler", "dtype")


@dataclass(frozen=True)
class Audit:
    """A verdict with its scores, of the weights that are in the run's folder."""

    verdict: dict[str, Any]
    scores: dict[str, Any]

    @property
    def protocol(self) -> dict[str, Any]:
        """How it was measured: plain values by name."""
        protocol, drawing = (_table(self.scores.get(key)) for key in ("protocol", "drawing"))
        found = {"protocol": protocol.get("name")} | {name: protocol.get(name) for name in PROTOCOL}
        found |= {name: drawing.get(name) for name in DRAWING}
        found["num_training_images"] = self.scores.get("num_train")
        return {name: without_places(value) for name, value in found.items() if _is_plain(value)}

    @property
    def numbers(self) -> list[tuple[str, float, tuple[float, float] | None]]:
        """(name, value, 95% interval or None), those that were measured."""
        found = []
        for name in SHOWN:
            value, interval = _number(self.scores.get(name)), self.scores.get(f"{name}_ci95")
            ends = [_number(end) for end in interval] if isinstance(interval, list) else []
            known = [end for end in ends if end is not None]
            if value is not None:
                found.append((name, value, (known[0], known[1]) if len(ends) == len(known) == 2 else None))
        return found


def audits_of(run: RunFolder) -> list[Audit]:
    """The audits in the run's folder and in the folders right inside it, by name. Audits of other weights, or of images
    that were drawn with more than the weights, are passed over, and a line of the log says so.
    """
    found, mark = [], None
    for folder in [run.path, *sorted(path for path in run.path.glob("*") if path.is_dir() and not path.is_symlink())]:
        if not (folder / VERDICT).is_file() or not (folder / SCORES).is_file():
            continue
        mark = mark or run.weights_hash()
        try:
            audit = Audit(_table(read_json(folder / VERDICT)), _table(read_json(folder / SCORES)))
        except UsageError as error:
            logger.warning(f"{error}; the card is written without this audit")
            continue
        doubt = _doubt(audit, mark)
        if doubt:
            logger.warning(f"{folder}: the audit {doubt}; the card is written without it")
        else:
            found.append(audit)
    return found


def _doubt(audit: Audit, mark: str) -> str | None:
    """Why an audit says nothing of the weights with this mark."""
    drawing = _table(audit.scores.get("drawing"))
    if audit.verdict.get("verdict") not in OUTCOMES:
        return "has no verdict"
    if audit.scores.get("weights_hash") != mark:
        return "is not of the weights that are here now"
    added = [name for name in ("mitigation", "negative_prompt", "lora") if drawing.get(name)]
    return f"is of images that were drawn with {added[0]}, which is not part of the weights" if added else None


def as_markdown(audits: Sequence[Audit]) -> str:
    """A section for each audit, for the card."""
    return "\n".join(_section(audit) for audit in audits)


def _section(audit):
    limits = [
        f"{title} at most {_shown(name, value)}"
        for name, title in LIMITS.items()
        if (value := _number(_table(audit.verdict.get("limits")).get(name))) is not None
    ]
    lines = ["## Memorization audit", "", f"Verdict: **{audit.verdict['verdict']}**"]
    lines[-1] += f" ({', '.join(limits)})." if limits else "."
    lines += ["", "| | | 95% interval |", "|---|---|---|"]
    for name, value, around in audit.numbers:
        ends = "" if around is None else " to ".join(_shown(name, end) for end in around)
        lines.append(f"| {SHOWN[name][0]} | {_shown(name, value)} | {ends} |")
    protocol = [f"{_words(name)} {plain(value)}" for name, value in audit.protocol.items()]
    return "\n".join([*lines, "", f"Measured with: {', '.join(protocol)}.", ""])


def _words(name):
    return name.removeprefix("num_").replace("_", " ")


def results(audits: Sequence[Audit], task: str, dataset: str, dataset_type: str) -> list[EvalResult]:
    """The numbers for ``model-index``.

    Args:
        task: the Hub's name of it.
        dataset: what the model was trained on; dataset_type: its Hub id, or a kind.
    """
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset_type,
            dataset_name=dataset,
            metric_type=name,
            metric_name=SHOWN[name][0],
            metric_value=value,
            metric_args={"verdict": audit.verdict["verdict"]}
            | ({} if around is None else {"ci95": list(around)})
            | audit.protocol,
            source_name=SOURCE,
            source_url=ADDRESS,
        )
        for audit in audits
        for name, value, around in audit.numbers
    ]


def plain(text: Any) -> str:
    """A value on one line, without what Markdown or HTML would read as more than text."""
    line = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{letter}" if letter in "\\|*_[]$`" else letter for letter in line)


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def _is_plain(value: Any) -> bool:
    return isinstance(value, str) or _number(value) is not None


def _shown(name: str, value: float) -> str:
    return f"{value:.1%}" if SHOWN[name][1] else f"{value:.3f}"
