"""A pipeline with mitigations: the given one's components, its class's subclass, and a chain of mitigations."""

import functools
import inspect

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from ..errors import UsageError
from .call import Call


class MitigatedPipeline:
    """What the classes made by ``mitigated_class`` have in common.

    mitigations: tuple of ``Mitigation``, in the order in which they were added. current_call: the running ``Call``.
    """

    mitigations = ()
    current_call = None

    @property
    def guidance_scale(self):
        scale = super().guidance_scale
        return self.current_call.guidance_scale(scale) if self.current_call else scale


@functools.cache
def mitigated_class(base):
    """A subclass of the pipeline class ``base`` that carries its name, so that ``save_pretrained`` writes what
    ``from_pretrained`` can read.
    """
    call_signature, encode_signature = inspect.signature(base.__call__), inspect.signature(base.encode_prompt)

    class Mitigated(MitigatedPipeline, base):
        @functools.wraps(base.__call__)
        def __call__(self, *args, **kwargs):
            arguments = call_signature.bind(self, *args, **kwargs).arguments
            with Call(self, arguments.get("generator")):
                return super().__call__(*args, **kwargs)

        @functools.wraps(base.encode_prompt)
        def encode_prompt(self, *args, **kwargs):
            encode = super().encode_prompt
            if self.current_call is None:
                return encode(*args, **kwargs)
            arguments = encode_signature.bind(self, *args, **kwargs).arguments
            return self.current_call.encode(encode, {key: arguments[key] for key in arguments if key != "self"})

    Mitigated.__name__, Mitigated.__qualname__, Mitigated.__module__ = base.__name__, base.__qualname__, base.__module__
    return Mitigated


def with_mitigation(pipeline, mitigation):
    """A new pipeline that shares ``pipeline``'s components and adds ``mitigation`` to its chain."""
    if not isinstance(pipeline, (StableDiffusionPipeline, StableDiffusionXLPipeline)):
        raise UsageError(
            f"a {type(pipeline).__name__} cannot be mitigated: "
            "it must be a StableDiffusionPipeline or a StableDiffusionXLPipeline"
        )
    kind = type(pipeline) if isinstance(pipeline, MitigatedPipeline) else mitigated_class(type(pipeline))
    mitigated = object.__new__(kind)
    mitigated.__dict__.update(pipeline.__dict__)
    mitigated.current_call = None
    mitigated.mitigations = (*getattr(pipeline, "mitigations", ()), mitigation)
    return mitigated
