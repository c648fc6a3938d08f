"""The model card and the upload."""

from pathlib import Path

from diffusers.utils import make_image_grid
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from huggingface_hub import create_repo, upload_folder

TAGS = ["stable-diffusion", "stable-diffusion-diffusers", "text-to-image", "diffusers", "diffusers-training", "ietagc"]


def create(args):
    """Create the repository (or find it). Returns its id."""
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    return create_repo(repo_id=name, exist_ok=True, token=args.hub_token).repo_id


def write_card(args, repo_id, images, rows):
    """Write README.md, with the validation images if there are any, into the output folder. ``rows``: those of
    rounds.jsonl.
    """
    folder = Path(args.output_dir)
    gallery = ""
    if images:
        make_image_grid(images, 1, len(images)).save(folder / "val_imgs_grid.png")
        prompts = ", ".join(f"“{prompt}”" for prompt in args.validation_prompts)
        gallery = f"![Validation images](./val_imgs_grid.png)\n\nPrompts: {prompts}\n"
    method = "\n".join(f"| `{key}` | {value} |" for key, value in args.method.to_dict().items() if value is not None)
    last = rows[-1] if rows else None
    outcome = ""
    if last:
        skipped, augmented = last["skip_rate"], last["augment_rate"]
        outcome = f"In the last round {skipped:.1%} of the samples were skipped and {augmented:.1%} augmented.\n"
    prompt = (args.validation_prompts or ["a photo"])[0]
    source = args.dataset_name or "an image folder"
    description = f"""# {repo_id}

Fine-tuned from **{args.pretrained_model_name_or_path}** on **{source}** with `{args.mitigation}`
against memorization of the training images ([IET-AGC+](https://github.com/liuxiao-guan/IET-AGC)).

{gallery}
## Use

```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{repo_id}", torch_dtype=torch.float16)
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
| learning rate | {args.learning_rate} |
| batch size | {args.train_batch_size} |
| gradient accumulation | {args.gradient_accumulation_steps} |
| resolution | {args.resolution} |
| mixed precision | {args.mixed_precision} |
| de-duplication | {args.deduplicate or "none"} |
| seed | {args.seed} |
"""
    card = load_or_create_model_card(
        repo_id_or_path=repo_id,
        from_training=True,
        license="creativeml-openrail-m",
        base_model=args.pretrained_model_name_or_path,
        model_description=description,
        inference=True,
    )
    populate_model_card(card, tags=TAGS).save(folder / "README.md")


def upload(args, repo_id):
    upload_folder(
        repo_id=repo_id,
        folder_path=args.output_dir,
        token=args.hub_token,
        commit_message="End of training",
        # Never the training pictures, nor paths of this machine.
        ignore_patterns=[
            "checkpoint-*",
            "rounds/**",
            "ietagc/shards/**",
            "ietagc/bad_samples.jsonl",
            f"{args.logging_dir}/**",
        ],
    )
