"""MQ and Gu's ratio of two folders equal their definitions, computed one image at a time."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ietagc_diffusers.cli import main
from ietagc_diffusers.cli import mq as module
from ietagc_diffusers.eval.mq import _counted, table
from ietagc_diffusers.eval.score import Protocol, Tools, score

NUM_TRAINING, NUM_GENERATED, SIDE = 64, 40, 12
THRESHOLDS = ("0.4", "0.5", "0.6")


def save(folder, pictures):
    folder.mkdir()
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Training images, and mixtures of one of them with noise, from a copy to noise only; as folders and as arrays."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("mq")
    training = rng.integers(0, 256, (NUM_TRAINING, SIDE, SIDE, 3), dtype=np.uint8)
    shares = np.linspace(0, 1, NUM_GENERATED)[:, None, None, None]
    noise = rng.integers(0, 256, (NUM_GENERATED, SIDE, SIDE, 3))
    generated = ((1 - shares) * training[:NUM_GENERATED] + shares * noise).astype(np.uint8)
    return save(folder / "generated", generated), save(folder / "train", training), generated, training


def ratios(image, training):
    """The three ratios of one image, in float64, from the definitions."""
    x, y = image.astype(float).ravel() / 255, training.reshape(len(training), -1).astype(float) / 255
    distances = np.sqrt(((y - x) ** 2).sum(axis=1))
    near = np.argsort(distances, kind="stable")[:50]
    around = np.sqrt(((y[near] - y[near[0]]) ** 2).sum(axis=1))
    nearest, second = distances[near[:2]]
    return {
        "iet-agc": nearest**2 / (distances[near] ** 2).mean(),
        "paper": nearest / around.mean(),
        "gu": nearest / second,
    }


def found(sets, output, *more):
    flags = ["mq", "--generated", str(sets[0]), "--train", str(sets[1]), "--output", str(output / "mq.json")]
    assert main([*flags, "--feature_cache", "none", "--device", "cpu", *more]) == 0
    return json.loads((output / "mq.json").read_text())


def test_every_definition_counts_what_the_naive_one_counts(sets, tmp_path, capsys):
    result, each = found(sets, tmp_path, "--max_memory", "0.0001"), [ratios(image, sets[3]) for image in sets[2]]
    wanted = {
        protocol: {limit: sum(ratio[protocol] < float(limit) for ratio in each) for limit in THRESHOLDS}
        for protocol in ("iet-agc", "paper")
    } | {"gu": {"1/3": sum(ratio["gu"] < 1 / 3 for ratio in each)}}
    counts = {
        protocol: {limit: by_sign["<"]["count"] for limit, by_sign in limits.items()}
        for protocol, limits in result["protocols"].items()
    }
    assert counts == wanted and len({count for limits in counts.values() for count in limits.values()}) > 3
    strict = result["protocols"]["iet-agc"]["0.4"]["<"]
    assert strict["per_65536"] == pytest.approx(65536 * strict["count"] / NUM_GENERATED)
    assert strict["ci95"][0] < strict["share"] < strict["ci95"][1]
    said = capsys.readouterr().out
    assert f"| iet-agc | < 0.4 | {strict['count']} |" in said and "| ≤ 0.4 |" in said and "| gu | < 1/3 |" in said


def test_a_ratio_at_the_threshold_counts_in_the_one_that_is_not_strict():
    counted = _counted(torch.tensor([0.4, 0.5, 0.5, 0.7]), 0.5, np.arange(4))
    assert [counted[sign]["count"] for sign in ("<", "<=")] == [1, 3]


def test_it_agrees_with_the_scores_of_the_same_folders(sets, tmp_path):
    from ietagc_diffusers.eval.image_sets import load_images

    result = found(sets, tmp_path)["protocols"]
    images = [load_images(folder, "x") for folder in sets[:2]]
    for l2 in ("iet-agc", "paper"):
        scores = score(*images, tmp_path / l2, Tools(Protocol(descriptor="pixel", views="image", l2=l2, fid="none")))
        assert {limit: result[l2][limit]["<="]["share"] for limit in THRESHOLDS} == pytest.approx(
            scores["memorized_quantity"]
        )
    assert result["gu"]["1/3"]["<"]["share"] == pytest.approx(scores["memorization_ratio"])
    assert result["gu"]["1/3"]["<"]["ci95"] == pytest.approx(scores["memorization_ratio_ci95"])


def test_one_protocol_and_other_thresholds_and_what_cannot_be_used(sets, tmp_path, capsys):
    train = save(tmp_path / "few", np.concatenate([sets[3][:5], sets[3][:1]]))
    (train / "broken.png").write_bytes(b"no picture")
    result = found((sets[0], train), tmp_path, "--protocol", "paper", "--thresholds", "0.25")
    assert {name: list(limits) for name, limits in result["protocols"].items()} == {"paper": ["0.25"]}
    assert result["num_train"] == 6 and result["neighbours"] == 6 and result["skipped"]["train"][0][0] == "broken.png"
    said = capsys.readouterr().out
    assert "exact duplicates among the training images: 1." in said and "with --distinct each" in said
    assert "only 6 training images" in said and "1 train files were left out, such as broken.png" in said
    result = found((sets[0], train), tmp_path, "--distinct")
    assert result["num_train"] == 5 and "duplicates" not in table(result)


def test_what_was_found_is_said_and_kept_in_a_new_folder_too(sets, tmp_path, capsys, monkeypatch):
    few = sets[0], save(tmp_path / "few", sets[3][:5])
    assert found(few, tmp_path / "of" / "today", "--protocol", "gu")["num_train"] == 5
    capsys.readouterr()
    monkeypatch.setattr(module, "write_json", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="full"):
        found(few, tmp_path, "--protocol", "gu")
    assert "| gu | " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--thresholds", "0.4", "0"], "--thresholds 0.0: must be more than 0"),
        (["--pixels", "1"], "--pixels 1: must be from 2"),
        (["--output", "{train}/mq.json"], "--output {train}/mq.json: what is written there would get into --train"),
        (["--output", "{train}"], "--output {train}: is a folder"),
        (["--train", "{one}"], "--train {one}: l2 ratios need two training images"),
        (["--generated", "{train}/nothing"], "--generated {train}/nothing: "),
    ],
)
def test_wrong_use_names_the_flag(sets, tmp_path, capsys, flags, message):
    places = {"train": sets[1], "one": save(tmp_path / "one", sets[3][:1])}
    given = ["--generated", str(sets[0]), "--train", str(sets[1]), "--output", str(tmp_path / "mq.json")]
    flags = [*given, "--feature_cache", "none", *(flag.format(**places) for flag in flags)]
    assert main(["mq", *flags, "--device", "cpu"]) == 2
    assert message.format(**places) in capsys.readouterr().err
