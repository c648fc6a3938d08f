"""What a stranger installs: one package that owns one name, with all it needs declared and nothing else."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from zipfile import ZipFile

import pytest
from conftest import ROOT, environment, write_folder

import ietagc_diffusers
from ietagc_diffusers.cli import COMMANDS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = ("ietagc_diffusers", "eval", "sscd", "configs")
# Names of distributions whose packages are called otherwise.
IMPORTED_AS = {"pillow": "PIL", "pyyaml": "yaml", "faiss-cpu": "faiss", "open-clip-torch": "open_clip"}
NOT_IMPORTED = {
    "xformers": "diffusers computes attention with it",
    "mypy": "a command",
    "pytest-xdist": "a plugin of pytest",
    "ruff": "a command",
    "setuptools": "builds the package",
    "types-pyyaml": "for mypy",
    "types-tqdm": "for mypy",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the sources, built in a copy of them, because a build leaves files behind."""
    folder = tmp_path_factory.mktemp("build")
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", "dist", "."], cwd=folder, check=True)
    (made,) = (folder / "dist").glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs commands of an environment with the wheel in a folder with other people's `eval` and `sscd`."""
    folder = tmp_path_factory.mktemp("stranger")
    venv.create(folder / "venv", symlinks=True)
    scripts = folder / "venv" / "bin"
    pip = [sys.executable, "-m", "pip", "--python", scripts / "python", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", wheel], check=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder / "venv")})
    # What the package needs is the test environment's.
    with open(os.path.join(packages, "dependencies.pth"), "w") as file:
        file.write(sysconfig.get_path("purelib") + "\n")
    for name in ("eval", "sscd"):
        (folder / "work" / name).mkdir(parents=True)
        (folder / "work" / name / "__init__.py").write_text(f"raise RuntimeError('this is another {name}')\n")

    def run(*words):
        done = subprocess.run(
            [scripts / words[0], *map(str, words[1:])],
            cwd=folder / "work",
            env={key: value for key, value in environment().items() if key != "PYTHONPATH"},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    return run


def test_the_wheel_owns_one_name_and_holds_every_module(wheel):
    names = set(ZipFile(wheel).namelist())
    metadata = f"ietagc_diffusers-{ietagc_diffusers.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"ietagc_diffusers", metadata}
    assert ZipFile(wheel).read(f"{metadata}/top_level.txt").split() == [b"ietagc_diffusers"]
    wanted = {path.relative_to(ROOT) for folder in SOURCES for path in (ROOT / folder).rglob("*.py")}
    wanted |= {
        path.relative_to(ROOT) for path in (ROOT / "configs").iterdir() if not re.search("demo|photos", path.name)
    }
    wanted |= {path.relative_to(ROOT) for path in (ROOT / "eval").rglob("*.html")}
    inside = {str(path) if path.parts[0] == "ietagc_diffusers" else f"ietagc_diffusers/{path}" for path in wanted}
    assert names - inside == {"ietagc_diffusers/py.typed", *(name for name in names if name.startswith(metadata))}
    assert inside <= names


def test_a_stranger_uses_every_command_and_what_the_readme_imports(installed, tmp_path):
    """In few processes, as each takes seconds to start."""
    code, text = installed("ietagc", "--help")
    assert code == 0 and all(name in text for name in COMMANDS)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith(("import ", "from "))]
    assert len(lines) >= 3
    training, generated = write_folder(tmp_path / "training", 8), write_folder(tmp_path / "generated", 6, seed=3)
    score = ["score", "--generated", generated, "--train", training, "--output", tmp_path / "scored"]
    lines += [
        "import sys",
        "import ietagc_diffusers as package",
        "from ietagc_diffusers.cli import COMMANDS, main",
        "for name in package.__all__: getattr(package, name)",
        "print(package.__file__)",
        "def ends(words):",
        "    try: main(words)",
        "    except SystemExit as end: return end.code",
        "for name in COMMANDS: assert ends([name, '--help']) == 0, name",
        f"assert not main({[*map(str, score), '--feature_cache', 'none']})",
        "sys.exit(ends(['train', '--config', 'laion10k_iet_agc_plus']))",  # a recipe without its path
    ]
    code, text = installed("python", "-c", "\n".join(lines))
    assert code == 2 and "--pretrained_model_name_or_path is needed" in text, text
    assert "/stranger" in text and "ietagc report" in text and (tmp_path / "scored" / "scores.json").is_file()
    assert text.count("usage: ") >= len(COMMANDS)


def normal(name):
    return re.match(r"[\w.-]+", name)[0].lower().replace("_", "-")


def declared(*groups):
    """{package: distribution} of the dependencies and of groups of optional ones."""
    listed = PROJECT["dependencies"] + [line for group in groups for line in PROJECT["optional-dependencies"][group]]
    names = {normal(line) for line in listed}
    return {IMPORTED_AS.get(name, name.replace("-", "_")): name for name in names}


def imports(folders, inside):
    """{package: a file} of imports at the top of modules, with ``inside`` also of those in functions."""
    found = {}
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text())
            for node in ast.walk(tree) if inside else tree.body:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
                found |= {name.split(".")[0]: path for name in names}
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names | {"ietagc_diffusers"}}


OPTIONAL = [group for group in PROJECT["optional-dependencies"] if group != "dev"]


def test_what_is_imported_is_declared_and_what_is_declared_is_used():
    library = SOURCES[:3]
    needed, possible = imports(library, inside=False), imports(library, inside=True)
    assert not needed.keys() - declared().keys(), needed
    assert not possible.keys() - declared(*OPTIONAL).keys(), possible
    own = {path.stem for folder in ("", "tests") for path in (ROOT / folder).glob("*.py")} | {"demo", "benchmarks"}
    used = possible | imports(("tests", "demo", "benchmarks"), inside=True)
    everything = declared(*PROJECT["optional-dependencies"])
    assert not used.keys() - everything.keys() - own, used
    unused = {everything[name] for name in everything.keys() - used.keys()}
    assert unused == NOT_IMPORTED.keys()


def test_the_tested_pins_are_of_all_that_is_declared_except_what_needs_cuda_or_an_account():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert {normal(line.split("==")[0]) for line in lines} == set(declared("dev", "faiss").values())
