"""A checkpoint in a single file is the pipeline that it was made of, for evaluation and for training."""

import json
import shutil

import pytest
import torch
from conftest import COLOURS, train_flags, train_here, unet_bytes
from diffusers import DiffusionPipeline
from mitigated import generate as drawn_by
from original_layout import original_state
from safetensors.torch import load_file, save_file

from ietagc_diffusers import UsageError, single_file, testing
from ietagc_diffusers.cli import main
from ietagc_diffusers.eval.pipelines import check_pipeline
from ietagc_diffusers.single_file import folder_of, is_checkpoint

PARTS = ("unet", "vae", "text_encoder")


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline():
    captions = [f"a {colour} picture" for colour in COLOURS]
    return quiet(testing.random_pipeline(captions, attention=True))


@pytest.fixture(scope="module")
def config(pipeline, tmp_path_factory):
    """A pipeline's folder without weights, as Diffusers fetches it from the Hub."""
    folder = tmp_path_factory.mktemp("config") / "config"
    pipeline.save_pretrained(folder)
    for weights in folder.glob("*/*.safetensors"):
        weights.unlink()
    return folder


@pytest.fixture(scope="module")
def file(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "shared.safetensors"
    save_file(original_state(pipeline), path)
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def states(pipeline):
    return {f"{part}.{k}": v for part in PARTS for k, v in getattr(pipeline, part).state_dict().items()}


def test_a_file_is_the_pipeline_that_it_was_made_of(pipeline, file, config, tmp_path):
    folder = folder_of(file, str(config), tmp_path / "cache")
    loaded = quiet(DiffusionPipeline.from_pretrained(folder))
    ours, theirs = states(pipeline), states(loaded)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(drawn_by(loaded, ["a red picture"], (1,)), drawn_by(pipeline, ["a red picture"], (1,)))


def test_it_is_converted_once_and_again_when_the_content_changes(file, config, tmp_path, monkeypatch):
    converted, convert = [], single_file._convert
    monkeypatch.setattr(single_file, "_convert", lambda *a, **k: (converted.append(1), convert(*a, **k)))
    mine = tmp_path / "mine.safetensors"
    shutil.copy(file, mine)
    first = folder_of(mine, str(config))
    assert folder_of(mine, str(config)) == first and len(converted) == 1
    assert first.startswith(str(tmp_path / "xdg" / "ietagc" / "single_files" / "mine-"))
    save_file({name: tensor + 1 for name, tensor in load_file(mine).items()}, mine)
    before = folder_of(mine, str(config))
    assert before != first
    own = tmp_path / "own"
    shutil.copytree(config, own)
    assert folder_of(mine, str(own)) == before  # the same configuration elsewhere
    scheduler = own / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "epsilon"}))
    other = folder_of(mine, str(own))
    assert other != before and len(converted) == 3
    assert json.loads((tmp_path / other / "scheduler" / "scheduler_config.json").read_text())["prediction_type"] == (
        "epsilon"
    )


def test_an_interrupted_conversion_leaves_no_pipeline(file, config, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(single_file, "write_json", interrupted)  # after the parts, before the folder has its name
        with pytest.raises(KeyboardInterrupt):
            folder_of(file, str(config), tmp_path)
    left = [path for path in (tmp_path / "single_files").iterdir() if path.is_dir()]
    assert [path.suffix for path in left] == [".part"]
    folder = folder_of(file, str(config), tmp_path)
    DiffusionPipeline.from_pretrained(folder)
    assert not left[0].exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_keep_their_precision(file, config, tmp_path, dtype):
    half = tmp_path / "half.safetensors"
    kept = {"alphas_cumprod"}  # of the schedule, in float32 in every file
    save_file({name: t if name in kept else t.to(dtype) for name, t in load_file(file).items()}, half)
    weights = load_file(folder_of(half, str(config)) + "/unet/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    mixed = tmp_path / "mixed.safetensors"
    save_file({name: t.to(dtype) if "unet" in name else t for name, t in load_file(file).items()}, mixed)
    weights = load_file(folder_of(mixed, str(config)) + "/unet/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_parts_that_the_file_lacks_come_from_the_configuration_s_folder(pipeline, file, config, tmp_path, monkeypatch):
    partial = tmp_path / "partial.safetensors"
    save_file({name: t for name, t in load_file(file).items() if not name.startswith("cond_stage")}, partial)
    with pytest.raises(UsageError, match=r"lacks its text_encoder, and .*config has no weights for it"):
        folder_of(partial, str(config))
    with monkeypatch.context() as patch:
        patch.setattr(single_file, "_repository", lambda path: str(config))
        with pytest.raises(UsageError, match="lacks its text_encoder; give `model_config`, a whole pip"):
            folder_of(partial)
    whole = tmp_path / "whole"
    quiet(testing.random_pipeline(["a red picture"], seed=7, attention=True)).save_pretrained(whole)
    ours, theirs = states(DiffusionPipeline.from_pretrained(folder_of(partial, str(whole)))), states(pipeline)
    same = {name.split(".")[0] for name in ours if torch.equal(ours[name], theirs[name]) and ours[name].numel() > 99}
    assert same == {"unet", "vae"}
    for without, part in (("middle_block", "a part"), ("text_model.final_layer_norm", "its text_encoder")):
        save_file({name: t for name, t in load_file(file).items() if without not in name}, partial)
        with pytest.raises(UsageError, match=f"lacks some weights of {part}: it is not whole"):
            folder_of(partial, str(config))


REAL = {  # a layer that tells the kind, its shape, and where Diffusers has the kind's configuration
    "stable-diffusion-v1-5/stable-diffusion-v1-5": {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)},
    "stabilityai/stable-diffusion-xl-base-1.0": {
        "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1280,)
    },
    "stabilityai/stable-diffusion-3-medium-diffusers": {
        "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias": (9216,),
        "model.diffusion_model.pos_embed": (1, 36864, 1),
    },
}


@pytest.mark.parametrize("repository", REAL)
def test_without_the_hub_it_says_whose_configuration_is_needed(repository, tmp_path):
    path = tmp_path / "real.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in REAL[repository].items()}, path)
    assert is_checkpoint(path)
    with pytest.raises(UsageError, match=rf"needs the configuration of {repository}, which .*; .* `model_config`"):
        folder_of(path)


def test_what_is_no_checkpoint_is_told_from_one(tmp_path, file, config):
    strange, pickle = tmp_path / "strange.safetensors", tmp_path / "old.ckpt"
    save_file({"down.weight": torch.zeros(2)}, strange)
    pickle.write_bytes(b"\x80\x02}q\x00.")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UsageError, match="holds no whole checkpoint of a kind that Diffusers knows"):
        folder_of(strange)
    for each, message in ((strange, "no whole checkpoint"), (broken, "no whole checkpoint"), (pickle, "is a pickle")):
        with pytest.raises(UsageError, match=message):
            check_pipeline(each)
    for each, message in ((strange, "lacks its text_encoder"), (broken, "no whole checkpoint")):
        with pytest.raises(UsageError, match=message):
            folder_of(each, str(config))
    with pytest.raises(UsageError, match="is a pickle, which can run code"):
        folder_of(pickle, str(config))
    with pytest.raises(UsageError, match=r"`model_config` .*: is no pipeline's folder"):
        folder_of(file, str(tmp_path))
    with pytest.raises(UsageError, match="`model_config` a/b: is for a model in a single file, not for c/d"):
        folder_of("c/d", "a/b")
    assert folder_of("c/d") == "c/d"
    with pytest.raises(UsageError, match="give that file"):
        check_pipeline(file.parent)


def test_commands_take_a_file(pipeline, file, config, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red picture\na blue picture\n")
    flags = ["--prompts", str(tmp_path / "prompts.txt"), "--num_inference_steps", "2", "--device", "cpu"]
    pipeline.save_pretrained(tmp_path / "folder")
    given = {"folder": ["--model", str(tmp_path / "folder")]}
    given["file"] = ["--model", str(file), "--model_config", str(config)]
    for name, model in given.items():
        assert main(["generate", *model, *flags, "--output", str(tmp_path / f"drawn_{name}")]) == 0
        assert main(["detect", *model, *flags, "--output", str(tmp_path / f"detected_{name}")]) == 0
    for drawn in ("000000.png", "000001.png"):
        assert (tmp_path / "drawn_file" / drawn).read_bytes() == (tmp_path / "drawn_folder" / drawn).read_bytes()
    scores = [(tmp_path / f"detected_{name}" / "detect.csv").read_text() for name in given]
    assert scores[0] == scores[1]
    assert main(["generate", "--model", str(file), *flags, "--output", str(tmp_path / "no")]) == 2
    assert "--model_config, the folder of a pipeline of the same kind" in capsys.readouterr().err
    # With a connection Diffusers' own configuration is taken.
    monkeypatch.setattr(single_file, "_repository", lambda path: str(config))
    assert main(["generate", "--model", str(file), *flags, "--output", str(tmp_path / "default")]) == 0
    assert (tmp_path / "default" / "000000.png").read_bytes() == (tmp_path / "drawn_file" / "000000.png").read_bytes()


def test_training_starts_from_a_file(pipeline, file, config, pictures, tmp_path):
    pipeline.save_pretrained(tmp_path / "folder")
    flags = ["--max_train_steps=2", "--num_shards=1"]
    wanted = train_here(train_flags(tmp_path / "folder", pictures, *flags), tmp_path / "a")
    found = train_here(train_flags(file, pictures, *flags, f"--model_config={config}"), tmp_path / "b")
    assert unet_bytes(found) == unet_bytes(wanted)
    with pytest.raises(UsageError, match=r"`pretrained_model_name_or_path` .*: needs the configuration of"):
        train_here(train_flags(file, pictures, *flags), tmp_path / "c")
