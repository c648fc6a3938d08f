"""The command line of the training scripts: flags made from the settings, and recipes."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .errors import UsageError, with_flags
from .method.config import MitigationConfig
from .method.recipes import read_recipe
from .settings import declared
from .training.scripts import SCRIPTS
from .training.settings import RunSettings, TrainingSettings

CONFIG_HELP = "YAML recipe with flags as keys; the command line wins."


class FlagParser(argparse.ArgumentParser):
    """Raises ``UsageError`` where argparse would exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def _get_option_tuples(self, option_string: str) -> list:
        """What an abbreviation may stand for: two names of one flag are one answer."""
        found = super()._get_option_tuples(option_string)
        return found[:1] if len({id(action) for action, *_ in found}) == 1 else found


def build_parser(kind: type[RunSettings] = TrainingSettings) -> FlagParser:
    """The flags of a settings class, in its groups, with the method's first."""
    parser = FlagParser(
        prog=program(),
        description="Train a diffusion model without memorizing the training set (IET-AGC+).\n"
        f"`ietagc train --script NAME` has the flags of train_NAME_ietagc.py; NAME: {', '.join(SCRIPTS)}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help=CONFIG_HELP)
    seen = set()
    of_kind = {entry.name: entry for entry in declared(kind)}
    for title, group in {"mitigation": MitigationConfig, **kind.GROUPS}.items():
        flags = parser.add_argument_group(title)
        for entry in declared(group):
            if entry.name not in seen:
                seen.add(entry.name)
                # For the method None means: what the preset says.
                of_preset = group is MitigationConfig and entry.name != "mitigation"
                own = of_kind.get(entry.name, entry)
                _add_flag(flags, own, None if of_preset else own.default, own.default != entry.default)
    return parser


def _add_flag(group, entry, default, own_default):
    about = entry.metadata
    options: dict[str, Any]
    if about["type"] is bool:
        options = {"action": argparse.BooleanOptionalAction}
    else:
        options = {"type": about["type"], "choices": about["choices"], **({"nargs": "+"} if about["several"] else {})}
    text = about["help"].replace("%", "%%")
    if own_default and default is not None:  # a default of this script only
        text = text.split(" Default: ")[0]
    if default not in (None, False, ()) and "Default" not in text and about["type"] is not bool:
        text += f" Default: {default}."
    names = [f"--{name}" for name in (entry.name, *about["aliases"])]
    group.add_argument(*names, default=default, help=text, **options)


def flag_names(kind: type[RunSettings] = TrainingSettings) -> list[str]:
    """The names of all flags but ``config``, aliases among them: what a recipe may have as keys."""
    entries = [*declared(MitigationConfig), *declared(kind)]
    return [name for entry in entries for name in (entry.name, *entry.metadata["aliases"])]


def known_names(kind: type[RunSettings] = TrainingSettings) -> set[str]:
    """The names that messages show as flags: ours, and the launcher's that we speak of."""
    return {*flag_names(kind), "config", "num_processes", "script"}


def recipe_to_argv(recipe: dict[str, Any]) -> list[str]:
    """A recipe as command-line words, so that argparse checks both alike."""
    words = []
    for key, value in recipe.items():
        if isinstance(value, bool):
            words.append(f"--{key}" if value else f"--no-{key}")
        elif value is not None:
            words += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
    return words


def parse_flags(argv: list[str], kind: type[RunSettings] = TrainingSettings) -> RunSettings:
    """The settings that a list of words gives. Raises ``UsageError``."""
    parser = build_parser(kind)
    config_only = FlagParser(add_help=False)
    config_only.add_argument("--config")
    path = config_only.parse_known_args(argv)[0].config
    recipe = read_recipe(path, flag_names(kind)) if path else {}
    given = vars(parser.parse_args(recipe_to_argv(recipe) + argv))
    method = {entry.name: given[entry.name] for entry in declared(MitigationConfig) if entry.name != "mitigation"}
    others = {entry.name: given[entry.name] for entry in declared(kind)}
    others["local_rank"] = int(os.environ.get("LOCAL_RANK", others["local_rank"]))
    return kind(method=MitigationConfig.preset(given["mitigation"], **method), **others)


def parse_args(argv: Sequence[str] | None = None, kind: type[RunSettings] = TrainingSettings) -> RunSettings:
    """Parse the command line, see ``parse_flags``. Wrong use exits with 2 and a line that says what is wrong."""
    try:
        return parse_flags(sys.argv[1:] if argv is None else list(argv), kind)
    except UsageError as error:
        fail(error, kind)


def fail(error: UsageError, kind: type[RunSettings] = TrainingSettings) -> NoReturn:
    """Print what is wrong, with the flags' names, and exit with 2."""
    message = with_flags(str(error), known_names(kind))
    print(f"{program()}: error: {message}", file=sys.stderr)
    raise SystemExit(2) from error


def program() -> str:
    """The program as it was called: a training script, ``ietagc train`` or ``python -m ietagc_diffusers train``."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"python -m {called.parent.name} train"
    return called.name if called.suffix == ".py" else f"{called.name} train"
