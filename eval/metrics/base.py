"""What a metric is, and what a kind of metrics needs and returns."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from ietagc_diffusers.sscd import Descriptor

from ..approximate import describe, recall
from ..features import Embedded, Extractor
from ..protocol import Protocol
from .intervals import bootstrap_interval, newcombe_interval, wilson_interval

Values = torch.Tensor | np.ndarray


def _bootstrap(values: tuple[Values, ...], statistic: Callable, groups: np.ndarray | None) -> list[float] | None:
    """None where there is a single value or group: drawn again and again it would have no width, as if it were sure."""
    if len(np.unique(np.arange(len(values[0])) if groups is None else groups)) < 2:
        return None
    return bootstrap_interval(values[0], statistic, groups=groups)


def _above_chance(values: tuple[Values, ...], statistic: Callable, groups: np.ndarray | None) -> list[float]:
    return [statistic(np.array([end]), values[1]) for end in wilson_interval(values[0], groups=groups)]


# Each is called with the values of a metric, its statistic, and the groups of the (first) values.
INTERVALS: dict[str, Callable[..., list[float] | None]] = {
    "above_chance": _above_chance,
    "bootstrap": _bootstrap,
    "wilson": lambda values, _, groups: wilson_interval(values[0], groups=groups),
    "newcombe": lambda values, _, groups: newcombe_interval(values[0], values[1], groups=groups),
}


def mean(values: Values) -> float:
    """The mean of values (N,), in their own precision; of hits (0 or 1) it is their share."""
    return float(values.mean())


@dataclass(frozen=True)
class Metric:
    """One number of ``scores.json``: how it is computed, where it is kept, and how it is shown.

    Args:
        name: in ``METRICS`` and in a benchmark's columns.
        title: in reports and tables.
        statistic: computes it, from a value for each image (N,), or from the features (N, D) and (M, D) of two sets. A
            statistic over random subsets returns [mean, standard deviation].
        interval_by: how its 95% interval is computed from the values of the images, if it has one. ``wilson`` is for
            shares: its values are hits. ``above_chance`` is for statistics of hits and of the share that chance gives,
            ``newcombe`` for the difference of the shares of two sets. ``bootstrap`` gives none for one prompt.
        lower: True if lower is better, False if higher is, None if neither.
        digits: shown decimal places; percent: whether it is shown as a percentage; per: what a share is multiplied by
            to be shown as a count.
        detail: stands in brackets behind the title; ``{entry}`` is filled from the protocol that the scores record.
        key: in ``scores.json``; ``a.b`` is the entry ``b`` of ``a``; empty: the name. The interval's key is ``a_ci95``.
    """

    name: str
    title: str
    statistic: Callable[..., float | list[float]]
    interval_by: Literal["above_chance", "bootstrap", "wilson", "newcombe"] | None = None
    lower: bool | None = True
    digits: int = 3
    percent: bool = False
    per: int = 1
    detail: str = ""
    key: str = ""

    @property
    def _path(self) -> tuple[str, str]:
        key, _, entry = (self.key or self.name).partition(".")
        return key, entry

    @property
    def keys(self) -> list[str]:
        """Its keys in ``scores.json``: of the number, and of the interval if there is one."""
        key = self._path[0]
        return [key, f"{key}_ci95"] if self.interval_by else [key]

    def of(self, *values: Values, groups: np.ndarray | None = None) -> dict[str, Any]:
        """The entries of ``scores.json``: what ``statistic`` makes of the values, and the interval.

        groups: (N,) which of the (first) values are not independent of one another, see ``ImageSets.prompts``.
        """
        found: list[Any] = [self.statistic(*values)]
        if self.interval_by:
            found.append(INTERVALS[self.interval_by](values, self.statistic, groups))
        entry = self._path[1]
        return {key: {entry: x} if entry else x for key, x in zip(self.keys, found, strict=True)}

    def _find(self, scores: dict, ending: str = "") -> Any:
        key, entry = self._path
        found = scores.get(key + ending)
        return found.get(entry) if entry and found is not None else found

    def value(self, scores: dict) -> Any:
        """The number, or [mean, standard deviation], in ``scores``; None if it was not computed."""
        return self._find(scores)

    def number(self, scores: dict) -> float | None:
        """The same, of [mean, standard deviation] the mean."""
        value = self.value(scores)
        return value[0] if isinstance(value, list) else value

    def interval(self, scores: dict) -> Any:
        """Its interval [low, high] in ``scores``, or None."""
        return self._find(scores, "_ci95")

    @property
    def scale(self) -> int:
        """What a shown number is multiplied by."""
        return 100 if self.percent else self.per

    @property
    def arrow(self) -> str:
        """The direction in which it gets better."""
        return {True: " ↓", False: " ↑", None: ""}[self.lower]

    def heading(self, protocol: dict) -> str:
        """Title, detail and direction, for scores with this protocol."""
        detail = f" ({self.detail.format(**protocol)})" if self.detail else ""
        return f"{self.title}{detail}{self.arrow}"

    def format(self, value: float | list[float]) -> str:
        """A value, or an end of its interval, as text."""
        numbers = value if isinstance(value, list) else [value]
        return " ± ".join(f"{number * self.per:,.{self.digits}{'%' if self.percent else 'f'}}" for number in numbers)


def prompt_numbers(texts: Iterable[str | None]) -> np.ndarray:
    """Each text's number, int64 (N,). Case and spacing make no other prompt; no text is a prompt of its own."""
    numbers: dict[Any, int] = {}
    plain = [" ".join((text or "").split()).casefold() for text in texts]
    return np.array([numbers.setdefault(text or index, len(numbers)) for index, text in enumerate(plain)])


@dataclass(frozen=True)
class ImageSets:
    """The features of the sets of images that metrics compare.

    Args:
        generated: of the generated images.
        all_training: of all training images; distinct_training: of the first of each set of exact duplicates;
            training: of the ones that are searched, which are either of the two.
        reference: of the images that the Fréchet distance is measured to.
        reference_name: ``train``, or where they come from.
        pixels: side of the images whose l2 distances are measured.
        heldout: of pictures that were not trained on, which are compared like the generated ones; None: there are none.
    """

    generated: Embedded
    all_training: Embedded
    distinct_training: Embedded
    training: Embedded
    reference: Embedded
    reference_name: str
    pixels: int
    heldout: Embedded | None = None

    @property
    def prompts(self) -> np.ndarray:
        """The number of the prompt of each generated image, int64 (N,)."""
        return prompt_numbers(self.generated.images.texts)


@dataclass(frozen=True)
class Measured:
    """The results of a kind of metrics.

    Args:
        scores: entries of ``scores.json``.
        columns: of ``nearest.parquet``: a value for each generated image.
        background: the columns of ``background.parquet``.
        protocol: what the numbers were measured with.
        searches: how neighbours were found, ``exact`` or ``faiss``, by what was searched.
        recall: of each search by FAISS, what ``approximate.recall`` returns.
        reasons: why a score is None, by its key.
        notes: what to keep in mind when reading the scores.
    """

    scores: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, list] = field(default_factory=dict)
    background: dict[str, list] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    searches: dict[str, str] = field(default_factory=dict)
    recall: dict[str, dict[str, Any]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __or__(self, other: "Measured") -> "Measured":
        """Both results in one."""
        return Measured(
            self.scores | other.scores,
            self.columns | other.columns,
            self.background | other.background,
            self.protocol | other.protocol,
            self.searches | other.searches,
            self.recall | other.recall,
            self.reasons | other.reasons,
            self.notes + other.notes,
        )


def missing(metrics: Iterable[Metric], why: str, known: dict[str, Any] | None = None, **results: Any) -> Measured:
    """The result where ``metrics`` could not be computed. ``known``: entries of ``scores.json`` that could be;
    ``results``: what else ``Measured`` takes.
    """
    keys = [key for metric in metrics for key in metric.keys]
    return Measured(scores=dict.fromkeys(keys) | (known or {}), reasons=dict.fromkeys(keys, why), **results)


class Kind(ABC):
    """Metrics that are computed together, ready to measure under a protocol.

    To add one, write a class in a module of this package and list it in ``KINDS``.
    """

    metrics: ClassVar[tuple[Metric, ...]]
    # Whether the images that the Fréchet distance is measured to are described by its extractors too.
    uses_reference: ClassVar[bool] = False
    # Whether its extractors are computed of mirrored generated images too, where training may have mirrored; their
    # names then end in ``_mirrored``.
    mirrors: ClassVar[bool] = False

    def __init__(self, protocol: Protocol, descriptor: Descriptor) -> None:
        self.protocol, self.descriptor = protocol, descriptor

    @property
    def extractors(self) -> dict[str, Extractor]:
        """What it needs of each generated and training image, beside ``descriptor`` and ``pixels``."""
        return {}

    @property
    def generated_extractors(self) -> dict[str, Extractor]:
        """What it needs of generated images only."""
        return {}

    @abstractmethod
    def measure(self, sets: ImageSets) -> Measured:
        """Compute the metrics."""

    def searched(
        self,
        name: str,
        best: torch.Tensor,
        exact: Callable[[torch.Tensor], torch.Tensor],
        copy_threshold: float | None = None,
    ) -> Measured:
        """The record of a search, and where it was not exact, of how much it found.

        Args:
            name: what was searched.

        Other arguments as for ``approximate.recall``.
        """
        if self.protocol.index == "exact":
            return Measured(searches={name: "exact"})
        found = recall(best, exact, copy_threshold)
        note = f"the search by FAISS ({name}) is not exact: {describe(found)}"
        return Measured(searches={name: "faiss"}, recall={name: found}, notes=(note,))
