"""A base that is not whole, or whose parts are of different models, is refused before training."""

import shutil

import pytest
from conftest import COLOURS, train_flags, train_here

from ietagc_diffusers import UsageError, testing

CAPTIONS = [f"a {colour} picture" for colour in COLOURS]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    testing.random_pipeline(CAPTIONS).save_pretrained(folder / "sd")
    testing.random_xl_pipeline(CAPTIONS).save_pretrained(folder / "xl")
    testing.random_sd3_pipeline(CAPTIONS).save_pretrained(folder / "sd3")
    return folder


def refused(base, pictures, out, message):
    with pytest.raises(UsageError, match=f"`pretrained_model_name_or_path` .*{message}"):
        train_here(train_flags(base, pictures, "--mitigation=none", "--max_train_steps=1"), out)


@pytest.mark.parametrize(
    ("kind", "part", "source", "message"),
    [
        # transformers makes up a tokenizer that reads every word as unknown
        (
            "xl",
            "tokenizer_2",
            None,
            "no CLIPTokenizer in its subfolder 'tokenizer_2': the folder is empty or not there",
        ),
        ("sd3", "tokenizer_3", None, "no T5Tokenizer.* in its subfolder 'tokenizer_3'"),
        ("xl", "unet", "sd/unet", "takes embeddings of width 16, the text encoders make 32"),
        ("xl", "text_encoder_2", "xl/text_encoder", "its weights lack text_projection.weight; is it of another model"),
        ("xl", "scheduler", "sd3/scheduler", "its scheduler is a FlowMatchEulerDiscreteScheduler"),
        ("sd3", "scheduler", "xl/scheduler", "its scheduler is a DDPMScheduler, .* is trained by flow matching"),
    ],
)
def test_missing_and_foreign_parts_are_named(bases, pictures, tmp_path, kind, part, source, message):
    base = shutil.copytree(bases / kind, tmp_path / "base")
    shutil.rmtree(base / part)
    if source is not None:
        shutil.copytree(bases / source, base / part)
    refused(base, pictures, tmp_path / "out", message)


@pytest.mark.parametrize("part", ["text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors"])
def test_a_file_cut_short_is_named(bases, pictures, tmp_path, part):
    base = shutil.copytree(bases / "xl", tmp_path / "base")
    (base / part).write_bytes((base / part).read_bytes()[:5000])
    refused(base, pictures, tmp_path / "out", f"in its subfolder '{part.split('/')[0]}': ")


def test_weights_of_other_shapes_are_named(bases, pictures, tmp_path):
    base = shutil.copytree(bases / "xl", tmp_path / "base")
    shutil.copy(bases / "sd3" / "text_encoder_2" / "model.safetensors", base / "text_encoder_2")
    refused(base, pictures, tmp_path / "out", "no CLIPTextModelWithProjection in its subfolder 'text_encoder_2': ")


@pytest.mark.parametrize("kind", ["xl", "sd3"])
def test_a_folder_without_index_is_named(bases, pictures, tmp_path, kind):
    base = shutil.copytree(bases / kind, tmp_path / "base")
    (base / "model_index.json").unlink()
    refused(base, pictures, tmp_path / "out", r"has no model_index\.json")


def test_the_adapter_of_a_run_is_no_base(base, pictures, tmp_path):
    flags = train_flags(base, pictures, "--mitigation=none", "--max_train_steps=1", "--lora_rank=2")
    adapter = train_here(flags, tmp_path / "adapter")
    refused(adapter, pictures, tmp_path / "out", "holds a LoRA, not a pipeline; give the base model")


def test_a_path_that_is_not_there_is_no_hub_id(pictures, tmp_path):
    refused(tmp_path / "nowhere", pictures, tmp_path / "out", "nowhere: no such folder")
