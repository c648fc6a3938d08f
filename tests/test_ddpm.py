"""The paper's unconditional recipes against an independent DDPM: architecture, first weights, the grid of DDIM."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import train_here
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import nn

from ietagc_diffusers import UsageError, testing
from ietagc_diffusers.arguments import parse_flags
from ietagc_diffusers.eval.benchmark import Benchmark
from ietagc_diffusers.eval.generate import Settings, load_pipeline
from ietagc_diffusers.eval.schedulers import describe, parse_scheduler
from ietagc_diffusers.families.unconditional import Unconditional, ddpm_weights, draw
from ietagc_diffusers.files import shipped
from ietagc_diffusers.run_folder import RunFolder
from ietagc_diffusers.training.scripts import UnconditionalScript

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = sorted(path for name in ("cifar10", "cifar100", "afhq_dog") for path in CONFIGS.glob(f"{name}_*.yaml"))
MATRICES = sorted([*CONFIGS.glob("sweep_*.yaml"), *CONFIGS.glob("benchmark_[ac]*.yaml")])
PAPERS_DDIM = "ddim:steps_offset=1,set_alpha_to_one=false"


class Attention(nn.Module):
    """Of one head, over the pixels."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(32, width)
        self.q, self.k, self.v, self.out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (project(h).flatten(2) for project in (self.q, self.k, self.v))
        weights = torch.einsum("bci,bcj->bij", q, k).div(math.sqrt(x.shape[1])).softmax(dim=2)
        return x + self.out(torch.einsum("bij,bcj->bci", weights, v).unflatten(2, x.shape[2:]))


class Block(nn.Module):
    """Two convolutions, with the timestep added between them."""

    def __init__(self, width_in, width, time_width, attends):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, width_in), nn.Conv2d(width_in, width, 3, padding=1)
        self.time = nn.Linear(time_width, width)
        self.norm2, self.conv2 = nn.GroupNorm(32, width), nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else None
        self.attention = Attention(width) if attends else None

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        h = self.conv2(F.dropout(F.silu(self.norm2(h)), 0.1, self.training))
        h = h + (x if self.shortcut is None else self.shortcut(x))
        return h if self.attention is None else self.attention(h)


class PublishedUNet(nn.Module):
    """Ho et al. (2020), appendix B, as in the public PyTorch code."""

    def __init__(self, width, multiples, attends, blocks=2):
        super().__init__()
        self.width, time_width, last = width, 4 * width, len(multiples) - 1
        self.time1, self.time2 = nn.Linear(width, time_width), nn.Linear(time_width, time_width)
        self.head = nn.Conv2d(3, width, 3, padding=1)
        skips, now, self.down, self.up = [width], width, nn.ModuleList(), nn.ModuleList()
        for level, multiple in enumerate(multiples):
            for _ in range(blocks):
                self.down.append(Block(now, width * multiple, time_width, level in attends))
                now = width * multiple
                skips.append(now)
            if level < last:
                self.down.append(nn.Conv2d(now, now, 3, stride=2, padding=1))
                skips.append(now)
        self.middle = nn.ModuleList([Block(now, now, time_width, True), Block(now, now, time_width, False)])
        for level, multiple in reversed(list(enumerate(multiples))):
            for _ in range(blocks + 1):
                self.up.append(Block(now + skips.pop(), width * multiple, time_width, level in attends))
                now = width * multiple
            if level:
                self.up.append(nn.Conv2d(now, now, 3, padding=1))
        self.norm, self.tail = nn.GroupNorm(32, now), nn.Conv2d(now, 3, 3, padding=1)

    def forward(self, x, t):
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(0, self.width, 2) / self.width)
        time = torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)  # sines and cosines in turn
        time = self.time2(F.silu(self.time1(time)))
        h = self.head(x)
        skips = [h]
        for part in self.down:
            h = part(h, time) if isinstance(part, Block) else part(h)
            skips.append(h)
        for part in self.middle:
            h = part(h, time)
        for part in self.up:
            if isinstance(part, Block):
                h = part(torch.cat([h, skips.pop()], dim=1), time)
            else:
                h = part(F.interpolate(h, scale_factor=2, mode="nearest"))
        return self.tail(F.silu(self.norm(h)))


def parts_of_diffusers(unet):
    """The modules of a ``UNet2DModel`` in the order of a forward pass, as ``PublishedUNet`` has them."""

    def resolve(block, scale):
        attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
        yield from zip(block.resnets, attentions, strict=False)
        for sampler in getattr(block, scale, None) or []:
            yield sampler.conv

    down = [part for block in unet.down_blocks for part in resolve(block, "downsamplers")]
    middle = list(zip(unet.mid_block.resnets, [*unet.mid_block.attentions, None], strict=True))
    up = [part for block in unet.up_blocks for part in resolve(block, "upsamplers")]
    return down + middle + up


def copy_weights(source, target):
    """From a ``UNet2DModel`` into a ``PublishedUNet``: each weight once."""

    def put(theirs, ours):
        ours.load_state_dict(
            {name: tensor.view_as(ours.state_dict()[name]) for name, tensor in theirs.state_dict().items()}
        )

    put(source.time_embedding.linear_2, target.time2)
    put(source.time_embedding.linear_1, target.time1)
    # Theirs begins with all cosines, then has all sines.
    sines = target.width // 2 + torch.arange(target.width // 2)
    target.time1.weight.data = source.time_embedding.linear_1.weight[
        :, torch.stack([sines, sines - target.width // 2], 1).flatten()
    ]
    put(source.conv_in, target.head), put(source.conv_norm_out, target.norm), put(source.conv_out, target.tail)
    for theirs, ours in zip(parts_of_diffusers(source), [*target.down, *target.middle, *target.up], strict=True):
        if not isinstance(ours, Block):
            put(theirs, ours)
            continue
        block, attention = theirs
        pairs = [(block.norm1, ours.norm1), (block.conv1, ours.conv1), (block.time_emb_proj, ours.time)]
        pairs += [(block.norm2, ours.norm2), (block.conv2, ours.conv2), (block.conv_shortcut, ours.shortcut)]
        assert (attention is None) == (ours.attention is None)
        if attention is not None:
            pairs += [(attention.group_norm, ours.attention.norm), (attention.to_out[0], ours.attention.out)]
            pairs += [(getattr(attention, f"to_{x}"), getattr(ours.attention, x)) for x in "qkv"]
        for left, right in pairs:
            assert (left is None) == (right is None)
            if left is not None:
                put(left, right)


def config_of(name):
    return json.loads(shipped(name, ".json").read_text())


def narrow(name, width):
    """The configuration with ``width`` channels at its first level."""
    config = config_of(name)
    widths = config["block_out_channels"]
    return config | {"block_out_channels": [width * value // widths[0] for value in widths]}


@pytest.mark.parametrize(
    ("name", "multiples", "size"), [("unet_ddpm_32", (1, 2, 2, 2), 32), ("unet_ddpm_64", (1, 2, 2, 2, 4), 16)]
)
def test_the_configuration_is_the_published_architecture(name, multiples, size):
    torch.manual_seed(0)
    theirs = UNet2DModel.from_config(narrow(name, 32)).eval()
    for tensor in theirs.parameters():  # biases and norms too
        tensor.data += 0.05 * torch.randn_like(tensor)
    ours = PublishedUNet(32, multiples, attends={1}).eval()
    copy_weights(theirs, ours)
    x, t = torch.randn(2, 3, size, size), torch.tensor([3, 981])
    with torch.no_grad():
        torch.testing.assert_close(theirs(x, t).sample, ours(x, t), rtol=1e-4, atol=1e-4)
        assert ours(x, t).std() > 0.1


def test_the_published_number_of_parameters():
    """Of DDPM on CIFAR-10: 35.7 million."""
    with torch.device("meta"):
        theirs, ours = UNet2DModel.from_config(config_of("unet_ddpm_32")), PublishedUNet(128, (1, 2, 2, 2), {1})
    assert theirs.num_parameters() == sum(p.numel() for p in ours.parameters()) == 35_746_307
    dropouts = [module for module in theirs.modules() if isinstance(module, nn.Dropout)]
    assert sum(module.p == 0.1 for module in dropouts) == 8 + 2 + 12 and {module.p for module in dropouts} <= {0.0, 0.1}


def test_first_weights_are_those_of_the_authors():
    """Xavier's bound sqrt(6 / (in + out)), times the gain; biases are zero; embeddings of classes are not touched."""
    unet = UNet2DModel.from_config(narrow("unet_ddpm_32", 32), num_class_embeds=3)
    embeddings = unet.class_embedding.weight.clone()
    torch.manual_seed(0)
    ddpm_weights(unet)
    small = 0
    for name, module in unet.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            last = name.endswith("conv2") or name == "conv_out"
            small += last
            kernel = module.weight[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
            bound = math.sqrt(6 / (sum(module.weight.shape[:2]) * kernel)) * (1e-5 if last else 1)
            assert 0.97 * bound < module.weight.abs().max() <= bound and not module.bias.any(), name
    assert small == 8 + 2 + 12 + 1 and torch.equal(unet.class_embedding.weight, embeddings)
    with torch.no_grad():
        assert unet(torch.randn(1, 3, 16, 16), 5, torch.tensor([1])).sample.abs().max() < 1e-3


def test_the_grid_of_ddim_is_the_papers(tmp_path):
    """Against a loop of its own: t = 981, 961, ..., 1, the predicted image clipped, the last step to alpha_bar[0]."""
    pipeline = testing.random_unconditional_pipeline(3)
    pipeline.unet.conv_out.bias.data += 0.3  # so that predictions leave [-1, 1] and clipping matters
    pipeline.save_pretrained(tmp_path)
    drawn = load_pipeline(tmp_path, Settings(scheduler=PAPERS_DDIM))
    images = draw(drawn, [torch.Generator().manual_seed(seed) for seed in (5, 6)], 2, 50)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    unet, clipped = drawn.unet.eval(), 0
    x = torch.cat([torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)])
    grid = list(range(1, 1000, 20))
    for t, before in zip(reversed(grid), reversed([0, *grid[:-1]]), strict=True):
        with torch.no_grad():
            noise = unet(x, t).sample
        image = (x - (1 - alpha_bar[t]).sqrt() * noise) / alpha_bar[t].sqrt()
        clipped += int((image.abs() > 1).sum())
        x = alpha_bar[before].sqrt() * image.clamp(-1, 1) + (1 - alpha_bar[before]).sqrt() * noise
    wanted = (x / 2 + 0.5).clamp(0, 1).mul(255).round().byte()
    found = torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in images])
    assert describe(PAPERS_DDIM) == "DDIMScheduler (steps_offset=1, set_alpha_to_one=false)"
    assert clipped > 1000 and drawn.scheduler.timesteps.tolist() == grid[::-1]
    assert (found.view(2, 16, 16, 3).permute(0, 3, 1, 2).int() - wanted.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("heun", "must be one of ddim"),
        ("ddim:step_offset=3", "unknown key 'step_offset'; did you mean 'steps_offset'"),
        ("ddim:steps_offset", "'steps_offset' has no value"),
    ],
)
def test_a_scheduler_that_does_not_exist_is_named(text, message):
    with pytest.raises(UsageError, match=message):
        Settings(scheduler=text)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_the_papers(recipe):
    settings = parse_flags([f"--config={recipe.stem}", "--train_data_dir=d"], UnconditionalScript)
    method, dog = settings.method, recipe.stem.startswith("afhq")
    variant = recipe.stem.removeprefix("cifar100_").removeprefix("cifar10_").removeprefix("afhq_dog_")
    assert method.mitigation == variant.replace("_plus", "+").replace("_", "-")
    assert settings.max_train_steps == (180_000 if dog else 390_000)
    assert settings.train_batch_size == (60 if dog else 128) and settings.random_flip is not dog
    assert (settings.adam_beta1, settings.adam_beta2, settings.adam_weight_decay) == (0.9, 0.999, 0)
    assert (settings.learning_rate, settings.max_grad_norm, settings.use_ema) == (2e-4, 1.0, False)
    shards = method.num_shards
    if variant in ("none", "agc"):
        assert shards == 1 and settings.lr_warmup_steps == 5000
    else:
        assert shards == (5 if dog else 10) and settings.lr_warmup_steps == shards * 15 * (15 if dog else 39)
        assert settings.max_train_steps / shards / method.steps_per_round == (24 if dog else 20)
    if variant != "none":
        assert (method.skip_threshold, method.bank_decay) == ((0.7 if dog else 0.5), 0.8)
        assert method.bank_buckets == 1000 and not method.bank_bias_correction
    if variant == "iet_agc_plus":
        assert (method.augment_range, method.redistribute_fraction) == ((1.2 if dog else 1.7), 0.25)
        assert method.randaugment_magnitude == (3 if recipe.stem.startswith("cifar10_") else 5)


@pytest.mark.parametrize("recipe", ["cifar10_none", "cifar100_iet_agc_plus", "afhq_dog_iet_agc"])
def test_recipes_train(recipe, pictures, tmp_path):
    """Of the same architecture, narrower, on pictures of 16 pixels."""
    name = "unet_ddpm_64" if recipe.startswith("afhq") else "unet_ddpm_32"
    config = narrow(name, 8) | {"norm_num_groups": 4, "layers_per_block": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = [f"--config={recipe}", f"--train_data_dir={pictures}", f"--model_config_name_or_path={tmp_path}"]
    flags += ["--resolution=16", "--train_batch_size=4", "--seed=1", "--report_to=none"]
    many = "iet" in recipe
    flags += ["--max_train_steps=4", "--steps_per_round=1", "--num_shards=2"] if many else ["--max_train_steps=2"]
    if recipe.startswith("cifar100"):
        flags += ["--class_labels=column", "--label_column=label", "--num_classes=3"]
    out = train_here(flags, tmp_path / "out", kind=UnconditionalScript)
    pipeline = DDPMPipeline.from_pretrained(out)
    assert pipeline.unet.config.sample_size == 16 and isinstance(pipeline.scheduler, DDPMScheduler)
    # The last layer began almost at zero, so that it is what Adam's first steps made of it.
    assert 0 < pipeline.unet.conv_out.weight.abs().max() < 1e-3


def test_the_untrained_model_of_a_run_is_where_it_started(pictures, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(narrow("unet_ddpm_32", 8) | {"norm_num_groups": 4}))
    flags = ["--config=cifar10_none", f"--train_data_dir={pictures}", f"--model_config_name_or_path={tmp_path}"]
    flags += ["--resolution=16", "--train_batch_size=4", "--seed=1", "--report_to=none", "--max_train_steps=1"]
    out = train_here([*flags, "--learning_rate=0"], tmp_path / "out", kind=UnconditionalScript)
    start = Unconditional.untrained(RunFolder(out).config(), out / "unet").denoiser.state_dict()
    trained = UNet2DModel.from_pretrained(out, subfolder="unet").state_dict()
    assert start.keys() == trained.keys() and all(torch.equal(start[name], trained[name]) for name in start)


def test_weights_are_drawn_for_a_model_from_scratch_only(pictures):
    flags = [f"--train_data_dir={pictures}", "--resolution=32", "--model_config_name_or_path=unet_ddpm_32"]
    with pytest.raises(UsageError, match="`weight_init` ddpm: is for a model from scratch"):
        parse_flags([*flags[:2], "--pretrained_model_name_or_path=b", "--weight_init=ddpm"], UnconditionalScript)
    with pytest.raises(UsageError, match="`model_config_name_or_path` unet_ddpm_23: no configuration"):
        Unconditional.load(parse_flags([*flags, "--model_config_name_or_path=unet_ddpm_23"], UnconditionalScript))


@pytest.mark.parametrize("matrix", MATRICES, ids=lambda path: path.stem)
def test_matrices_train_each_variant_equally_long(matrix):
    made = Benchmark(matrix.stem)
    budgets = {flags["max_train_steps"] for flags in made.effective.values()}
    assert budgets == {180_000 if "afhq" in matrix.stem else 390_000} and made.num_images == 65_536
    assert parse_scheduler(made.generate["scheduler"]) == parse_scheduler(PAPERS_DDIM)
    assert made.score["l2"] == "iet-agc" and made.columns[:3] == [f"mq_0.{n}_count" for n in (4, 5, 6)]
    used = {row["training"] for table in made.tables.values() for row in table["rows"]}
    assert used == made.training.keys()


def test_the_sweeps_change_one_number_of_the_method():
    wanted = {"shards": "num_shards", "fraction": "redistribute_fraction", "threshold": "skip_threshold"}
    for name, changed in wanted.items():
        made = Benchmark(f"sweep_{name}").effective
        ours = made["iet-agc+"]
        for flags in (flags for variant, flags in made.items() if variant not in ("iet-agc+", "none")):
            assert {key for key in flags if flags[key] != ours[key]} - {"steps_per_round"} == {changed}
            rounds = flags["max_train_steps"] / flags["num_shards"] / flags["steps_per_round"]
            assert rounds == 20
    periods = [flags["steps_per_round"] / 39 for flags in Benchmark("sweep_period").effective.values()]
    assert periods == [25, 50, 100]
