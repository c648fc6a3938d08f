"""Frechet distance and kernel distance between two sets of features. With Inception's they are FID and KID; with any
other they go by that extractor's name.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from ietagc_diffusers.sscd.descriptor import file_hash
from torchvision.transforms.v2 import functional as TF

from ietagc_diffusers.errors import UsageError

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"  # begins so: part of the file's name
SMALL = 2048


def frechet_distance(first, second):
    """||m1 - m2||^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of features (N, D) and (M, D), N, M >= 2, in float64.

    With C = A^T A for the centred features A / sqrt(N - 1), tr (C1 C2)^(1/2) is the sum of the singular values of
    A1 A2^T. No covariance is squared, so that fewer images than dimensions cost no precision: identical sets are at 0
    to 1e-12, where a root of C1 C2 gives 1e-4.
    """
    mean1, root1 = _mean_and_root(first)
    mean2, root2 = _mean_and_root(second)
    cross = torch.linalg.svdvals(root1 @ root2.T).sum()
    distance = (mean1 - mean2).pow(2).sum() + root1.pow(2).sum() + root2.pow(2).sum() - 2 * cross
    return max(distance.item(), 0.0)


def _mean_and_root(features):
    """The mean (D,) and a root of the covariance (min(N, D), D)."""
    features = features.double()
    mean = features.mean(dim=0)
    root = (features - mean) / (len(features) - 1) ** 0.5
    return mean, torch.linalg.qr(root, mode="r").R if len(root) > root.shape[1] else root


def kernel_distance(first, second, subsets=100, subset_size=None):
    """KID's unbiased squared MMD with the cubic polynomial kernel: [mean, standard deviation] over seeded subsets of
    1,000 images, or of half of the smaller set if that is fewer.

    Unlike the Frechet distance it is unbiased for few images.
    """
    from torch_fidelity.metric_kid import kid_features_to_metric

    smaller = min(len(first), len(second))
    size = subset_size or min(1000, max(2, smaller // 2))
    made = kid_features_to_metric(
        first.float(), second.float(), kid_subsets=subsets, kid_subset_size=size, verbose=False
    )
    return [made["kernel_inception_distance_mean"], made["kernel_inception_distance_std"]]


@dataclass(frozen=True)
class PooledPixels:
    """Coarse pixels as features, named ``pixel-8``: uint8 (N, 3, H, W) -> float32 (N, 3 * size * size) in [0, 1]."""

    size: int = 8

    @property
    def name(self):
        return f"pixel-{self.size}"

    @property
    def identity(self):
        return {"pooled_pixels": self.size}

    def __call__(self, images):
        return TF.resize(images.float() / 255, [self.size, self.size], antialias=True).flatten(1)


@dataclass(frozen=True)
class Inception:
    """FID's features: the 2048 of Inception v3 with the weights of 2015-12-05."""

    network: torch.nn.Module
    record: dict
    device: str = "cpu"
    name: str = field(default="inception")

    @property
    def identity(self):
        return {"inception": 2048} | self.record

    @torch.no_grad()
    def __call__(self, images):
        return self.network(images.to(self.device)).cpu()


def load_inception(weights=None, antialias=False, device="cpu"):
    """FID's extractor.

    Args:
        weights: its file; None looks for it in torch's hub cache and downloads it there.
        antialias: whether images are shrunk with antialiasing; False is FID's original TensorFlow resizing.

    Raises:
        UsageError: the file is not that one, or cannot be had.
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
                f"--fid inception: {URL_INCEPTION_V3} cannot be reached ({error}); get that file and give "
                f"--fid inception:FILE, or put it into {path.parent}"
            ) from error
    if not path.is_file():
        raise UsageError(f"--fid inception:{path}: no such file")
    sha256 = file_hash(path)
    if not sha256.startswith(INCEPTION_SHA256):
        raise UsageError(f"--fid inception:{path}: its SHA-256 is {sha256}; {INCEPTION_FILE} begins with 6726825d")
    torch.load(path, weights_only=True)  # the extractor unpickles freely; what passes here is harmless
    network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path), antialias=antialias).to(device)
    return Inception(network, {"sha256": sha256, "antialias": antialias}, str(device))
