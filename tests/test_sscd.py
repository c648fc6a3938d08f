"""Descriptors are unit vectors of named networks and preprocessings, and a wrong file is told from a right one."""

import os
import socket
from http.client import IncompleteRead
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from ietagc_diffusers.sscd import PREPROCESS, DescriptorError, descriptor, files, load_descriptor, pixel_descriptor


class Network(torch.nn.Module):
    """A stand-in for SSCD's: any size of image to a vector."""

    def __init__(self, dimensions=512, scale=3.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(scale * torch.randn(12, dimensions, generator=generator))

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images, (2, 2)).flatten(1) @ self.weight


@pytest.fixture
def checkpoint(tmp_path):
    def write(name="sscd_disc_mixup", **options):
        path = tmp_path / f"{name}.torchscript.pt"
        torch.jit.script(Network(**options)).save(str(path))
        return path

    return write


@pytest.fixture
def images():
    return torch.randint(0, 256, (3, 3, 300, 400), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PREPROCESS)
def test_preprocessing_is_torchvision_s_on_pil_images(name, images):
    resize = {"dcr": 256, "sscd-288": 288, "sscd-320": (320, 320)}[name]
    mean = [0.5] * 3 if name == "dcr" else [0.485, 0.456, 0.406]
    std = [0.5] * 3 if name == "dcr" else [0.229, 0.224, 0.225]
    steps = [transforms.Resize(resize), *([transforms.CenterCrop(224)] if name == "dcr" else [])]
    wanted = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(mean, std)])
    by_hand = torch.stack([wanted(Image.fromarray(x.permute(1, 2, 0).numpy())) for x in images])
    made = PREPROCESS[name](images)
    assert made.shape == by_hand.shape
    levels = (made - by_hand).abs() * torch.tensor(std)[:, None, None] * 255
    assert levels.max() < 2.1 and levels.mean() < 0.25  # PIL rounds between its two passes, older torch otherwise


def test_descriptors_are_the_network_s_output_of_unit_length(checkpoint, images):
    path = checkpoint()
    made = load_descriptor(str(path), "sscd-320")(images)
    with torch.no_grad():
        plain = torch.jit.load(str(path))(PREPROCESS["sscd-320"](images))
    torch.testing.assert_close(made, plain / plain.norm(dim=1, keepdim=True))
    assert made.dtype == torch.float32 and made.shape == (3, 512)


def test_a_protocol_names_checkpoint_and_preprocessing(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setenv("SSCD_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    checkpoint("sscd_disc_mixup")
    checkpoint("sscd_disc_large", dimensions=1024)
    assert load_descriptor("auto").identity["descriptor"] == "sscd_disc_large"
    assert load_descriptor("auto").identity["preprocess"] == "dcr"
    assert load_descriptor("auto", "sscd").identity["preprocess"] == "sscd-288"
    assert load_descriptor("auto", "sscd").name == "sscd_disc_mixup"


def test_auto_is_pixel_where_no_file_is_and_downloads_nothing(monkeypatch, tmp_path):
    monkeypatch.delenv("SSCD_HOME", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: pytest.fail("downloads"))
    assert load_descriptor("auto").name == "pixel"


def test_without_network_the_error_says_which_file_and_where(monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise OSError("no route")

    monkeypatch.delenv("SSCD_HOME", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(DescriptorError, match=r"sscd_disc_large\.torchscript\.pt.*SSCD_HOME"):
        load_descriptor("sscd_disc_large")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("no route"), "no route"),
        (TimeoutError("timed out"), "timed out"),
        (IncompleteRead(b""), "IncompleteRead"),
        (RuntimeError("invalid hash value"), "invalid hash"),
    ],
)
def test_a_download_that_fails_is_one_line_with_what_to_do(monkeypatch, tmp_path, error, message):
    def fails(*_, **__):
        assert socket.getdefaulttimeout()  # or a firewall makes it wait for ever
        raise error

    monkeypatch.setenv("SSCD_HOME", str(tmp_path / "mine"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fails)
    with pytest.raises(DescriptorError, match=message) as caught:
        load_descriptor("sscd_disc_mixup")
    text = str(caught.value)
    assert f"not in {tmp_path / 'mine'} (SSCD_HOME)" in text and f"put the file into {tmp_path}" in text
    assert "\n" not in text and socket.getdefaulttimeout() is None


def test_a_cache_that_cannot_be_written_is_told(monkeypatch, tmp_path):
    monkeypatch.delenv("SSCD_HOME", raising=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "file"))
    with pytest.raises(DescriptorError, match=r"checkpoints cannot be made .*SSCD_HOME"):
        load_descriptor("sscd_disc_mixup")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: pytest.fail("downloads"))
    with pytest.raises(DescriptorError, match=r"checkpoints cannot be written; download .*SSCD_HOME"):
        load_descriptor("sscd_disc_mixup")


def test_a_hash_that_cannot_be_kept_does_no_harm(checkpoint, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setenv("SSCD_HOME", str(tmp_path))
    path = checkpoint()
    monkeypatch.setattr(Path, "write_text", full)
    assert load_descriptor("sscd_disc_mixup").name == "sscd_disc_mixup"
    assert not path.with_name(path.name + ".sha256").exists()


def test_a_file_that_changed_is_refused(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setenv("SSCD_HOME", str(tmp_path))
    path = checkpoint()
    first = load_descriptor("sscd_disc_mixup")
    assert path.with_name(path.name + ".sha256").read_text().startswith(first.identity["sha256"])
    assert load_descriptor("sscd_disc_mixup").identity == first.identity
    checkpoint(scale=2.0)
    with pytest.raises(DescriptorError, match="the file changed"):
        load_descriptor("sscd_disc_mixup")


def test_a_download_that_does_not_load_is_removed_and_never_recorded(checkpoint, monkeypatch, tmp_path):
    monkeypatch.delenv("SSCD_HOME", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    good = checkpoint().read_bytes()
    downloads = [b"<html>Forbidden</html>", good]
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda _, to, **__: Path(to).write_bytes(downloads.pop(0)))
    with pytest.raises(DescriptorError, match=r"not a TorchScript file.*the download was removed"):
        load_descriptor("sscd_disc_mixup")
    assert not list((tmp_path / "hub").rglob("sscd*"))
    assert load_descriptor("sscd_disc_mixup").name == "sscd_disc_mixup"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"not a network"), "not a TorchScript file"),
        (lambda path: torch.save({"weight": torch.zeros(3)}, path), "not a TorchScript file"),
        (lambda path: torch.jit.script(Network(dimensions=7)).save(str(path)), "is it the right file"),
        (lambda path: torch.jit.script(Network(scale=float("nan"))).save(str(path)), "is it the right file"),
        (lambda path: torch.jit.script(torch.nn.Conv2d(3, 4, 3)).save(str(path)), "is it the right file"),
        (lambda path: torch.jit.script(torch.nn.Linear(7, 3)).save(str(path)), "does not run on images"),
    ],
)
def test_wrong_files_are_named(make, message, tmp_path):
    path = tmp_path / "sscd_disc_mixup.torchscript.pt"
    make(path)
    with pytest.raises(DescriptorError, match=message):
        load_descriptor(str(path))


def test_unknown_names_are_told():
    with pytest.raises(DescriptorError, match="did you mean sscd_disc_mixup"):
        load_descriptor("sscd_disk_mixup")
    with pytest.raises(DescriptorError, match="`protocol` scd: unknown"):
        load_descriptor("pixel", "scd")


def test_pixel_descriptors_are_unit_vectors_that_know_a_brightened_copy():
    images = torch.randint(0, 200, (20, 3, 32, 32), dtype=torch.uint8)
    pixel = pixel_descriptor()
    descriptors, brighter = pixel(images), pixel(images + 40)
    torch.testing.assert_close(descriptors.norm(dim=1), torch.ones(20))
    assert torch.equal((brighter @ descriptors.T).argmax(1), torch.arange(20))


def test_one_colour_is_similar_to_nothing():
    assert not pixel_descriptor()(torch.full((1, 3, 9, 9), 77, dtype=torch.uint8)).any()


def test_the_published_dimensions_are_checked():
    assert descriptor.CHECKPOINTS == {"sscd_disc_mixup": 512, "sscd_disc_large": 1024}
    assert np.isclose(descriptor.SSCD_COPY, 0.5)
    assert files.INT8_SHA256.startswith("86386042")


def test_only_sscd_s_checkpoints_have_its_threshold_and_every_descriptor_its_dimensions(checkpoint):
    known, large, unknown = (
        load_descriptor(str(checkpoint(name, dimensions=dimensions)))
        for name, dimensions in (("sscd_disc_mixup", 512), ("sscd_disc_large", 1024), ("mine", 40))
    )
    assert (known.copy_similarity, known.dimensions, known.sscd, known.protocol) == (0.5, 512, True, "sscd")
    assert (large.copy_similarity, large.dimensions, large.protocol) == (0.5, 1024, "dcr")
    assert (unknown.copy_similarity, unknown.dimensions, unknown.sscd) == (None, 40, False)
    assert pixel_descriptor().dimensions == 768 and pixel_descriptor(4).dimensions == 48
    made = descriptor.Descriptor("mine", lambda x: x.float(), lambda x: x.mean(dim=(2, 3)), None)
    assert made.dimensions == 3
