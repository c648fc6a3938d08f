"""The model card of a run."""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .. import __version__
from ..errors import UsageError
from ..files import place_name, without_places, write_text
from ..method.config import MitigationConfig
from ..run_folder import RunFolder
from .content import CARD
from .findings import Audit, as_markdown, audits_of, plain, results
from .repository import Patience, Repository, UploadError
from .sections import END, START, join, merge, read_card, split

if TYPE_CHECKING:
    from PIL import Image

    from ..training.settings import RunSettings

TAGS = ("diffusers", "diffusers-training", "ietagc")
PROMPTED, UNPROMPTED = "text-to-image", "unconditional-image-generation"  # the Hub's names of the tasks
LICENCE = ("license", "license_name", "license_link")
NUMBERS = {
    "learning_rate": "learning rate",
    "train_batch_size": "batch size",
    "gradient_accumulation_steps": "gradient accumulation",
    "resolution": "resolution",
    "mixed_precision": "mixed precision",
    "deduplicate": "de-duplication",
    "seed": "seed",
}


@dataclass(frozen=True)
class Facts:
    """What a card tells of a run.

    Args:
        repo_id: of the repository.
        values: the run's effective settings by name, the method's too, see ``RunSettings.values``.
        rows: those of rounds.jsonl.
        tags: of the model's family.
        prompted: whether the model draws what a prompt says.
        gallery: the images, as Markdown.
        licence: of the base, as its card's metadata have it; {} if that is not known.
        stated: whether the card states a licence already.
        audits: what audits found.
        num_left_out: rows of the training set that were excluded, or are near duplicates.
    """

    repo_id: str
    values: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    tags: Sequence[str]
    prompted: bool
    gallery: str = ""
    licence: Mapping[str, Any] = field(default_factory=dict)
    stated: bool = False
    audits: Sequence[Audit] = ()
    num_left_out: int = 0

    @property
    def base(self) -> str | None:
        """The base model, for readers."""
        base = self.values.get("pretrained_model_name_or_path")
        return base and without_places(base)

    @property
    def base_id(self) -> str | None:
        """Its id on the Hub; None if it is none: the Hub refuses cards with the paths of a machine."""
        return hub_id(self.values.get("pretrained_model_name_or_path"))

    @property
    def source(self) -> str:
        """The training set, for readers."""
        name = self.values.get("dataset_name")
        return without_places(name) if name else "an image folder"


def write_card(
    settings: "RunSettings",
    repo_id: str,
    images: Sequence["Image.Image"],
    rows: Sequence[dict[str, Any]],
    tags: Sequence[str] = (),
    folder: str | Path | None = None,
) -> None:
    """Write README.md, with the validation images if there are any, into the output folder. In a card that is there
    already only the run's section and metadata change, see ``sections.merge``.

    Args:
        rows: those of rounds.jsonl.
        tags: of the model's family.
        folder: another folder to write into.
    """
    run = RunFolder(folder or settings.output_dir)
    if images:
        from diffusers.utils import make_image_grid

        per_prompt, _ = settings.validation
        columns = per_prompt if per_prompt > 1 else len(images)
        make_image_grid(list(images), len(images) // columns, columns).save(run.card_grid_file)
    _write(run, repo_id, settings.values(), rows, tags, settings.prompted, settings.hub_token)


def write_card_of_records(run: RunFolder, repo_id: str, token: str | None = None) -> None:
    """The same for a run that is finished, from what it recorded. Images are not drawn again."""
    tags = _tags(run)
    _write(run, repo_id, run.config(), run.rounds(), tags, UNPROMPTED not in tags, token)


def _tags(run: RunFolder) -> Sequence[str]:
    """The tags of the model's family, or of the card if it is there; those of an adapter are its base's."""
    metadata, _, text = split(read_card(run) or "")
    if metadata and START in text and isinstance(metadata.get("tags"), list):
        return [tag for tag in metadata["tags"] if isinstance(tag, str)]
    from ..families import family_of

    values = run.config()
    base = values.get("pretrained_model_name_or_path") if run.is_adapter else run.path
    try:
        return family_of(base, values.get("revision"), values.get("cache_dir")).tags
    except UsageError:  # the base is no longer there
        return (PROMPTED,)


def hub_id(place: str | None) -> str | None:
    """A Hub id as it is; None for what is, or can only be, a path."""
    if not place or without_places(place) != place or Path(place).exists():
        return None
    try:
        validate_repo_id(place)
    except HFValidationError:
        return None
    return place


def licence_of(values: Mapping[str, Any], token: str | None = None) -> dict[str, Any]:
    """What the base's card says of its licence: the entries of ``LICENCE`` that it has; {} if that is not known."""
    base = values.get("pretrained_model_name_or_path")
    if not base:
        return {}
    known = hub_id(base)
    try:
        if known is None:
            card: str | None = (Path(base) / CARD).read_text(encoding="utf-8")
        else:
            card = _card_of(known, values.get("revision"), values.get("cache_dir"), token)
    except (OSError, UnicodeDecodeError, UploadError, UsageError):  # none, or none in reach
        return {}
    metadata, _, _ = split(card or "")
    found = {key: value for key in LICENCE if (value := (metadata or {}).get(key))}
    link = found.get("license_link")
    if isinstance(link, str) and not re.match(r"https?://", link):
        if known is None:
            del found["license_link"]
        else:
            found["license_link"] = f"https://huggingface.co/{known}/blob/main/{link.removeprefix('./')}"
    return found if found.get("license") else {}


@functools.cache
def _card_of(base: str, revision: str | None, cache_dir: str | None, token: str | None) -> str | None:
    """The card of a model on the Hub, from the cache if it is there."""
    cached = try_to_load_from_cache(base, CARD, cache_dir=cache_dir, revision=revision)
    if isinstance(cached, str):
        return Path(cached).read_text(encoding="utf-8")
    return Repository(base, revision, token=token, patience=Patience(tries=2)).card()


def _write(
    run: RunFolder,
    repo_id: str,
    values: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    tags: Sequence[str],
    prompted: bool,
    token: str | None,
) -> None:
    """Write the card, or its part of a card that is there."""
    there = read_card(run)
    gallery = ""
    if run.card_grid_file.is_file():
        gallery = f"![Validation images](./{run.card_grid_file.name})\n"
        prompts = values.get("validation_prompts") or []
        if prompted and prompts:
            gallery += f"\nPrompts: {', '.join(f'“{plain(prompt)}”' for prompt in prompts)}\n"
    stated = bool((split(there or "")[0] or {}).get("license"))
    licence, left_out = licence_of(values, token), run.training_set().get("num_left_out") or 0
    facts = Facts(repo_id, values, rows, tags, prompted, gallery, licence, stated, audits_of(run), left_out)
    card = join(metadata_of(facts), f"\n# {facts.repo_id}\n\n{START}\n{_section(facts)}\n{END}\n")
    write_text(run.card_file, card if there is None else merge(there, card, str(run.card_file)))


def metadata_of(facts: Facts) -> dict[str, Any]:
    """The card's metadata, as the Hub reads them."""
    task = PROMPTED if facts.prompted else UNPROMPTED
    dataset = hub_id(facts.values.get("dataset_name"))
    found = results(facts.audits, task, place_name(facts.source), dataset or "imagefolder")
    return ModelCardData(
        **facts.licence,
        library_name="diffusers",
        base_model=facts.base_id,
        datasets=[dataset] if dataset else None,
        tags=list(dict.fromkeys([*facts.tags, *(("lora",) if facts.values.get("lora_rank") else ()), *TAGS])),
        model_name=facts.repo_id.rpartition("/")[2] if found else None,
        eval_results=found or None,
        inference=True,
    ).to_dict()


def _section(facts: Facts) -> str:
    values = facts.values
    start = f"Fine-tuned from **{plain(facts.base)}**" if facts.base else "Trained from scratch"
    method = [
        (f"`{entry.name}`", value)
        for entry in fields(MitigationConfig)
        if (value := values.get(entry.name)) is not None
    ]
    known = {name: values[name] for name in NUMBERS if values.get(name) is not None}
    training = [(title, known.get(name, "none")) for name, title in NUMBERS.items()]
    if facts.num_left_out:
        training.append(("training images left out (excluded, near duplicates)", facts.num_left_out))
    if values.get("prior_dir"):
        training.insert(0, ("prior preservation, weight", values.get("prior_loss_weight")))
    if values.get("canary"):
        training.insert(0, ("canaries: training images shown with a grey border", values["canary"]))
    if values.get("lora_rank"):
        training.insert(0, ("LoRA rank, alpha", f"{values['lora_rank']}, {values.get('lora_alpha')}"))
    parts = [
        f"{start} on **{plain(facts.source)}** with `{values.get('mitigation')}`\n"
        "against memorization of the training images ([IET-AGC+](https://github.com/liuxiao-guan/IET-AGC)).",
        facts.gallery,
        f"## Use\n\n{_usage(facts)}",
        f"## Mitigation\n\n{_in_words(values)}\n\n{_outcome(facts)}\n{_as_table(method)}",
        f"## Training\n\n{_as_table([*training, ('ietagc-diffusers', __version__)])}",
        as_markdown(facts.audits),
        f"## Licence\n\n{_licence(facts)}",
    ]
    return "\n\n".join(part.strip() for part in parts if part)


def _as_table(rows):
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows)])


def _cell(value):
    return " ".join(str(value).replace("|", "\\|").split())


def _licence(facts):
    if facts.licence:
        return f"That of the base model: {plain(facts.licence.get('license_name') or facts.licence['license'])}."
    if facts.stated:
        return "As the metadata of this card state it."
    if facts.base:
        return "The licence of the base model is not known here, so none is stated: it holds for this model too."
    return "None was chosen yet."


def _in_words(values):
    """The method's equations in words, as far as they took part."""
    config, said = values.get, []
    if (config("num_shards") or 1) > 1:
        where = "each on its own shard of" if config("shard_data") else "each on all of"
        said.append(
            f"{config('num_shards')} copies of the model (proxies) were trained {where} the training set, and their "
            "weights averaged after each round (IET)."
        )
    other = {
        "base": "the base model's",
        "past": "that of the run's own model at a quarter to a half of the steps so far",
    }.get(config("calibrate"))
    usual = f"{other} on the same noisy image and by " if other else ""
    ratio = (
        f"The loss of each image, divided by {usual}the moving average of losses at its noise level, says how well it "
        "is known"
    )
    if config("skip_threshold"):
        said.append(f"{ratio}; images with a ratio under {config('skip_threshold'):g} were left out of the step (AGC).")
    elif config("skip_rate"):
        said.append(f"{ratio}; the {config('skip_rate'):.1%} with the lowest ratios were left out of their steps.")
    elif config("skip_false_rate"):
        rate = f"{config('skip_false_rate'):.1%}"
        said.append(f"{ratio}; images as abnormal as the lowest {rate} of held-out images were left out of the step.")
    if (config("augment_range") or 1) > 1:
        said.append("Those with a ratio little above were augmented, the more the lower it was (TAA).")
    if config("redistribute_fraction") and (config("num_shards") or 1) > 1:
        share = f"{config('redistribute_fraction'):.0%}"
        said.append(f"After each round {share} of each shard, the images skipped most often, moved on (MSR).")
    return " ".join(said)


def _outcome(facts):
    if not facts.rows:
        return ""
    last, values = facts.rows[-1], facts.values
    skipped, augmented = last["skip_rate"], last["augment_rate"]
    outcome = f"In the last round {skipped:.1%} of the samples were skipped and {augmented:.1%} augmented.\n"
    if values.get("dp_noise_multiplier") is not None:
        from ..training.privacy import in_words

        outcome += (
            f"\nTrained by DP-SGD, noise multiplier {values['dp_noise_multiplier']:g}, each image's gradient clipped "
            f"to {values['dp_max_grad_norm']:g}: {in_words(dict(last), values['dp_delta'])}. This holds against those "
            "who do not know the seed, from which the noise was drawn.\n"
        )
    return outcome


def _usage(facts):
    """How to draw with the model, as Markdown."""
    values = facts.values
    if values.get("ambient_corruption") is not None:
        return f"""The UNet takes a mask as a fourth channel, which `DDPMPipeline` does not give it.
Download it, and draw with the software that it was trained with (ietagc-diffusers):

```bash
ietagc generate --model {facts.repo_id.rpartition("/")[2]} --num_images 16 --output images
```"""
    prompt = (values.get("validation_prompts") or ["a photo"])[0]
    call = f"pipeline({prompt!r})" if facts.prompted else "pipeline()"
    adapter = bool(values.get("lora_rank"))
    start = facts.base if adapter else facts.repo_id
    load = f'pipeline = DiffusionPipeline.from_pretrained("{start}", dtype=torch.float16)'
    if adapter:
        load += f'\npipeline.load_lora_weights("{facts.repo_id}")'
    return f"""```python
import torch
from diffusers import DiffusionPipeline

{load}
image = {call}.images[0]
```"""
