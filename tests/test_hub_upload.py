"""What arrives on a Hub, over HTTP: the allow-list and nothing else, whole or not at all, whatever the network does."""

import io
import json
from email.utils import formatdate

import pytest
import yaml
from fake_hub import CUT, HALF_ANSWER, TOKEN
from huggingface_hub import constants
from PIL import Image

from ietagc_diffusers import RunFolder, UsageError
from ietagc_diffusers.cli import main
from ietagc_diffusers.hub import Patience, Repository, UploadError, contents, repository, upload

WEIGHTS = b"weights " * 5000
UPLOADED = {
    "README.md",
    "ietagc/config.yaml",
    "ietagc/rounds.jsonl",
    "ietagc/training_set.json",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "val_imgs_grid.png",
}
BUSY = (503, {}, "busy")


def place(name="me/model", waits=None, **more):
    patience = Patience(sleep=[].append if waits is None else waits.append, clock=lambda: 1000.0)
    return Repository(name, token=TOKEN, patience=patience, **more)


@pytest.fixture
def run(tmp_path):
    """The folder of a finished run, with much that is nobody's business."""
    out, home = tmp_path / "out", str(tmp_path)
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "png")
    files = {
        "README.md": "---\nbase_model: some/base\n---\n# me/model\n",
        "model_index.json": {"_class_name": "P", "unet": ["d", "U"], "scheduler": ["d", "S"], "checkpoint-3": ["a"],
                             "private": ["a", "b"], "..": ["a", "b"], "ietagc": ["a", "b"], "vae": ["d", "V"]},
        "unet/config.json": {"_name_or_path": f"{home}/models/base", "sample_size": 8},
        "unet/diffusion_pytorch_model.safetensors": WEIGHTS,
        "unet/notes.txt": "mine",
        "unet/picture.png": picture.getvalue(),
        "unet/optimizer.bin": "mine",
        "scheduler/scheduler_config.json": {},
        "val_imgs_grid.png": picture.getvalue(),
        "private/secrets.json": "mine",
        ".env": f"HF_TOKEN={TOKEN}",
        "notes.txt": "mine",
        "000_0.png": picture.getvalue(),
        "logs/events.out": home,
        "monitor.html": home,
        "checkpoint-3/config.json": "{}",
        "checkpoint-3/unet/config.json": "{}",
        "rounds/round-0001/unet/config.json": "{}",
        "unfinished/unet/config.json": "{}",
        "earlier-run-1/README.md": "mine",
        "ietagc/config.yaml": f"mitigation: iet\nnum_shards: 4\ntrain_data_dir: {home}/pictures\noutput_dir: {out}\n"
                              f"dataset_name: {home}/set\nheldout_dir: my/own\nvalidation_prompts: [a/b, '']\n",
        "ietagc/training_set.json": {"num_rows": 3},
        "ietagc/rounds.jsonl": {"round": 1, "skip_rate": 0.1, "augment_rate": 0.2},
        "ietagc/skip_counts.parquet": "mine",
        "ietagc/training_rows.parquet": home,
        "ietagc/bad_samples.jsonl": home,
        "ietagc/monitor.jsonl": home,
        "ietagc/monitor/step-000003.png": picture.getvalue(),
        "ietagc/run.json": home,
        "ietagc/lock": home,
        "ietagc/config.json": "{}",
        "ietagc/shards/shard-0/data.arrow": "mine",
        "ietagc/snapshot/step-1/model_index.json": "{}",
    }  # fmt: skip
    for name, content in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, bytes):
            content = (content if isinstance(content, str) else json.dumps(content) + "\n").encode()
        path.write_bytes(content)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "model.safetensors").write_text("mine")
    (out / "unet" / "model.safetensors").symlink_to(tmp_path / "elsewhere" / "model.safetensors")
    (out / "vae").symlink_to(tmp_path / "elsewhere")
    return RunFolder(out)


def test_only_what_is_listed_arrives_and_no_place_of_this_machine(hub, run, tmp_path):
    found = upload(run, place().create(), "all of it")
    assert found.startswith(hub.address)
    assert set(hub.files()) - {".gitattributes"} == UPLOADED
    assert hub.files()["unet/diffusion_pytorch_model.safetensors"] == WEIGHTS
    for sent in [*hub.files().values(), *hub.bodies]:
        assert str(tmp_path).encode() not in sent and b"mine" not in sent and TOKEN.encode() not in sent
    config = yaml.safe_load(hub.files()["ietagc/config.yaml"])
    assert config == {"mitigation": "iet", "num_shards": 4, "train_data_dir": "pictures", "dataset_name": "set",
                      "heldout_dir": "own", "validation_prompts": ["a/b", ""]}  # fmt: skip
    assert json.loads(hub.files()["unet/config.json"]) == {"_name_or_path": "base", "sample_size": 8}
    assert hub.commits == [("me/model", "main", "all of it", hub.commits[0][3])]


def test_a_link_in_place_of_a_record_is_not_followed(run, tmp_path):
    run.rounds_file.unlink()
    run.rounds_file.symlink_to(tmp_path / "out" / "notes.txt")
    run.records.rename(tmp_path / "records")
    run.records.symlink_to(tmp_path / "records")
    assert not [name for name in contents(run) if name.startswith("ietagc/") and name != "ietagc/config.yaml"]


def test_a_branch_is_made_once_and_a_private_repository_stays_private(hub, run):
    for _ in range(2):
        there = place("model", revision="second/try", private=True).create()
        assert there.name == "me/model"
        upload(run, there, "again")
    assert set(hub.files(branch="second/try")) >= UPLOADED and set(hub.files()) == {".gitattributes"}
    assert hub.private == {"me/model": True}
    assert len(hub.commits) == 1  # the second time nothing was new


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/repos/create"),
        ("POST", "/branch/"),
        ("GET", "/resolve/"),
        ("POST", "/validate-yaml"),
        ("POST", "/preupload/"),
        ("POST", "/objects/batch"),
        ("PUT", "/lfs/"),
        ("POST", "/commit/"),
    ],
)
@pytest.mark.parametrize("fault", [CUT, BUSY, (429, {"Retry-After": "7"}, "slow down"), (500, {}, "<html>")])
def test_faults_that_pass_are_waited_out(hub, run, waits, method, path, fault):
    hub.fail(method, path, fault, fault)
    upload(run, place(waits=waits, revision="next").create(), "through all of it")
    assert set(hub.files(branch="next")) >= UPLOADED and not hub.faults and len(hub.commits) == 1
    assert len(waits) == 2
    if fault[0] == 429 and path != "/validate-yaml":  # there the client loses the header with the page
        assert all(wait in (7, 8) for wait in waits)  # the Hub's client adds a second
    else:
        assert waits == sorted(waits) and waits[0] <= 1


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub, run, waits):
    hub.fail("POST", "/commit/", HALF_ANSWER)
    upload(run, place(waits=waits).create(), "once")
    assert len(hub.commits) == 1 and set(hub.files()) >= UPLOADED


def test_what_has_arrived_is_not_sent_again(hub, run, waits):
    hub.fail("POST", "/commit/", BUSY)
    upload(run, place(waits=waits).create(), "once")
    assert hub.count("PUT", "/lfs/") == 1


@pytest.mark.parametrize("asked", ["3600", formatdate(1000.0 + 3600, usegmt=True)])
def test_a_hub_that_asks_for_more_than_can_be_waited_is_left_alone(hub, run, waits, asked):
    hub.fail("POST", "/commit/", (429, {"Retry-After": asked}, "tomorrow"))
    with pytest.raises(UploadError, match="429"):
        upload(run, place(waits=waits).create(), "once")
    assert waits == [] and hub.count("POST", "/commit/") == 1


def test_a_date_is_waited_for(hub, run, waits):
    hub.fail("POST", "/commit/", (503, {"Retry-After": formatdate(1000.0 + 60, usegmt=True)}, "soon"))
    upload(run, place(waits=waits).create(), "once")
    assert waits == [60.0]


def test_the_waiting_has_an_end(hub, run, waits):
    hub.fail("POST", "/commit/", *[BUSY] * 20)
    with pytest.raises(UploadError, match="503"):
        upload(run, place(waits=waits).create(), "never")
    assert waits == [1, 2, 4, 8, 16] and not hub.commits


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [("me/model", "hf_wrong", r"401.*hf auth login"), ("other/model", TOKEN, r"rights.*may not write")],
)
def test_a_refusal_is_told_at_once_and_without_the_token(hub, waits, name, token, message):
    repository = Repository(name, token=token, patience=Patience(sleep=waits.append))
    with pytest.raises(UploadError, match=message) as refused:
        repository.create()
    assert token not in str(refused.value) and token not in repr(repository) and not waits
    assert hub.count("POST", "/repos/create") == 1


def test_a_token_that_an_answer_repeats_is_not_shown(hub, run):
    hub.fail("POST", "/commit/", (400, {}, json.dumps({"error": f"Bad: Bearer {TOKEN}"})))
    with pytest.raises(UploadError, match=r"Bad: Bearer \*\*\*") as refused:
        upload(run, place().create(), "once")
    assert TOKEN not in str(refused.value)


def test_a_conflict_with_another_commit_is_tried_again(hub, run, waits):
    hub.fail("POST", "/commit/", (409, {}, "another commit came first"))
    upload(run, place(waits=waits).create(), "after it")
    assert len(hub.commits) == 1 and waits == [1]


@pytest.mark.parametrize("name", ["my model", "a/b/c", "-x", "x--y", "me/.git", ""])
def test_a_name_that_the_hub_does_not_take_is_refused_unasked(name):
    with pytest.raises(UsageError, match="is no name for a repository"):
        Repository(name)


@pytest.mark.parametrize("revision", ["a b", "a..b", "/a", "a/", "-a", "a~1", "a.lock", "a@{1}", "", "a\n"])
def test_a_branch_that_git_does_not_take_is_refused_unasked(revision):
    with pytest.raises(UsageError, match="is no name for a branch"):
        Repository("me/model", revision)


def push(*words):
    return main(["push", *map(str, words)])


def test_push_uploads_a_run_and_writes_its_card_if_it_is_missing(hub, run, capsys):
    run.card_file.unlink()
    assert push(run.path, "model", "--token", TOKEN, "--private", "--revision", "v2") == 0
    told = capsys.readouterr()
    assert hub.address in told.out and TOKEN not in told.out + told.err
    assert set(hub.files(branch="v2")) >= UPLOADED and hub.private["me/model"]
    assert hub.files(branch="v2")["README.md"] == run.card_file.read_bytes()
    assert "num_shards" in run.card_file.read_text() and "me/model" in run.card_file.read_text()


def test_push_says_what_is_wrong(hub, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Patience, "__call__", lambda self, ask: ask())
    assert push(tmp_path, "model") == 2 and "not the folder of a training run" in capsys.readouterr().err
    assert push(run.path, "my model") == 2 and "is no name for a repository" in capsys.readouterr().err
    assert push(run.path, "model", "--revision", "a b") == 2 and "--revision a b" in capsys.readouterr().err
    assert not hub.requests
    assert push(run.path, "model", "--token", "hf_wrong") == 1
    told = capsys.readouterr().err
    assert "hf auth login" in told and "the same command tries again" in told and "hf_wrong" not in told
    (run.path / "model_index.json").unlink()
    assert push(run.path, "model", "--token", TOKEN) == 2 and "no trained model is there" in capsys.readouterr().err


def test_without_a_network_nothing_is_waited_for(run, waits, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UploadError, match="offline"):
        place(waits=waits).create()
    assert not waits


def test_the_times_of_the_default_patience_are_those_of_the_clock():
    assert (Patience().sleep, Patience().clock) == (repository.time.sleep, repository.time.time)


def test_a_later_push_brings_the_audit_and_keeps_what_people_wrote_on_the_hub(hub, run):
    assert push(run.path, "model", "--token", TOKEN) == 0
    there = hub.files()
    there["README.md"] = there["README.md"].replace(b"# me/model", b"# Ours\n\nRead this.") + b"\n## And this\n"
    scores = {"weights_hash": run.weights_hash(), "copy_rate": 0.25, "protocol": {"descriptor": "pixel"}}
    for name, value in {"scores": scores, "verdict": {"verdict": "failed"}}.items():
        (run.path / "audit").mkdir(exist_ok=True)
        (run.path / "audit" / f"{name}.json").write_text(json.dumps(value))
    assert push(run.path, "model", "--token", TOKEN) == 0
    card = there["README.md"].decode()
    assert "# Ours\n\nRead this." in card and card.endswith("\n## And this\n")
    assert "Verdict: **failed**" in card and yaml.safe_load(card.split("---")[1])["model-index"]
    assert hub.commits[-1][-1] == ["README.md"] and not any(name.startswith("audit") for name in there)
