"""The gate: generate, score, judge, and tell everyone. What is told cannot change the verdict."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ietagc_diffusers.console import say
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.files import write_json, write_text
from ietagc_diffusers.run_folder import RunFolder

from .drawing import drawing_of, sentence_of
from .generate import Settings, generate, model_hash, pipeline_folder
from .heldout import check_held_out_files
from .image_sets import ImageSet, load_images, unusable
from .local_masks import write_masks
from .membership import Target
from .prompts import Prompt
from .report import MASKS, Scored, table_rows, write_report
from .score import Tables, Tools, compare
from .verdict import FAILED, INCONCLUSIVE, PASSED, SIDES, Limits, Verdict, judge

__all__ = ["Limits", "Verdict", "audit", "card_path", "check_plain", "judge", "report_to_github", "write_card"]

IMAGES = "images"
WRITTEN = ("scores.json", "nearest.parquet", "background.parquet", "verdict.json", "report.html", "summary.md")
CARD_START, CARD_END = "<!-- memorization audit -->", "<!-- end of memorization audit -->"
MASKED = 24  # most similar images whose local masks are shown
MARKS = {PASSED: "✅", FAILED: "❌", INCONCLUSIVE: "⚠️"}


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
    heldout: ImageSet | None = None,
    strict: bool = False,
    warnings: Sequence[str] = (),
    notes: Sequence[str] = (),
    prompts_file: str | None = None,
    card: bool = False,
    github: bool = False,
    masks: tuple[Target, Target] | None = None,
    tell: Callable[[Verdict], None] = lambda verdict: say(verdict.sentence),
) -> Verdict | None:
    """Generate an image for each prompt, compare the images with the training set, and write ``images/``,
    ``verdict.json``, ``scores.json``, ``report.html`` and ``summary.md`` into ``output``.

    Once the images are compared nothing changes the verdict: a file that cannot be written is told in a line.

    Args:
        model: a pipeline's folder, or its id on the Hub.
        tools: for scoring; None on processes that only generate.
        state: of the processes, if several generate.
        cache, reference, heldout, notes: see ``score.compare``.
        strict, warnings: see ``judge``.
        prompts_file: the name of the file of the prompts, if they are not the training images' captions.
        card, github: whether the summary is put into the model's card, and shown by GitHub Actions.
        masks: the model and its base, to show in the report where the most similar images copy; None: not shown.
        tell: called with the verdict as soon as there is one, before the report is written.

    Returns:
        The verdict; None on processes that only generated images.

    Raises:
        UsageError: see ``generate`` and ``score.compare``. Held-out files that are also training files are refused
            before anything is drawn.
    """
    output = Path(output)
    if tools is not None:
        _remove_earlier(output)
    if heldout is not None:
        check_held_out_files(heldout, train)
    generate(model, prompts, output / IMAGES, settings, device, state, desc="Drawing")
    if tools is None:
        return None
    generated = load_images(output / IMAGES, "output")
    # Files of another origin, put beside them, would dilute the rate.
    generated = generated.select(i for i, row in enumerate(generated.rows) if row.get("seed") is not None)
    about = {
        "model": str(model),
        "model_hash": model_hash(model, lora=settings.lora),
        "weights_hash": RunFolder(model).weights_hash() if Path(model).is_dir() else None,
        "settings": asdict(settings),
        "drawing": drawing_of(output / IMAGES, len(prompts), pipeline_folder(model), prompts_file),
    }
    found = compare(generated, train, tools, cache, reference, about, heldout, notes)
    verdict = judge(found.scores, limits, strict, warnings)
    unharmed("verdict.json", lambda: write_json(output / "verdict.json", verdict.record()))
    tell(verdict)
    unharmed("the scores", lambda: found.save(output))
    if masks is not None:
        similar = _most_similar(generated, found)
        unharmed("the local masks", lambda: write_masks(*masks, similar, output / MASKS, device))
    scored, text = _scored(found, Path(str(model)).name, output / MASKS), verdict.sentence
    try:
        text = summary([scored], verdict)
    except Exception as error:  # as below
        say(_not_written("the summary", error))
    unharmed("summary.md", lambda: write_text(output / "summary.md", text))
    if card:
        unharmed("the model's card", lambda: write_card(model, text))
    if github:
        unharmed("GitHub's summary", lambda: report_to_github(text, verdict))
    shown = (verdict.outcome, verdict.sentence)
    if unharmed("report.html", lambda: write_report([scored], output / "report.html", verdict=shown)):
        say(output / "report.html")
    return verdict


def _remove_earlier(output: Path) -> None:
    """Remove the verdict of an earlier audit, which would be read as this one's if this one is cut off."""
    files = [output / name for name in ("verdict.json", "summary.md", "report.html")]
    for path in (*files, *output.glob(f"{MASKS}/{6 * '[0-9]'}.png")):
        try:
            path.unlink(missing_ok=True)
        except OSError:  # a folder that cannot be written is told of when it is written to
            return


def _not_written(name: str, error: Exception) -> str:
    return f"{name} could not be written: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def unharmed(name: str, write: Callable[[], Any]) -> bool:
    """Whether ``write()``, which writes ``name``, succeeded; if not, a line says why."""
    try:
        write()
    except Exception as error:  # of whatever kind: the verdict is already known
        say(_not_written(name, error))
        return False
    return True


def _most_similar(generated: ImageSet, found: Tables) -> ImageSet:
    """The images of the most similar pairs."""
    rows = zip(found.nearest["similarity"], found.nearest["file_name"], strict=True)
    names = [name for _, name in sorted(rows, reverse=True)[:MASKED]]
    return generated.select(generated.names.index(name) for name in names)


def _scored(found: Tables, name: str, masks: Path) -> Scored:
    nearest, background = found.columns()
    return Scored(name, found.scores, nearest, background, masks)


def check_plain(settings: Settings) -> None:
    """Raise ``UsageError`` unless images are drawn as the weights draw them by themselves, which a card is about."""
    for name in ("mitigation", "negative_prompt", "lora"):
        value = getattr(settings, name)
        if value:
            raise UsageError(
                f"`card` with `{name}` {value}: the card is read as a statement on the weights, which others use "
                f"without it; audit without `{name}`, or without `card`"
            )


def check_apart(
    output: str | Path,
    inputs: dict[str, str | None],
    model: str | Path | None = None,
    setting: str = "output",
    recorded: Sequence[str] = (),
) -> None:
    """Raise ``UsageError`` if what is written into the folder ``output`` would change what is read.

    Args:
        inputs: {setting: folder of images, or file of prompts, that is read}; what is not on this machine, such as an
            id on the Hub, cannot be changed.
        model: the model's folder, or its id on the Hub.
        recorded: folders of training images that the model records, which the next training reads.
    """
    place = Path(output).resolve()
    drawn = place / IMAGES
    read_here = [(f"`{name}` {value}", value) for name, value in inputs.items()]
    read_here += [(f"{value}, which the model was trained on", value) for value in recorded]
    for name, value in read_here:
        if value is None or not Path(value).exists():
            continue
        read = Path(value).resolve()
        if read.is_dir():
            spoilt = place.is_relative_to(read) or drawn.is_relative_to(read) or read.is_relative_to(drawn)
        else:
            spoilt = read.is_relative_to(drawn) or (read.parent == place and read.name in WRITTEN)
        if spoilt:
            raise UsageError(
                f"`{setting}` {output}: what is written there would get into {name}; give a folder elsewhere"
            )
    if model is not None and Path(model).is_dir() and _spoils_model((place, drawn), Path(model).resolve()):
        raise UsageError(
            f"`{setting}` {output}: is the model's folder or inside one of its parts; give another folder, such as "
            f"{Path(model) / 'audit'}"
        )


def _spoils_model(places: Sequence[Path], model: Path) -> bool:
    run = RunFolder(model)
    parts = [path.resolve() for path in [run.records, *run.belongings()]]
    inside = any(place.is_relative_to(part) for place in places for part in parts)
    return inside or model in places or model.is_relative_to(places[-1])


def summary(scored: list[Scored], verdict: Verdict) -> str:
    """The verdict and the numbers of one model in Markdown."""
    name, scores = _markdown(scored[0].name.replace("`", "'")), scored[0].scores
    lines = [f"### {MARKS[verdict.outcome]} Memorization audit of {name}", "", _markdown(verdict.sentence), ""]
    lines += [f"| | {name} |", "|---|---|"]
    for heading, cells, show in table_rows(scored):
        value, interval = cells[0]
        around = f" ({show(interval[0])} – {show(interval[1])})" if interval else ""
        lines.append(f"| {heading} | {show(value)}{around} |")
    protocol = scores["protocol"]
    named = f", protocol `{protocol['name']}`" if protocol["name"] else ""
    lines += ["", f"Descriptor `{protocol['descriptor']}`{named}, {protocol['neighbours']} search for neighbours."]
    if scores.get("drawing"):
        lines += ["", _markdown(sentence_of(scores["drawing"]))]
    for side, title in SIDES.items():
        if skipped := scores["skipped"][side]:
            num_others = len(skipped) - len(unusable(skipped))
            lines += ["", f"{len(skipped)} {title} files were left out (not images: {num_others})."]
    return "\n".join(lines) + "\n"


def _markdown(text: str) -> str:
    """A name or a sentence on one line, without what Markdown or HTML would read as more than text."""
    escaped = "".join(f"\\{letter}" if letter in "\\|*[]$" else letter for letter in " ".join(text.split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;")


def card_path(model: str | Path) -> Path:
    """Where the model's card is. Raises ``UsageError`` if the model is not a folder."""
    folder = Path(model)
    if not folder.is_dir():
        raise UsageError(f"`card`: {model} is not a folder; download the model and audit the download")
    return folder / "README.md"


def write_card(model: str | Path, text: str) -> None:
    """Put the summary into the model's card; it replaces that of an earlier audit.

    Raises:
        UsageError: the end of the earlier summary is missing: what follows it may be someone's text.
    """
    path = card_path(model)
    card = path.read_text(encoding="utf-8") if path.exists() else ""
    before, start, rest = card.partition(CARD_START)
    _, end, after = rest.partition(CARD_END)
    if start and not end:
        raise UsageError(f"{path}: has the line {CARD_START} without {CARD_END}; put the end where it belongs")
    section = text.replace("### ", "## ", 1)
    write_text(path, f"{before.rstrip()}\n\n{CARD_START}\n{section}{CARD_END}\n{after.lstrip()}".lstrip())


def report_to_github(text: str, verdict: Verdict) -> None:
    """Append the summary to the job's page, and annotate anything but a pass, in the format of GitHub Actions.

    Raises:
        OSError: the page cannot be written; the annotation is printed all the same.
    """
    if not verdict.passed:
        data = verdict.sentence.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
        say(f"::error title=Memorization audit::{data}")
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    else:
        say(text)
