"""What the tests of mitigated pipelines share."""

import copy

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

from ietagc_diffusers import testing
from ietagc_diffusers.mitigations import apply_mitigations
from ietagc_diffusers.mitigations.base import Mitigation, PromptMitigation
from ietagc_diffusers.mitigations.denoisers import denoiser_of
from ietagc_diffusers.mitigations.pipeline import with_mitigation

PROMPTS = ["a red picture", "a blue picture of a long red picture"]
AT_ZERO = ["rt:num_words=0", "rna:num_words=0", "cwr:num_words=0", "gni:scale=0", "wen:steps=0", "cfg:transition=1000",
           "memattn:scale=1,mask=false"]  # fmt: skip
ACTING = ["rt", "rna", "cwr", "gni", "wen:target_loss=0", "cfg", "cfg:transition=dynamic",
          "cfg:transition=650,initial_scale=-2", "memattn", "memattn:mask=false,scale=5"]  # fmt: skip
CHAIN = "cwr+wen:target_loss=0,steps=2+rt+gni+cfg+memattn"
KINDS = {"sd": testing.random_pipeline, "xl": testing.random_xl_pipeline, "sd3": testing.random_sd3_pipeline}
EXTRA = {StableDiffusionPipeline: {"requires_safety_checker": False}}


def make(kind):
    pipeline = KINDS[kind](PROMPTS)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def is_sd3(pipeline):
    return isinstance(pipeline, StableDiffusion3Pipeline)


def suited(pipeline, text):
    """The chain ``text`` without what acts on cross-attention, where there is none."""
    kept = [part for part in text.split("+") if not (is_sd3(pipeline) and part.startswith("memattn"))]
    if not kept:
        pytest.skip("no cross-attention")
    return "+".join(kept)


def denoiser(pipeline):
    return pipeline.transformer if is_sd3(pipeline) else pipeline.unet


def encode(pipeline, prompts):
    """Prompt embeddings and negative ones; pooled and pooled negative ones too, if the pipeline has them."""
    more = {"prompt_2": None, "prompt_3": None} if is_sd3(pipeline) else {}
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    return [part.detach() for part in pipeline.encode_prompt(prompts, **more, **options) if part is not None]


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def generate(pipeline, prompts=PROMPTS, seeds=(1, 2), **options):
    """Images (N, 3, H, W) in [0, 1], each from its own seed."""
    options = {"num_inference_steps": 4, "output_type": "pt", "guidance_scale": 5.0, **options}
    options.setdefault("generator", generators(*seeds))
    return pipeline(prompts, **options).images


def models(pipeline):
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def sibling(pipeline, **parts):
    """A pipeline of the same class and components but for ``parts``."""
    other = type(pipeline)(**{**pipeline.components, **parts}, **EXTRA.get(type(pipeline), {}))
    other.set_progress_bar_config(disable=True)
    return other


def same(a, b):
    """The same 8-bit images, but for one grey level: sums over another batch size are rounded otherwise."""
    return (a * 255).round().sub((b * 255).round()).abs().max() <= 1


def denoiser_inputs(pipeline, *args, **options):
    """The arguments of the denoiser's calls by the pipeline itself, in order: "sample" is the noisy latents, "pooled"
    the pooled embedding or None.
    """
    seen = []

    class Spy(Mitigation):
        name = "spy"

        def before_step(self, step):
            pooled = denoiser_of(pipeline).pooled_of(step.inputs)
            seen.append(copy.deepcopy({**step.inputs, "sample": step.sample, "pooled": pooled}))

    generate(with_mitigation(pipeline, Spy()), *args, **options)
    return seen


def is_clean(pipeline):
    return not any(part._forward_hooks or part._forward_pre_hooks for part in denoiser(pipeline).modules())


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
