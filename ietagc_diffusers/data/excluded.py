"""Rows that the user leaves out of the training set, named in a file."""

from collections.abc import Iterable
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from ..errors import UsageError, one_line
from .listing import printable
from .sources import SAMPLE_ID, Source, stored_column
from .text_files import read_text


def without_excluded(source: Source, file: str | Path | None) -> tuple[Source, np.ndarray]:
    """The source without the rows that ``exclude_rows`` names, and their sample ids, int64.

    Args:
        file: a text file with a row on each line, by the name of its image's file in the folder or by its sample id;
            empty lines do not count. None: nothing is left out.

    Raises:
        UsageError: the file cannot be read, a line names no row, or no row would be left.
    """
    if file is None:
        return source, np.array([], dtype=np.int64)
    name = f"`exclude_rows` {file}"
    try:
        lines = [line.strip() for line in read_text(file).split("\n")]
    except (OSError, ValueError) as error:
        raise UsageError(f"{name}: cannot be read: {one_line(error)}") from error
    ids, names = stored_column(source.rows, SAMPLE_ID).to_numpy(), [] if source.folder is None else source.folder.names
    rows_of = _rows_of(map(str, ids.tolist())) | _rows_of(names)  # a name counts before an id that is written alike
    excluded = np.zeros(len(ids), dtype=bool)
    for number, line in enumerate(lines, 1):
        if line and line not in rows_of:
            near = get_close_matches(line, [one for one in names if one is not None], 1)
            hint = f"; did you mean {printable(near[0])}?" if near else ""
            raise UsageError(f"{name}: line {number}: the training set has no row {printable(line)}{hint}")
        excluded[rows_of.get(line, [])] = True
    if excluded.all():
        raise UsageError(f"{name}: names all {len(ids)} rows of the training set: nothing is left to train on")
    kept = np.flatnonzero(~excluded)
    folder = None if source.folder is None else replace(source.folder, names=[names[row] for row in kept])
    return replace(source, rows=source.rows.select(kept), folder=folder), ids[excluded]


def _rows_of(names: Iterable[str | None]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        if name is not None:
            rows.setdefault(name, []).append(row)
    return rows
