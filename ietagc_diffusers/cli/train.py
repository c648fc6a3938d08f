"""``ietagc train``, and the training scripts."""

import sys
from collections.abc import Sequence

from ..arguments import FlagParser, fail, known_names, parse_args
from ..errors import UsageError, with_flags
from ..training.callbacks import Ended
from ..training.monitor import Comparer
from ..training.run import train
from ..training.scripts import SCRIPTS
from ..training.settings import RunSettings


def main(argv: Sequence[str] | None = None, kind: type[RunSettings] | None = None) -> None:
    """Train as the command line says. Wrong use exits with 2, a run that cannot continue with 1.

    ``kind``: of the script that was called; None: ``ietagc train``, whose ``--script`` says which.
    """
    words = sys.argv[1:] if argv is None else [*argv]
    if kind is None:
        kind, words = _chosen(words)
    settings = parse_args(words, kind)
    names = known_names(kind)
    try:
        train(settings, lambda text: print(with_flags(text, names), flush=True), comparer_of(settings))
    except UsageError as error:
        fail(error, kind)
    except Ended as error:
        sys.exit(with_flags(str(error), names))


def comparer_of(settings: RunSettings) -> Comparer | None:
    """What compares the images that the monitor draws with the training images; None if it draws none."""
    if settings.monitor_images is None:
        return None
    from ietagc_diffusers.eval.monitor import comparer

    return comparer


def _chosen(words: list[str]) -> tuple[type[RunSettings], list[str]]:
    """The kind of the script that ``--script`` names, text-to-image by default, and the other words."""
    parser = FlagParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--script", choices=SCRIPTS, default="text_to_image")
    try:
        known, others = parser.parse_known_args(words)
    except UsageError as error:
        fail(error)
    return SCRIPTS[known.script], others
