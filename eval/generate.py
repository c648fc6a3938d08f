"""Images for prompts, each from a seed of its own, into a folder that ``datasets`` loads."""

import hashlib
import inspect
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import diffusers
import torch
import yaml
from diffusers import DiffusionPipeline, UNet2DConditionModel
from tqdm.auto import tqdm

from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.files import read_json, write_json, write_text

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "pndm": "PNDMScheduler",
}
DTYPES = ("float32", "float16", "bfloat16")
HASHED = {".safetensors", ".bin", ".json", ".txt", ".model"}
OF_A_PLACE = ("_name_or_path", "name_or_path", "_diffusers_version", "transformers_version")  # in configurations
SETTINGS_FILE = ".generate.json"  # hidden: no image, and no row for `datasets`


@dataclass(frozen=True)
class Settings:
    """How images are drawn: all that they depend on but the model, the prompts and the device's arithmetic.

    resolution: None is what the model was trained at, see ``trained_resolution``, else its own; scheduler: a key of
    ``SCHEDULERS``, None is the model's own; mitigation: a chain such as ``rt:num_words=2+gni``, or None; the
    image at place i has the seed ``seed + i``; batches are fixed slices, so that neither the number of processes nor an
    interruption shows.
    """

    seed: int = 0
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    batch_size: int = 8
    resolution: int | None = None
    scheduler: str | None = None
    negative_prompt: str | None = None
    mitigation: str | None = None
    dtype: str = "float32"

    def __post_init__(self):
        if self.resolution is not None and (self.resolution < 8 or self.resolution % 8):
            raise UsageError(f"--resolution {self.resolution}: must be a multiple of 8")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed {self.seed}: must be in 0 to 2^63 - 1")
        for name, known in (("scheduler", (None, *SCHEDULERS)), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                listed = ", ".join(filter(None, known))
                raise UsageError(f"--{name} {getattr(self, name)}: must be one of {listed}")


def load_pipeline(model, settings, device="cpu", unet=None):
    """The text-to-image pipeline of a folder or a Hub id, its safety checker off: a blacked-out copy would not count.

    ``unet``: folder of another UNet to put into it.

    Raises:
        UsageError: it does not load or takes no prompt.
    """
    dtype = getattr(torch, settings.dtype)
    other = {} if unet is None else {"unet": UNet2DConditionModel.from_pretrained(unet, dtype=dtype)}
    folder = pipeline_folder(model)
    if "safety_checker" in read_json(folder / "model_index.json"):
        other |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, **other)
    except Exception as error:
        raise UsageError(f"--model {model}: does not load as a pipeline: {_one_line(error)}") from error
    if "prompt" not in inspect.signature(pipeline.__call__).parameters:
        raise UsageError(f"--model {model}: a {type(pipeline).__name__} takes no prompt")
    if settings.scheduler is not None:
        scheduler = getattr(diffusers, SCHEDULERS[settings.scheduler])
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pipeline = pipeline.to(device)
    if settings.mitigation:
        from ietagc_diffusers.mitigations import apply_mitigations

        pipeline = apply_mitigations(pipeline, settings.mitigation)
    return pipeline


def pipeline_folder(model):
    """Where a pipeline lies: the folder itself, or where a Hub id was downloaded to. Raises ``UsageError``."""
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(DiffusionPipeline.download(model))
    except Exception as error:
        raise UsageError(f"--model {model}: neither a folder nor a Hub id: {_one_line(error)}") from error


def _one_line(error):
    return " ".join(str(error).split())[:300]


def trained_resolution(model):
    """The resolution that a pipeline folder was trained at, as the training script recorded it there; else None.

    A pipeline's own is its base model's, whatever it was fine-tuned at.
    """
    path = Path(model) / "ietagc" / "config.yaml"
    if not path.is_file():
        return None
    try:
        resolution = yaml.safe_load(path.read_text(encoding="utf-8"))["resolution"]
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: cannot be read ({_one_line(error)}); give --resolution") from error
    return max(8, resolution // 8 * 8)  # pipelines draw multiples of 8


def model_hash(model, unet=None):
    """A hash of a pipeline folder or a Hub id: of the weights, configurations and vocabularies of all its components,
    wherever they lie, and of the UNet put into it.
    """
    folder = pipeline_folder(model)
    index = folder / "model_index.json"
    parts = [key for key in json.loads(index.read_text()) if (folder / key).is_dir()] if index.is_file() else ["."]
    digest = hashlib.sha256()
    for part in sorted(parts):
        where = Path(unet) if unet is not None and part == "unet" else folder / part
        for path in sorted(path for path in where.iterdir() if path.suffix in HASHED):
            digest.update(f"{part}/{path.name}".encode() + _content_hash(path))
    return digest.hexdigest()[:16]


def _content_hash(path):
    if path.name.endswith("config.json"):
        config = {key: value for key, value in read_json(path).items() if key not in OF_A_PLACE}
        return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).digest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


@torch.no_grad()
def draw(pipeline, texts, seeds, settings):
    """PIL images for prompts, each with noise from its own seed alone."""
    size = {} if settings.resolution is None else {"height": settings.resolution, "width": settings.resolution}
    negative = {} if settings.negative_prompt is None else {"negative_prompt": [settings.negative_prompt] * len(texts)}
    return pipeline(
        list(texts),
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        **size,
        **negative,
    ).images


def generate(model, prompts, output, settings, device="cpu", state=None, unet=None, desc="Drawing"):
    """Draw one image a prompt into the folder ``output`` and write its ``metadata.jsonl`` (file_name, text, seed,
    mitigation, sample_id, source). Images that are already there are kept.

    Args:
        model: folder or Hub id; prompts: list of ``Prompt``.
        unet: folder of another UNet to put into the model.
        state: accelerate's ``PartialState`` if several processes draw together: each calls this.

    Raises:
        UsageError: the folder holds images of another model, other prompts or settings.
    """
    output = Path(output)
    settings = replace(settings, resolution=settings.resolution or trained_resolution(model))
    rank, num_processes = (state.process_index, state.num_processes) if state is not None else (0, 1)
    if rank == 0:
        _check_settings(output, model, unet, prompts, settings)
    _wait(state)
    batches = [
        range(s, min(s + settings.batch_size, len(prompts))) for s in range(0, len(prompts), settings.batch_size)
    ]
    mine = [b for b in batches[rank::num_processes] if not all(_image_path(output, i).exists() for i in b)]
    if mine:
        pipeline = load_pipeline(model, settings, device, unet)
        with tqdm(total=sum(map(len, mine)), desc=desc, disable=rank > 0) as bar:
            for batch in mine:
                texts, seeds = [prompts[i].text for i in batch], [settings.seed + i for i in batch]
                for index, image in zip(batch, draw(pipeline, texts, seeds, settings), strict=True):
                    _save(image, _image_path(output, index))
                bar.update(len(batch))
    _wait(state)
    if rank == 0:
        _write_metadata(prompts, output, settings)


def _wait(state):
    if state is not None:
        state.wait_for_everyone()


def _write_metadata(prompts, output, settings):
    rows = [
        {
            "file_name": _image_path(output, index).name,
            "text": prompt.text,
            "seed": settings.seed + index,
            "mitigation": settings.mitigation,
            "sample_id": prompt.sample_id,
            "source": prompt.source,
        }
        for index, prompt in enumerate(prompts)
    ]
    write_text(output / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _image_path(output, index):
    return output / f"{index:06d}.png"


def _save(image, path):
    part = path.with_suffix(".part")
    image.save(part, format="png")
    part.replace(path)


def _check_settings(output, model, unet, prompts, settings):
    """Leave a record of what is drawn in ``output``, or compare it with the one that belongs to what is there. The
    batch size may differ: it does not show.
    """
    output.mkdir(parents=True, exist_ok=True)
    texts = json.dumps([asdict(prompt) for prompt in prompts])
    wanted = asdict(settings) | {
        "model": str(model),
        "model_hash": model_hash(model, unet),
        "num_images": len(prompts),
        "prompts": hashlib.blake2b(texts.encode(), digest_size=8).hexdigest(),
    }
    path = output / SETTINGS_FILE
    if not any(output.glob("*.png")):
        write_json(path, wanted)
        return
    if not path.exists():
        raise UsageError(f"{output}: holds images that were not drawn here; give an empty --output")
    found = read_json(path)
    differing = [key for key in wanted if key not in ("model", "batch_size") and found.get(key) != wanted[key]]
    if differing:
        key = differing[0]
        raise UsageError(
            f"{output}: begun with {key} {found.get(key)!r}, not {wanted[key]!r}; give another --output, or remove it"
        )
