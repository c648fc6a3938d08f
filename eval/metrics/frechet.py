"""Fréchet distance and kernel distance between two sets of features. With Inception's features they are FID and KID;
with any others they are shown with the name of these features.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torchvision.transforms.v2 import functional as TF

from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.sscd import Descriptor
from ietagc_diffusers.sscd.descriptor import file_hash

from ..features import Extractor
from ..protocol import Protocol
from .base import ImageSets, Kind, Measured, Metric, missing

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"  # the first digits, which are part of the file's name
SMALL = 2048


def frechet_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """||m1 - m2||^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of features (N, D) and (M, D), N, M >= 2, in float64.

    With C = A^T A for the centred features A / sqrt(N - 1), tr (C1 C2)^(1/2) is the sum of the singular values of
    A1 A2^T. No covariance is squared, so no precision is lost with fewer images than dimensions: the distance of
    identical sets is 0 to 1e-12, where a root of C1 C2 gives 1e-4.
    """
    mean1, root1 = _mean_and_root(first)
    mean2, root2 = _mean_and_root(second)
    cross = torch.linalg.svdvals(root1 @ root2.T).sum()
    distance = (mean1 - mean2).pow(2).sum() + root1.pow(2).sum() + root2.pow(2).sum() - 2 * cross
    return max(distance.item(), 0.0)


def _mean_and_root(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean (D,) and a root of the covariance (min(N, D), D)."""
    features = features.double()
    mean = features.mean(dim=0)
    root = (features - mean) / (len(features) - 1) ** 0.5
    return mean, torch.linalg.qr(root, mode="r").R if len(root) > root.shape[1] else root


def kernel_distance(
    first: torch.Tensor, second: torch.Tensor, subsets: int = 100, subset_size: int | None = None
) -> list[float]:
    """KID's unbiased squared MMD with the cubic polynomial kernel: [mean, standard deviation] over seeded subsets of
    1,000 images, or of half of the smaller set if that is fewer.

    Unlike the Fréchet distance it is unbiased for few images.
    """
    from torch_fidelity.metric_kid import kid_features_to_metric

    smaller = min(len(first), len(second))
    size = subset_size or min(1000, max(2, smaller // 2))
    distance = kid_features_to_metric(
        first.float(), second.float(), kid_subsets=subsets, kid_subset_size=size, verbose=False
    )
    return [distance["kernel_inception_distance_mean"], distance["kernel_inception_distance_std"]]


FID = Metric("fid", "FID", frechet_distance, digits=2)
KID = Metric("kid", "KID", kernel_distance, digits=4)
FRECHET = Metric("frechet_distance", "Fréchet distance", frechet_distance, detail="{frechet[features]}")
KERNEL = Metric("kernel_distance", "kernel distance", kernel_distance, digits=4, detail="{frechet[features]}")


def measured_distances(scores: dict) -> tuple[float | None, float | None]:
    """The Fréchet distance and the mean kernel distance in ``scores``, of whichever features they were measured on."""
    inception = FID.value(scores) is not None
    return (FID if inception else FRECHET).number(scores), (KID if inception else KERNEL).number(scores)


@dataclass(frozen=True)
class PooledPixels:
    """Coarse pixels as features, named ``pixel-8``: uint8 (N, 3, H, W) -> float32 (N, 3 * size * size) in [0, 1]."""

    size: int = 8

    @property
    def name(self) -> str:
        return f"pixel-{self.size}"

    @property
    def identity(self) -> dict:
        return {"pooled_pixels": self.size}

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return TF.resize(images.float() / 255, [self.size, self.size], antialias=True).flatten(1)


@dataclass(frozen=True)
class Inception:
    """FID's features: the 2048 of Inception v3 with the weights of 2015-12-05."""

    network: torch.nn.Module
    record: dict
    device: str = "cpu"
    name: str = field(default="inception")

    @property
    def identity(self) -> dict:
        return {"inception": 2048} | self.record

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images.to(self.device)).cpu()


def load_inception(weights: str | Path | None = None, antialias: bool = False, device: str = "cpu") -> Inception:
    """FID's extractor.

    Args:
        weights: its file; None: the one in torch's hub cache, which is downloaded if it is not there.
        antialias: whether images are shrunk with antialiasing; False is FID's original TensorFlow resizing.

    Raises:
        UsageError: the file is another one, does not exist, or cannot be downloaded.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torchmetrics.image.fid import NoTrainInceptionV3

    path = Path(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if weights is None and not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_SHA256)
        except (OSError, RuntimeError) as error:  # RuntimeError: the hash is not the file's
            raise UsageError(
                f"`fid` inception: {URL_INCEPTION_V3} cannot be reached ({error}); get that file and use "
                f"`fid` inception:FILE, or put it into {path.parent}"
            ) from error
    if not path.is_file():
        raise UsageError(f"`fid` inception:{path}: no such file")
    sha256 = file_hash(path)
    if not sha256.startswith(INCEPTION_SHA256):
        raise UsageError(
            f"`fid` inception:{path}: its SHA-256 is {sha256}; that of {INCEPTION_FILE} begins with 6726825d"
        )
    torch.load(path, weights_only=True)  # raises for a harmful pickle, which the extractor would run
    network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path), antialias=antialias).to(device)
    return Inception(network, {"sha256": sha256, "antialias": antialias}, str(device))


class Frechet(Kind):
    """Distances between the distributions of the generated images and of the reference."""

    metrics = (FID, KID, FRECHET, KERNEL)
    uses_reference = True

    def __init__(self, protocol: Protocol, descriptor: Descriptor) -> None:
        super().__init__(protocol, descriptor)
        kind, _, path = protocol.fid.partition(":")
        self.features: Inception | PooledPixels | None = None
        if kind == "inception":
            self.features = load_inception(path or None, protocol.fid_antialias, protocol.device)
        elif kind == "pixel-8":
            self.features = PooledPixels(8)

    @property
    def extractors(self) -> dict[str, Extractor]:
        return {} if self.features is None else {"features": self.features}

    def measure(self, sets: ImageSets) -> Measured:
        record = None if self.features is None else {"features": self.features.name, **self.features.identity}
        about = {"frechet": record, "frechet_reference": sets.reference_name}
        if self.features is None:
            return missing(self.metrics, "not asked for: `fid` is none", protocol=about)
        generated, reference = (x.features["features"] for x in (sets.generated, sets.reference))
        fewest = min(len(generated), len(reference))
        if fewest < 2:
            return missing(self.metrics, "needs two images on both sides", protocol=about)
        if isinstance(self.features, Inception):
            computed, others, why = (FID, KID), (FRECHET, KERNEL), "measured on Inception's features: see fid and kid"
        else:
            computed, others = (FRECHET, KERNEL), (FID, KID)
            why = f"measured on {self.features.name} features instead: see frechet_distance, or set `fid` to inception"
        small = (
            f"Fréchet distance of {len(generated)} images to {len(reference)}: with fewer than {SMALL:,} it is too "
            "high; compare it only at equal numbers of images, or use the kernel distance, which has no such bias",
        )
        scores = {key: value for metric in computed for key, value in metric.of(generated, reference).items()}
        return missing(others, why) | Measured(scores, protocol=about, notes=small if fewest < SMALL else ())
