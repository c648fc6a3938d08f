"""The model card and the upload."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from diffusers.utils import make_image_grid
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from huggingface_hub import create_repo, upload_file, upload_folder
from PIL import Image

from . import __version__
from .errors import UsageError
from .families import place_name
from .run_folder import RunFolder
from .training.privacy import in_words
from .training.settings import RunSettings

TAGS = ("diffusers", "diffusers-training", "ietagc")
OF_ADAPTERS = ("lora",)


def create(settings: RunSettings) -> str:
    """Create the repository (or find it). Returns its id."""
    name = settings.hub_model_id or Path(settings.output_dir).resolve().name
    try:
        private = settings.hub_private_repo or None  # None: as the account has it
        return create_repo(repo_id=name, exist_ok=True, private=private, token=settings.hub_token).repo_id
    except Exception as error:  # of the network, the Hub, or a name that it does not take
        raise UsageError(
            f"`push_to_hub` {name}: the repository cannot be created: {' '.join(str(error).split())[:300]}"
        ) from error


def write_card(
    settings: RunSettings,
    repo_id: str,
    images: Sequence[Image.Image],
    rows: Sequence[dict[str, Any]],
    tags: Sequence[str] = (),
) -> None:
    """Write README.md, with the validation images if there are any, into the output folder.

    ``rows``: those of rounds.jsonl; ``tags``: of the model's family.
    """
    folder, base = RunFolder(settings.output_dir), settings.pretrained_model_name_or_path
    base = base and place_name(base)
    gallery = ""
    if images:
        per_prompt, _ = settings.validation
        columns = per_prompt if per_prompt > 1 else len(images)
        make_image_grid(list(images), len(images) // columns, columns).save(folder.card_grid_file)
        gallery = f"![Validation images](./{folder.card_grid_file.name})\n"
        if settings.prompted:
            gallery += f"\nPrompts: {', '.join(f'“{prompt}”' for prompt in settings.drawn)}\n"
    method = "\n".join(
        f"| `{key}` | {value} |" for key, value in settings.method.to_dict().items() if value is not None
    )
    last = rows[-1] if rows else None
    outcome = ""
    if last:
        skipped, augmented = last["skip_rate"], last["augment_rate"]
        outcome = f"In the last round {skipped:.1%} of the samples were skipped and {augmented:.1%} augmented.\n"
    if last and settings.dp_noise_multiplier is not None:
        outcome += (
            f"\nTrained by DP-SGD, noise multiplier {settings.dp_noise_multiplier:g}, each image's gradient clipped to "
            f"{settings.dp_max_grad_norm:g}: {in_words(last, settings.dp_delta)}. This holds against those who do not "
            "know the seed, from which the noise was drawn.\n"
        )
    lora = settings.adapters
    adapter = f"| LoRA rank, alpha | {lora.lora_rank}, {lora.lora_alpha} |\n" if lora else ""
    prior = f"| prior preservation, weight | {settings.prior_loss_weight} |\n" if settings.prior_dir else ""
    source = settings.dataset_name or "an image folder"
    start = f"Fine-tuned from **{base}**" if base else "Trained from scratch"
    description = f"""# {repo_id}

{start} on **{source}** with `{settings.method.mitigation}`
against memorization of the training images ([IET-AGC+](https://github.com/liuxiao-guan/IET-AGC)).

{gallery}
## Use

{_usage(settings, repo_id, base)}

## Mitigation

{outcome}
| | |
|---|---|
{method}

## Training

| | |
|---|---|
{adapter}{prior}| learning rate | {settings.learning_rate} |
| batch size | {settings.train_batch_size} |
| gradient accumulation | {settings.gradient_accumulation_steps} |
| resolution | {settings.resolution} |
| mixed precision | {settings.mixed_precision} |
| de-duplication | {settings.deduplicate or "none"} |
| seed | {settings.seed} |
| ietagc-diffusers | {__version__} |
"""
    card = load_or_create_model_card(
        repo_id_or_path=repo_id,
        from_training=True,
        license="creativeml-openrail-m" if settings.prompted else None,  # Stable Diffusion's
        base_model=base,
        model_description=description,
        inference=True,
    )
    tags = [*tags, *(OF_ADAPTERS if lora else ()), *TAGS]
    populate_model_card(card, tags=tags).save(folder.card_file)


def _usage(settings, repo_id, base):
    """How to draw with the model, as Markdown."""
    if settings.method.ambient_corruption is not None:
        return f"""The UNet takes a mask as a fourth channel, which `DDPMPipeline` does not give it.
Download it, and draw with the software that it was trained with (ietagc-diffusers):

```bash
ietagc generate --model {repo_id.rpartition("/")[2]} --num_images 16 --output images
```"""
    call = f"pipeline({(settings.drawn or ['a photo'])[0]!r})" if settings.prompted else "pipeline()"
    start = base if settings.adapters else repo_id
    load = f'pipeline = DiffusionPipeline.from_pretrained("{start}", torch_dtype=torch.float16)'
    if settings.adapters:
        load += f'\npipeline.load_lora_weights("{repo_id}")'
    return f"""```python
import torch
from diffusers import DiffusionPipeline

{load}
image = {call}.images[0]
```"""


def upload(settings: RunSettings, repo_id: str) -> None:
    """Upload the run's folder, without what is private, and its settings without the places of this machine."""
    folder = RunFolder(settings.output_dir)
    shown = {
        key: place_name(value) if isinstance(value, str) else value
        for key, value in folder.config().items()
        if key not in ("output_dir", "cache_dir", "logging_dir")
    }
    upload_file(
        path_or_fileobj=yaml.safe_dump(shown, sort_keys=False).encode(),
        path_in_repo=str(folder.config_file.relative_to(folder.path)),
        repo_id=repo_id,
        token=settings.hub_token,
        commit_message="Settings of the training",
    )
    upload_folder(
        repo_id=repo_id,
        folder_path=str(folder.path),
        token=settings.hub_token,
        commit_message="End of training",
        ignore_patterns=[*folder.private, "ietagc/config.yaml", f"{settings.logging_dir}/**"],
    )
