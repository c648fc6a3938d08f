"""A pipeline with mitigations: a subclass of a pipeline's class, with its components and a chain of mitigations."""

import functools
import inspect
from typing import Any

from ..errors import UsageError
from .base import Mitigation
from .call import Call
from .denoisers import denoiser_of


class MitigatedPipeline:
    """The common part of the classes that ``mitigated_class`` makes.

    Attributes:
        mitigations: in the order in which they were added.
        current_call: the running call.
    """

    mitigations: tuple[Mitigation, ...] = ()
    current_call: Call | None = None

    @property
    def guidance_scale(self) -> Any:
        scale = super().guidance_scale  # type: ignore[misc]  # the pipeline's: subclasses derive from one
        return self.current_call.guidance_scale(scale) if self.current_call else scale


@functools.cache
def mitigated_class(base: Any) -> type:
    """A subclass of the pipeline class ``base`` with the same name, so that ``from_pretrained`` can read what
    ``save_pretrained`` writes.
    """
    call_signature, encode_signature = inspect.signature(base.__call__), inspect.signature(base.encode_prompt)

    class Mitigated(MitigatedPipeline, base):
        @functools.wraps(base.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            arguments = call_signature.bind(self, *args, **kwargs).arguments
            with Call(self, arguments.get("generator")):
                return super().__call__(*args, **kwargs)

        @functools.wraps(base.encode_prompt)
        def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
            encode = super().encode_prompt
            if self.current_call is None:
                return encode(*args, **kwargs)
            arguments = encode_signature.bind(self, *args, **kwargs).arguments
            return self.current_call.encode(encode, {key: arguments[key] for key in arguments if key != "self"})

    Mitigated.__name__, Mitigated.__qualname__, Mitigated.__module__ = base.__name__, base.__qualname__, base.__module__
    return Mitigated


def with_mitigation(pipeline: Any, mitigation: Mitigation) -> Any:
    """A new pipeline that shares ``pipeline``'s components and adds ``mitigation`` to its chain.

    Raises:
        UsageError: a pipeline of a kind that cannot be mitigated, or not so.
    """
    denoiser = denoiser_of(pipeline)
    if mitigation.rescales and not denoiser.cross_attention:
        raise UsageError(
            f"mitigation {mitigation.name}: acts on cross-attention, but in a {type(pipeline).__name__} image and "
            "prompt attend to each other jointly; choose another mitigation, such as wen or cfg"
        )
    kind: Any = type(pipeline)
    if not isinstance(pipeline, MitigatedPipeline):
        kind = mitigated_class(kind)
    mitigated: Any = object.__new__(kind)
    mitigated.__dict__.update(pipeline.__dict__)
    mitigated.current_call = None
    mitigated.mitigations = (*getattr(pipeline, "mitigations", ()), mitigation)
    return mitigated
