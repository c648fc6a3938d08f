"""A run goes to the Hub at its end or along its way; training is the same, and no failure loses anything."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import launch, train_flags, train_here, unet_bytes
from fake_hub import TOKEN
from huggingface_hub import metadata_load
from safetensors.torch import load

from ietagc_diffusers import RunFolder
from ietagc_diffusers.arguments import parse_args
from ietagc_diffusers.hub import Repository, contents
from ietagc_diffusers.hub.sections import END, START
from ietagc_diffusers.training.callbacks import Uploads, uploads
from ietagc_diffusers.training.run import _push

PLAIN = ("--mitigation=none", "--max_train_steps=2")
ROUNDS = ("--mitigation=iet-agc", "--num_shards=2", "--max_train_steps=6", "--steps_per_round=1", "--use_ema")
NEEDED = ("--pretrained_model_name_or_path=b", "--train_data_dir=d")
PUSH = ("--push_to_hub", "--hub_model_id=me/model", f"--hub_token={TOKEN}")
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def files_of(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_result_is_on_the_hub_and_the_token_nowhere(hub, base, pictures, tmp_path, capfd):
    out = train_here(train_flags(base, pictures, *PLAIN, *PUSH, "--hub_revision=v1"), tmp_path / "out")
    there = hub.files(branch="v1")
    assert set(there) == {".gitattributes", "README.md", *contents(RunFolder(out))}
    assert there[WEIGHTS] == unet_bytes(out) and there["README.md"] == RunFolder(out).card_file.read_bytes()
    places = [str(place).encode() for place in (out, base, pictures, tmp_path)]
    for content in there.values():
        assert not [place for place in places if place in content]
    assert not [path for path in files_of(out) if TOKEN.encode() in path.read_bytes()]
    told = capfd.readouterr()
    assert TOKEN not in told.out + told.err and "/lfs/" not in told.err  # addresses of files may be signed
    metadata = metadata_load(out / "README.md")
    assert "base_model" not in metadata and "license" not in metadata
    assert "licence of the base model is not known" in there["README.md"].decode()


def test_a_failed_upload_ends_a_good_run_well_and_says_what_to_do(hub, base, pictures, tmp_path, capsys):
    hub.fail("POST", "/commit/", (403, {}, f"no: Bearer {TOKEN}"))
    out = train_here(train_flags(base, pictures, *PLAIN, *PUSH, "--hub_revision=v1"), tmp_path / "my out")
    told = capsys.readouterr().out
    assert f"Upload it later with: ietagc push '{out}' me/model --revision v1" in told
    assert "403" in told and "not on the Hub" in told and TOKEN not in told
    assert RunFolder(out).is_finished and not hub.commits


def test_a_card_that_cannot_be_written_costs_only_the_upload(tmp_path):
    def full(name):
        raise OSError("No space left on device")

    settings = parse_args([*NEEDED, "--push_to_hub", "--hub_model_id=me/model", f"--output_dir={tmp_path}"])
    said = []
    _push(settings, settings.repository, full, said.append)
    assert "No space left on device" in said[0] and f"ietagc push {tmp_path} me/model" in said[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--push_to_hub", "--hub_model_id=my model"], "--hub_model_id my model: is no name for a repository"),
        (["--push_to_hub", "--output_dir=runs/my model"], "--output_dir my model: is no name for a repository"),
        (["--push_to_hub", "--hub_revision=a b"], "--hub_revision a b: is no name for a branch"),
        (["--hub_strategy=every_round"], "--hub_strategy every_round: is for --push_to_hub"),
        (["--hub_revision=v1"], "--hub_revision v1: is for --push_to_hub"),
    ],
)
def test_what_the_hub_would_refuse_is_refused_before_anything_is_loaded(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse_args([*NEEDED, *flags])
    assert message in capsys.readouterr().err


class Process:
    """An upload that ends with ``code``, or goes on (None)."""

    def __init__(self, code):
        self.code, self.stopped = code, False

    def poll(self):
        return self.code

    def terminate(self):
        self.stopped, self.code = True, -15

    def wait(self, seconds=None):
        return self.code


@pytest.fixture
def started(monkeypatch):
    """The uploads that were started along the way: (step, files, message, process)."""
    started = []

    def start(folder, repository, message, log):
        assert repository.name == "me/model" and repository.token == TOKEN
        files = {
            name: file if isinstance(file, bytes) else file.read_bytes()
            for name, file in contents(RunFolder(folder)).items()
        }
        started.append((folder.name, files | {"README.md": (folder / "README.md").read_bytes()}, message, Process(0)))
        return started[-1][-1]

    monkeypatch.setattr(uploads, "start_push", start)
    return started


@pytest.fixture(scope="module")
def plain(base, pictures, tmp_path_factory):
    return train_here(train_flags(base, pictures, *ROUNDS, "--save_rounds"), tmp_path_factory.mktemp("plain") / "out")


def test_every_round_is_uploaded_and_training_is_the_same(hub, started, plain, base, pictures, tmp_path):
    flags = train_flags(base, pictures, *ROUNDS, *PUSH, "--hub_strategy=every_round")
    out = train_here(flags, tmp_path / "out")
    assert [(step, message) for step, _, message, _ in started] == [
        ("step-2", "Step 2 of 6, after 1 rounds"),
        ("step-4", "Step 4 of 6, after 2 rounds"),
    ]
    for number, (_, files, _, _) in enumerate(started, 1):
        assert files[WEIGHTS] == unet_bytes(RunFolder(plain).round(number))
        assert files["ietagc/rounds.jsonl"].count(b"\n") == number and b"me/model" in files["README.md"]
    assert unet_bytes(out) == unet_bytes(plain) == hub.files()[WEIGHTS]
    assert [commit[2] for commit in hub.commits] == ["End of training"]
    assert not RunFolder(out).snapshot.exists()


def test_the_model_of_each_checkpoint_is_uploaded(hub, started, base, pictures, tmp_path):
    kind = ("--mitigation=agc", "--steps_per_round=2", "--max_train_steps=3", "--checkpointing_steps=1")
    out = train_here(train_flags(base, pictures, *kind, *PUSH, "--hub_strategy=checkpoint"), tmp_path)
    assert [step for step, *_ in started] == ["step-1", "step-2"]
    for number, (_, files, *_) in enumerate(started, 1):
        uploaded, saved = load(files[WEIGHTS]), load((RunFolder(out).checkpoint(number) / WEIGHTS).read_bytes())
        assert all(torch.equal(uploaded[name], saved[name]) for name in saved)
        assert not any(name.startswith("checkpoint") for name in files)


class Ensemble:
    """As much of a run as ``Uploads`` asks for."""

    def __init__(self, is_main=True, single=True):
        self.single, self.finished, self.global_step, self.round = single, False, 0, 0
        self.rounds = SimpleNamespace(total_steps=10, steps_before=lambda number: 3 * number)
        self.waited = []
        self.layout = SimpleNamespace(is_main=is_main, barrier=lambda: self.waited.append(self.global_step))
        self.weights = SimpleNamespace(save_pipeline=lambda folder: folder.mkdir(parents=True), output_bytes=1000)
        self.weights.unfinished_bytes = 500

    def step(self, callback, last=False):
        before, self.global_step, self.finished = self.global_step, self.global_step + 1, last
        callback.on_step(self, None, before)


@pytest.fixture
def processes(monkeypatch):
    processes = []

    def start(folder, repository, message, log):
        log.write_text("Traceback\nietagc push: me/model: refused\n")
        processes.append(Process(None))
        return processes[-1]

    monkeypatch.setattr(uploads, "start_push", start)
    return processes


def uploader(tmp_path, card=lambda run, folder: None, every=2):
    folder = RunFolder(tmp_path)
    folder.records.mkdir(exist_ok=True)
    return Uploads(folder, Repository("me/model"), every, card)


def test_one_upload_at_a_time_and_none_is_waited_for(tmp_path, processes, caplog):
    run, callback = Ensemble(), uploader(tmp_path)
    callback.on_start(run)
    for _ in range(5):
        run.step(callback)
    assert len(processes) == 1 and "the model of step 4 is not" in caplog.text
    assert [path.name for path in RunFolder(tmp_path).snapshot.iterdir()] == ["step-2"]
    processes[0].code = 1
    run.step(callback)
    assert len(processes) == 2 and "was not uploaded: ietagc push: me/model: refused; training continues" in caplog.text
    callback.on_end(run)
    assert processes[1].stopped and not RunFolder(tmp_path).snapshot.exists()


def test_all_processes_wait_for_what_one_saves_and_only_then(tmp_path, processes):
    for is_main in (True, False):
        run, callback = Ensemble(is_main), uploader(tmp_path)
        callback.on_start(run)
        for _ in range(5):
            run.step(callback)
        run.step(callback, last=True)  # the result follows
        callback.on_end(run)
        assert run.waited == [2, 4]
    assert len(processes) == 1


def test_the_model_of_several_shards_exists_only_between_rounds(tmp_path, processes):
    run, callback = Ensemble(single=False), uploader(tmp_path, every=4)
    callback.on_start(run)
    for number in range(1, 4):
        run.step(callback)
        run.step(callback)
        run.global_step, run.round = 3 * number, number
        callback.on_round(run, {}, run.global_step - 1)
    assert run.waited == [6, 9]  # 4 and 8 lie in the rounds before


def test_no_model_is_saved_for_an_upload_where_the_result_would_not_fit_any_more(tmp_path, processes, monkeypatch):
    run, callback = Ensemble(), uploader(tmp_path)
    for left, started in ((1499, 0), (1500, 1)):
        monkeypatch.setattr(uploads, "room", lambda folder, left=left: left)
        run.step(callback)
        run.step(callback)
        assert len(processes) == started


def test_a_full_disk_costs_only_the_upload(tmp_path, processes, caplog):
    def full(run, folder):
        raise OSError("No space left on device")

    run, callback = Ensemble(), uploader(tmp_path, full)
    callback.on_start(run)
    for _ in range(3):
        run.step(callback)
    assert not processes and "No space left on device; training continues" in caplog.text and run.waited == [2]
    assert not RunFolder(tmp_path).snapshot.exists()


def test_an_upload_is_a_process_of_its_own_that_is_told_the_token_privately(hub, plain, tmp_path, monkeypatch):
    for name, value in {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}.items():
        monkeypatch.setenv(name, value)
    (plain / "README.md").write_text(f"---\ntags: [a]\n---\n# me/model\n{START}\n{END}\n")
    there = Repository("me/model", "v1", token=TOKEN).create()
    process = uploads.start_push(plain, there, "Step 4", tmp_path / "log")
    assert TOKEN not in " ".join(process.args) and os.getpgid(process.pid) != os.getpgid(0)
    assert process.wait() == 0, (tmp_path / "log").read_text()
    assert hub.commits[0][:3] == ("me/model", "v1", "Step 4") and hub.files(branch="v1")[WEIGHTS] == unet_bytes(plain)
    assert TOKEN not in (tmp_path / "log").read_text()


def launched(hub, base, pictures, output, *more):
    """Two processes of a run that is pushed, the second of which has ended while what the hub holds went on."""

    def release(main, other):
        other.join(600)
        assert other.exitcode == 0 and main.is_alive()
        hub.released.set()

    there = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    flags = train_flags(base, pictures, *ROUNDS, *PUSH, *more)
    return launch(flags, output, processes=2, during=release, **there)


def test_one_of_two_processes_uploads_and_no_other_waits_for_it(hub, base, pictures, tmp_path):
    """Nor fails if that does."""
    hub.held = "/preupload/"
    hub.fail("POST", "/commit/", (403, {}, "no"))
    done = launched(hub, base, pictures, tmp_path / "out", "--max_train_steps=2")
    assert done.returncode == 0 and not hub.commits
    assert [hub.count("POST", path) for path in ("/repos/create", "/preupload/", "/commit/")] == [1, 1, 1]
    assert done.stdout.count(f"Upload it later with: ietagc push {tmp_path / 'out'} me/model") == 1
    assert (tmp_path / "out" / "model_index.json").is_file()


@pytest.mark.slow
def test_two_processes_upload_along_the_way_once(hub, plain, base, pictures, tmp_path):
    """The first upload is held, so that later ones are left out; none of it is waited for, and the result follows."""
    hub.held = "/preupload/"
    out = launched(hub, base, pictures, tmp_path / "out", "--hub_strategy=every_round") and tmp_path / "out"
    assert [commit[2] for commit in hub.commits] == ["End of training"]
    assert unet_bytes(out) == unet_bytes(plain) == hub.files()[WEIGHTS]


def test_pushing_a_run_with_its_card_loads_no_model_code():
    code = "import sys, ietagc_diffusers.hub; print(*({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
