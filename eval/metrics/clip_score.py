"""CLIP score: the cosine between an image and its prompt, x 100."""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF

from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.sscd import PREPROCESS, Descriptor
from ietagc_diffusers.sscd.descriptor import file_hash

from ..features import Extractor
from ..protocol import Protocol
from .base import ImageSets, Kind, Measured, Metric, mean

CLIP_SCORE = Metric("clip_score", "CLIP score", mean, "bootstrap", lower=False, digits=2)


@dataclass(frozen=True)
class ClipImages:
    """Extractor of CLIP's image vectors: uint8 (N, 3, H, W) -> float32 (N, D) of unit length."""

    model: Any
    transform: Callable[[torch.Tensor], torch.Tensor]
    record: dict
    device: str

    @property
    def identity(self) -> dict:
        return {"clip_images": self.record}

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.encode_image(self.transform(images).to(self.device), normalize=True).float().cpu()


class ClipScorer:
    """CLIP score over open_clip.

    Args:
        model_name: open_clip's, such as ``ViT-B-16``; OpenAI's weights from a file need ``ViT-B-16-quickgelu``, which
            their tag implies.
        pretrained: a tag, whose weights are downloaded, or a weights file.
        preprocess: ``own``, the model's; or ``dcr``, as in the paper's tables: the images that SSCD saw (256, crop 224,
            0.5/0.5).

    ``note``: a warning about the score, or None.

    Raises:
        UsageError: unknown model or tag, no weights, or ``dcr`` with a model for images that are not 224 x 224.
    """

    def __init__(
        self, model_name: str = "ViT-B-16", pretrained: str = "openai", preprocess: str = "own", device: str = "cpu"
    ) -> None:
        where = f"`clip` {model_name}:{pretrained}"
        if model_name not in open_clip.list_models() and ":" not in model_name:
            near = get_close_matches(model_name, open_clip.list_models(), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"{where}: open_clip has no such model{hint}")
        path = Path(pretrained)
        tags = open_clip.list_pretrained_tags_by_model(model_name)
        if not path.is_file() and pretrained not in tags:
            raise UsageError(f"{where}: neither a file nor a tag of this model ({', '.join(tags) or 'it has none'})")
        # OpenAI's weights were trained with another GELU than the plain model names have.
        quick = pretrained in tags and bool(open_clip.get_pretrained_cfg(model_name, pretrained).get("quick_gelu"))
        try:
            model, _, own = open_clip.create_model_and_transforms(
                model_name, pretrained, device=device, force_quick_gelu=quick
            )
        except Exception as error:
            named = f"{model_name}-quickgelu" if quick and "quickgelu" not in model_name else model_name
            raise UsageError(
                f"{where}: the weights cannot be loaded ({' '.join(str(error).split())[:200]}); "
                f"get the file elsewhere and use `clip` {named}:FILE"
            ) from error
        size = model.visual.image_size
        size = size if isinstance(size, int) else size[0]
        if preprocess == "dcr" and size != 224:
            raise UsageError(f"{where}: takes images of {size} pixels; `clip_preprocess` dcr makes them 224: use own")
        self.model, self.device = model.eval(), device
        self.tokenizer = open_clip.get_tokenizer(model_name)
        weights = {"sha256": file_hash(path)} if path.is_file() else {"tag": pretrained}
        self.note = None
        if path.is_file() and f"{model_name}-quickgelu" in open_clip.list_models():
            self.note = (
                "CLIP's weights come from a file and are assumed to be OpenCLIP's own; if they are OpenAI's, the score "
                f"is wrong: use `clip` {model_name}-quickgelu:FILE"
            )
        quick |= "quickgelu" in model_name
        self.record = {"model": model_name, **weights, "preprocess": preprocess, "quick_gelu": quick}
        transform = PREPROCESS["dcr"] if preprocess == "dcr" else partial(_one_by_one, own)
        self.images = ClipImages(self.model, transform, self.record, device)

    @torch.no_grad()
    def texts(self, prompts: list[str], batch_size: int = 64) -> tuple[torch.Tensor, int]:
        """Vectors of the prompts, float32 (N, D) of unit length, and how many were longer than the model reads."""
        unique = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        vectors = []
        for start in range(0, len(unique), batch_size):
            tokens = self.tokenizer(list(unique)[start : start + batch_size]).to(self.device)
            vectors.append(self.model.encode_text(tokens, normalize=True).float().cpu())
        rows = torch.tensor([unique[prompt] for prompt in prompts])
        longer = {prompt: self._is_longer(prompt) for prompt in unique}
        return torch.cat(vectors)[rows], sum(longer[prompt] for prompt in prompts)

    def _is_longer(self, prompt: str) -> bool:
        """Whether the prompt still has tokens, or their end, one place after the model's last."""
        limit = self.tokenizer.context_length
        padding = getattr(getattr(self.tokenizer, "tokenizer", None), "pad_token_id", 0)
        return bool(self.tokenizer([prompt], context_length=limit + 1)[0, limit] != padding)


def _one_by_one(transform: Callable, images: torch.Tensor) -> torch.Tensor:
    return torch.stack([transform(TF.to_pil_image(image)) for image in images])


def clip_scores(image_vectors: torch.Tensor, text_vectors: torch.Tensor) -> torch.Tensor:
    """100 x the cosine of each pair of unit vectors (N, D): (N,). Not clamped at 0."""
    return 100 * F.cosine_similarity(image_vectors, text_vectors, dim=1)


class ClipScore(Kind):
    """How well the generated images follow their prompts."""

    metrics = (CLIP_SCORE,)

    def __init__(self, protocol: Protocol, descriptor: Descriptor) -> None:
        super().__init__(protocol, descriptor)
        self.scorer = None
        if protocol.clip is not None:
            model, _, weights = protocol.clip.partition(":")
            name = descriptor.protocol or protocol.resolved_name
            preprocess = protocol.clip_preprocess or ("dcr" if name == "dcr" else "own")
            self.scorer = ClipScorer(model, weights or "openai", preprocess, protocol.device)

    @property
    def generated_extractors(self) -> dict[str, Extractor]:
        return {} if self.scorer is None else {"clip": self.scorer.images}

    def measure(self, sets: ImageSets) -> Measured:
        if self.scorer is None:
            return self._missing(
                "not asked for: set `clip` to ViT-B-16:openai, which downloads 600 MB, or to ViT-B-16-quickgelu:FILE "
                "with OpenAI's weights"
            )
        images = sets.generated.images
        without = [name for name, text in zip(images.names, images.texts, strict=True) if not text]
        if without:
            return self._missing(f"{len(without)} images have no prompt in a metadata.jsonl, the first is {without[0]}")
        vectors, num_longer = self.scorer.texts(list(filter(None, images.texts)))
        cut = f"{num_longer} prompts have more tokens than CLIP reads: their ends are ignored" if num_longer else None
        values = clip_scores(sets.generated.features["clip"], vectors)
        return Measured(
            CLIP_SCORE.of(values, groups=sets.prompts) | {"num_prompts_truncated": num_longer},
            columns={"clip_score": values.tolist()},
            protocol={"clip": self.scorer.record},
            notes=tuple(filter(None, (self.scorer.note, cut))),
        )

    def _missing(self, why: str) -> Measured:
        record = None if self.scorer is None else self.scorer.record
        return Measured(dict.fromkeys(CLIP_SCORE.keys), protocol={"clip": record}, reasons={CLIP_SCORE.name: why})
