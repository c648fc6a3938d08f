"""Draw an image for each prompt, or without prompts, each from its own seed, into a folder that ``datasets`` loads."""

import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from ietagc_diffusers import __version__
from ietagc_diffusers.errors import UsageError, one_line
from ietagc_diffusers.families import Unconditional, drawn_edge, family_of
from ietagc_diffusers.families.unconditional import draw as draw_unprompted
from ietagc_diffusers.files import read_json, write_json, write_text
from ietagc_diffusers.run_folder import ADAPTER_FILE

from .adapters import Adapter, base_of_run, find_adapter, put_on
from .base_guidance import BaseGuidance, guide_away
from .pipelines import check_pipeline, is_unprompted, pipeline_folder
from .prompts import Prompt
from .record import recorded_training
from .schedulers import parse_scheduler

DTYPES = ("float32", "float16", "bfloat16")
HASHED = {".safetensors", ".bin", ".json", ".txt", ".model"}
# Keys of configurations that say where a model was saved and by which version, not what it is.
NOT_HASHED = ("_name_or_path", "name_or_path", "_diffusers_version", "transformers_version")
SETTINGS_FILE = ".generate.json"  # hidden, so that it is neither an image nor a row for `datasets`
UNPROMPTED = Unconditional.pipelines
NOT_COMPARED = ("model", "lora", "batch_size", "version")  # in that file: they do not change what is drawn


@dataclass(frozen=True)
class Settings:
    """How images are drawn: everything they depend on except the model, the prompts and the device's arithmetic.

    Batches are fixed slices of the prompts, so that neither the number of processes nor an interruption changes them.

    Args:
        seed: of the first image; image i has the seed ``seed + i``.
        resolution: height and width in pixels, a multiple of 8. None is what the model was trained at, see
            ``trained_resolution``, or else the pipeline's own.
        scheduler: see ``parse_scheduler``; None is the model's own.
        negative_prompt: for every image.
        mitigation: a chain such as ``rt:num_words=2+gni``.
        dtype: one of ``DTYPES``.
        lora: adapters for the model, see ``adapters.find_adapter``.
        base_guidance: guides the model away from its base.

    Raises:
        UsageError: naming a setting that is out of range.
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
    lora: tuple[str, ...] = ()
    base_guidance: BaseGuidance | None = None

    def __post_init__(self) -> None:
        if self.resolution is not None and (self.resolution < 8 or self.resolution % 8):
            raise UsageError(f"`resolution` {self.resolution}: must be a multiple of 8")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"`seed` {self.seed}: must be in 0 to 2^63 - 1")
        if self.scheduler is not None:
            parse_scheduler(self.scheduler)
        if self.dtype not in DTYPES:
            raise UsageError(f"`dtype` {self.dtype}: must be one of {', '.join(DTYPES)}")


def load_pipeline(
    model: str | Path, settings: Settings, device: str = "cpu", denoiser: str | Path | None = None
) -> DiffusionPipeline:
    """The pipeline of a folder or a Hub id, without its safety checker, which would black out copies.

    Args:
        denoiser: folder of a trained module that takes the place of the pipeline's own, or of an adapter for it.

    Raises:
        UsageError: it does not load, or takes no prompt and is not unconditional either.
    """
    check_pipeline(model)
    dtype = getattr(torch, settings.dtype)
    folder = pipeline_folder(model)
    index = read_json(folder / "model_index.json")
    # diffusers saves a pipeline without one of its parts, such as T5, and loads it only if it is told so again.
    replaced: dict[str, Any] = {name: None for name, kind in index.items() if kind == [None, None]}
    adapters = _adapters(model, denoiser, settings.lora)
    if denoiser is not None and not _is_adapter(denoiser):
        family = family_of(folder, setting="model")
        replaced[family.denoiser_name] = family.load_denoiser(denoiser, dtype=dtype)
    if "safety_checker" in index:
        replaced |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, **replaced)
    except Exception as error:
        raise UsageError(f"`model` {model}: does not load as a pipeline: {one_line(error)}") from error
    unprompted = is_unprompted(folder)
    if not unprompted and "prompt" not in inspect.signature(pipeline.__call__).parameters:
        raise UsageError(f"`model` {model}: a {type(pipeline).__name__} takes no prompt")
    if unprompted:
        check_unprompted(settings)
        _check_size(pipeline, settings)
    put_on(pipeline, adapters)
    set_up(pipeline, settings)
    pipeline = pipeline.to(device)
    if settings.mitigation:
        from ietagc_diffusers.mitigations import apply_mitigations

        pipeline = apply_mitigations(pipeline, settings.mitigation)
    return pipeline if settings.base_guidance is None else _guided_away(pipeline, settings, device)


def _guided_away(pipeline: DiffusionPipeline, settings: Settings, device: str) -> DiffusionPipeline:
    guidance = settings.base_guidance
    assert guidance is not None
    base = None
    if guidance.base is not None:
        base = load_pipeline(guidance.base, replace(settings, mitigation=None, lora=(), base_guidance=None), device)
    return guide_away(pipeline, base, guidance)


def set_up(pipeline: Any, settings: Settings) -> None:
    """Give a pipeline the settings' scheduler and no progress bar. Raises ``UsageError`` for a scheduler or a size that
    this kind of pipeline cannot draw with.
    """
    _check_fit(pipeline, settings)
    if settings.scheduler is not None:
        scheduler, options = parse_scheduler(settings.scheduler)
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **options)
    pipeline.set_progress_bar_config(disable=True)


def _check_fit(pipeline: Any, settings: Settings) -> None:
    """Raise ``UsageError`` for a scheduler or a size that this kind of pipeline cannot draw with."""
    kind = type(pipeline).__name__
    if settings.scheduler is not None and "FlowMatch" in type(pipeline.scheduler).__name__:
        raise UsageError(
            f"`scheduler` {settings.scheduler}: a {kind} works by flow matching, and only its own scheduler draws "
            "with it; leave this out"
        )
    multiple = getattr(pipeline, "vae_scale_factor", 1) * getattr(pipeline, "patch_size", 1)
    if settings.resolution is not None and settings.resolution % multiple:
        raise UsageError(f"`resolution` {settings.resolution}: must be a multiple of {multiple} for a {kind}")


def check_unprompted(settings: Settings) -> None:
    """Raise ``UsageError`` for settings that act on prompts, which an unconditional pipeline does not take."""
    for name in ("mitigation", "negative_prompt", "lora"):
        value = getattr(settings, name)
        if value and value != "none":
            raise UsageError(
                f"`{name}` {value}: a {UNPROMPTED[0].__name__} takes no prompt, and this acts on prompts; leave it out"
            )


def _check_size(pipeline: Any, settings: Settings) -> None:
    """Raise ``UsageError`` for another size than an unconditional pipeline's own."""
    kind, size = type(pipeline).__name__, getattr(pipeline, Unconditional.denoiser_name).config.sample_size
    if settings.resolution not in (None, size):
        raise UsageError(f"`resolution` {settings.resolution}: a {kind} draws at its own, {size}; leave it out")


def _is_adapter(folder):
    return (Path(folder) / ADAPTER_FILE).is_file()


def _adapters(model: str | Path, denoiser: str | Path | None, lora: Sequence[str]) -> list[Adapter]:
    """All adapters that a pipeline is drawn with: of a run that left only its adapter, of ``denoiser``, and others."""
    own = [] if base_of_run(model) is None else [model]
    if denoiser is not None and _is_adapter(denoiser):
        own = [denoiser]
    return [find_adapter(str(place)) for place in [*own, *lora]]


def trained_resolution(model: str | Path, lora: Sequence[str] = ()) -> int | None:
    """The resolution in pixels at which a model was trained, in multiples of 8, if that is recorded beside it or beside
    one of its adapters: the last of ``lora`` that records it counts before the model.

    Otherwise a pipeline draws at its own: of models that other tools or earlier versions trained, the base model's.
    """
    for place in (*(find_adapter(given).file.parent for given in reversed(lora)), model):
        record = recorded_training(place)
        if record is None:
            continue
        if not isinstance(record.resolution, int):
            raise UsageError(f"{place}: its ietagc/config.yaml says no resolution; give `resolution`")
        return drawn_edge(record.resolution)
    return None


def model_hash(model: str | Path, denoiser: str | Path | None = None, lora: Sequence[str] = ()) -> str:
    """A hash, 16 hexadecimal digits, of a pipeline folder or a Hub id: of the weights, configurations and vocabularies
    of all its components and adapters, wherever they are stored. ``denoiser``, ``lora``: as in ``load_pipeline``.
    """
    folder = pipeline_folder(model)
    index = folder / "model_index.json"
    parts = [key for key in json.loads(index.read_text()) if (folder / key).is_dir()] if index.is_file() else ["."]
    replaced = {}
    if denoiser is not None and not _is_adapter(denoiser):
        replaced = {family_of(folder, setting="model").denoiser_name: Path(denoiser)}
    digest = hashlib.sha256()
    for part in sorted(parts):
        component = replaced.get(part, folder / part)
        for path in sorted(path for path in component.iterdir() if path.suffix in HASHED):
            digest.update(f"{part}/{path.name}".encode() + _content_hash(path))
    for adapter in _adapters(model, denoiser, lora):
        digest.update(f"adapter {adapter.scale}".encode() + _content_hash(adapter.file))
    return digest.hexdigest()[:16]


def _content_hash(path: Path) -> bytes:
    if path.name.endswith("config.json"):
        config = {key: value for key, value in read_json(path).items() if key not in NOT_HASHED}
        return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).digest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


@torch.no_grad()
def draw(
    pipeline: Any,
    texts: Sequence[str],
    seeds: Sequence[int],
    settings: Settings,
    labels: Sequence[int | None] = (),
) -> list[Image.Image]:
    """PIL images for prompts, each with noise from its own seed only. ``labels``: of a model of classes, which takes no
    prompts.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if isinstance(pipeline, UNPROMPTED):
        told = [label for label in labels if label is not None] or None
        return draw_unprompted(pipeline, generators, len(seeds), settings.num_inference_steps, told)
    size = {} if settings.resolution is None else {"height": settings.resolution, "width": settings.resolution}
    negative = {} if settings.negative_prompt is None else {"negative_prompt": [settings.negative_prompt] * len(texts)}
    return pipeline(
        list(texts),
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        generator=generators,
        **size,
        **negative,
    ).images


def generate(
    model: str | Path,
    prompts: Sequence[Prompt],
    output: str | Path,
    settings: Settings,
    device: str = "cpu",
    state: Any = None,
    denoiser: str | Path | None = None,
    desc: str = "Drawing",
) -> None:
    """Draw one image for each prompt into the folder ``output`` and write its ``metadata.jsonl`` (file_name, text,
    seed, mitigation, sample_id, source). Images that are already there are kept.

    Args:
        model: folder or Hub id.
        state: accelerate's ``PartialState`` if several processes draw together; each of them calls this function.
        denoiser: as in ``load_pipeline``.
        desc: title of the progress bar.

    Raises:
        UsageError: the folder holds images of another model, other prompts or settings.
    """
    check_pipeline(model)
    output = Path(output)
    if not is_unprompted(model):
        settings = replace(settings, resolution=settings.resolution or trained_resolution(model, settings.lora))
    rank, num_processes = (state.process_index, state.num_processes) if state is not None else (0, 1)
    if rank == 0:
        _check_settings(output, model, denoiser, prompts, settings)
    _wait(state)
    batches = [
        range(s, min(s + settings.batch_size, len(prompts))) for s in range(0, len(prompts), settings.batch_size)
    ]
    mine = [b for b in batches[rank::num_processes] if not all(_image_path(output, i).exists() for i in b)]
    if mine:
        pipeline = load_pipeline(model, settings, device, denoiser)
        with tqdm(total=sum(map(len, mine)), desc=desc, disable=rank > 0) as bar:
            for batch in mine:
                texts, seeds = [prompts[i].text for i in batch], [settings.seed + i for i in batch]
                labels = [prompts[i].label for i in batch]
                for index, image in zip(batch, draw(pipeline, texts, seeds, settings, labels), strict=True):
                    _save(image, _image_path(output, index))
                bar.update(len(batch))
    _wait(state)
    if rank == 0:
        _write_metadata(prompts, output, settings)


def _wait(state: Any) -> None:
    if state is not None:
        state.wait_for_everyone()


def _write_metadata(prompts: Sequence[Prompt], output: Path, settings: Settings) -> None:
    rows = [
        {
            "file_name": _image_path(output, index).name,
            "text": prompt.text,
            "seed": settings.seed + index,
            "mitigation": settings.mitigation,
            "sample_id": prompt.sample_id,
            "source": prompt.source,
            **({} if prompt.label is None else {"label": prompt.label}),
        }
        for index, prompt in enumerate(prompts)
    ]
    write_text(output / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _image_path(output: Path, index: int) -> Path:
    return output / f"{index:06d}.png"


def _save(image: Image.Image, path: Path) -> None:
    part = path.with_suffix(".part")
    image.save(part, format="png")
    part.replace(path)


def _check_settings(
    output: Path, model: str | Path, denoiser: str | Path | None, prompts: Sequence[Prompt], settings: Settings
) -> None:
    """Record in an empty folder ``output`` how its images are drawn; compare with the record if it holds images."""
    output.mkdir(parents=True, exist_ok=True)
    texts = json.dumps([prompt.record() for prompt in prompts])
    wanted = asdict(settings) | {
        "model": str(model),
        "model_hash": model_hash(model, denoiser, settings.lora),
        "num_images": len(prompts),
        "prompts": hashlib.blake2b(texts.encode(), digest_size=8).hexdigest(),
        "version": __version__,
    }
    if settings.base_guidance is not None and (base := settings.base_guidance.base) is not None:
        wanted["base_guidance"]["base"] = model_hash(base)  # wherever it is stored
    path = output / SETTINGS_FILE
    if not path.exists() and any(not file.name.startswith(".") for file in output.iterdir()):
        raise UsageError(f"{output}: holds images or other files of another origin; give an empty `output`")
    if not any(output.glob("*.png")):
        write_json(path, wanted)
        return
    found = read_json(path)
    for key in wanted:
        if key not in NOT_COMPARED and found.get(key) != wanted[key]:
            raise UsageError(
                f"{output}: begun with `{key}` {found.get(key)!r}, not {wanted[key]!r}; give another `output`, or "
                "remove that folder"
            )
