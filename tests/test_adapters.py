"""Evaluation of adapters: of runs that left only one, of files from elsewhere, several together."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import train_flags, train_here
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from ietagc_diffusers import UsageError
from ietagc_diffusers.eval.adapters import find_adapter
from ietagc_diffusers.eval.detect import Detection, detect
from ietagc_diffusers.eval.generate import Settings, draw, generate, load_pipeline, model_hash, trained_resolution
from ietagc_diffusers.eval.image_sets import load_images
from ietagc_diffusers.eval.losses import Losses, shown
from ietagc_diffusers.eval.paper_figures import fig3
from ietagc_diffusers.eval.prompts import Prompt
from ietagc_diffusers.files import write_json
from ietagc_diffusers.run_folder import ADAPTER_FILE, RunFolder

FEW = {"num_inference_steps": 2, "resolution": 16}


@pytest.fixture(scope="module")
def run(base, pictures, tmp_path_factory):
    """A run whose updates are large enough to be seen."""
    flags = train_flags(base, pictures, "--mitigation=none", "--lora_rank=2", "--lora_alpha=6", "--max_train_steps=4")
    flags += ["--learning_rate=0.03", "--checkpointing_steps=2"]
    return train_here(flags, tmp_path_factory.mktemp("runs") / "lora")


def drawn(model, *lora, **more):
    settings = Settings(**FEW, lora=lora)
    return np.asarray(draw(load_pipeline(model, settings, **more), ["a red picture"], [3], settings)[0], dtype=int)


@pytest.fixture(scope="module")
def wanted(base, run):
    """What diffusers draws with the adapter, by scale."""
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipeline.load_lora_weights(run, adapter_name="one")
    images = {}
    for scale in (1.0, 0.5):
        pipeline.set_adapters(["one"], [scale])
        images[scale] = np.asarray(draw(pipeline, ["a red picture"], [3], Settings(**FEW))[0], dtype=int)
    return images


def test_a_run_is_drawn_from_as_its_base_with_the_adapter(base, run, wanted):
    for model, lora in ((run, ()), (base, (str(run),)), (base, (str(run / ADAPTER_FILE),))):
        assert np.array_equal(drawn(model, *lora), wanted[1.0])
    assert np.array_equal(drawn(base, f"{run}:0.5"), wanted[0.5])
    assert np.array_equal(drawn(base, f"{run}:0.25", f"{run}:0.25"), wanted[0.5])
    assert trained_resolution(run) == 16
    assert np.array_equal(drawn(base, denoiser=run / "checkpoint-4"), wanted[1.0])
    plain = drawn(base)
    assert min(np.abs(one - other).max() for one in (plain, wanted[1.0]) for other in (wanted[0.5],)) > 2


def kohya(run, path):
    """The adapter as kohya's scripts write it."""
    tensors = {}
    for name, tensor in load_file(run / ADAPTER_FILE).items():
        module, side = name.removeprefix("unet.").removesuffix(".weight").split(".lora.")
        tensors[f"lora_unet_{module.replace('.', '_')}.lora_{side}.weight"] = tensor.contiguous()
        tensors[f"lora_unet_{module.replace('.', '_')}.alpha"] = torch.tensor(6.0)
    save_file(tensors, path)
    return str(path)


def test_kohyas_files_are_drawn_with(base, run, wanted, tmp_path):
    assert np.array_equal(drawn(base, kohya(run, tmp_path / "style.safetensors")), wanted[1.0])


def test_the_hash_of_a_model_is_that_of_its_adapters_too(base, run, tmp_path):
    moved = shutil.copy(run / ADAPTER_FILE, tmp_path / "other.safetensors")
    same = {model_hash(run), model_hash(base, lora=[str(run)]), model_hash(base, lora=[moved])}
    same.add(model_hash(base, run / "checkpoint-4"))
    others = [model_hash(base), model_hash(base, lora=[f"{run}:0.5"]), model_hash(base, run / "checkpoint-2")]
    assert len(same) == 1 and len({*same, *others}) == 4


def test_images_of_another_adapter_are_not_continued(base, run, tmp_path):
    prompts, settings = [Prompt("a red picture")], Settings(**FEW, lora=(str(run),))
    generate(base, prompts, tmp_path / "one", settings)
    generate(run, prompts, tmp_path / "one", Settings(**FEW))  # the same model by another name
    with pytest.raises(UsageError, match="begun with `model_hash`"):
        generate(base, prompts, tmp_path / "one", Settings(**FEW))
    assert trained_resolution(run) == 16


def test_prompts_are_scored_with_the_adapter(base, run, tmp_path):
    few = {"generations": 1, "num_inference_steps": 1, "resolution": 16}
    for name, settings in (("none", Detection(**few)), ("lora", Detection(**few, lora=(str(run),)))):
        detect(base, ["a red picture"], tmp_path / name, settings)
    detect(run, ["a red picture"], tmp_path / "run", Detection(**few))
    none, lora, of_run = ((tmp_path / name / "detect.csv").read_text() for name in ("none", "lora", "run"))
    assert none != lora == of_run


def test_an_adapter_says_at_which_resolution_its_model_is_drawn_and_measured(base, run, tmp_path):
    assert trained_resolution(base, [str(run)]) == 16 and trained_resolution(base) is None
    finer = RunFolder(shutil.copytree(run, tmp_path / "finer"))
    write_json(finer.training_set_file, finer.training_set() | {"resolution": 24})
    both = str(run), str(finer.path)
    assert trained_resolution(base, both) == 24 == trained_resolution(run, both[1:])
    assert trained_resolution(finer.path, both[:1]) == 16
    few = Detection(generations=1, num_inference_steps=1, lora=both[1:])
    assert detect(base, ["a red picture"], tmp_path / "detect", few)["resolution"] == 24
    generate(base, [Prompt("a red picture")], tmp_path / "drawn", Settings(num_inference_steps=1, lora=both))
    assert load_images(tmp_path / "drawn", "output").image(0).size == (24, 24)


def test_losses_along_a_run_are_those_of_its_adapters(base, run, pictures):
    images = shown(load_images(pictures, "train"), 16, 4)
    losses = Losses(base, images, images, draws=1)
    models = RunFolder(run).saved_models("unet")
    assert [step for step, _ in models] == [2, 4]
    assert len({losses.of_base(), *(losses(folder) for _, folder in models)}) == 3


def test_fig_3_is_of_the_run_s_adapter(base, run, pictures, tmp_path):
    plain = shutil.copytree(base, tmp_path / "plain")
    shutil.copytree(run / "ietagc", plain / "ietagc")
    scored = SimpleNamespace(nearest={"nearest": [], "similarity": []})
    curves = [fig3(scored, folder, load_images(pictures, "train")).axes[0].lines[0] for folder in (run, plain)]
    assert not np.array_equal(*(curve.get_ydata() for curve in curves))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such_id_x", "neither a file or folder nor a Hub id"),
        ("empty", f"the folder holds no {ADAPTER_FILE}"),
        ("pickle.bin", "must be a .safetensors file"),
        ("text.safetensors", "does not fit the model"),
        ("wide.safetensors", "does not fit the model: its layers have other sizes"),
        ("other.safetensors", "fits no layer of the model"),
    ],
)
def test_adapters_that_will_not_do(base, run, tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickle.bin").write_bytes(b"x")
    (tmp_path / "text.safetensors").write_text("not a tensor")
    tensors = load_file(run / ADAPTER_FILE)
    save_file(
        {key: torch.cat([t, t], dim=int("down" in key)) for key, t in tensors.items()}, tmp_path / "wide.safetensors"
    )
    save_file({f"transformer.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "other.safetensors")
    given = name if "/" in name else str(tmp_path / name)
    with pytest.raises(UsageError, match=f"`lora` {given}: {message}") as refusal:
        drawn(base, given)
    assert "\n" not in str(refusal.value)


def test_a_scale_is_what_follows_the_last_colon(tmp_path):
    (tmp_path / "a:2.safetensors").write_bytes(b"")
    assert find_adapter(str(tmp_path / "a:2.safetensors")).scale == 1
    assert find_adapter(f"{tmp_path / 'a:2.safetensors'}:-0.5").scale == -0.5


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ("nan", "the scale must be a finite number"),
        ("inf", "the scale must be"),
        ("half", "the scale half is not"),
    ],
)
def test_a_scale_is_a_finite_number(tmp_path, scale, message):
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match=f"`lora` .*:{scale}: {message}"):
        find_adapter(f"{tmp_path / 'a.safetensors'}:{scale}")


def test_an_adapter_without_its_base_says_what_to_give(base, run, tmp_path):
    shutil.copy(run / ADAPTER_FILE, tmp_path)
    with pytest.raises(UsageError, match="holds a LoRA, not a pipeline; set `model` to its base"):
        load_pipeline(tmp_path, Settings())
    with pytest.raises(UsageError, match="is a LoRA, not a pipeline; set `model`"):
        load_pipeline(tmp_path / ADAPTER_FILE, Settings())
    (tmp_path / "ietagc").mkdir()
    (tmp_path / "ietagc" / "config.yaml").write_text("pretrained_model_name_or_path: /moved/away\n")
    with pytest.raises(UsageError, match="holds an adapter for /moved/away, which is not found; set `model`"):
        load_pipeline(tmp_path, Settings())
