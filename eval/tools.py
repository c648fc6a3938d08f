"""What a score is measured with: a protocol, and its models."""

import functools
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field

from ietagc_diffusers.sscd import Descriptor, load_descriptor

from .features import Extractor, Pixels, Size
from .metrics import KINDS, Kind
from .protocol import Protocol
from .views import Mirrored, Views, Whole


@dataclass
class Tools:
    """A protocol with its models loaded: the descriptor, and the kinds of metrics that use it.

    Raises:
        UsageError, DescriptorError: a model that is unknown or cannot be loaded, or a descriptor without a threshold.
    """

    protocol: Protocol
    descriptor: Descriptor = field(init=False)
    kinds: list[Kind] = field(init=False)
    views: Views | None = field(init=False)

    def __post_init__(self) -> None:
        self.descriptor = load_descriptor(self.protocol.descriptor, self.protocol.name, self.protocol.device)
        self.protocol.copy_threshold(self.descriptor)  # raises here, before anything is drawn or described
        self.kinds = [kind(self.protocol, self.descriptor) for kind in KINDS]
        self.views = self.protocol.resolved_views(self.descriptor)

    @property
    def protocol_name(self) -> str | None:
        """The name of the protocol; None with the descriptor ``pixel``, which has no protocols. The papers compare
        whole images only: with views the name says so.
        """
        name = self.descriptor.protocol
        return f"{name} with views" if name and self.views else name

    def extractors(self, pixels: Pixels) -> dict[str, Extractor]:
        """What is computed of every image of both sets."""
        always: dict[str, Extractor] = {"pixels": pixels, "size": Size()}
        return always | _merged(kind.extractors for kind in self.kinds)

    def training_extractors(self, pixels: Pixels) -> dict[str, Extractor]:
        """What is computed of training images only."""
        if self.views is None:
            return {"views": Whole(self.descriptor)}
        views = self.views.of_training(self.descriptor)
        return views if self.protocol.l2 == "paper" else views | {"pixel_views": self.views.crops_of_pixels(pixels)}

    @property
    def generated_extractors(self) -> dict[str, Extractor]:
        """What is computed of generated images only."""
        own = _merged(kind.generated_extractors for kind in self.kinds)
        if self.views is not None and self.views.mirrored:
            several = _merged(kind.extractors for kind in self.kinds if kind.mirrors)
            own |= {f"{name}_mirrored": Mirrored(one) for name, one in several.items()}
        return own | self.queries

    @property
    def queries(self) -> dict[str, Extractor]:
        """What is computed of images that are compared with the views of training images."""
        return {"views": Whole(self.descriptor)} if self.views is None else self.views.of_others(self.descriptor)

    @property
    def reference_extractors(self) -> dict[str, Extractor]:
        """What is computed of the images that the Fréchet distance is measured to."""
        return _merged(kind.extractors for kind in self.kinds if kind.uses_reference)


def _merged(dicts: Iterable[dict[str, Extractor]]) -> dict[str, Extractor]:
    return functools.reduce(operator.or_, dicts, {})
