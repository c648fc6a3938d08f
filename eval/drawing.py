"""How the images of a folder were drawn, as ``generate`` recorded it, for scores, reports and cards."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.files import read_json

from .generate import SETTINGS_FILE
from .schedulers import describe

RECORDED = (
    "model", "lora", "num_inference_steps", "guidance_scale", "mitigation", "negative_prompt", "dtype", "num_images",
)  # fmt: skip
CAPTIONS = "captions of training images"
NO_PROMPTS = "none"


def drawing_of(
    source: str | Path, num_files: int, model: str | Path | None = None, prompts: str | None = None
) -> dict[str, Any] | None:
    """How the images of the folder ``source`` were drawn: JSON values; None if ``generate`` did not draw these images.

    Args:
        num_files: how many images there are: with others among them the record does not describe the set.
        model: the pipeline's folder; None is the one that the record names, if it is on this machine.
        prompts: the file of the prompts; None: what the images' metadata says.
    """
    folder = Path(source)
    if not (folder / SETTINGS_FILE).is_file():
        return None
    try:
        settings = read_json(folder / SETTINGS_FILE)
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
        if settings.get("num_images") != num_files or len(rows) != num_files:
            return None
        with Image.open(folder / rows[0]["file_name"]) as image:
            size = list(image.size)
        guided = settings.get("base_guidance")
        return {key: settings.get(key) for key in RECORDED} | {
            "scheduler": _scheduler(settings.get("scheduler"), model or settings.get("model")),
            "resolution": size,
            "seeds": [rows[0]["seed"], rows[-1]["seed"]],
            "prompts": prompts or _prompts(rows),
            "num_prompts": len({row["text"] for row in rows}),
            **({} if guided is None else {"base_guidance": guided}),
        }
    except (OSError, UsageError, ValueError, LookupError, TypeError, AttributeError):
        return None  # another tool's file, or one that is damaged: nothing is known


def _prompts(rows):
    if not any(row["text"] for row in rows):
        return NO_PROMPTS
    return CAPTIONS if all(row.get("source") for row in rows) else "prompts of one's own"


def _scheduler(given: str | None, model: str | Path | None) -> str | None:
    """The scheduler's class: the given one's, with options, or the model's own if its folder is on this machine."""
    if given is not None:
        return describe(given)
    path = Path(str(model)) / "scheduler" / "scheduler_config.json"
    return json.loads(path.read_text(encoding="utf-8")).get("_class_name") if path.is_file() else None


def sentence_of(drawing: dict[str, Any]) -> str:
    """The record as a sentence."""
    width, height = drawing["resolution"]
    first, last = drawing["seeds"]
    mitigation = f"with the mitigation {drawing['mitigation']}" if drawing["mitigation"] else "without mitigation"
    negative = f", negative prompt “{drawing['negative_prompt']}”" if drawing["negative_prompt"] else ""
    adapters = [Path(place).name for place in drawing.get("lora") or ()]
    lora = f" with the adapter{'s' if len(adapters) > 1 else ''} {', '.join(adapters)}" if adapters else ""
    scheduler = f" of {drawing['scheduler']}" if drawing["scheduler"] else ""
    seeds = f"seed {first}" if first == last else f"seeds {first} to {last}"
    steps = f"{drawing['num_inference_steps']} steps{scheduler}"
    if drawing["prompts"] == NO_PROMPTS:
        return (
            f"Drawn without prompts: {drawing['num_images']} images, {steps}, {width} x {height} pixels, "
            f"{drawing['dtype']}, {seeds}."
        )
    guidance = f"guidance {drawing['guidance_scale']:g}"
    if away := drawing.get("base_guidance"):
        guidance = f"guidance away from the base {away['scale']:g}, correction {away['correction']:g}"
    return (
        f"Drawn{lora} {mitigation}{negative}: {drawing['num_images']} images, {steps}, "
        f"{guidance}, {width} x {height} pixels, {drawing['dtype']}, {seeds}; "
        f"{drawing['num_prompts']} different prompts: {drawing['prompts']}."
    )
