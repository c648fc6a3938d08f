"""Prior preservation: what a step adds up to, which pictures come when, and that nothing else changes."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import launch, train_flags, train_here, unet_bytes, write_folder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ietagc_diffusers import Layout, PlainControl, Proxy, RunFolder, UsageError
from ietagc_diffusers.arguments import parse_flags
from ietagc_diffusers.data import Batch
from ietagc_diffusers.data.rows import load_other_rows
from ietagc_diffusers.method.control import DecidingControl, Decision
from ietagc_diffusers.training.build import build_run, load_family
from ietagc_diffusers.training.prior import Prior, PriorSet
from ietagc_diffusers.training.rows import load_rows
from ietagc_diffusers.training.run import train
from ietagc_diffusers.training.streams import RandomStreams

PLAIN = ["--mitigation=none", "--max_train_steps=8"]
# A short run in which every part of the method acts: 2 shards, 3 rounds, skips, augmentations, moves.
METHOD = [
    "--num_shards=2", "--steps_per_round=4", "--max_train_steps=24", "--skip_threshold=0.9", "--augment_range=1.3",
    "--bank_buckets=2", "--gradient_accumulation_steps=2",
]  # fmt: skip
LORA = ["--mitigation=none", "--max_train_steps=6", "--lora_rank=2", "--lora_dropout=0.4"]
BATCH, WIDTH, WEIGHT = 3, 4, 0.7


@pytest.fixture(scope="module")
def prior_dir(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("prior") / "others", 7, seed=9)


# The loss of a step


def numbers(seed, rows):
    """Inputs (rows, WIDTH) and targets (rows, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, WIDTH, generator=generator), torch.randn(rows, 1, generator=generator)


class Drawn:
    def __init__(self, inputs, targets, levels):
        self.inputs, self.targets, self.levels = inputs, targets, levels

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, rows):
        return Drawn(self.inputs[rows], self.targets[rows], self.levels[rows])


class Regression:
    """An objective without chance, on rows of numbers; a sample's level is its number."""

    def encode(self, batch):
        return batch

    def draw(self, batch):
        return Drawn(batch.images, batch.inputs["targets"], batch.samples)

    def losses(self, model, drawn):
        return (model(drawn.inputs) - drawn.targets).square().squeeze(1)

    def weights(self, drawn):
        return None

    def plain_loss(self, model, drawn):
        return self.losses(model, drawn).mean()


class Skipping(DecidingControl):
    """Skips the samples with these numbers."""

    def __init__(self, skipped, group=None):
        super().__init__(None, group)
        self.skipped = torch.tensor(sorted(skipped), dtype=torch.int64)

    def decide(self, losses, levels):
        skip, nothing = torch.isin(levels, self.skipped), torch.zeros_like(losses)
        return Decision(skip, nothing.bool(), nothing, nothing)


class Listed:
    """A loader of given batches; the last one ends an epoch."""

    def __init__(self, inputs, targets, sizes, first=0):
        self.batches, self.taken = [], 0
        for size in sizes:
            rows = slice(first, first + size)
            self.batches.append(
                Batch(inputs[rows], {"targets": targets[rows]}, torch.arange(len(inputs))[rows], seeds=[0] * size)
            )
            first += size

    def next(self):
        self.taken += 1
        return self.batches[self.taken - 1], self.taken == len(self.batches)


def linear():
    torch.manual_seed(0)
    return torch.nn.Linear(WIDTH, 1)


def gradient_of_a_step(control, loader, prior, accumulation, layout):
    """Of both parameters in one tensor: what a step of plain descent at rate 1 subtracts."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    proxy = Proxy(0, loader, control, optimizer, schedule, 100, accumulation, 0, prior)
    before = flat(model)
    proxy.step(model, Regression(), layout)
    return before - flat(model), proxy


def flat(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def gradient_of(loss):
    model = linear()
    loss(model).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def mean_loss(model, inputs, targets):
    return (model(inputs) - targets).square().mean() if len(inputs) else 0 * model.weight.sum()


def steps_of_process(rank, folder, size):
    """One process's part of a step of each case; in a batch of the group the processes' parts follow one another."""
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    for number, (accumulation, skipped) in enumerate(CASES):
        layout = Layout(1, size, rank)
        loaders = [Listed(*numbers(seed, 100), [BATCH] * accumulation, rank * accumulation * BATCH) for seed in (1, 2)]
        prior = Prior(loaders[1], WEIGHT, (0, 0), RandomStreams(), "`prior_dir` d")
        gradient, _ = gradient_of_a_step(Skipping(skipped, layout), loaders[0], prior, accumulation, layout)
        torch.save(gradient, folder / f"gradient-{number}-{rank}.pt")
    if size > 1:
        dist.destroy_process_group()


# Micro-batches, and which samples are skipped: none, some (of one batch all) or all.
CASES = [(micro, skipped) for micro in (1, 3) for skipped in ((), (0, 2, 3, 4, 5), tuple(range(100)))]


@pytest.mark.parametrize("size", [1, 2])
def test_the_loss_is_the_mean_over_the_kept_plus_the_weighted_mean_over_the_prior(tmp_path, size):
    """On one process and on two that share the shard."""
    if size == 1:
        steps_of_process(0, tmp_path, 1)
    else:
        mp.start_processes(steps_of_process, (tmp_path, size), nprocs=size, start_method="forkserver")
    for number, (accumulation, skipped) in enumerate(CASES):
        rows = size * accumulation * BATCH
        (x, y), (prior_x, prior_y) = (tuple(part[:rows] for part in numbers(seed, 100)) for seed in (1, 2))
        keep = [row for row in range(rows) if row not in skipped]

        def loss(model, own=(x[keep], y[keep]), prior=(prior_x, prior_y)):
            return mean_loss(model, *own) + WEIGHT * mean_loss(model, *prior)

        for rank in range(size):
            found = torch.load(tmp_path / f"gradient-{number}-{rank}.pt")
            torch.testing.assert_close(found, gradient_of(loss), rtol=1e-5, atol=1e-6)


def test_in_the_official_order_each_micro_batch_weighs_as_its_own_does():
    """An epoch ends on a short batch after two of three micro-batches; the official script divides by three."""
    own, others, sizes = numbers(1, 100), numbers(2, 100), [BATCH, 2]
    prior = Prior(Listed(*others, [BATCH, BATCH]), WEIGHT, (0, 0), RandomStreams(), "")
    gradient, _ = gradient_of_a_step(PlainControl(), Listed(*own, sizes), prior, 3, Layout(1))

    def official(model):
        of_own = mean_loss(model, *(part[:BATCH] for part in own)) + mean_loss(model, *(part[3:5] for part in own))
        first, second = (mean_loss(model, *(part[rows] for part in others)) for rows in (slice(3), slice(3, 6)))
        return (of_own + WEIGHT * (first + second)) / 3

    torch.testing.assert_close(gradient, gradient_of(official), rtol=1e-5, atol=1e-6)


def test_prior_samples_are_not_counted():
    own, others = numbers(1, 100), numbers(2, 100)
    prior = Prior(Listed(*others, [BATCH]), WEIGHT, (0, 0), RandomStreams(), "")
    _, proxy = gradient_of_a_step(Skipping([1]), Listed(*own, [BATCH]), prior, 1, Layout(1))
    assert proxy.total_visits.tolist() == [1] * BATCH + [0] * (100 - BATCH)
    assert proxy.total_skips.nonzero().flatten().tolist() == [1]
    losses = (linear()(own[0][:BATCH]) - own[1][:BATCH]).square()
    assert proxy.round_totals[0].item() == pytest.approx(losses.sum().item())
    wanted = mean_loss(linear(), *(part[:BATCH] for part in others)).item()
    assert prior.mean_loss() == pytest.approx(wanted) and prior.mean_loss() == 0


def test_a_step_whose_prior_loss_is_not_finite_is_left_out():
    own, (x, y) = numbers(1, 100), numbers(2, 100)
    prior = Prior(Listed(x * torch.nan, y, [BATCH]), WEIGHT, (0, 0), RandomStreams(), "")
    gradient, proxy = gradient_of_a_step(Skipping([]), Listed(*own, [BATCH]), prior, 1, Layout(1))
    assert not gradient.any() and proxy.left_out and proxy.nonfinite_in_a_row == 1


# Which pictures come when


class Keys:
    """Samples that show which keys were asked for."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def of_shard(self, samples):
        return self

    def __getitems__(self, keys):
        return Batch(torch.tensor(keys))

    def received(self, batch):
        return batch


def keys(shard=0, batches=6, size=4, group=1, rank=0, resumed_at=None):
    """(row, seed) of the samples of some batches."""
    prior = Prior.of_shard(PriorSet(Keys(7), 1.0, "", ""), size, 0, (5, shard), RandomStreams(), group, rank)
    if resumed_at:
        prior.loader.load_state_dict({"first_epoch": 0, "taken": resumed_at})
        batches -= resumed_at
    return [prior.loader.next()[0].images.tolist() for _ in range(batches)]


def test_every_shard_uses_the_whole_set_in_an_order_of_its_own():
    for shard in (0, 1):
        rows = np.array(keys(shard, batches=7))[:, :, 0].flatten()
        assert all(sorted(rows[start : start + 7]) == list(range(7)) for start in range(0, 28, 7))
    assert keys(0) != keys(1)


def test_the_order_depends_neither_on_processes_nor_on_interruptions():
    parts = zip(keys(size=2, group=2), keys(size=2, group=2, rank=1), strict=True)
    assert [[*first, *second] for first, second in parts] == keys(size=4)
    assert keys(resumed_at=3) == keys()[3:]


def prior_of(base, prior_dir, *more):
    """Settings, family and prior set of a run."""
    settings = parse_flags(train_flags(base, prior_dir.parent / "no pictures", f"--prior_dir={prior_dir}", *more))
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    family = load_family(settings, accelerator)
    return settings, family, PriorSet.load(settings, family, accelerator)


def test_noise_depends_neither_on_processes_nor_on_what_was_drawn_before(base, prior_dir):
    _, family, prior = prior_of(base, prior_dir)

    def losses(size, group=1, rank=0, batches=2):
        torch.manual_seed(size + rank)
        streams = RandomStreams()
        shard = Prior.of_shard(prior, size, 0, (5, 0), streams, group, rank)
        before = streams.get()["torch"]
        found = [shard.loss(family.denoiser, family.objective, torch.device("cpu"))[0] for _ in range(batches)]
        assert torch.equal(streams.get()["torch"], before)
        return torch.stack(found).detach()

    whole = losses(4)
    assert torch.equal(whole, losses(4)) and whole[0] != whole[1]
    torch.testing.assert_close((losses(2, 2, 0) + losses(2, 2, 1)) / 2, whole, rtol=1e-5, atol=1e-6)


class Noise:
    """An objective whose loss is a random number."""

    def encode(self, batch):
        return batch

    def draw(self, encoded):
        return torch.rand(())

    def plain_loss(self, model, drawn):
        return drawn


def test_every_batch_of_every_shard_has_noise_of_its_own():
    def draws(shard):
        prior = Prior.of_shard(PriorSet(Keys(7), 1.0, "", ""), 4, 0, (5, shard), RandomStreams())
        return [prior.loss(None, Noise(), torch.device("cpu"))[0].item() for _ in range(5)]

    assert len({*draws(0), *draws(1)}) == 10 and draws(0) == draws(0)


def test_min_snr_weighs_the_prior_as_it_weighs_training(base, prior_dir):
    def loss(*more):
        _, family, prior = prior_of(base, prior_dir, *more)
        shard = Prior.of_shard(prior, 4, 0, (5, 0), RandomStreams())
        return shard.loss(family.denoiser, family.objective, torch.device("cpu"))[0].item()

    assert loss("--prior_loss_weight=3") == pytest.approx(3 * loss(), rel=1e-6)
    assert loss("--snr_gamma=5") < 0.9 * loss()


# Whole runs


@pytest.mark.parametrize(
    "flags",
    [PLAIN, pytest.param(METHOD, marks=pytest.mark.slow), LORA],
    ids=["none", "method", "lora"],
)
def test_nothing_else_changes(base, pictures, prior_dir, tmp_path, flags):
    """With weight 0 a run is the run without the set, bit for bit; with another weight it is not."""
    name = "pytorch_lora_weights.safetensors" if flags is LORA else "unet/diffusion_pytorch_model.safetensors"
    flags = train_flags(base, pictures, *flags, "--random_flip", "--noise_offset=0.1")
    weighted = [f"--prior_dir={prior_dir}", "--prior_loss_weight=0"]
    folders = [train_here([*flags, *more], tmp_path / str(len(more))) for more in ([], weighted, weighted[:1])]
    without, with_0, with_1 = (folder / name for folder in folders)
    assert without.read_bytes() == with_0.read_bytes() != with_1.read_bytes()
    tables = [pq.read_table(RunFolder(folder).skip_counts_file) for folder in folders[:2]]
    assert tables[0].equals(tables[1])


@pytest.fixture(scope="module")
def method_flags(base, pictures, prior_dir):
    return train_flags(base, pictures, *METHOD, f"--prior_dir={prior_dir}", "--prior_loss_weight=0.5")


@pytest.fixture(scope="module")
def method_run(method_flags, tmp_path_factory):
    return train_here(method_flags, tmp_path_factory.mktemp("runs") / "method")


@pytest.mark.parametrize(
    "stop_at", [pytest.param(3, marks=pytest.mark.slow), 8, pytest.param(21, marks=pytest.mark.slow)]
)
def test_a_stopped_run_goes_on_bit_for_bit(method_flags, method_run, tmp_path, stop_at):
    train_here(method_flags, tmp_path, stop_at=stop_at)
    train_here([*method_flags, "--resume_from_checkpoint=latest", "--dataloader_num_workers=1"], tmp_path)
    assert unet_bytes(tmp_path) == unet_bytes(method_run)


@pytest.mark.slow
def test_a_stopped_plain_run_goes_on_bit_for_bit(base, pictures, prior_dir, tmp_path):
    flags = train_flags(base, pictures, "--mitigation=none", "--max_train_steps=11", f"--prior_dir={prior_dir}")
    flags += ["--gradient_accumulation_steps=4", "--random_flip"]
    whole = train_here(flags, tmp_path / "whole")
    train_here(flags, tmp_path / "cut", stop_at=5)
    train_here([*flags, "--resume_from_checkpoint=latest"], tmp_path / "cut")
    assert unet_bytes(tmp_path / "cut") == unet_bytes(whole)


@pytest.mark.slow
def test_two_processes_equal_one(method_flags, method_run, tmp_path):
    launch(method_flags, tmp_path, processes=2)
    assert unet_bytes(tmp_path) == unet_bytes(method_run)


def test_the_run_is_told_and_logged_and_its_training_set_is_the_user_s(base, pictures, prior_dir, method_run, tmp_path):
    run = RunFolder(method_run)
    events = EventAccumulator(str(next(method_run.rglob("events*")).parent))
    events.Reload()
    assert [event.step for event in events.Scalars("prior_loss")] == [4, 8, 12, 16, 18, 20, 22, 24]
    assert all(0.1 < event.value < 10 for event in events.Scalars("prior_loss"))
    assert run.config()["prior_loss_weight"] == 0.5 and run.config()["prior_dir"] == str(prior_dir)
    plain = RunFolder(train_here(train_flags(base, pictures, *METHOD), tmp_path))
    assert run.training_set_file.read_text() == plain.training_set_file.read_text()
    assert pq.read_table(run.training_rows_file).equals(pq.read_table(plain.training_rows_file))


def test_another_prior_is_another_run(method_flags, prior_dir, tmp_path):
    flags = [*method_flags, "--max_train_steps=8"]
    train_here(flags, tmp_path / "run", stop_at=4)
    resumed = [*flags, "--resume_from_checkpoint=latest"]
    changed = shutil.copytree(prior_dir, tmp_path / "changed")
    shutil.copy(changed / "003_0.png", changed / "004_0.png")
    for given, message in (
        ([*resumed, f"--prior_dir={changed}"], "prior_data was '.*cannot change within a run"),
        ([flag for flag in resumed if "prior" not in flag], "prior_data was '.*', is None"),
        ([*resumed, "--prior_loss_weight=2"], r"prior_loss_weight was 0\.5, is 2\.0.*`resume_allow"),
    ):
        with pytest.raises(UsageError, match=message):
            train_here(given, tmp_path / "run")
    moved = shutil.copytree(prior_dir, tmp_path / "moved")
    allowed = ["--prior_loss_weight=2", "--resume_allow", "prior_loss_weight"]
    assert RunFolder(train_here([*resumed, f"--prior_dir={moved}", *allowed], tmp_path / "run")).is_finished


def test_a_cache_of_latents_changes_nothing(base, pictures, prior_dir, tmp_path):
    more = [f"--prior_dir={prior_dir}", "--center_crop", "--augment_range=1"]
    flags = train_flags(base, pictures, *METHOD, *more, "--max_train_steps=8")
    cached = [*flags, f"--cache_latents={tmp_path / 'cache'}"]
    assert unet_bytes(train_here(flags, tmp_path / "a")) == unet_bytes(train_here(cached, tmp_path / "b"))
    AcceleratorState._reset_state(reset_partial_state=True)
    settings, accelerator = parse_flags(cached), Accelerator(cpu=True)
    family = load_family(settings, accelerator)
    condition = family.condition(settings, settings.method)
    rows, groups, *_ = load_rows(settings, condition, accelerator)
    for prior, resting in ((None, 2), (PriorSet.load(settings, family, accelerator), 0)):
        build_run(settings, accelerator, family, None, condition, rows, groups, prior)
        assert len(family.resting) == resting  # VAE and text encoder


# What is read, and what is refused


def without_metadata(folder, prior_dir, sidecars=()):
    shutil.copytree(prior_dir, folder)
    (folder / "metadata.jsonl").unlink()
    for name in sidecars:
        (folder / f"{name}.txt").write_text("a cat")
    return folder


def test_captions_are_those_of_the_folder_and_are_not_mitigated(base, prior_dir, tmp_path):
    captions = ["--caption_column=caption", "--caption_mitigation=rc", "--caption_mitigation_probability=1"]
    captions += ["--max_train_samples=2", "--dataset_split=validation"]  # of the training set
    sidecars = without_metadata(tmp_path / "sidecars", prior_dir, [path.stem for path in prior_dir.glob("*.png")])
    _, family, prior = prior_of(base, sidecars, *captions)
    assert len(prior) == 7
    wanted = family.tokenize(["a cat"])["input_ids"][0]
    for seed in range(5):
        assert torch.equal(prior.samples.__getitems__([(0, seed)]).inputs["input_ids"][0], wanted)
    settings, family, _ = prior_of(base, prior_dir, *captions)
    rows = load_other_rows(settings, "prior_dir", family.condition(settings, settings.method))
    assert rows["caption"][:2] == ["a red picture", "a green picture"]


def damaged(path):
    """A picture that is whole at both ends only."""
    whole = path.read_bytes()
    half = len(whole) // 2
    path.write_bytes(whole[:half] + bytes(100) + whole[half + 100 :])


def test_a_bad_picture_met_in_training_is_named(base, pictures, prior_dir, tmp_path):
    folder = shutil.copytree(prior_dir, tmp_path / "others")
    damaged(folder / "002_0.png")
    flags = train_flags(base, pictures, *PLAIN, f"--prior_dir={folder}")
    with pytest.raises(UsageError, match=r"`prior_dir` .*others: row 2 \(.*002_0.png\): the image does not decode"):
        train_here(flags, tmp_path / "out")
    resumed = [*flags, "--resume_from_checkpoint=latest", "--on_bad_sample=skip"]
    run = RunFolder(train_here(resumed, tmp_path / "out"))
    (line,) = map(json.loads, run.bad_samples_file.read_text().splitlines())
    assert run.is_finished and line["sample_id"] is None and "002_0.png" in line["reason"]


@pytest.fixture
def places(pictures, prior_dir, tmp_path):
    """Folders that will not do."""
    (tmp_path / "empty").mkdir()
    without_metadata(tmp_path / "silent", prior_dir)
    without_metadata(tmp_path / "half", prior_dir, ["000_0"])
    cut = shutil.copytree(prior_dir, tmp_path / "cut") / "005_0.png"
    cut.write_bytes(cut.read_bytes()[:200])
    shutil.copytree(prior_dir, shutil.copytree(pictures, tmp_path / "mine") / "others")
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prior_dir={}/nowhere"], r"^`prior_dir` .*nowhere: no such folder$"),
        (["--prior_dir={}/empty"], r"^`prior_dir` .*empty: the folder is empty; it needs images"),
        (["--prior_dir={}/silent"], r"^`prior_dir` .*silent: `caption_column` text: not a column .*\.txt file beside"),
        (["--prior_dir={}/half"], r"^`prior_dir` .*half: row 1 has no caption"),
        (["--prior_dir={}/cut"], r"^`prior_dir` .*cut: row 5 .*005_0.png\): the image does not decode"),
        (["--prior_dir={}/mine/others", "--train_data_dir={}/mine"], r"^`prior_dir` .* must not lie in one another"),
        (["--prior_dir={}/mine", "--train_data_dir={}/mine/others"], "^`prior_dir` .* must not lie in one another"),
        (["--prior_dir={}/mine", "--output_dir={}/mine/out"], "^`output_dir` .*: lies in `prior_dir`"),
        (["--prior_loss_weight=1"], "^`prior_loss_weight` 1.0: weighs the pictures of `prior_dir`; give that too"),
        (["--prior_dir=x", "--prior_loss_weight=-1"], "^`prior_loss_weight` -1.0: must be 0 or more"),
        (["--prior_dir=x", "--prior_loss_weight=inf"], "^`prior_loss_weight` inf: must be 0 or more, and finite"),
    ],
)
def test_wrong_use_is_named_before_training(base, pictures, places, flags, message):
    flags = [flag.format(places) for flag in flags]
    flags = train_flags(base, pictures, *PLAIN, f"--output_dir={places / 'out'}", *flags)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(UsageError, match=message) as error:
        train(parse_flags(flags))
    assert "\n" not in str(error.value)
