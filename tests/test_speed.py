"""What makes a step faster works with the method, and changes results by rounding only."""

import functools

import pytest
import torch
from conftest import train_flags, train_here
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors.torch import load_file

from ietagc_diffusers import TrainingSettings, UsageError
from ietagc_diffusers.families import StableDiffusion
from ietagc_diffusers.training.moments import put

FULL = [
    "--num_shards=2", "--steps_per_round=3", "--max_train_steps=12", "--skip_threshold=0.9", "--augment_range=1.3",
    "--bank_buckets=2", "--use_ema", "--lr_scheduler=cosine", "--checkpointing_steps=5",
]  # fmt: skip


def weights(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def plain(base, pictures, tmp_path_factory):
    return weights(train_here(train_flags(base, pictures, *FULL), tmp_path_factory.mktemp("plain") / "run"))


@pytest.mark.parametrize(
    "flag",
    ["--fused_adam", "--channels_last", pytest.param("--compile", marks=pytest.mark.slow), "--gradient_checkpointing"],
)
def test_results_agree(base, pictures, plain, tmp_path, monkeypatch, flag):
    # The compiler's graphs, without the minutes that its kernels take to build.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    flags = train_flags(base, pictures, *FULL, flag)
    found = weights(train_here(flags, tmp_path / "run"))
    for name, tensor in plain.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    train_here(flags, tmp_path / "stopped", stop_at=8)
    resumed = weights(train_here([*flags, "--resume_from_checkpoint=latest"], tmp_path / "stopped"))
    for name, tensor in found.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=2e-4)


@pytest.mark.parametrize("where", ["fused", "capturable", None])
def test_step_counters_wait_where_the_optimizer_wants_them(where):
    """Of a resumed run: torch's fused kernels take them beside the parameters, and no other way."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2, device="meta"))])
    if where is not None:
        optimizer.param_groups[0][where] = True
    put(optimizer, {"0/step": torch.tensor(7.0)})
    (state,) = optimizer.state.values()
    assert state["step"].device.type == ("cpu" if where is None else "meta")


def test_attention_is_the_fused_one(base):
    denoiser = StableDiffusion.load_denoiser(base, "unet")
    assert {type(processor) for processor in denoiser.attn_processors.values()} == {AttnProcessor2_0}


def test_eight_bits_have_kernels_of_their_own(base, pictures):
    with pytest.raises(UsageError, match="`fused_adam`"):
        TrainingSettings(
            pretrained_model_name_or_path=str(base), train_data_dir=str(pictures), use_8bit_adam=True, fused_adam=True
        )
