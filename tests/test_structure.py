"""Imports go one way, the script stays short, and modules stay a sitting long."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "ietagc_diffusers").rglob("*.py"))
SOURCES = [
    p
    for folder in ("ietagc_diffusers", "eval", "sscd", "demo", "benchmarks")
    for p in sorted((ROOT / folder).rglob("*.py"))
]


def imports(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_the_package_imports_neither_evaluation_nor_demo(path):
    if "cli" not in path.parts:
        found = imports(path)
        assert not {name.split(".")[0] for name in found} & {"eval", "sscd", "demo", "benchmarks", "tests"}
        assert not any(name.startswith(("ietagc_diffusers.eval", "ietagc_diffusers.sscd")) for name in found)


def test_the_method_s_parts_import_nothing_local_but_the_error():
    for path in sorted((ROOT / "ietagc_diffusers" / "method").glob("*.py")):
        assert {name for name in imports(path) if name.startswith("..")} <= {"..errors"}


def test_the_ensemble_does_not_know_a_timestep_nor_the_control_an_optimizer():
    assert "timestep" not in (ROOT / "ietagc_diffusers" / "training" / "ensemble.py").read_text()
    assert "optimizer" not in (ROOT / "ietagc_diffusers" / "method" / "control.py").read_text()


@pytest.mark.parametrize("path", [*SOURCES, ROOT / "train_text_to_image_ietagc.py"], ids=lambda p: p.name)
def test_modules_are_a_sitting_long(path):
    assert len(path.read_text().splitlines()) < (300 if path.parent == ROOT else 400)
