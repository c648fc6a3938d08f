"""Everything public says the types of what it takes and returns."""

import ast

import pytest
from conftest import ROOT

SOURCES = [path for folder in ("ietagc_diffusers", "eval", "sscd") for path in sorted((ROOT / folder).rglob("*.py"))]


def is_typed(function):
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    if arguments and arguments[0].arg in ("self", "cls"):
        arguments = arguments[1:]
    more = [argument for argument in (function.args.vararg, function.args.kwarg) if argument is not None]
    returns = function.returns is not None or function.name == "__init__"
    return returns and all(argument.annotation is not None for argument in [*arguments, *more])


def functions(path):
    """(class or None, function) of a module and of its classes."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            yield None, node
        elif isinstance(node, ast.ClassDef):
            yield from ((node, inner) for inner in node.body if isinstance(inner, ast.FunctionDef))


# A method that overrides a typed one has that one's types.
TYPED_METHODS = {f.name for path in SOURCES for kind, f in functions(path) if kind is not None and is_typed(f)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_public_has_types(path):
    untyped = []
    for kind, function in functions(path):
        private = function.name.startswith("_") and function.name not in ("__init__", "__call__")
        if private or (kind is not None and kind.name.startswith("_")):
            continue
        inherited = kind is not None and kind.bases and function.name in TYPED_METHODS
        if not inherited and not is_typed(function):
            untyped.append(f"{kind.name}.{function.name}" if kind is not None else function.name)
    assert not untyped
