"""Mitigated pipelines: what each mitigation does equals a small reference, and everything else stays as it was."""

import copy
import inspect
import json
import math
import warnings
from typing import ClassVar

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
)
from diffusers.models.attention_processor import Attention, SlicedAttnProcessor

from ietagc_diffusers import UsageError, tiny
from ietagc_diffusers.mitigations import (
    MITIGATIONS,
    apply_mitigations,
    mitigate,
    parse_mitigation,
    parse_mitigations,
    text_conditional_noise,
)
from ietagc_diffusers.mitigations.base import Mitigation, PromptMitigation
from ietagc_diffusers.mitigations.pipeline import with_mitigation
from ietagc_diffusers.mitigations.wen import noise_magnitude, optimise_embeddings

PROMPTS = ["a red picture", "a blue picture of a long red picture"]
AT_ZERO = ["rt:num_words=0", "rna:num_words=0", "cwr:num_words=0", "gni:scale=0", "wen:steps=0", "cfg:transition=1000",
           "memattn:scale=1,mask=false"]  # fmt: skip
ACTING = ["rt", "rna", "cwr", "gni", "wen:target_loss=0", "cfg", "cfg:transition=dynamic",
          "cfg:transition=650,initial_scale=-2", "memattn", "memattn:mask=false,scale=5"]  # fmt: skip
CHAIN = "cwr+wen:target_loss=0,steps=2+rt+gni+cfg+memattn"
MAKERS = {"sd": tiny.random_pipeline, "xl": tiny.random_xl_pipeline}


@pytest.fixture(scope="module", params=MAKERS)
def pipeline(request):
    pipeline = MAKERS[request.param](PROMPTS)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def sd():
    pipeline = tiny.random_pipeline(PROMPTS)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def generate(pipeline, prompts=PROMPTS, seeds=(1, 2), **options):
    """Images (N, 3, H, W) in [0, 1], each from its own seed."""
    options = {"num_inference_steps": 4, "output_type": "pt", "guidance_scale": 5.0, **options}
    options.setdefault("generator", generators(*seeds))
    return pipeline(prompts, **options).images


def same(a, b):
    """The same 8-bit images, but for one grey level: sums over another batch size are rounded otherwise."""
    return (a * 255).round().sub((b * 255).round()).abs().max() <= 1


def unet_inputs(pipeline, *args, **options):
    """The keyword arguments of the UNet's calls by the pipeline itself, in order."""
    seen = []

    class Spy(Mitigation):
        name = "spy"

        def before_unet(self, step):
            seen.append(copy.deepcopy({**step.inputs, "sample": step.sample}))

    generate(with_mitigation(pipeline, Spy()), *args, **options)
    return seen


def is_clean(pipeline):
    return not any(part._forward_hooks or part._forward_pre_hooks for part in pipeline.unet.modules())


class Recorder(PromptMitigation):
    """Passes prompts on and keeps them."""

    name = "recorder"

    def __init__(self):
        self.prompts = []

    def rewrite(self, prompt, tokenizer, rng):
        self.prompts.append(prompt)
        return prompt


def rewritten(pipeline, text, *args, **options):
    recorder = Recorder()
    generate(with_mitigation(apply_mitigations(pipeline, text), recorder), *args, num_inference_steps=1, **options)
    return recorder.prompts


# What stays as it was


@pytest.mark.parametrize("text", AT_ZERO)
@pytest.mark.parametrize("case", ["guided", "unguided", "negative", "images", "embeds", "one", "global"])
def test_at_strength_zero_the_images_are_the_same_bits(pipeline, text, case):
    options = {}
    if case == "unguided":
        options = {"guidance_scale": 1.0}
    if case == "negative":
        options = {"negative_prompt": ["a blue picture", ""], "guidance_rescale": 0.5}
    if case == "images":
        options = {"num_images_per_prompt": 3, "seeds": range(6)}
    if case == "embeds":
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        encoded = pipeline.encode_prompt(
            PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        options = {"prompts": None, **dict(zip(names, encoded, strict=False))}
    results = []
    for each in (pipeline, apply_mitigations(pipeline, text)):
        torch.manual_seed(3)
        if case == "one":
            options = {"prompts": PROMPTS[0], "generator": torch.Generator().manual_seed(3)}
        if case == "global":
            options = {"generator": None}
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            results.append((generate(each, **options), torch.get_rng_state()))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("text", [*ACTING, CHAIN])
def test_each_acts_and_leaves_the_original_as_it_was(pipeline, text):
    before, attributes = generate(pipeline), dict(pipeline.__dict__)
    mitigated = apply_mitigations(pipeline, text)
    changed = generate(mitigated)
    assert not torch.equal(changed, before) and changed.isfinite().all()
    assert torch.equal(generate(mitigated), changed)
    assert torch.equal(generate(pipeline), before)
    assert is_clean(pipeline) and mitigated.current_call is None
    assert all(value is attributes[key] for key, value in pipeline.components.items())
    assert all(value is pipeline.components[key] for key, value in mitigated.components.items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in pipeline.unet.parameters())
    assert not hasattr(pipeline, "mitigations")


def test_a_mitigated_pipeline_is_one_of_its_class_and_saved_as_such(pipeline, tmp_path):
    mitigated = apply_mitigations(pipeline, CHAIN)
    assert isinstance(mitigated, type(pipeline)) and type(mitigated) is type(mitigate(pipeline, "gni"))
    assert inspect.signature(mitigated.__call__) == inspect.signature(pipeline.__call__)
    for name, each in (("plain", pipeline), ("mitigated", mitigated)):
        each.save_pretrained(tmp_path / name)
    indices = [json.loads((tmp_path / name / "model_index.json").read_text()) for name in ("plain", "mitigated")]
    assert indices[0] == indices[1] and indices[0]["_class_name"] == type(pipeline).__name__
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "mitigated")
    assert type(loaded) is type(pipeline)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(generate(loaded), generate(pipeline))


def test_a_component_of_its_own_does_not_reach_the_original(sd):
    mitigated = mitigate(sd, "gni")
    mitigated.scheduler = DDIMScheduler.from_config(sd.scheduler.config)
    mitigated.set_progress_bar_config(disable=False)
    assert type(sd.scheduler).__name__ == "DDPMScheduler" and sd.config["scheduler"][1] == "DDPMScheduler"
    assert mitigated.config["scheduler"][1] == "DDIMScheduler" and sd._progress_bar_config == {"disable": True}


def test_encoding_a_prompt_outside_a_call_is_not_mitigated(sd):
    arguments = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    pairs = zip(apply_mitigations(sd, CHAIN).encode_prompt(PROMPTS, **arguments), sd.encode_prompt(PROMPTS, **arguments))
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("text", ["rt", "wen:target_loss=0", "memattn+gni", CHAIN])
def test_hooks_are_gone_after_an_exception(sd, text):
    mitigated, before = apply_mitigations(sd, text), generate(sd)

    def fail(pipeline, index, timestep, tensors):
        assert not is_clean(sd)
        raise RuntimeError("in the callback")

    with pytest.raises(RuntimeError, match="in the callback"):
        generate(mitigated, callback_on_step_end=fail)
    with pytest.raises(ValueError, match="list of generators of length 1"):
        generate(mitigated, seeds=(1,))
    with pytest.raises(TypeError, match="same type"):
        generate(mitigated, negative_prompt="a str for a list")
    assert is_clean(sd) and mitigated.current_call is None
    assert torch.equal(generate(sd), before)


@pytest.mark.parametrize("text", ["memattn", "wen"])
def test_hooks_are_gone_where_the_model_or_the_options_do_not_fit(sd, text):
    broken = DiffusionPipeline.from_pipe(sd)
    broken.unet = copy.deepcopy(sd.unet)
    broken.unet.fuse_qkv_projections()
    broken.set_progress_bar_config(disable=True)
    mitigated = apply_mitigations(broken, {"memattn": "gni+memattn", "wen": "wen:target_step=4"}[text])
    with pytest.raises(UsageError, match={"memattn": "projections are fused", "wen": "below the number of"}[text]):
        generate(mitigated)
    assert is_clean(broken) and mitigated.current_call is None


def test_callbacks_see_and_steer_the_call(sd):
    """The step's own guidance scale; the mitigated embedding; and guidance that is turned off half way."""
    mitigated, seen = apply_mitigations(sd, "gni+cfg:transition=500+memattn"), []

    def watch(pipeline, index, timestep, tensors):
        seen.append((int(timestep) > 500, pipeline.guidance_scale, tensors["prompt_embeds"]))
        if index == 2:
            pipeline._guidance_scale = 0.0
            return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[1]}
        return {}

    images = generate(
        mitigated, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"]
    )
    assert images.isfinite().all()
    assert [scale for _, scale, _ in seen[:3]] == [0.0 if early else 5.0 for early, _, _ in seen[:3]]
    assert {early for early, _, _ in seen} == {True, False}
    plain = unet_inputs(sd)[0]["encoder_hidden_states"]
    assert torch.equal(seen[0][2][:2], plain[:2]) and not torch.equal(seen[0][2][2:], plain[2:])


KINDS = [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_any_scheduler(pipeline, kind):
    for text in (CHAIN, "cfg:transition=dynamic"):
        mitigated = apply_mitigations(pipeline, text)
        mitigated.scheduler = kind.from_config(pipeline.scheduler.config)
        assert generate(mitigated).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_and_inference_mode(pipeline, dtype):
    half = DiffusionPipeline.from_pipe(pipeline)
    half.set_progress_bar_config(disable=True)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if name in half.components:
            setattr(half, name, copy.deepcopy(getattr(half, name)).to(dtype))
    mitigated = mitigate(half, "wen", target_loss=0, lr=0.01)
    before, after = (text_conditional_noise(each, PROMPTS, [1, 2]).magnitude for each in (half, mitigated))
    assert (after < 0.9 * before).all()
    with torch.inference_mode():
        for text in (CHAIN, "wen:target_loss=0+cfg:transition=dynamic"):
            assert generate(apply_mitigations(half, text)).isfinite().all()


def test_model_offloading(sd):
    """The host stands in for the accelerator: components move by accelerate's hooks all the same."""
    own = copy.deepcopy(sd)
    wanted = generate(apply_mitigations(sd, CHAIN))
    own.enable_model_cpu_offload(device="cpu")
    mitigated = apply_mitigations(own, CHAIN)
    assert torch.equal(generate(mitigated), wanted) and torch.equal(generate(mitigated), wanted)
    assert torch.equal(generate(own), generate(sd))


def test_other_pipelines_are_refused(sd):
    other = StableDiffusionImg2ImgPipeline.from_pipe(sd)
    with pytest.raises(UsageError, match="StableDiffusionImg2ImgPipeline cannot be mitigated"):
        mitigate(other, "rt")


# Randomness


@pytest.mark.parametrize("text", [*ACTING, CHAIN])
def test_an_image_depends_on_its_own_generator_alone(pipeline, text):
    mitigated = apply_mitigations(pipeline, text)
    prompts, seeds = [*PROMPTS, "a red red picture"], (5, 6, 7)
    together = generate(mitigated, prompts, seeds)
    for row in (0, 2):
        assert same(generate(mitigated, prompts[row : row + 1], seeds[row : row + 1])[0], together[row])
        one = torch.Generator().manual_seed(seeds[row])
        assert same(generate(mitigated, prompts[row], generator=one)[0], together[row])
    assert same(generate(mitigated, prompts[::-1], seeds[::-1]), together.flip(0))


@pytest.mark.parametrize("text", ["rt", "gni", CHAIN])
def test_several_images_a_prompt_are_several_prompts(pipeline, text):
    mitigated = apply_mitigations(pipeline, text)
    repeated = [prompt for prompt in PROMPTS for _ in range(2)]
    assert same(generate(mitigated, seeds=range(4), num_images_per_prompt=2), generate(mitigated, repeated, range(4)))
    assert len(set(rewritten(pipeline, "rt", seeds=range(4), num_images_per_prompt=2))) == 4


@pytest.mark.parametrize("text", ["rt", "rna", "cwr", "gni", CHAIN])
def test_no_generator_is_consumed_and_an_advanced_one_draws_anew(sd, text):
    mitigated, plain, own = apply_mitigations(sd, text), *generators(4, 4)
    latents = torch.zeros(1, 4, 8, 8)  # what differs between two calls is the mitigation, not the start
    results = []
    for _ in range(2):
        results.append(generate(mitigated, "a red blue picture", generator=own, latents=latents, eta=0.0))
        generate(sd, "a red blue picture", generator=plain, latents=latents)
        assert torch.equal(own.get_state(), plain.get_state())
        torch.rand(1, generator=own), torch.rand(1, generator=plain)
    assert not torch.equal(*results)


@pytest.mark.parametrize("text", ["rt", "gni", CHAIN])
def test_without_a_generator_the_global_stream_decides(sd, text):
    mitigated, results = apply_mitigations(sd, text), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(generate(mitigated, generator=None))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_images_of_one_generator_get_draws_of_their_own(sd):
    prompts = rewritten(sd, "rt", ["a picture"] * 4, generator=torch.Generator().manual_seed(0))
    assert len(set(prompts)) == 4


def test_a_mitigation_draws_by_its_place_in_the_chain(sd):
    twice = rewritten(sd, "rt:num_words=1+rt:num_words=1", [""] * 20, range(20))
    assert sum(len(set(prompt.split())) == 2 for prompt in twice) > 15
    assert [p.split() for p in rewritten(sd, "rt:num_words=1", [""] * 20, range(20))] != [p.split()[:1] for p in twice]


# Prompts


@pytest.mark.parametrize("name", ["rt", "rna", "cwr"])
@pytest.mark.parametrize("prompt", ["a red picture", "", "w " * 80, "красная 画 🐈"])
def test_prompts_are_rewritten_and_negative_ones_are_not(pipeline, name, prompt):
    options = {"prompts": [prompt], "seeds": (1,), "negative_prompt": ["a blue picture"]}
    (changed,) = rewritten(pipeline, f"{name}:num_words=3", **options)
    added = 0 if name == "cwr" and not prompt else 3
    assert len(changed.split()) == len(prompt.split()) + added
    inputs = unet_inputs(mitigate(pipeline, name, num_words=3), **options)[0]
    wanted = unet_inputs(pipeline, **{**options, "prompts": [changed]})[0]
    assert torch.equal(inputs["encoder_hidden_states"], wanted["encoder_hidden_states"])
    if inputs["added_cond_kwargs"]:
        assert torch.equal(*(each["added_cond_kwargs"]["text_embeds"] for each in (inputs, wanted)))


def test_the_second_prompt_of_sdxl_is_rewritten_too():
    xl = tiny.random_xl_pipeline(PROMPTS)
    xl.set_progress_bar_config(disable=True)
    first, second = rewritten(xl, "rt:num_words=2", ["a"], (1,), prompt_2=["b"])
    assert len(first.split()) == len(second.split()) == 3 and "a" in first.split() and "b" in second.split()
    inputs = unet_inputs(mitigate(xl, "rt", num_words=2), ["a"], (1,), prompt_2=["b"])[0]
    wanted = unet_inputs(xl, [first], (1,), prompt_2=[second])[0]
    assert torch.equal(inputs["encoder_hidden_states"], wanted["encoder_hidden_states"])


def test_prompt_embeds_cannot_be_rewritten_but_everything_else_acts(sd):
    embeds, negative = sd.encode_prompt(PROMPTS, "cpu", 1, True)
    options = {"prompts": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
    with pytest.warns(UserWarning, match="rt, cwr: rewrites prompts, but prompt_embeds were given"):
        assert torch.equal(generate(apply_mitigations(sd, "rt+cwr"), **options), generate(sd, **options))
    kept = embeds.clone()
    for text in ("gni", "wen:target_loss=0", "memattn:scale=5"):
        assert not torch.equal(generate(apply_mitigations(sd, text), **options), generate(sd, **options))
        assert torch.equal(embeds, kept), "the caller's tensor must stay as it is"


# Order


def test_prompt_mitigations_act_in_their_order(sd):
    (first,) = rewritten(sd, "cwr+rt", [""], (1,))
    (second,) = rewritten(mitigate(mitigate(sd, "rt"), "cwr"), "none", [""], (1,))
    assert len(first.split()) == 4 and len(second.split()) == 8
    assert set(second.split()) <= set(rewritten(sd, "rt", [""], (1,))[0].split())


def test_embedding_mitigations_act_in_their_order(sd):
    class Add(Mitigation):
        name = "add"

        def before_unet(self, step):
            if step.index == 0:
                step.embeddings.add_(1)

    class Double(Mitigation):
        name = "double"

        def before_unet(self, step):
            if step.index == 0:
                step.embeddings.mul_(2)

    plain = unet_inputs(sd)[-1]["encoder_hidden_states"]
    for order in ((Add(), Double()), (Double(), Add())):
        chained = with_mitigation(with_mitigation(sd, order[0]), order[1])
        assert [mitigation.name for mitigation in chained.mitigations] == [each.name for each in order]
        wanted = (plain[2:] + 1) * 2 if isinstance(order[0], Add) else plain[2:] * 2 + 1
        changed = unet_inputs(chained)[-1]["encoder_hidden_states"]
        assert torch.equal(changed[:2], plain[:2]) and torch.equal(changed[2:], wanted)
    names = [mitigation.name for mitigation in apply_mitigations(sd, CHAIN).mitigations]
    assert names == ["cwr", "wen", "rt", "gni", "cfg", "memattn"]


# Noise on the embedding


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_gni_adds_noise_of_its_scale_to_the_conditional_branch(pipeline, guidance_scale):
    options = {"prompts": ["a red picture"] * 40, "seeds": range(40), "guidance_scale": guidance_scale}
    mitigated = unet_inputs(mitigate(pipeline, "gni", scale=0.3), **options)
    plain = unet_inputs(pipeline, **options)
    assert torch.equal(mitigated[0]["encoder_hidden_states"], mitigated[-1]["encoder_hidden_states"])
    tensors = [(mitigated[0]["encoder_hidden_states"], plain[0]["encoder_hidden_states"])]
    if plain[0]["added_cond_kwargs"]:
        tensors.append([each[0]["added_cond_kwargs"]["text_embeds"] for each in (mitigated, plain)])
    for changed, original in tensors:
        noise = changed - original
        if guidance_scale > 1:
            assert torch.equal(changed[:40], original[:40])
            noise = noise[40:]
        tolerance = 5 * 0.3 / math.sqrt(noise.numel())
        assert noise.mean().abs() < tolerance and abs(noise.std() - 0.3) < tolerance
        assert (noise.std(dim=0) - 0.3).abs().mean() < 0.05, "every image must have noise of its own"


# Wen


def toy(batch, seed=0):
    """A smooth model of embeddings (B, 5, 3) with predictions (B, 4, 2, 2)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(15, 16, generator=generator)
    embeddings = torch.randn(batch, 5, 3, generator=generator)
    unconditional = torch.randn(batch, 4, 2, 2, generator=generator)
    return lambda e: torch.tanh(e.flatten(1) @ weight).view(-1, 4, 2, 2), embeddings, unconditional


def adamw(predict, embedding, unconditional, steps, lr, target):
    """One image, AdamW written out (decay 0.01, betas 0.9 and 0.999). Returns the embedding and the steps taken."""
    x, m, v = embedding.clone(), 0.0, 0.0
    for step in range(1, steps + 1):
        point = x.clone().requires_grad_()
        loss = (predict(point[None])[0] - unconditional).pow(2).sum().sqrt()
        if loss <= target:
            return x, step - 1
        (gradient,) = torch.autograd.grad(loss, point)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        update = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        x[1:] = (x * (1 - lr * 0.01) - lr * update)[1:]
    return x, steps


def test_wen_equals_adamw_on_one_image_at_a_time():
    predict, embeddings, unconditional = toy(6)
    start = noise_magnitude(predict(embeddings), unconditional)
    target = start.sort().values[3].item() - 0.5
    optimised = optimise_embeddings(predict, embeddings, unconditional, steps=8, lr=0.05, target_loss=target)
    taken = set()
    for row in range(6):
        wanted, steps = adamw(predict, embeddings[row], unconditional[row], 8, 0.05, target)
        taken.add(steps)
        torch.testing.assert_close(optimised[row], wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(optimised[row], embeddings[row]) == (start[row] <= target)
    assert 0 in taken and 8 in taken and len(taken) > 2, "images must stop at steps of their own"
    assert torch.equal(optimised[:, 0], embeddings[:, 0])
    assert torch.equal(optimise_embeddings(predict, embeddings, unconditional, steps=0), embeddings)


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_wen_lowers_the_magnitude_and_leaves_token_0(pipeline, guidance_scale):
    options = {"target_loss": 0, "lr": 0.01, "steps": 6}
    mitigated = mitigate(pipeline, "wen", **options)
    inputs = [unet_inputs(each, guidance_scale=guidance_scale) for each in (pipeline, mitigated)]
    plain, changed = (each[0]["encoder_hidden_states"][-2:] for each in inputs)
    assert torch.equal(changed, inputs[1][-1]["encoder_hidden_states"][-2:]), "it must hold for all steps"
    assert torch.equal(plain[:, 0], changed[:, 0]) and not torch.equal(plain[:, 1:], changed[:, 1:])
    if guidance_scale > 1:
        assert torch.equal(inputs[0][0]["encoder_hidden_states"][:2], inputs[1][0]["encoder_hidden_states"][:2])
    # Unguided, the same optimisation against the empty prompt: the embedding does not depend on the guidance scale.
    guided = unet_inputs(mitigated)[0]["encoder_hidden_states"][2:]
    torch.testing.assert_close(changed, guided, rtol=1e-3, atol=1e-4)
    before, after = (text_conditional_noise(each, PROMPTS, [1, 2], 4).magnitude for each in (pipeline, mitigated))
    assert (after < 0.9 * before).all()


def test_wen_stops_at_the_target(sd):
    before = text_conditional_noise(sd, PROMPTS, [1, 2], 4).magnitude
    low, high = before.argmin().item(), before.argmax().item()
    between = before.mean().item()
    mitigated = mitigate(sd, "wen", target_loss=between, lr=0.005, steps=50)
    after = text_conditional_noise(mitigated, PROMPTS, [1, 2], 4).magnitude
    assert after[low] == before[low]
    assert 0.8 * between < after[high] <= between * 1.0001
    assert torch.equal(generate(mitigate(sd, "wen", target_loss=before.max() + 1e-3)), generate(sd))


def test_wen_can_wait_for_a_later_step(sd):
    mitigated = mitigate(sd, "wen", target_loss=0, target_step=2)
    plain, changed = unet_inputs(sd), unet_inputs(mitigated)
    equal = [torch.equal(a["encoder_hidden_states"], b["encoder_hidden_states"]) for a, b in zip(plain, changed)]
    assert equal == [True, True, False, False]


# The detector


def test_the_detector_measures_the_first_steps_of_generation(pipeline):
    """Against the latents of a generation written out, one prompt at a time."""
    prompts, seeds = [*PROMPTS, ""], [1, 2, 3]
    result = text_conditional_noise(pipeline, prompts, seeds, 5, 3, guidance_scale=4.0, batch_size=2)
    assert result.magnitude.shape == (3,) and result.per_step.shape == (3, 3)
    assert result.magnitude.dtype == result.per_step.dtype == torch.float32
    torch.testing.assert_close(result.magnitude, result.per_step.mean(dim=1))
    for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        for index, inputs in enumerate(unet_inputs(pipeline, prompt, (seed,), guidance_scale=4.0, num_inference_steps=5)):
            if index == 3:
                break
            timestep = pipeline.scheduler.timesteps[index]
            with torch.no_grad():
                unconditional, conditional = pipeline.unet(
                    inputs["sample"], timestep, inputs["encoder_hidden_states"],
                    added_cond_kwargs=inputs["added_cond_kwargs"],
                ).sample  # fmt: skip
            wanted = (conditional - unconditional).pow(2).sum().sqrt()
            assert result.per_step[row, index].item() == pytest.approx(wanted.item(), rel=1e-3)
    assert pipeline.scheduler.timesteps.numel() == 5 and is_clean(pipeline)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [1]}, "2 prompts and 1 seeds"),
        ({"steps": 0}, "steps 0: must be in 1 to num_inference_steps, 50"),
        ({"steps": 51}, "steps 51"),
        ({"guidance_scale": 1.0}, "guidance_scale 1.0: must be over 1"),
    ],
)
def test_the_detector_refuses_what_it_cannot_measure(sd, options, message):
    with pytest.raises(UsageError, match=message):
        text_conditional_noise(sd, PROMPTS, **{"seeds": [1, 2], **options})


# Guidance


def written_out(sd, prompt, seed, steps, transition, initial, scale):
    """Generation of one image with DDIM, guidance by hand. Returns latents, and the steps at which guidance acted."""
    scheduler = DDIMScheduler.from_config(sd.scheduler.config)
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        embeds, negative = sd.encode_prompt([prompt], "cpu", 1, True)
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        norms, found, acted = [], False, []
        for t in scheduler.timesteps:
            eps_u, eps_c = (sd.unet(latents, t, e).sample for e in (negative, embeds))
            norms.append((eps_c - eps_u).norm().item())
            if transition == "dynamic":
                found = found or (len(norms) > 2 and norms[-2] < norms[-3] and norms[-2] < norms[-1])
            else:
                found = t.item() <= transition
            acted.append(found)
            latents = scheduler.step(eps_u + (scale if found else initial) * (eps_c - eps_u), t, latents).prev_sample
    return latents, acted


@pytest.mark.parametrize(
    ("text", "transition", "initial"),
    [
        ("cfg", 500, 0.0),
        ("cfg:transition=650,initial_scale=-2", 650, -2.0),
        ("cfg:transition=dynamic", "dynamic", 1.0),
        ("cfg:transition=dynamic,initial_scale=0", "dynamic", 0.0),
    ],
)
def test_guidance_is_delayed_for_each_image(sd, text, transition, initial):
    mitigated = apply_mitigations(sd, text)
    mitigated.scheduler = DDIMScheduler.from_config(sd.scheduler.config)
    seeds, begun = list(range(10, 18)), set()
    prompts = ["a red picture"] * len(seeds)
    latents = generate(mitigated, prompts, seeds, num_inference_steps=12, output_type="latent", guidance_scale=30.0)
    for row, seed in enumerate(seeds):
        wanted, acted = written_out(sd, prompts[row], seed, 12, transition, initial, 30.0)
        begun.add(sum(acted))
        torch.testing.assert_close(latents[row], wanted[0], rtol=1e-3, atol=1e-3)
    if transition == "dynamic":
        assert len(begun) > 1, "images must find transitions of their own"
    assert begun != {0}


# Cross-attention


class Written:
    """Cross-attention written out, one image: logits of the beginning token scaled in the conditional row (the
    second), tokens from ``length`` on left out in both.
    """

    def __init__(self, scale, length):
        self.scale, self.length = scale, length

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **unused):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        rows = []
        for row, (x, y) in enumerate(zip(hidden_states, context, strict=True)):
            q, k, v = (w.unflatten(-1, (attn.heads, -1)).transpose(0, 1) for w in (attn.to_q(x), attn.to_k(y), attn.to_v(y)))
            logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
            if encoder_hidden_states is not None:
                logits[..., self.length :] = -torch.inf
                logits[..., 0] *= self.scale if row == 1 else 1
            rows.append((logits.softmax(dim=-1) @ v).transpose(0, 1).flatten(1))
        return attn.to_out[0](torch.stack(rows))


@pytest.mark.parametrize(("scale", "mask"), [(1.25, True), (6.0, False), (6.0, True), (-3.0, True)])
def test_attention_is_rescaled_as_written_out(pipeline, scale, mask):
    mitigated = mitigate(pipeline, "memattn", scale=scale, mask=mask)
    images = generate(mitigated, guidance_scale=20.0)
    reference = DiffusionPipeline.from_pipe(pipeline)
    reference.set_progress_bar_config(disable=True)
    reference.unet = copy.deepcopy(pipeline.unet)
    for row, (prompt, seed) in enumerate(zip(PROMPTS, (1, 2), strict=True)):
        length = len(pipeline.tokenizer(prompt).input_ids) if mask else 77
        reference.unet.set_attn_processor(Written(scale, length))
        wanted = generate(reference, prompt, (seed,), guidance_scale=20.0)[0]
        torch.testing.assert_close(images[row], wanted, rtol=0, atol=2e-3)
    assert (images - generate(pipeline, guidance_scale=20.0)).abs().max() > 4e-3


def test_attention_is_rescaled_whatever_the_processor(sd):
    mitigated = mitigate(sd, "memattn", scale=6)
    wanted = generate(mitigated)
    attentions = [part for part in sd.unet.modules() if isinstance(part, Attention)]
    before = [attention.processor for attention in attentions]
    sd.unet.set_attn_processor(SlicedAttnProcessor(1))
    torch.testing.assert_close(generate(mitigated), wanted, rtol=0, atol=1e-3)
    for attention, processor in zip(attentions, before, strict=True):
        attention.set_processor(processor)


# Names and options


def test_each_mitigation_has_a_name_defaults_and_a_description():
    assert list(MITIGATIONS) == ["rt", "rna", "cwr", "gni", "wen", "cfg", "memattn"]
    for name, kind in MITIGATIONS.items():
        assert kind.name == name and kind.__doc__ and kind() == kind()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("rt:num_words=4", ("rt", {"num_words": 4})),
        ("gni", ("gni", {})),
        ("wen:steps=5, lr=1e-1 ,target_loss=2", ("wen", {"steps": 5, "lr": 0.1, "target_loss": 2.0})),
        ("cfg:transition=dynamic", ("cfg", {"transition": "dynamic"})),
        ("cfg:transition=650,initial_scale=-2", ("cfg", {"transition": 650.0, "initial_scale": -2.0})),
        ("memattn:mask=False", ("memattn", {"mask": False})),
    ],
)
def test_options_are_read_from_the_command_line(sd, text, wanted):
    name, options = parse_mitigation(text)
    assert (name, options) == wanted
    assert mitigate(sd, name, **options).mitigations == apply_mitigations(sd, text).mitigations


def test_chains_are_read_from_the_command_line(sd):
    assert parse_mitigations("rt + gni:scale=1e+1+rt") == [("rt", {}), ("gni", {"scale": 10.0}), ("rt", {})]
    assert parse_mitigations("none") == [] and apply_mitigations(sd, "none") is sd


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rtt", "mitigation 'rtt': not one of rt, .*; did you mean 'rt'?"),
        ("", "mitigation '': not one of"),
        ("rt+", r"mitigation 'rt\+': not one of"),
        ("rt+gnj", "did you mean 'gni'"),
        ("rt:num_wrds=2", "mitigation rt: unknown option 'num_wrds'; it has num_words; did you mean 'num_words'?"),
        ("rt:num_words", "'num_words' has no value: write num_words=value"),
        ("rt:num_words=-1", "mitigation rt: num_words -1: must be a whole number, at least 0"),
        ("rt:num_words=1.5", "must be a whole number"),
        ("gni:scale=nan", "mitigation gni: scale nan: must be a number"),
        ("gni:scale=-0.1", "must be at least 0"),
        ("wen:lr=fast", "mitigation wen: lr fast: must be a number"),
        ("cfg:transition=late", "must be a timestep or 'dynamic'"),
        ("memattn:mask=1", "must be true or false"),
    ],
)
def test_wrong_names_and_options_are_errors_that_say_what_would_do(sd, text, message):
    with pytest.raises(UsageError, match=message):
        apply_mitigations(sd, text)


class Marked(PromptMitigation):
    name: ClassVar[str] = "marked"


def test_a_prompt_mitigation_must_say_how_it_rewrites(sd):
    with pytest.raises(NotImplementedError):
        generate(with_mitigation(sd, Marked()))
