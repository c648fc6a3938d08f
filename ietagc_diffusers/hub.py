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
from .training.settings import TrainingSettings

TAGS = ("diffusers", "diffusers-training", "ietagc")
OF_ADAPTERS = ("lora",)


def create(settings: TrainingSettings) -> str:
    """Create the repository (or find it). Returns its id."""
    name = settings.hub_model_id or Path(settings.output_dir).resolve().name
    try:
        return create_repo(repo_id=name, exist_ok=True, token=settings.hub_token).repo_id
    except Exception as error:  # of the network, the Hub, or a name that it does not take
        raise UsageError(
            f"`push_to_hub` {name}: the repository cannot be created: {' '.join(str(error).split())[:300]}"
        ) from error


def write_card(
    settings: TrainingSettings,
    repo_id: str,
    images: Sequence[Image.Image],
    rows: Sequence[dict[str, Any]],
    tags: Sequence[str] = (),
) -> None:
    """Write README.md, with the validation images if there are any, into the output folder.

    ``rows``: those of rounds.jsonl; ``tags``: of the model's family.
    """
    folder, base = RunFolder(settings.output_dir), place_name(settings.pretrained_model_name_or_path)
    gallery = ""
    if images:
        columns = settings.num_validation_images if settings.num_validation_images > 1 else len(images)
        make_image_grid(list(images), len(images) // columns, columns).save(folder.card_grid_file)
        prompts = ", ".join(f"“{prompt}”" for prompt in settings.validation_prompts or [])
        gallery = f"![Validation images](./{folder.card_grid_file.name})\n\nPrompts: {prompts}\n"
    method = "\n".join(
        f"| `{key}` | {value} |" for key, value in settings.method.to_dict().items() if value is not None
    )
    last = rows[-1] if rows else None
    outcome = ""
    if last:
        skipped, augmented = last["skip_rate"], last["augment_rate"]
        outcome = f"In the last round {skipped:.1%} of the samples were skipped and {augmented:.1%} augmented.\n"
    prompt = (settings.validation_prompts or ["a photo"])[0]
    lora = settings.lora_rank is not None
    load = f'pipeline = DiffusionPipeline.from_pretrained("{base if lora else repo_id}", torch_dtype=torch.float16)'
    if lora:
        load += f'\npipeline.load_lora_weights("{repo_id}")'
    adapter = f"| LoRA rank, alpha | {settings.lora_rank}, {settings.lora_alpha} |\n" if lora else ""
    prior = f"| prior preservation, weight | {settings.prior_loss_weight} |\n" if settings.prior_dir else ""
    source = settings.dataset_name or "an image folder"
    description = f"""# {repo_id}

Fine-tuned from **{base}** on **{source}** with `{settings.method.mitigation}`
against memorization of the training images ([IET-AGC+](https://github.com/liuxiao-guan/IET-AGC)).

{gallery}
## Use

```python
import torch
from diffusers import DiffusionPipeline

{load}
image = pipeline({prompt!r}).images[0]
```

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
        license="creativeml-openrail-m",
        base_model=base,
        model_description=description,
        inference=True,
    )
    tags = [*tags, *(OF_ADAPTERS if lora else ()), *TAGS]
    populate_model_card(card, tags=tags).save(folder.card_file)


def upload(settings: TrainingSettings, repo_id: str) -> None:
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
