"""Mitigated pipelines: everything but the mitigation stays as it was, the randomness is the generators', and chains
keep their order.
"""

import copy
import inspect
import json
import warnings

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
)
from mitigated import (
    ACTING,
    AT_ZERO,
    CHAIN,
    KINDS,
    PROMPTS,
    denoiser,
    denoiser_inputs,
    encode,
    generate,
    generators,
    is_clean,
    is_sd3,
    make,
    models,
    rewritten,
    same,
    sibling,
    suited,
)

from ietagc_diffusers import UsageError
from ietagc_diffusers.mitigations import (
    MITIGATIONS,
    apply_mitigations,
    mitigate,
    parse_mitigation,
    parse_mitigations,
    text_conditional_noise,
)
from ietagc_diffusers.mitigations.base import Mitigation
from ietagc_diffusers.mitigations.pipeline import with_mitigation


@pytest.fixture(scope="module", params=KINDS)
def pipeline(request):
    return make(request.param)


@pytest.fixture(scope="module")
def sd():
    return make("sd")


# What stays as it was


@pytest.mark.parametrize("text", AT_ZERO)
@pytest.mark.parametrize("case", ["guided", "unguided", "negative", "layers", "images", "embeds", "one", "global"])
def test_at_strength_zero_the_images_are_the_same_bits(pipeline, text, case):
    options = {"num_inference_steps": 2}
    if case == "unguided":
        options |= {"guidance_scale": 1.0}
    if case == "negative":
        options |= {
            "negative_prompt": ["a blue picture", ""],
            **({} if is_sd3(pipeline) else {"guidance_rescale": 0.5}),
        }
    if case == "layers" and is_sd3(pipeline):
        options |= {"num_inference_steps": 4, "skip_guidance_layers": [0], "skip_layer_guidance_stop": 0.8}
    if case == "images":
        options |= {"num_images_per_prompt": 3, "seeds": range(6)}
    if case == "embeds":
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        options |= {"prompts": None, **dict(zip(names, encode(pipeline, PROMPTS), strict=False))}
    results = []
    for each in (pipeline, apply_mitigations(pipeline, suited(pipeline, text))):
        torch.manual_seed(3)
        if case == "one":
            options |= {"prompts": PROMPTS[0], "generator": torch.Generator().manual_seed(3)}
        if case == "global":
            options |= {"generator": None}
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            results.append((generate(each, **options), torch.get_rng_state()))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("text", [*ACTING, CHAIN])
def test_each_acts_and_leaves_the_original_as_it_was(pipeline, text):
    before, attributes = generate(pipeline), dict(pipeline.__dict__)
    mitigated = apply_mitigations(pipeline, suited(pipeline, text))
    changed = generate(mitigated)
    assert not torch.equal(changed, before) and changed.isfinite().all()
    assert torch.equal(generate(mitigated), changed)
    assert torch.equal(generate(pipeline), before)
    assert is_clean(pipeline) and mitigated.current_call is None
    assert all(value is attributes[key] for key, value in pipeline.components.items())
    assert all(value is pipeline.components[key] for key, value in mitigated.components.items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in denoiser(pipeline).parameters())
    assert not hasattr(pipeline, "mitigations")


def test_a_mitigated_pipeline_is_one_of_its_class_and_saved_as_such(pipeline, tmp_path):
    mitigated = apply_mitigations(pipeline, suited(pipeline, CHAIN))
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
    mitigated, plain = (each.encode_prompt(PROMPTS, **arguments) for each in (apply_mitigations(sd, CHAIN), sd))
    assert all(map(torch.equal, mitigated, plain))


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
    broken = sibling(sd, unet=copy.deepcopy(sd.unet))
    broken.unet.fuse_qkv_projections()
    mitigated = apply_mitigations(broken, {"memattn": "gni+memattn", "wen": "wen:target_step=4"}[text])
    with pytest.raises(UsageError, match={"memattn": "projections are fused", "wen": "below the number of"}[text]):
        generate(mitigated)
    assert is_clean(broken) and mitigated.current_call is None


@pytest.mark.parametrize("in_place", [True, False])
def test_attention_in_a_compiled_unet_is_refused_not_left_as_it_is(sd, in_place):
    unet = copy.deepcopy(sd.unet)
    if in_place:
        unet.compile(backend="eager")
    compiled = sibling(sd, unet=unet if in_place else torch.compile(unet, backend="eager"))
    with pytest.raises(UsageError, match="not compiled"):
        generate(apply_mitigations(compiled, "memattn"))


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
    plain = denoiser_inputs(sd)[0]["encoder_hidden_states"]
    assert torch.equal(seen[0][2][:2], plain[:2]) and not torch.equal(seen[0][2][2:], plain[2:])


@pytest.mark.parametrize("transition", [500, "dynamic"])
def test_a_guidance_scale_without_guidance_is_the_caller_s(sd, transition):
    scales = []

    def watch(pipeline, index, timestep, tensors):
        scales.append(pipeline.guidance_scale)
        return {}

    mitigated = mitigate(sd, "cfg", transition=transition)
    images = generate(mitigated, guidance_scale=1.0, callback_on_step_end=watch)
    assert scales == [1.0] * 4 and torch.equal(images, generate(sd, guidance_scale=1.0))


SCHEDULERS = [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler]


@pytest.mark.parametrize("kind", SCHEDULERS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", ["sd", "xl"])
def test_any_scheduler(name, kind):
    pipeline = make(name)
    for text in (CHAIN, "cfg:transition=dynamic"):
        mitigated = apply_mitigations(pipeline, text)
        mitigated.scheduler = kind.from_config(pipeline.scheduler.config)
        assert generate(mitigated).isfinite().all()


def test_a_scheduler_of_flow_matching():
    pipeline = make("sd3")
    for text in ("cwr+wen:target_loss=0,steps=2+gni+cfg", "cfg:transition=dynamic"):
        mitigated = apply_mitigations(pipeline, text)
        mitigated.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
        assert generate(mitigated).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_and_inference_mode(pipeline, dtype):
    half = sibling(pipeline, **{name: copy.deepcopy(part).to(dtype) for name, part in models(pipeline).items()})
    mitigated = mitigate(half, "wen", target_loss=0, lr=0.01)
    before, after = (text_conditional_noise(each, PROMPTS, [1, 2]).magnitude for each in (half, mitigated))
    assert (after < 0.9 * before).all()
    with torch.inference_mode():
        for text in (CHAIN, "wen:target_loss=0+cfg:transition=dynamic"):
            assert generate(apply_mitigations(half, suited(half, text))).isfinite().all()


def test_model_offloading(sd):
    """The host stands in for the accelerator: components move by accelerate's hooks all the same."""
    own = sibling(sd, **copy.deepcopy(models(sd)))
    wanted = generate(apply_mitigations(sd, CHAIN))
    own.enable_model_cpu_offload(device="cpu")
    mitigated = apply_mitigations(own, CHAIN)
    assert torch.equal(generate(mitigated), wanted) and torch.equal(generate(mitigated), wanted)
    assert torch.equal(generate(own), generate(sd))


def test_other_pipelines_are_refused(sd):
    other = StableDiffusionImg2ImgPipeline.from_pipe(sd)
    with pytest.raises(UsageError, match=r"StableDiffusionImg2ImgPipeline cannot be mitigated: give a .* or "):
        mitigate(other, "rt")


@pytest.mark.parametrize("text", ["memattn", "memattn:scale=1,mask=false", "rt+memattn"])
def test_rescaling_of_attention_is_refused_where_there_is_no_cross_attention(text):
    with pytest.raises(UsageError, match="memattn: acts on cross-attention, but in a StableDiffusion3Pipeline"):
        apply_mitigations(make("sd3"), text)


# Randomness


@pytest.mark.parametrize("text", [*ACTING, CHAIN])
def test_an_image_depends_on_its_own_generator_alone(pipeline, text):
    mitigated = apply_mitigations(pipeline, suited(pipeline, text))
    prompts, seeds = [*PROMPTS, "a red red picture"], (5, 6, 7)
    together = generate(mitigated, prompts, seeds)
    assert same(generate(mitigated, prompts[2:], seeds[2:])[0], together[2])
    assert same(generate(mitigated, prompts[1], generator=torch.Generator().manual_seed(6))[0], together[1])
    assert same(generate(mitigated, prompts[::-1], seeds[::-1]), together.flip(0))


@pytest.mark.parametrize("text", ["rt", "gni", CHAIN])
def test_several_images_a_prompt_are_several_prompts(pipeline, text):
    mitigated = apply_mitigations(pipeline, suited(pipeline, text))
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


@pytest.mark.parametrize("times", [1, 4])
def test_images_of_one_generator_get_draws_of_their_own(sd, times):
    generator = torch.Generator().manual_seed(0)
    prompts = rewritten(sd, "rt", ["a picture"] * 4, generator=[generator] * 4 if times == 4 else generator)
    assert len(set(prompts)) == 4


def test_a_mitigation_draws_by_its_place_in_the_chain(sd):
    twice = rewritten(sd, "rt:num_words=1+rt:num_words=1", [""] * 20, range(20))
    assert sum(len(set(prompt.split())) == 2 for prompt in twice) > 15
    assert [p.split() for p in rewritten(sd, "rt:num_words=1", [""] * 20, range(20))] != [p.split()[:1] for p in twice]


# Order


def test_prompt_mitigations_act_in_their_order(sd):
    (first,) = rewritten(sd, "cwr+rt", [""], (1,))
    (second,) = rewritten(mitigate(mitigate(sd, "rt"), "cwr"), "none", [""], (1,))
    assert len(first.split()) == 4 and len(second.split()) == 8
    assert set(second.split()) <= set(rewritten(sd, "rt", [""], (1,))[0].split())


def test_embedding_mitigations_act_in_their_order(sd):
    class Add(Mitigation):
        name = "add"

        def before_step(self, step):
            if step.index == 0:
                step.embeddings.add_(1)

    class Double(Mitigation):
        name = "double"

        def before_step(self, step):
            if step.index == 0:
                step.embeddings.mul_(2)

    plain = denoiser_inputs(sd)[-1]["encoder_hidden_states"]
    for order in ((Add(), Double()), (Double(), Add())):
        chained = with_mitigation(with_mitigation(sd, order[0]), order[1])
        assert [mitigation.name for mitigation in chained.mitigations] == [each.name for each in order]
        wanted = (plain[2:] + 1) * 2 if isinstance(order[0], Add) else plain[2:] * 2 + 1
        changed = denoiser_inputs(chained)[-1]["encoder_hidden_states"]
        assert torch.equal(changed[:2], plain[:2]) and torch.equal(changed[2:], wanted)
    names = [mitigation.name for mitigation in apply_mitigations(sd, CHAIN).mitigations]
    assert names == ["cwr", "wen", "rt", "gni", "cfg", "memattn"]


# Names and options


def test_each_mitigation_has_a_name_defaults_and_a_description():
    assert list(MITIGATIONS) == ["rt", "rna", "cwr", "gni", "wen", "cfg", "memattn"]
    for name, kind in MITIGATIONS.items():
        assert kind.name == name and kind.__doc__.splitlines()[0].endswith(".") and kind() == kind()


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
        ("rt:num_words=-1", "mitigation rt: `num_words` -1: must be a whole number, at least 0"),
        ("rt:num_words=1.5", "must be a whole number"),
        ("gni:scale=nan", "mitigation gni: `scale` nan: must be a number"),
        ("gni:scale=-0.1", "must be at least 0"),
        ("wen:lr=fast", "mitigation wen: `lr` fast: must be a number"),
        ("cfg:transition=late", "must be a timestep or 'dynamic'"),
        ("memattn:mask=1", "must be true or false"),
    ],
)
def test_wrong_names_and_options_are_errors_that_say_what_would_do(sd, text, message):
    with pytest.raises(UsageError, match=message):
        apply_mitigations(sd, text)
