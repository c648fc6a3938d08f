"""What a model is told of an image: nothing, its class, or its caption."""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..errors import UsageError
from ..mitigations.prompts import choose_caption, random_words, repeat_words, replace_caption
from .columns import is_text, is_texts
from .sources import SAMPLE_ID, stored_column

ROWS_AT_ONCE = 10_000
MOST_CLASSES = 1 << 31  # more are no numbers of rows
LABELS = 1  # tells the draw of random labels from others of the same seed
REPLACED, ADDED = 4, 2  # words, as Somepalli et al. (2023) have them


class Condition:
    """What a model is told of a row's image besides the image. This one: nothing.

    ``columns``: of the rows, which ``read`` takes the values of.
    """

    columns: tuple[str, ...] = ()

    def check(self, rows: Dataset, only_types: bool = False, source: Any = None) -> None:
        """Raise ``UsageError`` naming a column of the wrong type or, unless ``only_types``, a row without a value.

        ``source``: the ``data.sources.Source`` of the rows, which says what may be meant where a column is missing,
        and which file a row is of.
        """

    def read(self, row: dict[str, Any]) -> Any:
        """The value of a row. Raises ``UsageError`` saying what is wrong with it."""
        return None

    def draw(self, value: Any, rng: Any) -> Any:
        """The value of one visit; ``rng``: ``random.Random``, or the module itself."""
        return value

    def values(self, rows: Dataset) -> Iterable[Any] | None:
        """All values that ``draw`` may give for rows that are not bad; None if that is not known beforehand."""
        return [None]

    def tensors(self, drawn: list) -> dict[str, torch.Tensor]:
        """The drawn values of a batch as named tensors (B, ...)."""
        return {}


class ClassLabels(Condition):
    """A class label for each image, as the tensor ``class_labels`` (B,), int64.

    Args:
        kind: ``column`` (of integers, the dataset's own), ``random`` (drawn once for each row, uniformly, by the seed)
            or ``unique`` (the number of the row, so that each image is a class of its own).
        number: of classes; labels are 0 to ``number`` - 1.
        column: that holds them, for ``column``.
        seed: of the draw.
    """

    def __init__(self, kind: str, number: int, column: str | None = None, seed: int | None = None):
        self.kind, self.number, self.column, self.seed = kind, number, column, seed
        self.columns = (str(column),) if kind == "column" else (SAMPLE_ID,)

    def check(self, rows: Dataset, only_types: bool = False, source: Any = None) -> None:
        name = self.columns[0]
        if name not in rows.column_names:
            raise UsageError(
                f"`label_column` {name}: not a column of the dataset, which has {', '.join(rows.column_names)}"
            )
        if self.kind == "random" or (only_types and self.kind == "column"):
            return
        found = [value for value in stored_column(rows, name).unique().to_pylist() if not self._is_label(value)]
        if found and self.kind == "unique" and max(found) >= MOST_CLASSES:
            raise UsageError(
                f"`class_labels` unique: takes the rows' numbers as classes, and here they are ids, such as {found[0]} "
                "(`ietagc prepare` makes such); add a column that counts the rows from 0, and name it as "
                "`label_column` with `class_labels` column"
            )
        if found and self.kind == "unique":
            raise UsageError(
                f"`num_classes` {self.number}: fewer than the rows of the dataset, each of which is a class of its own "
                f"with `class_labels` unique; give {max(found) + 1} or more"
            )
        if found:
            raise UsageError(
                f"`label_column` {name}: holds {found[0]!r}, and labels are 0 to {self.number - 1} for `num_classes` "
                f"{self.number}"
            )

    def _is_label(self, value):
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < self.number

    def read(self, row: dict[str, Any]) -> int:
        value = row[self.columns[0]]
        if self.kind == "random":
            return int(np.random.default_rng([self.seed or 0, LABELS, value]).integers(self.number))
        if not self._is_label(value):
            raise UsageError(f"has no label from 0 to {self.number - 1} in column '{self.columns[0]}'")
        return value

    def values(self, rows: Dataset) -> None:
        return None

    def tensors(self, drawn: list[int]) -> dict[str, torch.Tensor]:
        return {"class_labels": torch.tensor(drawn)}


class Captions(Condition):
    """Captions: a column of strings, or of lists of strings, of which one is drawn at each visit.

    Args:
        column: its name.
        tokenize: B strings -> named tensors (B, L).
        tokenizer: that mitigations draw words from.
        mitigation: ``rc``, ``rt`` or ``cwr`` of Somepalli et al. (2023) act on a share ``probability`` of the visits: 4
            random words instead of the caption, 2 random words added, or 2 of its own repeated. ``mc`` is what a list
            of captions does by itself, and needs several somewhere.
        dropout: share of the visits at which the caption is left empty.
    """

    def __init__(
        self,
        column: str,
        tokenize: Callable[[list[str]], dict[str, torch.Tensor]],
        tokenizer: Any,
        mitigation: str | None = None,
        probability: float | None = None,
        dropout: float = 0.0,
    ):
        self.dropout = dropout
        self.column, self.columns = column, (column,)
        self.tokenize, self.tokenizer = tokenize, tokenizer
        self.mitigation, self.probability = mitigation, probability

    def check(self, rows: Dataset, only_types: bool = False, source: Any = None) -> None:
        if self.column not in rows.column_names:
            hint = "" if source is None else source.hint(self.column)
            raise UsageError(
                f"`caption_column` {self.column}: not a column of the dataset, which has "
                f"{', '.join(rows.column_names)}{hint}"
            )
        feature = rows.features[self.column]
        text = is_text(feature)
        if not text and not is_texts(feature):
            raise UsageError(
                f"`caption_column` {self.column}: should hold strings or lists of strings, holds {feature}"
            )
        if not only_types:
            for number, caption in enumerate(self._stored(rows)):
                if not _is_caption(caption):
                    file = "" if source is None else source.file_of(number)
                    row = stored_column(rows, SAMPLE_ID)[number] if SAMPLE_ID in rows.column_names else number
                    raise UsageError(
                        f"row {row} has no caption in column '{self.column}'{file}: add one or remove the row"
                    )
        if self.mitigation == "mc":
            self._require_several(rows, text)

    def _stored(self, rows):
        stored = rows.select_columns([self.column]).with_format("arrow")
        for start in range(0, len(rows), ROWS_AT_ONCE):
            yield from stored[start : start + ROWS_AT_ONCE][self.column].to_pylist()

    def _require_several(self, rows, text):
        need = "`caption_mitigation` mc: needs several captions per image"
        if text:
            raise UsageError(
                f"{need}, and `caption_column` {self.column} holds strings: name a column of lists of strings"
            )
        if not any(captions and len(captions) > 1 for captions in self._stored(rows)):
            raise UsageError(f"{need}, and no row of `caption_column` {self.column} has more than one")

    def read(self, row: dict[str, Any]) -> str | list[str]:
        caption = row[self.column]
        if not _is_caption(caption):
            raise UsageError(f"has no caption in column '{self.column}'")
        return caption

    def draw(self, value: str | list[str], rng: Any = random) -> str:
        if self.dropout and rng.random() < self.dropout:
            return ""
        caption = choose_caption(value, rng)
        if self.mitigation in (None, "mc") or rng.random() >= self.probability:
            return caption
        if self.mitigation == "rc":
            return replace_caption(self.tokenizer, REPLACED, rng)
        if self.mitigation == "rt":
            return random_words(caption, self.tokenizer, ADDED, rng)
        return repeat_words(caption, ADDED, rng)

    def values(self, rows: Dataset) -> Iterator[str] | None:
        if self.mitigation in (None, "mc"):
            stored = (text for value in self._stored(rows) if _is_caption(value) for text in _texts(value))
            return itertools.chain([""], stored) if self.dropout else stored
        return None

    def tensors(self, drawn: list[str]) -> dict[str, torch.Tensor]:
        return self.tokenize(drawn)


def _texts(value):
    return [value] if isinstance(value, str) else value


def _is_caption(value):
    return isinstance(value, str) or (bool(value) and all(isinstance(caption, str) for caption in value))
