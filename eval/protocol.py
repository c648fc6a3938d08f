"""The protocol of a score: what is measured, and with what. Numbers are comparable only under the same protocol."""

from dataclasses import dataclass
from importlib.util import find_spec

from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.sscd import Descriptor
from ietagc_diffusers.sscd.descriptor import PROTOCOLS, protocol_of

from .image_sets import MIN_EDGE
from .neighbours import GIB
from .views import Views

CHOICES = {
    "l2": ("iet-agc", "paper"),
    "clip_preprocess": (None, "own", "dcr"),
    "views": (None, "training", "image"),
    "index": ("exact", "faiss"),
}


@dataclass(frozen=True)
class Protocol:
    """What is measured, and with what.

    Args:
        name: see ``sscd.load_descriptor``.
        descriptor: see ``sscd.load_descriptor``.
        copy_similarity: an image whose similarity is higher counts as a copy; None: the descriptor's own threshold,
            which a file that is not one of the published checkpoints does not have.
        l2: ``iet-agc`` or ``paper``: the l2 ratio of MQ. Gu et al.'s ratio is always measured too.
        pixels: side of the images whose l2 distances are measured; None: the small edge that most generated images
            have, at most 64.
        clip: open_clip's ``MODEL:TAG`` or ``MODEL:FILE``; None: no CLIP score.
        clip_preprocess: ``own`` or ``dcr``; None: ``dcr`` under protocol ``dcr``, else ``own``.
        fid: features of the Fréchet distance: ``inception`` or ``inception:FILE``, which make it FID; ``dcr`` or
            ``dcr:FILE``, the same network fed as by Somepalli et al. and the paper's authors; ``pixel-8``; or ``none``.
        fid_antialias: whether Inception's images are shrunk with antialiasing.
        patches: whether crops are compared too.
        views: ``training``: images are compared with all that training may have shown of an image, see ``eval.views``;
            ``image``: only with the image, as the protocols of the papers do; None: ``image`` with a descriptor that
            has a protocol of a paper, ``training`` with any other.
        center_crop, random_flip: what the training did; None: not known, so it may have shown all.
        distinct: whether exact duplicates among the training images count once, so that a copy of a duplicated image
            has a second neighbour to be compared with.
        index: search for neighbours, see ``eval.neighbours``.
        device: where networks and searches run.
        batch_size: images that are described at a time.
        max_memory: bytes of working memory of a search.

    Raises:
        UsageError: a value that is not one of those above.
    """

    name: str | None = None
    descriptor: str = "auto"
    copy_similarity: float | None = None
    l2: str = "iet-agc"
    pixels: int | None = None
    clip: str | None = None
    clip_preprocess: str | None = None
    fid: str = "pixel-8"
    fid_antialias: bool = False
    patches: bool = False
    views: str | None = None
    center_crop: bool | None = None
    random_flip: bool | None = None
    distinct: bool = False
    index: str = "exact"
    device: str = "cpu"
    batch_size: int = 32
    max_memory: int = 2 * GIB

    def __post_init__(self) -> None:
        if self.pixels is not None and self.pixels < MIN_EDGE:
            raise UsageError(f"`pixels` {self.pixels}: must be at least {MIN_EDGE}: a single pixel shows nothing")
        if self.fid.partition(":")[0] not in ("inception", "dcr", "pixel-8", "none"):
            raise UsageError(f"`fid` {self.fid}: must be inception, inception:FILE, dcr, dcr:FILE, pixel-8 or none")
        if self.fid.startswith("dcr") and self.fid_antialias:
            raise UsageError("`fid_antialias`: `fid` dcr has a resizing of its own, which is always antialiased")
        for setting, choices in CHOICES.items():
            value = getattr(self, setting)
            if value not in choices:
                raise UsageError(f"`{setting}` {value}: must be {' or '.join(filter(None, choices))}")
        if self.index == "faiss" and find_spec("faiss") is None:
            raise UsageError("`index` faiss: is not installed; pip install faiss-cpu")

    @property
    def resolved_name(self) -> str:
        """The name, or what the descriptor makes of None."""
        return self.name or protocol_of(self.descriptor)

    def resolved_views(self, descriptor: Descriptor) -> Views | None:
        """What training may have shown of an image; None if only whole images are compared."""
        of_a_paper = self.name is not None or descriptor.protocol in PROTOCOLS
        views = self.views or ("image" if of_a_paper else "training")
        return Views.of(self.center_crop, self.random_flip) if views == "training" else None

    def copy_threshold(self, descriptor: Descriptor) -> float:
        """The similarity above which an image counts as a copy. Raises ``UsageError`` if nobody has given one."""
        return descriptor.threshold(self.copy_similarity)

    @property
    def search_options(self) -> dict:
        """For ``nearest_l2`` and ``most_similar``."""
        return {"device": self.device, "index": self.index, "max_memory": self.max_memory}

    @property
    def exact_search(self) -> dict:
        """The same for a search that misses nothing."""
        return self.search_options | {"index": "exact"}
