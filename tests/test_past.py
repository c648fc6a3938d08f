"""The run's own past as the reference of calibrated control (--calibrate past)."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import train_flags, train_here, unet_bytes

from ietagc_diffusers import RunFolder, UsageError, checkpoint, testing
from ietagc_diffusers.arguments import parse_flags
from ietagc_diffusers.data import Batch
from ietagc_diffusers.run_folder import EMA
from ietagc_diffusers.tensor_files import Disk, HostMemory, TensorFile
from ietagc_diffusers.training.controls import reference_of
from ietagc_diffusers.training.cost import Cost
from ietagc_diffusers.training.past import PastModel, kept_after
from ietagc_diffusers.training.rounds import Rounds
from ietagc_diffusers.training.scripts import UnconditionalScript

CAPTIONS = ["a red picture", "a blue picture"]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
ROUNDS = 9
# By the rule in words: after 1, 2, 4, 8 rounds a model is kept, and is the reference from twice as many on.
REFERENCE = [0, 0, 1, 1, 2, 2, 2, 2, 4, 4]
NEXT = [0, 1, 2, 2, 4, 4, 4, 4, 8, 8]
RUN = ["--mitigation=agc", "--calibrate=past", "--skip_threshold=1.0", "--bank_buckets=1", "--report_to=none"]
RUN += ["--steps_per_round=1", "--save_rounds"]


def flags_of(base, pictures, shards, *more):
    every = [f"--num_shards={shards}", f"--max_train_steps={ROUNDS * shards}", f"--checkpointing_steps={shards}"]
    return [*train_flags(base, pictures), *RUN, *every, *more]


@pytest.fixture(scope="module", params=[(1, []), (2, ["--use_ema", "--proxy_state=disk"])], ids=["one", "two"])
def run(request, base, pictures, tmp_path_factory):
    """(K, folder, flags) of a finished run."""
    shards, more = request.param
    flags = flags_of(base, pictures, shards, *more)
    return shards, train_here(flags, tmp_path_factory.mktemp("past") / "run"), flags


def past_file(folder, step, which):
    return folder / f"checkpoint-{step}" / "ietagc" / f"past-{which}.safetensors"


def test_it_is_a_quarter_to_half_of_the_way_back():
    assert [kept_after(rounds) for rounds in range(10)] == list(zip(REFERENCE, NEXT, strict=True))
    for rounds in range(2, 2000):
        assert rounds / 4 < kept_after(rounds)[0] <= rounds / 2


def test_the_reference_is_the_model_that_was_saved_then(run):
    """The saved one is the moving average where there is one."""
    shards, folder, _ = run
    for rounds in range(1, ROUNDS + 1):
        for which, wanted in (("reference", REFERENCE[rounds]), ("next", NEXT[rounds])):
            path = past_file(folder, rounds * shards, which)
            assert path.exists() == bool(wanted), (rounds, which)
            if wanted:
                found, then = TensorFile(path), TensorFile(RunFolder(folder).round(wanted) / WEIGHTS)
                assert found.keys() == then.keys()
                assert all(torch.equal(found[name], then[name]) for name in then), (rounds, which)


def test_what_has_not_changed_is_on_the_disk_once(run):
    shards, folder, _ = run
    assert past_file(folder, 5 * shards, "next").samefile(past_file(folder, 7 * shards, "next"))
    assert past_file(folder, 5 * shards, "reference").samefile(past_file(folder, 7 * shards, "reference"))
    assert not past_file(folder, 7 * shards, "next").samefile(past_file(folder, 8 * shards, "next"))


def test_nothing_is_skipped_before_there_is_a_past(run):
    _, folder, _ = run
    rates = [row["skip_rate"] for row in RunFolder(folder).rounds()]
    assert rates[:2] == [0, 0] and sum(rates[3:]) > 0


def test_a_stopped_run_goes_on_bit_for_bit(run, tmp_path):
    shards, whole, flags = run
    flags = [*flags, "--resume_from_checkpoint=latest", "--checkpointing_steps=100000", "--no-save_rounds"]
    for step in (1, 5 * shards + shards // 2):
        train_here(flags, tmp_path, stop_at=step)
    train_here(flags, tmp_path)
    assert unet_bytes(tmp_path) == unet_bytes(whole)
    skips = [[row["skip_rate"] for row in RunFolder(path).rounds()] for path in (tmp_path, whole)]
    assert skips[0] == skips[1]


def test_the_arithmetic_is_that_of_real_checkpoints(run, base):
    shards, folder, flags = run
    parameters = sum(t.numel() for t in TensorFile(base / WEIGHTS).values())
    cost = Cost(parameters, num_shards=shards, ema="--use_ema" in flags, reference=4 * parameters, past=True)
    rounds = Rounds(shards, ROUNDS, 1)
    for step in (shards, 3 * shards, 8 * shards):
        large = (f"unet{EMA}/*.safetensors", "unet/*.safetensors", "ietagc/optimizer-*.safetensors")
        at = folder / f"checkpoint-{step}"
        paths = [path for pattern in (*large, "ietagc/past-*.safetensors") for path in at.glob(pattern)]
        content = sum(t.nbytes for path in paths for t in TensorFile(path).values())
        assert content == sum(cost.files(rounds, step).values()), step
    assert all(checkpoint.damage(path) is None for path in RunFolder(folder).checkpoints())
    plain = Cost(parameters, num_shards=shards)
    past = Cost(parameters, num_shards=shards, reference=4 * parameters, past=True)
    assert past.waiting - plain.waiting == past.device - plain.device == 4 * parameters


@pytest.mark.parametrize("place", [lambda folder: HostMemory(), Disk], ids=["host", "disk"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_its_losses_are_those_of_the_model_as_it_was(place, precision, tmp_path):
    family = testing.family_of_pipeline(testing.random_pipeline(CAPTIONS))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    batch = Batch(images, family.tokenize(CAPTIONS), seeds=[0, 1])
    drawn = family.objective.draw(family.objective.encode(batch))
    family.dtype = family.objective.dtype = precision
    drawn = replace(drawn, condition={name: tensor.to(precision) for name, tensor in drawn.condition.items()})
    settings = parse_flags(["--pretrained_model_name_or_path=m", "--train_data_dir=d", *RUN])
    past = reference_of(settings, family, family.denoiser, lambda module: module, place(tmp_path))
    assert isinstance(past, PastModel) and past.module.dtype == precision
    models = {}
    for rounds in range(1, ROUNDS + 1):
        with torch.no_grad():
            for parameter in family.denoiser.parameters():
                parameter.mul_(0.9)
        models[rounds] = copy.deepcopy(family.denoiser).to(precision)
        before = past.losses(family.objective, drawn)
        assert (before == torch.inf).all() if rounds < 3 else before.isfinite().all()
        past.end_round(rounds, dict(family.denoiser.named_parameters()))
        if REFERENCE[rounds]:
            with torch.no_grad():
                wanted = family.objective.losses(models[REFERENCE[rounds]], drawn)
            assert torch.equal(past.losses(family.objective, drawn), wanted)


def test_a_model_from_scratch_compares_with_its_past(pictures, tmp_path):
    testing.random_unconditional_pipeline().unet.save_config(tmp_path / "unet.json")
    flags = [
        f"--model_config_name_or_path={tmp_path / 'unet.json'}", f"--train_data_dir={pictures}", "--resolution=16",
        "--train_batch_size=4", "--max_train_steps=5", "--checkpointing_steps=1", *RUN,
    ]  # fmt: skip
    folder = train_here(flags, tmp_path / "run", kind=UnconditionalScript)
    assert [row["skip_rate"] > 0 for row in RunFolder(folder).rounds()][:2] == [False, False]
    assert sum(row["skip_rate"] for row in RunFolder(folder).rounds()) > 0
    found, then = TensorFile(past_file(folder, 5, "reference")), TensorFile(RunFolder(folder).round(2) / WEIGHTS)
    assert found.keys() == then.keys() and all(torch.equal(found[name], then[name]) for name in then)


def test_a_run_that_is_too_short_to_have_a_past_is_refused(base, pictures, tmp_path):
    flags = [*flags_of(base, pictures, 1), "--steps_per_round=5"]
    with pytest.raises(UsageError, match=r"`calibrate` past: .* third round, and the run has 2 in all"):
        train_here(flags, tmp_path)


def test_flags():
    names = ["--pretrained_model_name_or_path=m", "--train_data_dir=d"]
    with pytest.raises(UsageError, match="`calibrate` past: an adapter has a better reference"):
        parse_flags([*names, "--mitigation=agc-c", "--calibrate=past", "--lora_rank=4"])
    with pytest.raises(UsageError, match="`calibrate` past: calibrates the control by loss, which is off"):
        parse_flags([*names, "--mitigation=none", "--calibrate=past"])
    method = parse_flags([names[1], "--mitigation=iet-agc+c", "--calibrate=past"], UnconditionalScript).method
    assert (method.calibrate, method.skip_threshold) == ("past", 0.97)
