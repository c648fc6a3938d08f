"""Averaging over time: the mean of weights, and of adapters the nearest to the mean of their updates."""

import json

import pytest
import torch
from conftest import train_flags, train_here
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from ietagc_diffusers import UsageError
from ietagc_diffusers.cli import main
from ietagc_diffusers.run_folder import ADAPTER_FILE, RunFolder
from ietagc_diffusers.training.weight_averaging import average_adapters, average_run, window

RUN = ["--mitigation=none", "--max_train_steps=8", "--steps_per_round=2", "--report_to=none", "--save_rounds"]
RUN += ["--learning_rate=1e-2"]
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def run(base, pictures, tmp_path_factory):
    return train_here(train_flags(base, pictures, *RUN), tmp_path_factory.mktemp("run") / "out")


@pytest.fixture(scope="module")
def adapter(base, pictures, tmp_path_factory):
    flags = train_flags(base, pictures, *RUN, "--lora_rank=2", "--lora_target_modules", "to_q", "conv1")
    return train_here(flags, tmp_path_factory.mktemp("adapter") / "out")


def test_the_mean_is_of_the_last_models(run, tmp_path, capsys):
    assert main(["average", "--run", str(run), "--last=3", "--output", str(tmp_path / "out")]) == 0
    assert "The mean of 3 models, of the steps 4, 6, 8" in capsys.readouterr().out
    rounds = [load_file(run / f"rounds/round-{number:04d}" / UNET) for number in (2, 3, 4)]
    found = load_file(tmp_path / "out" / UNET)
    assert found.keys() == rounds[0].keys()
    for name, tensor in found.items():
        wanted = torch.stack([each[name].double() for each in rounds]).mean(dim=0).float()
        assert torch.equal(tensor, wanted), name
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert torch.equal(dict(pipeline.unet.named_parameters())["conv_in.weight"], found["conv_in.weight"])
    assert RunFolder(tmp_path / "out").training_set() == RunFolder(run).training_set()


def test_the_mean_of_one_model_is_that_model(run, tmp_path):
    average_run(run, tmp_path / "out", "1")
    found, wanted = load_file(tmp_path / "out" / UNET), load_file(run / UNET)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)


def updates(folder):
    """{layer: up @ down} of an adapter."""
    tensors = load_file(folder / ADAPTER_FILE)
    found = {}
    for down, tensor in tensors.items():
        if "lora_A" in down or "lora.down" in down:
            up = tensors[down.replace("lora_A", "lora_B").replace("lora.down", "lora.up")]
            found[down] = up.flatten(1).double() @ tensor.flatten(1).double()
    return found


def test_adapters_have_the_nearest_mean_of_their_updates(adapter, tmp_path):
    average_run(adapter, tmp_path / "out", "50%")
    found = updates(tmp_path / "out")
    both = [updates(adapter / f"rounds/round-{number:04d}") for number in (3, 4)]
    assert len(found) > 4
    for name, update in found.items():
        mean = (both[0][name] + both[1][name]) / 2
        left, values, right = torch.linalg.svd(mean, full_matrices=False)
        best = (left[:, :2] * values[:2]) @ right[:2]
        torch.testing.assert_close(update, best, rtol=1e-4, atol=1e-6)
    assert load_file(tmp_path / "out" / ADAPTER_FILE).keys() == load_file(adapter / ADAPTER_FILE).keys()


def test_equal_adapters_have_themselves_as_their_mean_and_opposite_factors_too(adapter, tmp_path):
    for name in ("same", "turned"):
        (tmp_path / name).mkdir()
    tensors, about = load_file(adapter / ADAPTER_FILE), {"format": "pt"}
    save_file(tensors, tmp_path / "same" / ADAPTER_FILE, about)
    save_file({name: -tensor for name, tensor in tensors.items()}, tmp_path / "turned" / ADAPTER_FILE, about)
    discarded = average_adapters([tmp_path / "same", tmp_path / "turned"], tmp_path / "out")
    assert discarded == pytest.approx(0, abs=1e-6)
    for name, update in updates(tmp_path / "out").items():
        torch.testing.assert_close(update, updates(adapter)[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("last", "number", "wanted"), [("5", 20, 5), ("5", 3, 3), ("50%", 20, 10), ("50%", 1, 1), ("1%", 20, 1)]
)
def test_the_window(last, number, wanted):
    assert window(last, number) == wanted


@pytest.mark.parametrize("last", ["0", "-1", "0%", "150%", "half", "", "1.5", "nan%"])
def test_a_window_is_a_number_or_a_share(last):
    with pytest.raises(UsageError, match=r"`last` .*: must be a number of models, such as 5"):
        window(last, 10)


def test_wrong_use_is_refused(base, pictures, run, tmp_path):
    with pytest.raises(UsageError, match=r"`output` .*: is not empty"):
        average_run(run, run, "5")
    with pytest.raises(UsageError, match=r"`run` .*: holds no trained model"):
        average_run(tmp_path, tmp_path / "out", "5")
    plain = [flag for flag in RUN if flag != "--save_rounds"]
    once = train_here(train_flags(base, pictures, *plain, "--max_train_steps=1"), tmp_path / "once")
    with pytest.raises(UsageError, match="left fewer than two models along its way"):
        average_run(once, tmp_path / "out", "5")
    assert not (tmp_path / "out").exists()


def test_a_dora_has_no_mean(base, pictures, tmp_path):
    flags = train_flags(base, pictures, *RUN, "--lora_rank=2", "--use_dora", "--max_train_steps=4")
    dora = train_here(flags, tmp_path / "dora")
    with pytest.raises(UsageError, match="is no factor of a LoRA: the mean of other adapters"):
        average_run(dora, tmp_path / "out", "2")


def test_what_was_averaged_is_recorded(adapter, tmp_path):
    average_run(adapter, tmp_path / "out", "2")
    assert json.loads((tmp_path / "out" / "ietagc" / "averaged.json").read_text()) == {"steps": [6, 8]}
    assert RunFolder(tmp_path / "out").is_adapter
