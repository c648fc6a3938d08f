"""``ietagc train``, and the training scripts: fine-tune a model."""

import sys
from collections.abc import Sequence

from ..arguments import fail, known_names, parse_args
from ..errors import UsageError, with_flags
from ..training.callbacks import Ended
from ..training.run import train
from ..training.settings import RunSettings, TrainingSettings


def main(argv: Sequence[str] | None = None, kind: type[RunSettings] = TrainingSettings) -> None:
    """Train as the command line says. Wrong use exits with 2, a run that cannot continue with 1."""
    settings = parse_args(argv, kind)
    names = known_names(kind)
    try:
        train(settings, say=lambda text: print(with_flags(text, names), flush=True))
    except UsageError as error:
        fail(error, kind)
    except Ended as error:
        sys.exit(with_flags(str(error), names))
