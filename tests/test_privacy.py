"""DP-SGD: gradients of single samples, clipped, counted once a step, noise, and what is said of privacy."""

import copy
import json
import math
import sys

import pytest
import torch
from conftest import train_flags, train_here, unet_bytes

from ietagc_diffusers import RunFolder, UsageError, hub, testing
from ietagc_diffusers.arguments import parse_flags
from ietagc_diffusers.training.privacy import PrivacyAccount, PrivateGradients, check_launch, epsilon, in_words
from ietagc_diffusers.training.scripts import UnconditionalScript

PRIVATE = ["--mitigation=none", "--dp_noise_multiplier=0.5", "--dp_max_grad_norm=0.2", "--report_to=none"]


def unet_of(kind):
    """(tiny UNet, a function of rows that gives the loss of each sample)."""
    torch.manual_seed(0)
    if kind == "pixels":
        unet, shape, told = testing.random_unconditional_pipeline(classes=5).unet, (3, 16, 16), {}
        told["class_labels"] = torch.tensor([0, 1, 1, 4])
    else:
        unet, shape = testing.random_pipeline(["a red picture"]).unet, (4, 8, 8)
        told = {"encoder_hidden_states": torch.randn(4, 77, 16)}
    images = torch.randn(4, *shape).to(memory_format=torch.channels_last)
    targets, timesteps = torch.randn(4, *shape), torch.tensor([3, 500, 10, 900])
    scales = torch.tensor([1.0, 30.0, 0.001, 5.0])  # some gradients are clipped, some are not

    def losses(model, rows):
        rows = torch.tensor(rows)
        said = model(images[rows], timesteps[rows], **{name: t[rows] for name, t in told.items()}).sample
        return scales[rows] * (said - targets[rows]).square().flatten(1).mean(1)

    return unet.train(), losses


def reference(unet, losses, max_norm, rows=range(4)):
    """The sum of the samples' clipped gradients, each from a backward pass of its own."""
    parameters = list(unet.parameters())
    sums, norms = [torch.zeros_like(p) for p in parameters], []
    for row in rows:
        gradients = torch.autograd.grad(losses(unet, [row]).sum(), parameters)
        norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient * min(1.0, max_norm / norms[-1])
    return sums, norms


def released(unet, losses, private, batches=((0, 1, 2, 3),), samples=None):
    for rows in batches:
        losses(unet, list(rows)).sum().backward()
        private.collect(torch.tensor(samples or rows))
    private.release()
    return [parameter.grad for parameter in unet.parameters()]


def close(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_gradients_are_those_of_autograd_one_sample_at_a_time(kind):
    unet, losses = unet_of(kind)
    sums, norms = reference(copy.deepcopy(unet), losses, max_norm := 0.5)
    assert min(norms) < max_norm < max(norms)
    private = PrivateGradients(unet, 0.0, max_norm, 8)
    close(released(unet, losses, private), [total / 8 for total in sums])
    close(released(unet, losses, private, [(0, 1), (2, 3)]), [total / 8 for total in sums])  # micro-batches


def test_an_image_counts_once_a_step_and_what_is_not_finite_not_at_all():
    unet, losses = unet_of("pixels")
    plain = copy.deepcopy(unet)
    private = PrivateGradients(unet, 0.0, 0.5, 1)
    close(released(unet, losses, private, samples=[7, 8, 7, 9]), reference(plain, losses, 0.5, [0, 1, 3])[0])
    for rows in ((0, 1), (2, 3)):  # also where it comes again in another micro-batch
        losses(unet, list(rows)).sum().backward()
        private.collect(torch.tensor({(0, 1): [7, 8], (2, 3): [8, 9]}[rows]))
    private.release()
    close([p.grad for p in unet.parameters()], reference(plain, losses, 0.5, [0, 1, 3])[0])
    spoilt = torch.tensor([1.0, math.nan, 1.0, math.inf])
    (losses(unet, [0, 1, 2, 3]) * spoilt).sum().backward()
    private.collect(torch.arange(4))
    private.release()
    close([p.grad for p in unet.parameters()], reference(plain, losses, 0.5, [0, 2])[0])


def test_noise_has_the_deviation_of_multiplier_times_norm():
    unet, losses = unet_of("pixels")
    exact, _ = reference(copy.deepcopy(unet), losses, 0.5)
    private, found = PrivateGradients(unet, 3.0, 0.5, 4), []
    for _ in range(2):
        torch.manual_seed(0)
        gradients = released(unet, losses, private)
        found.append(torch.cat([(4 * g - e).flatten() for g, e in zip(gradients, exact, strict=True)]))
    assert torch.equal(*found) and found[0].std().item() == pytest.approx(1.5, rel=0.03)
    assert abs(found[0].mean().item()) < 0.05


def exact_epsilon(mu, delta):
    """Of the Gaussian mechanism (Balle and Wang 2018), by bisection."""

    def delta_of(e):
        left, right = (math.erfc((e / mu + side * mu / 2) / math.sqrt(2)) / 2 for side in (-1, 1))
        return left - math.exp(e) * right

    low, high = 0.0, 100.0
    for _ in range(80):
        low, high = ((low + high) / 2, high) if delta_of((low + high) / 2) > delta else (low, (low + high) / 2)
    return high


@pytest.mark.parametrize(("multiplier", "visits"), [(1.0, 1), (2.0, 10), (5.0, 100)])
def test_epsilon_of_shuffled_batches_is_that_of_gaussian_noise_at_each_visit(multiplier, visits):
    account = PrivacyAccount(multiplier, 1e-5, 10, 50)
    found = account.spent(5 * visits)  # 5 steps an epoch
    exact = exact_epsilon(math.sqrt(visits) / multiplier, 1e-5)
    assert exact <= found["epsilon"] <= 1.25 * exact
    assert 0 < found["epsilon_poisson"] < found["epsilon"]
    assert account.spent(5 * visits + 1)["epsilon"] > found["epsilon"]  # a new epoch began


def test_epsilon_says_where_there_is_none():
    assert epsilon(0.0, 0.1, 5, 1e-5) == math.inf and epsilon(1.0, 0.1, 0, 1e-5) == 0
    nothing = PrivacyAccount(0.0, 1e-5, 10, 50).spent(5)
    assert nothing == {"epsilon": None, "epsilon_poisson": None}
    assert "infinite" in in_words(nothing, 1e-5) and "not privacy" in in_words(nothing, 1e-5)
    paper = PrivacyAccount(0.0002, 1e-5, 128, 50_000).spent(400_000)  # as the traces of the paper's baseline read
    assert paper["epsilon_poisson"] > 1e9
    private = PrivacyAccount(20.0, 1e-5, 10, 1000).spent(100)
    assert "not privacy" not in in_words(private, 1e-5)


@pytest.fixture(scope="module")
def unprompted(pictures, tmp_path_factory):
    """Flags of the unconditional script."""
    folder = tmp_path_factory.mktemp("config")
    testing.random_unconditional_pipeline().unet.save_config(folder)
    return [
        f"--model_config_name_or_path={folder}", f"--train_data_dir={pictures}", "--resolution=16", "--seed=5",
        "--train_batch_size=4", "--learning_rate=1e-3", "--lr_warmup_steps=0", "--checkpointing_steps=100000",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "flags",
    [
        ["--gradient_accumulation_steps=2", "--steps_per_round=2", "--max_train_steps=3"],
        ["--mitigation=iet", "--num_shards=2", "--steps_per_round=1", "--max_train_steps=4"],
    ],
    ids=["none", "iet"],
)
def test_a_stopped_run_goes_on_bit_for_bit_and_tells_what_it_spent(unprompted, tmp_path, flags):
    flags = [*unprompted, *PRIVATE, *flags]
    whole = train_here(flags, tmp_path / "whole", kind=UnconditionalScript)
    train_here(flags, tmp_path / "cut", stop_at=1, kind=UnconditionalScript)
    train_here([*flags, "--resume_from_checkpoint=latest"], tmp_path / "cut", kind=UnconditionalScript)
    assert unet_bytes(whole) == unet_bytes(tmp_path / "cut")
    rows = [json.loads(line) for line in RunFolder(whole).rounds_file.read_text().splitlines()]
    spent = [row["epsilon"] for row in rows]
    assert len(rows) == 2 and 0 < spent[0] <= spent[1] and rows[0]["epsilon_poisson"] < rows[1]["epsilon_poisson"]
    settings = parse_flags([*flags, f"--output_dir={whole}"], UnconditionalScript)
    hub.write_card(settings, "me/model", [], rows)
    card = (whole / "README.md").read_text()
    assert f"epsilon {spent[-1]:.4g} at delta 1e-05" in card and "clipped to 0.2" in card


def test_text_to_image_models_and_loras_are_trained_too(base, pictures, tmp_path):
    for name, more in (("unet", []), ("lora", ["--lora_rank=2"])):
        flags = train_flags(base, pictures, *PRIVATE, "--max_train_steps=2", *more)
        folder = train_here(flags, tmp_path / name)
        assert json.loads(RunFolder(folder).rounds_file.read_text().splitlines()[-1])["epsilon"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mitigation=agc"], "does not account for images that are skipped"),
        (["--mitigation=iet", "--redistribute_fraction=0.1"], "does not account for images that are skipped"),
        (["--mitigation=iet", "--no-shard_data"], "does not account for images that are skipped"),
        (["--channels_last"], "`channels_last`: cannot be combined with `dp_noise_multiplier`"),
        (["--on_bad_sample=skip"], "`on_bad_sample`: cannot be combined"),
        (["--gradient_checkpointing"], "`gradient_checkpointing`: cannot be combined"),
    ],
)
def test_what_it_does_not_account_for_is_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        parse_flags(["--train_data_dir=d", *PRIVATE, *flags], UnconditionalScript)
    with pytest.raises(UsageError, match="`dp_delta`: belongs to `dp_noise_multiplier`"):
        parse_flags(["--train_data_dir=d", "--dp_delta=1e-6"], UnconditionalScript)


def test_what_the_launch_lacks_is_told_before_anything_is_loaded(monkeypatch, unprompted, tmp_path):
    with pytest.raises(UsageError, match="`mixed_precision` bf16: DP-SGD clips in float32"):
        train_here([*unprompted, *PRIVATE, "--mixed_precision=bf16"], tmp_path, kind=UnconditionalScript)
    settings = parse_flags([*unprompted, *PRIVATE], UnconditionalScript)
    check_launch(settings, 1)
    with pytest.raises(UsageError, match="`num_processes` 2: with DP-SGD at most as many as `num_shards`, 1"):
        check_launch(settings, 2)
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(UsageError, match="needs the package opacus; `pip install opacus`"):
        check_launch(settings, 1)
