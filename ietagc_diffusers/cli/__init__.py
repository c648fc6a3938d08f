"""The command line, ``ietagc COMMAND``.

Each command is a module of this package, named as the command, with ``add_arguments(parser)`` and
``run(args) -> int | None`` (None is exit code 0). Modules that take long to import are imported in ``run``, after the
checks that need none of them.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from .. import __version__
from ..errors import UsageError, with_flags

COMMANDS = {
    "prepare": "make a training set of images and captions as they were downloaded, and report what is left out",
    "train": "fine-tune a model without memorizing the training set",
    "dedup": "find near duplicates among training images before the training: a table, a page, the rows to leave out",
    "audit": "draw images, compare them with the training set, report; exit with 3 above the limits, 4 if in doubt",
    "generate": "draw images, each from its own seed; continues where it was interrupted",
    "score": "compare generated images with the training set",
    "mq": "count memorized images (MQ, Gu et al.'s ratio) under every definition in print",
    "report": "write one HTML file about one or more scored models",
    "attack": "tell training images from held-out ones by membership attacks: what an attacker learns from the model",
    "retrigger": "make a model draw training images by optimised prompt embeddings: the work that it takes",
    "extract": "draw training images from a fine-tuned model as an attacker who has its base does (FineXtract)",
    "canary": "read canaries back: whether a model draws the grey border that only its training showed (SolidMark)",
    "risk": "find which training images a run memorizes, and why: a table and a page with pictures",
    "average": "average the last models of one run, which the training left behind",
    "front": "compare runs with plain training stopped at any point: held-out loss and memorization",
    "figures": "draw the paper's Figs. 3, 6, 7, 8 and 9, as far as the given inputs allow",
    "calibrate": "measure from which similarity an image counts as a copy, on pictures of your own kind",
    "detect": "find memorized prompts without the training images (Wen et al.)",
    "benchmark": "train and score a matrix of runs, and write the paper's tables",
    "push": "upload a finished run to the Hub, with its card",
    "emm": "measure the largest training set that a model still memorizes (Gu et al.), by configuration",
}
TRAIN = "train"  # has its own parser, which also reads recipes
WRONG_USE, INTERRUPTED = 2, 130
DESCRIPTION = "Fine-tune diffusion models without memorizing the training set, and measure what a model reproduces."


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_USE, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser(prog: str) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and the parsers of the commands by name."""
    parser = Parser(prog=prog, description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"ietagc {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers: dict[str, argparse.ArgumentParser] = {}
    for name, text in COMMANDS.items():
        description = f"{text[0].upper()}{text[1:]}."
        parsers[name] = commands.add_parser(name, help=text, description=description, allow_abbrev=False)
        if name != TRAIN:
            import_module(f".{name}", __name__).add_arguments(parsers[name])
    return parser, parsers


def main(argv: Sequence[str] | None = None, prog: str = "ietagc") -> int:
    """Run a command and return its exit code: 0, 2 for wrong use, 130 if interrupted; 3 for an audit
    above its limits, and 4 for one that cannot tell.

    Args:
        argv: the words after the program's name; None is ``sys.argv``'s.
        prog: the program as it was called, for usage and error messages.
    """
    words = sys.argv[1:] if argv is None else [*argv]
    if words[:1] == [TRAIN]:
        return import_module(f".{TRAIN}", __name__).main(words[1:]) or 0
    parser, parsers = build_parser(prog)
    args, unknown = parser.parse_known_args(words)
    args.prog, command = prog, parsers[args.command]
    if unknown:
        command.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return import_module(f".{args.command}", __name__).run(args) or 0
    except UsageError as error:
        flags = {word.removeprefix("--") for word in command._option_string_actions}
        print(f"{command.prog}: error: {with_flags(str(error), flags)}", file=sys.stderr)
        return WRONG_USE
    except KeyboardInterrupt:
        print("\nInterrupted. The same command continues from here.", file=sys.stderr)
        return INTERRUPTED
