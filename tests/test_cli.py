"""One command line: quick help, wrong use told by flag, and flags that agree with the library."""

import subprocess
import sys
import types
from dataclasses import MISSING, fields

import pytest
from conftest import ROOT, environment

import ietagc_diffusers
from ietagc_diffusers.arguments import flag_names
from ietagc_diffusers.cli import COMMANDS, build_parser, common, main, mq
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.eval.detect import Detection
from ietagc_diffusers.eval.generate import DTYPES, Settings
from ietagc_diffusers.eval.metrics.l2 import THRESHOLDS
from ietagc_diffusers.eval.mq import PROTOCOLS
from ietagc_diffusers.eval.schedulers import SCHEDULERS
from ietagc_diffusers.eval.score import Protocol
from ietagc_diffusers.method.recipes import read_recipe, recipe_path

SLOW = {"torch", "numpy", "diffusers", "transformers", "datasets", "accelerate", "matplotlib", "PIL"}
NEEDED = {
    "audit": ["--model", "m", "--train", "t"],
    "generate": ["--model", "m", "--output", "o"],
    "score": ["--generated", "g", "--train", "t", "--output", "o"],
    "front": ["--run", "a=b", "--heldout", "h"],
    "mq": ["--generated", "g", "--train", "t"],
    "detect": ["--model", "m"],
    "attack": ["--model", "m", "--heldout", "h"],
    "canary": ["--model", "m"],
}  # flags without defaults


def parse(command, *more):
    return build_parser("ietagc")[0].parse_args([command, *NEEDED[command], *more])


def test_help_imports_nothing_that_takes_long():
    code = (
        "import sys\nfrom ietagc_diffusers.cli import COMMANDS, main\n"
        "for words in ([], *([name] for name in COMMANDS if name != 'train')):\n"
        "    try:\n        main([*words, '--help'])\n"
        "    except SystemExit as end:\n        assert end.code == 0\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    assert all(name in done.stdout for name in COMMANDS)
    assert not SLOW & set(done.stderr.split())


@pytest.mark.parametrize("module", ["eval", "ietagc_diffusers"])
def test_messages_name_the_program_as_it_was_called(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "report", "a=", "--max_pairs", "3"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == f"python -m {module} report: error: `scores` a=: should be NAME=DIR\n"  # not a flag there


def test_the_version_is_the_package_s(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"ietagc {ietagc_diffusers.__version__}\n"


def test_words_for_training_are_passed_on_untouched(monkeypatch):
    words = ["--num_shards", "3", "--help", "--validation_prompts", "a b", "--", "-x"]
    given = []
    fake = types.SimpleNamespace(main=given.append)
    monkeypatch.setitem(sys.modules, "ietagc_diffusers.cli.train", fake)
    assert main(["train", *words]) == 0 and given == [words]


@pytest.mark.parametrize(
    ("called", "name"),
    [
        ("/venv/bin/ietagc", "ietagc train"),
        ("/site-packages/ietagc_diffusers/__main__.py", "python -m ietagc_diffusers train"),
        ("train_text_to_image_ietagc.py", "train_text_to_image_ietagc.py"),
    ],
)
def test_training_names_the_program_as_it_was_called(called, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [called])
    with pytest.raises(SystemExit) as end:
        main(["train", "--num_shards", "0"])
    assert end.value.code == 2 and capsys.readouterr().err.startswith(f"{name}: error: --num_shards 0: ")


def test_wrong_use_is_one_line_that_names_flags_and_only_flags(capsys, tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n")
    wrong = ["--prompts", str(tmp_path / "p.txt"), "--mitigation", "rt:num_words=-1"]
    assert main(["generate", *NEEDED["generate"], "--device", "cpu", *wrong]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ietagc generate: error: --mitigation rt:num_words=-1: ") and error.count("\n") == 1
    assert "`num_words` -1" in error


def test_a_descriptor_that_cannot_be_loaded_is_wrong_use(pictures, capsys, tmp_path):
    flags = ["--generated", str(pictures), "--train", str(pictures), "--output", str(tmp_path), "--device", "cpu"]
    assert main(["score", *flags, "--descriptor", "pixl"]) == 2
    assert "--descriptor pixl: neither a known name nor a file; did you mean pixel?" in capsys.readouterr().err


def test_an_interruption_exits_with_130(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("ietagc_diffusers.cli.report.run", interrupted)
    assert main(["report", "a"]) == 130 and "Interrupted" in capsys.readouterr().err


def defaults(kind):
    return {entry.name: entry.default for entry in fields(kind) if entry.default is not MISSING}


def test_choices_and_defaults_are_the_library_s():
    assert list(SCHEDULERS) == common.SCHEDULERS and list(DTYPES) == common.DTYPES
    for command in ("audit", "generate"):
        args = parse(command)
        assert common.settings_of(args, "cpu") == Settings()
        assert common.settings_of(args, "cuda:1").dtype == "float16"
    for command in ("audit", "score", "front"):
        assert common.protocol_of(parse(command), "cpu") == Protocol()
    assert list(PROTOCOLS) == mq.PROTOCOLS and tuple(parse("mq").thresholds) == THRESHOLDS
    args = vars(parse("detect"))
    args["lora"] = tuple(args["lora"])
    assert {name: args[name] for name in defaults(Detection)} == defaults(Detection)


def test_names_of_runs_and_models():
    assert common.named_folders(["a=x/y", "b"], "run") == [("a", "x/y"), ("b", "b")]
    assert common.named_folders(["x/y,x/z"], "run") == [("y", "x/y,x/z")]
    with pytest.raises(UsageError, match=r"`run` x/b: two of them are named b"):
        common.named_folders(["b", "x/b"], "run")


def test_a_recipe_of_the_package_needs_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = recipe_path("laion10k_iet_agc_plus")
    assert shipped.is_file() and recipe_path("laion10k_iet_agc_plus.yaml") == shipped
    assert read_recipe("laion10k_none", flag_names())["mitigation"] == "none"
    (tmp_path / "laion10k_none").write_text("resolution: 3\n")  # a file of the user comes first
    assert read_recipe("laion10k_none", ["resolution"]) == {"resolution": 3}
    with pytest.raises(UsageError, match="`config` other/laion10k_none: No such file"):
        read_recipe("other/laion10k_none", [])


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "train"])
def test_flags_of_every_command_are_documented(name):
    parser = build_parser("ietagc")[1][name]
    assert all(action.help for action in parser._actions)
