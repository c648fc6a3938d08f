"""Rooms: who may import whom, which words a room does not say, and modules that are a sitting long."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ietagc_diffusers"
SOURCES = [
    path
    for folder in ("ietagc_diffusers", "eval", "sscd", "demo", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
PRODUCT = [path for path in SOURCES if path.parts[len(ROOT.parts)] not in ("demo", "benchmarks")]
EDGE = {"arguments", "cli"}  # where flags are flags
LOW = {
    "console",
    "errors",
    "files",
    "settings",
    "run_folder",
    "tensor_files",
    "__init__",
}  # modules that every room may import
# What each room may import, beside itself and the low modules.
ROOMS = {
    "method": set(),
    "mitigations": set(),
    "data": {"mitigations"},
    "families": {"data", "method"},
    "checkpoint": set(),
    "training": {"checkpoint", "data", "families", "hub", "method", "single_file"},
    "hub": {"families", "method", "training"},
    "arguments": {"method", "training"},
    "testing": {"families"},
    "single_file": set(),
    "prepare": {"data", "hub"},
    "eval": {"arguments", "data", "families", "method", "mitigations", "single_file", "sscd", "training"},
    "sscd": set(),
    "cli": {
        "arguments",
        "data",
        "eval",
        "families",
        "hub",
        "method",
        "mitigations",
        "prepare",
        "single_file",
        "sscd",
        "training",
    },
}
# Names of the parts of one kind of model, which only families and the mitigations of pipelines use.
OF_A_MODEL = {"unet", "UNet2DConditionModel", "input_ids", "encoder_hidden_states", "text_encoder", "caption"}


def module_of(path):
    """The dotted name of a file of the package; evaluation and descriptors lie beside it in a checkout."""
    base = PACKAGE if PACKAGE in path.parents else ROOT
    return ".".join(path.relative_to(base).with_suffix("").parts)


def imports(path):
    """Dotted names of the package's modules that a file imports, without the package's own."""
    module = module_of(path)
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if isinstance(node, ast.Import):
            yield from (
                name.removeprefix("ietagc_diffusers.") for name in names if name.startswith("ietagc_diffusers.")
            )
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *filter(None, [node.module])]
            yield from (".".join([*base, name]) for name in names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ietagc_diffusers":
            base = node.module.split(".")[1:]
            yield from (".".join([*base, name]) for name in names)


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.parts[len(ROOT.parts)] not in ("demo", "benchmarks")], ids=module_of
)
def test_rooms_import_one_way(path):
    room = module_of(path).split(".")[0]
    if room in LOW or path.stem == "__main__":
        return  # the low modules have a test of their own; a main module starts the command line
    allowed = ROOMS[room] | LOW | {room}
    found = {name.split(".")[0] for name in imports(path)} - {"__version__"}
    assert found <= allowed, f"{room} imports {sorted(found - allowed)}"


def test_low_modules_import_only_one_another():
    for path in PACKAGE.glob("*.py"):
        if path.stem in LOW - {"__init__"}:
            assert {name.split(".")[0] for name in imports(path)} <= LOW


def names_in(path):
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return {token.string for token in tokens if token.type == tokenize.NAME}


GENERAL = [
    *(PACKAGE / "checkpoint").glob("*.py"),
    PACKAGE / "run_folder.py",
    *sorted((PACKAGE / "method").glob("*.py")),
    *(p for p in sorted((PACKAGE / "training").rglob("*.py")) if p.name != "settings.py"),
    *sorted((ROOT / "eval").rglob("*.py")),
]


@pytest.mark.parametrize("path", GENERAL, ids=module_of)
def test_only_families_speak_of_the_parts_of_a_model(path):
    found = names_in(path) & OF_A_MODEL
    if path.stem == "validation":
        found -= {"caption"}  # an argument of a tracker's image
    assert not found


def test_the_ensemble_has_no_timesteps_and_the_control_no_optimizer():
    assert "timestep" not in (PACKAGE / "training" / "ensemble.py").read_text()
    assert "optimizer" not in (PACKAGE / "method" / "control.py").read_text()


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if "cli" not in p.parts and p.name != "arguments.py"], ids=module_of
)
def test_the_library_names_settings_not_flags_in_its_errors(path):
    """An error's text says `num_shards`; the command line makes --num_shards of it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and node.exc is not None:
            texts = [n.value for n in ast.walk(node.exc) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            assert not [text for text in texts if "--" in text], f"line {node.lineno}"


@pytest.mark.parametrize("path", [*SOURCES, *ROOT.glob("train_*.py")], ids=lambda p: p.name)
def test_modules_are_a_sitting_long(path):
    assert len(path.read_text().splitlines()) <= (30 if path.parent == ROOT else 400)


def test_tests_share_through_modules_that_are_no_tests():
    """A test that moves takes what others import from its module with it; `pytest` finds that last of all."""
    for path in sorted((ROOT / "tests").glob("*.py")):
        modules = [n.module for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
        assert not [name for name in modules if name and name.startswith("test_")], path.name
