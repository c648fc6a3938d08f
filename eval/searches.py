"""Searches for many images in many models, each of which is kept when it is finished."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ietagc_diffusers.files import read_json_lines
from ietagc_diffusers.sscd import Descriptor

from .generate import model_hash
from .losses import Chosen
from .membership import Target
from .trigger_search import Search, TriggerSearch

FINISHED, DRAWN = "finished.jsonl", "drawn"


@dataclass(frozen=True)
class Finished:
    """The search for one image in one model.

    similarities, steps, diverged: see ``trigger_search.Found``.
    first, best: names of the pictures in the folder ``drawn``.
    """

    similarities: list[float]
    steps: int | None
    diverged: bool
    first: str
    best: str


Searches = dict[str, list[Finished]]  # of each image of the sets ``train`` and ``heldout``


@dataclass(frozen=True)
class KeptSearches:
    """Searches, each of which is kept in the folder ``output`` when it is finished."""

    output: Path
    descriptor: Descriptor
    threshold: float
    search: Search
    device: str

    def of(self, name: str, target: Target, model: str | Path, sets: dict[str, Chosen]) -> Searches:
        """The searches of a model for all images. It is loaded only if one of them is not finished."""
        known = {key: Finished(**row) for key, row in read_json_lines(self.output / FINISHED)}
        known = {key: one for key, one in known.items() if all(map(self._is_there, (one.first, one.best)))}
        conditions = self._conditions(model)
        keys = {
            each: [_key(conditions, pixels, text) for pixels, text in zip(one.pixels, one.told, strict=True)]
            for each, one in sets.items()
        }
        missing = [(each, place) for each in keys for place, key in enumerate(keys[each]) if key not in known]
        if missing:
            with target.opened(self.device) as opened, (self.output / FINISHED).open("a", encoding="utf-8") as file:
                find = TriggerSearch(opened, self.descriptor, self.threshold, self.search)
                for each, place in tqdm(missing, desc=f"Searching {name}"):
                    key, one = keys[each][place], sets[each]
                    if key not in known:  # an image may be there twice
                        known[key] = self._search(find, one.pixels[place], one.told[place], key)
                        file.write(json.dumps([key, asdict(known[key])]) + "\n")
                        file.flush()
        return {each: [known[key] for key in keys[each]] for each in keys}

    def _search(self, find: TriggerSearch, pixels: torch.Tensor, text: str, key: str) -> Finished:
        found = find(pixels, text)
        names = f"{key}-first.png", f"{key}-best.png"
        for name, image in zip(names, (found.first, found.best), strict=True):
            image.save(self.output / DRAWN / name)
        return Finished(found.similarities, found.steps, found.diverged, *names)

    def _is_there(self, name: str) -> bool:
        return (self.output / DRAWN / name).is_file()

    def _conditions(self, model: str | Path) -> str:
        """What a search depends on besides the image and its caption."""
        search = asdict(replace(self.search, gradient_checkpointing=False))  # which changes nothing that is found
        kind = torch.device(self.device).type
        return json.dumps([model_hash(model), self.descriptor.identity, self.threshold, search, kind])


def _key(conditions: str, pixels: torch.Tensor, text: str) -> str:
    content = json.dumps([conditions, text]).encode() + pixels.numpy().tobytes()
    return hashlib.blake2b(content, digest_size=8).hexdigest()
