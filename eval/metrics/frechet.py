"""Fréchet distance and kernel distance between two sets of features. With Inception's features they are FID and KID;
with any others, those of the same network fed in another way too, they are shown with the name of these features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import torch
from torchvision.transforms.v2 import functional as TF

from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.sscd import Descriptor
from ietagc_diffusers.sscd.files import file_hash
from ietagc_diffusers.sscd.preprocess import Preprocess

from ..features import Extractor
from ..protocol import Protocol
from .base import ImageSets, Kind, Measured, Metric, missing

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"  # the first digits, which are part of the file's name
INCEPTION_EDGE = 299
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
FID_DCR = Metric("fid_dcr", "FID (dcr)", frechet_distance, digits=2)
FRECHET = Metric("frechet_distance", "Fréchet distance", frechet_distance, detail="{frechet[features]}")
KERNEL = Metric("kernel_distance", "kernel distance", kernel_distance, digits=4, detail="{frechet[features]}")


def measured_distances(scores: dict) -> tuple[float | None, float | None]:
    """The Fréchet distance and the mean kernel distance in ``scores``, of whichever features they were measured on."""
    frechet = next((metric for metric in (FID, FID_DCR) if metric.value(scores) is not None), FRECHET)
    return frechet.number(scores), (KID if frechet is FID else KERNEL).number(scores)


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
    """The 2048 features of Inception v3 with the weights of 2015-12-05: with the network's own resizing those of FID.

    Args:
        network: uint8 (N, 3, H, W) -> float32 (N, 2048).
        record: of its weights and of what it is fed with.
        device: where it runs.
        name: of the features.
        transform: what is done to images before.
    """

    network: torch.nn.Module
    record: dict
    device: str = "cpu"
    name: str = "inception"
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def identity(self) -> dict:
        return {"inception": 2048} | self.record

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        images = images.to(self.device)
        return self.network(images if self.transform is None else self.transform(images)).cpu()


def _normalised_twice(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    """What the first layer is given in Somepalli et al.'s FID: pixels are brought to [-1, 1], and then x -> 2x - 1 is
    done to them, which their copy of pytorch-fid does to what it takes for values in [0, 1]. So they are in [-3, 1].

    Args:
        inputs: the network's own, (pixels - 128) / 128.
    """
    pixels = 128 * inputs[0] + 128
    return 4 * pixels / 255 - 3


def load_inception_dcr(weights: str | Path | None = None, device: str = "cpu") -> Inception:
    """The features of FID as Somepalli et al., and with their script the paper's authors, compute it: the small edge is
    resized to 299 with antialiasing, the centre cropped, and pixels are normalised twice. Arguments and errors: see
    ``load_inception``.
    """
    plain = load_inception(weights, device=device)
    plain.network.get_submodule("Conv2d_1a_3x3").register_forward_pre_hook(_normalised_twice)
    record = {"sha256": plain.record["sha256"], "preprocess": "dcr"}
    return Inception(
        plain.network, record, plain.device, "inception-dcr", Preprocess(INCEPTION_EDGE, INCEPTION_EDGE, None)
    )


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
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_SHA256)
        except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: the hash is not the file's
            raise UsageError(
                f"`fid` inception: {URL_INCEPTION_V3} cannot be reached or kept ({error}); get that file and use "
                f"`fid` inception:FILE or dcr:FILE, or put it into {path.parent}"
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

    metrics = (FID, KID, FID_DCR, FRECHET, KERNEL)
    uses_reference = True

    def __init__(self, protocol: Protocol, descriptor: Descriptor) -> None:
        super().__init__(protocol, descriptor)
        kind, _, path = protocol.fid.partition(":")
        self.features: Inception | PooledPixels | None = None
        if kind == "inception":
            self.features = load_inception(path or None, protocol.fid_antialias, protocol.device)
        elif kind == "dcr":
            self.features = load_inception_dcr(path or None, protocol.device)
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
        computed = _computed(self.features)
        others = [metric for metric in self.metrics if metric not in computed]
        why = f"measured on {self.features.name} features instead: see {computed[0].name} and {computed[1].name}"
        notes = []
        if fewest < SMALL:
            notes.append(
                f"Fréchet distance of {len(generated)} images to {len(reference)}: with fewer than {SMALL:,} it is too "
                "high; compare it only at equal numbers of images, or use the kernel distance, which has no such bias"
            )
        if sets.reference_name == "train":
            notes.append(
                "the Fréchet and kernel distances are measured to the training images, which rewards copying: a model "
                "that returns them is at distance 0. Set `reference` to held-out images"
            )
        scores = {key: value for metric in computed for key, value in metric.of(generated, reference).items()}
        return missing(others, why) | Measured(scores, protocol=about, notes=tuple(notes))


def _computed(features: Inception | PooledPixels) -> tuple[Metric, Metric]:
    """The Fréchet and kernel distance of these features: only FID's own features make them FID and KID."""
    by_name = {"inception": (FID, KID), "inception-dcr": (FID_DCR, KERNEL)}
    return by_name.get(features.name, (FRECHET, KERNEL))
