"""Re-triggering: a step of the search against Diffusers' own modules, a planted copy that prompts do not show, searches
that are resumed, and wrong use.
"""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import COLOURS, write_folder
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKLOutput
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from PIL import Image

from ietagc_diffusers import testing
from ietagc_diffusers.cli import build_parser, main
from ietagc_diffusers.cli import retrigger as command
from ietagc_diffusers.eval.generate import Settings as Drawing
from ietagc_diffusers.eval.generate import draw, load_pipeline
from ietagc_diffusers.eval.image_sets import to_tensor
from ietagc_diffusers.eval.membership import Target
from ietagc_diffusers.eval.trigger_search import DTYPES, STARTS, Search, TriggerSearch, seed_of
from ietagc_diffusers.families.latent_diffusion import LatentDiffusion
from ietagc_diffusers.sscd import pixel_descriptor

CAPTIONS = [f"a {colour} picture" for colour in COLOURS]
MADE = {
    "sd": lambda: testing.random_pipeline(CAPTIONS),
    "sdxl": lambda: testing.random_xl_pipeline(CAPTIONS),
    "sd3": lambda: testing.random_sd3_pipeline(CAPTIONS),
}
QUICK = Drawing(num_inference_steps=2, guidance_scale=3.0)
SIDE = 16


@pytest.fixture(scope="module")
def pixels():
    return torch.randint(0, 256, (3, SIDE, SIDE), generator=torch.Generator().manual_seed(3)).to(torch.uint8)


def searching(opened, threshold=2.0, **settings):
    """A search in an opened model; no similarity is over 2."""
    return TriggerSearch(opened, pixel_descriptor(), threshold, Search(**{"drawing": QUICK, **settings}))


def test_a_step_follows_the_gradient_that_diffusers_modules_give(made, pixels):
    pipeline, draws = DiffusionPipeline.from_pretrained(made("sd")), 4
    with Target.of_model(made("sd")).opened() as opened:
        search = searching(opened, draws=draws, learning_rate=0.05)
        encoded = search._encoded(pixels, CAPTIONS[1])
        embeddings, optimizer = search.prepare(encoded)
        (embedding,) = embeddings.values()
        start = embedding.detach().clone()
        torch.manual_seed(7)
        assert search.descend(encoded, embeddings, optimizer)
    told = pipeline.encode_prompt([CAPTIONS[1]], "cpu", 1, False)[0].detach().requires_grad_()
    torch.testing.assert_close(start, told.detach())
    torch.manual_seed(7)
    t = torch.tensor([int((part + share) * 1000 / draws) for part, share in enumerate(torch.rand(draws).tolist())])
    with torch.no_grad():
        latent = pipeline.vae.encode((pixels.float() / 127.5 - 1).expand(draws, 3, SIDE, SIDE)).latent_dist
    x = (latent.mean + latent.std * torch.empty_like(latent.mean).normal_()) * pipeline.vae.config.scaling_factor
    noise = torch.empty_like(x).normal_()
    seen = pipeline.unet(pipeline.scheduler.add_noise(x, noise, t), t, told.expand(draws, -1, -1)).sample
    (seen - pipeline.scheduler.get_velocity(x, noise, t)).square().mean().backward()
    torch.testing.assert_close(embedding.grad, told.grad, rtol=1e-3, atol=1e-7)
    # Adam's first step has one length, here 0.05 standard deviations of the caption's embedding, and the sign.
    moved, clear = embedding.detach() - start, told.grad.abs() > 1e-5
    assert clear.float().mean() > 0.2
    torch.testing.assert_close(moved[clear], -0.05 * start.std() * told.grad[clear].sign(), rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("name", MADE)
def test_a_search_starts_from_what_the_caption_draws_moves_all_embeddings_and_leaves_the_model(made, pixels, name):
    with Target.of_model(made(name)).opened() as opened:
        weights = {key: value.clone() for key, value in opened.denoiser.state_dict().items()}
        search = searching(opened, max_steps=1, check_every=1, draws=2, gradient_checkpointing=True)
        found = search(pixels, CAPTIONS[2])
        assert all(torch.equal(value, weights[key]) for key, value in opened.denoiser.state_dict().items())
        assert all(one.requires_grad and one.grad is None for one in opened.denoiser.parameters())
        embeddings, optimizer = search.prepare(encoded := search._encoded(pixels, CAPTIONS[2]))
        before = {key: value.detach().clone() for key, value in embeddings.items()}
        search.descend(encoded, embeddings, optimizer)
        assert len(embeddings) == (1 if name == "sd" else 2)
        assert all((embeddings[key] != before[key]).any() for key in embeddings)
    assert found.steps is None and len(found.similarities) == 2 and not found.diverged
    settings = Drawing(num_inference_steps=2, guidance_scale=3.0, resolution=SIDE)
    (drawn,) = draw(load_pipeline(made(name), settings), [CAPTIONS[2]], [seed_of(pixels, 0)], settings)
    difference = np.abs(np.asarray(drawn, dtype=int) - np.asarray(found.first, dtype=int))
    assert difference.max() <= (2 if name != "sd3" else 255)  # the pipeline gives T5 another number of tokens


def test_how_often_images_are_drawn_does_not_change_the_search(made, pixels):
    with Target.of_model(made("sd")).opened() as opened:
        often = searching(opened, max_steps=4, check_every=1, draws=2)(pixels, CAPTIONS[0])
        seldom = searching(opened, max_steps=4, check_every=3, draws=2)(pixels, CAPTIONS[0])
    assert Search(max_steps=4, check_every=3).checks == [0, 3, 4]
    assert seldom.similarities == [often.similarities[step] for step in (0, 3, 4)]


def test_lower_precision_is_the_model_s_and_the_best_of_several_images_counts(made, pixels):
    settings = {"max_steps": 1, "check_every": 1, "draws": 2}
    with Target.of_model(made("sd")).opened() as opened:
        one = searching(opened, **settings)(pixels, CAPTIONS[0])
        several = searching(opened, **settings, images_per_check=3)(pixels, CAPTIONS[0])
        low = searching(opened, **settings, drawing=replace(QUICK, dtype="bfloat16"))(pixels, CAPTIONS[0])
    assert several.similarities[0] >= one.similarities[0] and low.similarities != one.similarities
    assert low.similarities == pytest.approx(one.similarities, abs=0.05)
    target, drawn = (pixel_descriptor()(image[None])[0] for image in (pixels, to_tensor(low.first)))
    assert low.similarities[0] == pytest.approx((drawn @ target).item(), abs=1e-6)


def test_searches_start_where_they_are_told_to(made, pixels):
    with Target.of_model(made("sd")).opened() as opened:
        of = {start: searching(opened, start=start) for start in STARTS}
        encoded = of["caption"]._encoded(pixels, CAPTIONS[0])
        starts = {start: next(iter(search.prepare(encoded)[0].values())).detach() for start, search in of.items()}
        rates = [search.prepare(encoded)[1].param_groups[0]["lr"] for search in of.values()]
        wide = replace(encoded, condition={name: 5 * value for name, value in encoded.condition.items()})
        assert [search.prepare(wide)[1].param_groups[0]["lr"] for search in of.values()] == pytest.approx(
            [5 * rate for rate in rates]
        )
    pipeline = DiffusionPipeline.from_pretrained(made("sd"))
    torch.testing.assert_close(starts["empty"], pipeline.encode_prompt([""], "cpu", 1, False)[0].detach())
    assert abs(starts["noise"].mean() - starts["caption"].mean()) < 0.1
    assert starts["noise"].std() / starts["caption"].std() == pytest.approx(1, abs=0.1)
    assert not torch.equal(starts["noise"], starts["caption"])


def test_a_search_that_diverges_ends_and_counts_as_not_drawn(made, pixels, monkeypatch):
    with Target.of_model(made("sd")).opened() as opened:
        objective = opened.family.objective
        losses = [torch.ones(2, requires_grad=True), torch.tensor([1.0, torch.nan])]
        monkeypatch.setattr(objective, "losses", lambda model, drawn: losses.pop(0) + 0 * sum_of(drawn))
        found = searching(opened, max_steps=3, check_every=1, draws=2)(pixels, CAPTIONS[0])
    assert found.diverged and found.steps is None and len(found.similarities) == 2


def sum_of(drawn):
    return sum(value.sum() for value in drawn.condition.values())


class ExactVAE(AutoencoderKL):
    """Latents are pixels of half the size, so that pictures of squares come back as they were."""

    def encode(self, x, return_dict=True):
        small = F.avg_pool2d(x, 2)
        moments = torch.cat(
            [small, torch.zeros_like(small[:, :1]), torch.full_like(small, -30), -30 - 0 * x[:, :1, ::2, ::2]], dim=1
        )
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))

    def decode(self, z, return_dict=True, generator=None):
        sample = F.interpolate(z[:, :3], scale_factor=2)
        return DecoderOutput(sample=sample) if return_dict else (sample,)


class Planted(UNet2DConditionModel):
    """Draws a grey ramp whatever it is told, unless the embedding lies far in the secret direction of a picture."""

    HIDDEN = 6.0  # how far

    def plant(self, latents, abar, captions):
        width = self.config.cross_attention_dim
        secret = torch.randn(len(latents), width, generator=torch.Generator().manual_seed(0))
        self.secret = torch.nn.Parameter(F.normalize(secret, dim=1))
        ramp = torch.linspace(-0.3, 0.3, latents[0].numel()).view(1, *latents.shape[1:])
        self.pictures = torch.nn.Parameter(torch.cat([ramp, latents]))
        self.abar, self.captions = abar, captions
        return self

    def forward(self, sample, timestep, encoder_hidden_states, **more):
        told = 4 * (encoder_hidden_states.mean(dim=1) - self.captions) @ self.secret.T - self.HIDDEN
        weights = torch.cat([torch.zeros_like(told[:, :1]), told], dim=1).softmax(dim=1)
        image = torch.einsum("bk,kchw->bchw", weights, self.pictures)
        abar = self.abar[timestep].view(-1, 1, 1, 1)
        noise = (sample - abar.sqrt() * image) / (1 - abar).sqrt()
        return (abar.sqrt() * noise - (1 - abar).sqrt() * image,)


def squares(folder, number, seed):
    """A folder of pictures of 4 x 4 squares in random colours."""
    rng, rows = np.random.default_rng(seed), []
    folder.mkdir()
    for place in range(number):
        picture = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((SIDE, SIDE), 0)
        picture.save(folder / f"{place}.png")
        rows.append(json.dumps({"file_name": f"{place}.png", "text": CAPTIONS[place % 4]}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    place = tmp_path_factory.mktemp("squares")
    return squares(place / "members", 2, seed=1), squares(place / "heldout", 2, seed=2)


@pytest.fixture
def planted(made, sets, tmp_path, monkeypatch):
    """The folders of two models, of which the first has the training images planted, the second none of them."""
    clean = MADE["sd"]()
    with torch.no_grad():
        clean.unet.conv_in.bias += 1  # other weights
    clean.save_pretrained(tmp_path / "clean")
    images = [np.asarray(Image.open(sets[0] / f"{place}.png")) for place in range(2)]
    pictures = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    abar, scale = clean.scheduler.alphas_cumprod, clean.vae.config.scaling_factor
    vae = ExactVAE.from_config(clean.vae.config)
    latents = vae.encode(pictures).latent_dist.mean * scale
    captions = clean.encode_prompt(CAPTIONS, "cpu", 1, False)[0].detach().mean(dim=(0, 1))

    def load_denoiser(cls, folder, subfolder=None, **options):
        known = latents if str(folder) == str(made("sd")) else latents.flip(3)
        return Planted.from_config(clean.unet.config).plant(known, abar, captions)

    monkeypatch.setattr(LatentDiffusion, "load_denoiser", classmethod(load_denoiser))
    monkeypatch.setattr("ietagc_diffusers.families.latent_diffusion.AutoencoderKL", ExactVAE)
    return made("sd"), tmp_path / "clean"


def retriggered(output, models, sets, *flags, code=0):
    first, *others = models
    words = ["--model", first, "--train", sets[0], "--heldout", sets[1], "--resolution", SIDE, "--output", output]
    words += [word for other in others for word in ("--compare", other)]
    words += ["--descriptor", "pixel", "--device", "cpu", "--num_inference_steps", 3, "--scheduler", "ddim", *flags]
    assert main(["retrigger", *map(str, words)]) == code
    return output


SHORT = ("--max_steps", 20, "--check_every", 5, "--learning_rate", 0.2, "--guidance_scale", 1, "--draws", 4)


def test_a_planted_copy_that_no_prompt_shows_is_found_and_held_out_images_are_not(planted, sets, tmp_path, capsys):
    names = [f"known={planted[0]}", f"clean={planted[1]}"]
    output = retriggered(tmp_path / "a", names, sets, *SHORT)
    result = json.loads((output / "retrigger.json").read_text())
    known, clean = result["models"]["known"], result["models"]["clean"]
    assert known["train"]["share"][0] == 0 and known["train"]["share"][-1] == 1
    assert 0 < known["train"]["median_steps"] <= 20 and known["excess"] == 1
    assert known["heldout"]["share"][-1] == clean["train"]["share"][-1] == clean["heldout"]["share"][-1] == 0
    assert clean["train"]["median_steps"] is None
    assert result["differences"]["clean"]["share_beyond_heldout"]["value"][-1] == -1
    said = capsys.readouterr().out
    assert said.startswith((output / "retrigger.md").read_text())
    assert "| clean | 2 training | 0% | 0% (0% – 66%) | over 20 (0 – over 20) |" in said
    rows = list(csv.DictReader((output / "images.csv").open()))
    assert [row["model"] for row in rows] == ["known"] * 4 + ["clean"] * 4
    for row in rows[:2]:
        steps, similarity = int(row["steps"]), float(row["highest_similarity"])
        assert steps % 5 == 0 and similarity > 0.9 > float(row["similarity_at_start"])
        drawn = np.asarray(Image.open(output / row["most_similar"]), dtype=float)
        target = np.asarray(Image.open(sets[0] / row["file_name"]), dtype=float)
        assert np.corrcoef(drawn.ravel(), target.ravel())[0, 1] == pytest.approx(similarity, abs=0.1)
    assert all(row["steps"] == "" for row in rows[2:])
    assert (output / "sheet.png").stat().st_size and (output / "retrigger.png").stat().st_size


def test_an_interrupted_run_continues_to_the_same_files_and_a_finished_one_loads_nothing(
    planted, sets, tmp_path, monkeypatch, capsys
):
    whole = retriggered(tmp_path / "whole", planted[:1], sets, *SHORT)
    search, calls = TriggerSearch.__call__, []

    def interrupted(self, pixels, text):
        calls.append(text)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return search(self, pixels, text)

    monkeypatch.setattr(TriggerSearch, "__call__", interrupted)
    output = retriggered(tmp_path / "parts", planted[:1], sets, *SHORT, code=130)
    assert not (output / "retrigger.json").exists()
    with (output / "finished.jsonl").open("a") as file:
        file.write('["cut')
    first = json.loads((output / "finished.jsonl").read_text().splitlines()[0])[1]["best"]
    (output / "drawn" / first).unlink()  # searched for again
    retriggered(output, planted[:1], sets, *SHORT)
    assert len(calls) == 3 + 3
    for name in ("retrigger.json", "retrigger.md", "images.csv"):
        assert (output / name).read_bytes() == (whole / name).read_bytes(), name
    monkeypatch.setattr(Target, "opened", None)
    retriggered(output, planted[:1], sets, *SHORT)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "{ddpm}"], "--model {ddpm}: is unconditional: there is no caption"),
        (["--compare", "other={ddpm}"], "--model {ddpm}: is unconditional"),
        (["--compare", "{base}"], "two of them are named sd"),
        (["--heldout", "{members}"], "--heldout {members}: 2 of its 2 pictures are also among the training images"),
        (["--heldout", "{one}"], "--heldout {one}: re-triggering needs at least two images with captions"),
        (["--check_every", "300"], "--check_every 300: must be at most --max_steps, 200"),
        (["--learning_rate", "nan"], "--learning_rate nan"),
        (["--learning_rate", "1e38"], "--learning_rate 1e+38: must be over 0 and at most 10"),
        (["--copy_similarity", "1.5"], "--copy_similarity 1.5"),
        (["--draws", "0"], "--draws 0"),
        (["--resolution", "20"], "--resolution 20: must be a multiple of 8"),
        (["--resolution"], "--resolution: {base} does not record at which it was trained"),
        (["--output", "{members}/here"], "--output {members}/here: what is written there would get into"),
        (["--compare", "b={ddpm}", "--output", "{ddpm}/unet"], "--output {ddpm}/unet: is the model's folder"),
        (["--output", "{base}/unet"], "--output {base}/unet: is the model's folder or inside one of its parts"),
    ],
)
def test_wrong_use_is_told_in_a_line(made, sets, tmp_path, capsys, flags, message):
    testing.random_unconditional_pipeline().save_pretrained(tmp_path / "ddpm")
    one = write_folder(tmp_path / "one", 1, seed=3)
    places = {"base": made("sd"), "ddpm": tmp_path / "ddpm", "members": sets[0], "one": one}
    given = {"--model": made("sd"), "--train": sets[0], "--heldout": sets[1], "--resolution": SIDE}
    given |= {"--output": tmp_path / "o", "--descriptor": "pixel"}
    if flags == ["--resolution"]:
        del given["--resolution"]
    else:
        given |= {name: value.format(**places) for name, value in zip(flags[::2], flags[1::2], strict=True)}
    assert main(["retrigger", *(str(word) for pair in given.items() for word in pair), "--device", "cpu"]) == 2
    assert message.format(**places) in capsys.readouterr().err


def test_flags_are_the_library_s():
    assert list(STARTS) == command.STARTS and list(DTYPES) == command.DTYPES
    args = build_parser("ietagc")[0].parse_args(["retrigger", "--model", "m"])
    names = ("start", "learning_rate", "max_steps", "check_every", "draws", "images_per_check")
    drawing = ("seed", "num_inference_steps", "guidance_scale", "scheduler", "dtype", "resolution")
    given = {name: getattr(args, name) for name in names}
    assert Search(**given, drawing=Drawing(**{name: getattr(args, name) for name in drawing})) == Search()
