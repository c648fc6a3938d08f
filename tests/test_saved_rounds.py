"""The models of a run's rounds, which lie beside it as pipelines."""

import errno
from dataclasses import replace

import pytest
from conftest import train_flags, train_here, unet_bytes
from diffusers import StableDiffusionPipeline

from ietagc_diffusers import RunFolder
from ietagc_diffusers.tensor_files import TensorFile
from ietagc_diffusers.training.callbacks import rounds as rounds_module
from ietagc_diffusers.training.cost import Cost
from ietagc_diffusers.training.rounds import Rounds
from ietagc_diffusers.training.weights import Weights

FLAGS = ["--num_shards=2", "--steps_per_round=1", "--max_train_steps=6", "--save_rounds", "--report_to=none"]


@pytest.fixture(scope="module")
def run(base, pictures, tmp_path_factory):
    return train_here(train_flags(base, pictures, *FLAGS), tmp_path_factory.mktemp("runs") / "run")


def files(folder):
    return {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}


def test_what_training_leaves_as_it_is_is_on_the_disk_once(run):
    first, *others = (RunFolder(run).round(number) for number in (1, 2, 3))
    for folder in others:
        assert files(folder).keys() == files(first).keys() and unet_bytes(folder) != unet_bytes(first)
        for name, path in files(folder).items():
            frozen = name.parts[0] not in ("unet", "model_index.json")
            assert path.samefile(first / name) == frozen and path.stat().st_nlink == (3 if frozen else 1)
        StableDiffusionPipeline.from_pretrained(folder)
    for name, path in files(others[-1]).items():  # the last round's model is the run's
        assert path.read_bytes() == (run / name).read_bytes()


def test_the_arithmetic_is_that_of_the_disk(run, base):
    """But for the headers of the files."""
    unet, frozen = (
        sum(path.stat().st_size for path in (run / "rounds" / "round-0001").glob(f"{part}/*.safetensors"))
        for part in ("unet", "[tv]*")
    )
    taken = {p.stat().st_ino: p.stat().st_size for p in (run / "rounds").rglob("*.safetensors")}
    parameters = sum(t.numel() for t in TensorFile(base / "unet" / "diffusion_pytorch_model.safetensors").values())
    cost = Cost(parameters, frozen=frozen, save_rounds=True)
    assert sum(taken.values()) == 3 * unet + frozen == pytest.approx(cost.saved(3), rel=0.25)
    rounds = Rounds(1, 3, 1)  # three of them
    assert cost.disk(rounds, 100, None) - replace(cost, save_rounds=False).disk(rounds, 100, None) == cost.saved(3)


def test_rounds_leave_room_for_the_trained_pipeline(run, base, pictures, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(rounds_module, "room", lambda path: 1000)
    train_here(train_flags(base, pictures, *FLAGS), tmp_path)
    assert "it and the trained one need" in caplog.text and not any((tmp_path / "rounds").glob("*"))
    assert unet_bytes(tmp_path) == unet_bytes(run)


def test_a_round_that_the_disk_refuses_is_left_out_and_training_goes_on(
    run, base, pictures, tmp_path, monkeypatch, caplog
):
    whole = Weights.save_pipeline

    def refuse(self, folder, final=False, earlier=None):
        whole(self, folder, final, earlier)
        if folder.name.startswith("round-0002"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Weights, "save_pipeline", refuse)
    train_here(train_flags(base, pictures, *FLAGS), tmp_path)
    assert "The model of round 2 could not be written: [Errno 28] No space left" in caplog.text
    assert [path.name for path in sorted((tmp_path / "rounds").iterdir())] == ["round-0001", "round-0003"]
    assert unet_bytes(RunFolder(tmp_path).round(3)) == unet_bytes(tmp_path) == unet_bytes(run)
