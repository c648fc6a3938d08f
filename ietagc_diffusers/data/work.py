"""Work on many items: in lists of some size, in threads."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

THREADS = min(32, os.cpu_count() or 1)


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of ``size`` items, the last perhaps shorter."""
    items = iter(items)
    while some := list(islice(items, size)):
        yield some


def in_threads(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """``work`` of each item, in their order, with a bounded number of items under way."""
    with ThreadPoolExecutor(THREADS) as pool:
        for some in batched(items, 8 * THREADS):
            yield from pool.map(work, some)
