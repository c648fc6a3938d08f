"""Whole runs of the script: what they equal, what they leave behind, and where they may be interrupted."""

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from conftest import COLOURS, launch, train_flags, train_here, unet_bytes, write_folder
from datasets import load_dataset, load_from_disk
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torchvision import transforms
from transformers import CLIPTextModel, CLIPTokenizer

from ietagc_diffusers import UsageError, testing

# A short run in which every part of the method acts: 2 shards, 3 rounds, skips, augmentations, moves.
METHOD = [
    "--num_shards=2", "--steps_per_round=4", "--max_train_steps=24", "--skip_threshold=0.9", "--augment_range=1.3",
    "--bank_buckets=2", "--use_ema",
]  # fmt: skip


def plain_training(base, pictures, steps, flip, accumulation, ema, embedding_noise=0.0):
    """Plain fine-tuning, written anew with accelerate's own loader and accumulation: the reference for 'none'."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(gradient_accumulation_steps=accumulation)
    set_seed(5)
    scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder")
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
    for frozen in (vae, text_encoder):  # with gradients, attention takes another path, which rounds differently
        frozen.requires_grad_(False)
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet").train()
    average = EMAModel(unet.parameters()) if ema else None
    rows = load_dataset("imagefolder", data_files={"train": f"{pictures}/**"})["train"]
    crop = transforms.Compose(
        [
            transforms.Resize(16, interpolation=transforms.InterpolationMode.LANCZOS),
            transforms.RandomCrop(16),
            transforms.RandomHorizontalFlip(0.5 if flip else 0.0) if flip else transforms.Lambda(lambda x: x),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )

    def prepare(batch):
        tokens = tokenizer(batch["text"], max_length=77, padding="max_length", return_tensors="pt").input_ids
        return {"x": [crop(image.convert("RGB")) for image in batch["image"]], "tokens": tokens}

    def collate(items):
        return torch.stack([item["x"] for item in items]), torch.stack([item["tokens"] for item in items])

    loader = torch.utils.data.DataLoader(rows.with_transform(prepare), shuffle=True, batch_size=4, collate_fn=collate)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=steps)
    unet, optimizer, loader, schedule = accelerator.prepare(unet, optimizer, loader, schedule)
    done = 0
    while done < steps:
        for images, tokens in loader:
            with accelerator.accumulate(unet):
                latents = vae.encode(images).latent_dist.sample() * vae.config.scaling_factor
                noise = torch.randn_like(latents)
                t = torch.randint(0, 1000, (len(latents),)).long()
                condition = text_encoder(tokens)[0]
                if embedding_noise:
                    condition = condition + embedding_noise * torch.randn_like(condition)
                prediction = unet(scheduler.add_noise(latents, noise, t), t, condition).sample
                loss = F.mse_loss(prediction, scheduler.get_velocity(latents, noise, t))
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                done += 1
                if average:
                    average.step(unet.parameters())
            if done >= steps:
                break
    if average:
        average.copy_to(unet.parameters())
    return {name: p.detach() for name, p in unet.named_parameters()}


@pytest.mark.parametrize(
    ("flip", "accumulation", "ema", "embedding_noise", "attention"),
    [(False, 1, False, 0, False), (True, 2, True, 0, False), (True, 1, False, 0.1, False), (True, 1, False, 0, True)],
)
def test_none_is_plain_training_bit_for_bit(
    base, pictures, tmp_path, flip, accumulation, ema, embedding_noise, attention
):
    """``attention``: in the VAE, as in every real one; its latents lie in memory with their channels last."""
    if attention:
        base = tmp_path / "base"
        testing.random_pipeline([f"a {colour} picture" for colour in COLOURS], attention=True).save_pretrained(base)
    steps = 10 if accumulation == 1 else 7
    wanted = plain_training(base, pictures, steps, flip, accumulation, ema, embedding_noise)
    flags = train_flags(base, pictures, "--mitigation=none", f"--max_train_steps={steps}", "--lr_scheduler=cosine")
    flags += [f"--gradient_accumulation_steps={accumulation}", "--lr_warmup_steps=2"]
    flags += ["--random_flip"] * flip + ["--use_ema"] * ema + [f"--embedding_noise={embedding_noise}"]
    got = load_file(train_here(flags, tmp_path / "out") / "unet" / "diffusion_pytorch_model.safetensors")
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.fixture(scope="module")
def method_run(base, pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "method"
    return train_here(train_flags(base, pictures, *METHOD, "--save_shards", "--save_rounds"), folder)


def rounds(folder):
    return [json.loads(line) for line in (folder / "ietagc" / "rounds.jsonl").read_text().splitlines()]


def figures(folder):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rounds(folder)]


def test_the_output_is_a_pipeline(method_run):
    pipeline = StableDiffusionPipeline.from_pretrained(method_run)
    image = pipeline("a red picture", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (16, 16, 3)
    for index in (1, 2, 3):
        StableDiffusionPipeline.from_pretrained(method_run / "rounds" / f"round-{index:04d}")


def test_rounds_tell_what_happened(method_run):
    rows = rounds(method_run)
    assert [row["global_step"] for row in rows] == [8, 16, 24]
    assert all(0 < row["skip_rate"] < 1 and 0 < row["augment_rate"] < 1 for row in rows)
    assert [row["moved"] for row in rows] == [6, 6, 6]


def test_skip_counts_name_every_sample(method_run):
    table = pq.read_table(method_run / "ietagc" / "skip_counts.parquet").to_pydict()
    assert table["sample_id"] == list(range(24))
    rows = rounds(method_run)
    visits = 2 * 3 * (4 * 4)  # shards x rounds x steps x batch: epochs of 12 end on whole batches
    assert sum(table["visits"]) == visits
    assert sum(table["skips"]) == pytest.approx(sum(row["skip_rate"] for row in rows) / 3 * visits)
    assert sorted(set(table["shard"])) == [0, 1]


def test_shards_are_datasets(method_run):
    table = pq.read_table(method_run / "ietagc" / "skip_counts.parquet").to_pydict()
    for shard in range(2):
        rows = load_from_disk(method_run / "ietagc" / "shards" / f"shard-{shard}")
        assert rows["sample_id"] == np.flatnonzero(np.array(table["shard"]) == shard).tolist()


def test_config_repeats_the_run(method_run, tmp_path):
    config = yaml.safe_load((method_run / "ietagc" / "config.yaml").read_text())
    assert config["skip_threshold"] == 0.9 and config["seed"] == 5
    again = train_here([f"--config={method_run / 'ietagc' / 'config.yaml'}"], tmp_path / "again")
    assert unet_bytes(again) == unet_bytes(method_run)
    assert figures(again) == figures(method_run)


@pytest.mark.parametrize("stop_at", [3, 8, 12, 23])
def test_a_stopped_run_goes_on_bit_for_bit(base, pictures, method_run, tmp_path, stop_at):
    flags = train_flags(base, pictures, *METHOD, "--save_shards", "--save_rounds")
    train_here(flags, tmp_path, stop_at=stop_at)
    assert (tmp_path / f"checkpoint-{stop_at}" / "unet_ema" / "config.json").is_file()
    assert not (tmp_path / "model_index.json").exists()
    train_here([*flags, "--resume_from_checkpoint=latest"], tmp_path)
    assert unet_bytes(tmp_path) == unet_bytes(method_run)
    assert figures(tmp_path) == figures(method_run)
    tables = [pq.read_table(folder / "ietagc" / "skip_counts.parquet") for folder in (tmp_path, method_run)]
    assert tables[0].equals(tables[1])


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stopped_plain_run_goes_on_bit_for_bit(base, pictures, tmp_path, workers):
    flags = train_flags(base, pictures, "--mitigation=none", "--max_train_steps=11", "--random_flip", "--use_ema")
    flags += [f"--dataloader_num_workers={workers}", "--gradient_accumulation_steps=2"]
    whole = train_here(flags, tmp_path / "whole")
    train_here(flags, tmp_path / "cut", stop_at=5)
    train_here([*flags, "--resume_from_checkpoint=checkpoint-5"], tmp_path / "cut")
    assert unet_bytes(tmp_path / "cut") == unet_bytes(whole)


def test_two_processes_equal_one(base, pictures, method_run, tmp_path):
    launch(train_flags(base, pictures, *METHOD), tmp_path, processes=2)
    assert unet_bytes(tmp_path) == unet_bytes(method_run)
    assert figures(tmp_path) == figures(method_run)
    tables = [pq.read_table(folder / "ietagc" / "skip_counts.parquet") for folder in (tmp_path, method_run)]
    assert tables[0].equals(tables[1])


def test_a_resumed_run_of_other_flags_is_refused(base, pictures, tmp_path):
    flags = train_flags(base, pictures, *METHOD)
    train_here(flags, tmp_path, stop_at=4)
    with pytest.raises(UsageError, match=r"skip_threshold was 0.9, is 0.8.*`resume_allow"):
        train_here([*flags, "--skip_threshold=0.8", "--resume_from_checkpoint=latest"], tmp_path)
    for name, message in (("num_shards", "cannot change within a run"), ("skip_treshold", "not among")):
        with pytest.raises(UsageError, match=f"`resume_allow` {name}: {message}"):
            train_here([*flags, "--resume_from_checkpoint=latest", "--resume_allow", name], tmp_path)
    allowed = ["--skip_threshold=0.8", "--resume_from_checkpoint=latest", "--resume_allow", "skip_threshold"]
    assert rounds(train_here([*flags, *allowed], tmp_path))[-1]["global_step"] == 24


def test_a_missing_checkpoint_is_named(base, pictures, tmp_path):
    flags = train_flags(base, pictures, *METHOD)
    train_here(flags, tmp_path, stop_at=4)
    with pytest.raises(UsageError, match=r"checkpoint-77: not found; checkpoints in .*: checkpoint-4"):
        train_here([*flags, "--resume_from_checkpoint=checkpoint-77"], tmp_path)


def test_checkpoints_keep_to_their_limit(base, pictures, tmp_path):
    flags = train_flags(base, pictures, *METHOD, "--checkpointing_steps=4", "--checkpoints_total_limit=2")
    train_here(flags, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-20", "checkpoint-24"]


def test_deduplication_and_groups(base, tmp_path):
    pictures = write_folder(tmp_path / "pictures", 16, copies=range(8))
    flags = train_flags(base, pictures, *METHOD, "--max_train_steps=8")
    once = pq.read_table(
        train_here([*flags, "--deduplicate=exact"], tmp_path / "once") / "ietagc" / "skip_counts.parquet"
    )
    assert once.num_rows == 16
    grouped = train_here([*flags, "--group_duplicates"], tmp_path / "grouped")
    table = pq.read_table(grouped / "ietagc" / "skip_counts.parquet").to_pydict()
    names = [json.loads(line)["file_name"][:3] for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    homes = {}
    for name, shard in zip(names, table["shard"], strict=True):
        homes.setdefault(name, set()).add(shard)
    assert all(len(shards) == 1 for shards in homes.values())


def test_validation_images_and_labels(base, pictures, tmp_path):
    flags = train_flags(base, pictures, *METHOD, "--label_column=label", "--validation_epochs=1")
    train_here([*flags, "--validation_prompts", "a red picture", "a blue picture"], tmp_path)
    assert list(tmp_path.glob("logs/**/events*"))


def test_validation_does_not_change_the_training(base, pictures, tmp_path):
    flags = train_flags(base, pictures, "--mitigation=none", "--max_train_steps=8")
    plain = train_here(flags, tmp_path / "plain")
    watched = train_here(
        [*flags, "--validation_epochs=1", "--validation_prompts", "a red picture"], tmp_path / "watched"
    )
    assert unet_bytes(plain) == unet_bytes(watched)


@pytest.mark.parametrize("mitigation", ["agc", "iet", "iet-agc", "iet-agc-taa", "iet-agc+"])
def test_every_preset_runs(base, pictures, tmp_path, mitigation):
    flags = train_flags(base, pictures, f"--mitigation={mitigation}", "--num_train_epochs=2", "--snr_gamma=5")
    rows = rounds(train_here([*flags, "--epochs_per_round=1"], tmp_path))
    shards = 1 if mitigation == "agc" else 4
    assert len(rows) == 2 and len(rows[0]["shard_loss"]) == shards
    assert rows[-1]["global_step"] == shards * math.ceil(2 * 6 / shards)


def test_half_precision_and_scaled_learning_rate_run(base, pictures, tmp_path):
    flags = train_flags(base, pictures, *METHOD, "--mixed_precision=bf16", "--gradient_checkpointing", "--scale_lr")
    folder = train_here([*flags, "--learning_rate=1e-4", "--noise_offset=0.1", "--input_perturbation=0.1"], tmp_path)
    assert all(math.isfinite(row["loss"]) for row in rounds(folder))
    config = yaml.safe_load((folder / "ietagc" / "config.yaml").read_text())
    assert config["learning_rate"] == 1e-4 and config["mixed_precision"] == "bf16"


def test_controls_run(base, pictures, tmp_path):
    flags = train_flags(base, pictures, "--mitigation=none", "--max_train_steps=40")
    row = rounds(train_here([*flags, "--random_skip_rate=0.3", "--random_augment_rate=0.4"], tmp_path))[0]
    assert row["skip_rate"] > 0 and row["augment_rate"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_shards=30"], "`num_shards` 30: more than the 24 training samples"),
        (["--pretrained_model_name_or_path={empty}"], "`pretrained_model_name_or_path`"),
        (["--enable_xformers_memory_efficient_attention"], "needs a CUDA device"),
        (["--use_8bit_adam"], "bitsandbytes is not installed"),
        (["--lr_scheduler=wavy"], "`lr_scheduler` wavy"),
        (["--dream_training"], "`dream_training` works only with prediction type epsilon"),
        (["--label_column=kind"], "`label_column` kind: not a column"),
    ],
)
def test_wrong_use_is_named_before_training(base, pictures, tmp_path, flags, message):
    (tmp_path / "empty").mkdir()
    flags = [flag.format(empty=tmp_path / "empty") for flag in flags]
    with pytest.raises(UsageError, match=message):
        train_here(train_flags(base, pictures, *flags), tmp_path / "out")


def test_a_model_without_unet_is_named(base, pictures, tmp_path):
    import shutil

    shutil.copytree(base, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "unet")
    with pytest.raises(UsageError, match="no UNet2DConditionModel in its"):
        train_here(
            [*train_flags(base, pictures), f"--pretrained_model_name_or_path={tmp_path / 'model'}"], tmp_path / "out"
        )


def test_wrong_use_exits_with_2_in_one_line(base, tmp_path):
    done = launch(train_flags(base, tmp_path / "nowhere"), tmp_path / "out", check=False)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert errors == [f"train_text_to_image_ietagc.py: error: --train_data_dir {tmp_path / 'nowhere'}: no such folder"]
    assert "Traceback" not in done.stderr


def test_help_lists_every_flag():
    done = launch(["--help"], None)
    assert "--skip_threshold" in done.stdout and "--snr_gamma" in done.stdout
