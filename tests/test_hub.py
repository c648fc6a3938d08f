"""The model card says what was done and found, and never a token; people may go on writing it."""

import json
import math

import pytest
from fake_hub import TOKEN
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image

from ietagc_diffusers import RunFolder, StableDiffusion, UsageError
from ietagc_diffusers import hub as cards
from ietagc_diffusers.arguments import parse_args
from ietagc_diffusers.files import without_places
from ietagc_diffusers.hub.sections import END, START, join, merge, split
from ietagc_diffusers.training.records import write_config


def test_the_card_tells_base_mitigation_and_outcome(tmp_path):
    argv = ["--pretrained_model_name_or_path=some/base", "--dataset_name=some/data", f"--output_dir={tmp_path}"]
    argv += ["--wen_threshold=2", "--embedding_noise=0.1", "--caption_mitigation=rt"]
    args = parse_args([*argv, "--hub_token=secret", "--validation_prompts", "a cat", "a dog", "--skip_threshold=0.7"])
    rows = [{"skip_rate": 0.25, "augment_rate": 0.5}]
    cards.write_card(args, "me/model", [Image.new("RGB", (8, 8))] * 2, rows)
    card = (tmp_path / "README.md").read_text()
    for word in (
        "base_model: some/base",
        "some/data",
        "`skip_threshold` | 0.7",
        "`wen_threshold` | 2.0",
        "`embedding_noise` | 0.1",
        "`caption_mitigation` | rt",
        "`caption_mitigation_probability` | 0.1",
        "25.0%",
        "a cat",
        "me/model",
        "ietagc",
    ):
        assert word in card
    assert "secret" not in card and (tmp_path / "val_imgs_grid.png").exists()


def test_a_card_without_images_or_rounds(tmp_path):
    args = parse_args(["--pretrained_model_name_or_path=b", "--train_data_dir=d", f"--output_dir={tmp_path}"])
    cards.write_card(args, "me/model", [], [])
    assert "an image folder" in (tmp_path / "README.md").read_text()


def test_the_card_of_an_adapter_says_how_it_is_put_onto_its_base(tmp_path):
    argv = ["--pretrained_model_name_or_path=some/base", "--dataset_name=some/data", f"--output_dir={tmp_path}"]
    cards.write_card(parse_args([*argv, "--lora_rank=8"]), "me/model", [], [])
    card = (tmp_path / "README.md").read_text()
    assert 'from_pretrained("some/base"' in card and 'load_lora_weights("me/model")' in card
    assert "- lora\n" in card and "| LoRA rank, alpha | 8, 8.0 |" in card


def card_of(tmp_path, *more, rows=(), name="me/model"):
    """The card of a run with these flags, from the settings."""
    argv = ["--pretrained_model_name_or_path=some/base", "--dataset_name=some/data", f"--output_dir={tmp_path}"]
    tmp_path.mkdir(exist_ok=True)
    cards.write_card(parse_args([*argv, *more]), name, [], rows)
    return (tmp_path / "README.md").read_text()


def metadata_of(card):
    """A card's metadata as huggingface_hub reads them; its own checks of their form pass."""
    metadata = ModelCard(card, ignore_metadata_errors=False).data.to_dict()
    assert ModelCardData(**metadata).to_dict() == metadata
    return metadata


def test_a_card_loads_in_the_current_spelling_and_has_no_blanks_to_fill(tmp_path):
    card = card_of(tmp_path, "--mitigation=iet-agc+")
    assert "dtype=torch.float16" in card and "torch_dtype" not in card and "TODO" not in card
    for word in ("averaged after each round (IET)", "a ratio under 0.8", "(TAA)", "25% of each shard"):
        assert word in card
    plain = card_of(tmp_path / "plain", "--mitigation=none")
    assert "(IET)" not in plain and "(AGC)" not in plain


def base_with(tmp_path, card):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text(card)
    return f"--pretrained_model_name_or_path={base}"


@pytest.mark.parametrize(
    ("card", "wanted"),
    [
        ("---\nlicense: mit\n---\n# base\n", {"license": "mit"}),
        (
            "---\nlicense: other\nlicense_name: odd\nlicense_link: LICENSE.md\n---\n",
            {"license": "other", "license_name": "odd"},  # the link is to a file of the base
        ),
        (
            "---\nlicense: other\nlicense_link: https://a.b/c\n---\n",
            {"license": "other", "license_link": "https://a.b/c"},
        ),
        ("# no metadata\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\nlicense_name: odd\n---\n", {}),
    ],
)
def test_the_licence_is_the_base_s_own_and_a_path_is_no_base_model(tmp_path, card, wanted):
    metadata = metadata_of(card_of(tmp_path / "out", base_with(tmp_path, card)))
    assert {key: value for key, value in metadata.items() if key.startswith("license")} == wanted
    assert "base_model" not in metadata
    text = (tmp_path / "out" / "README.md").read_text()
    assert ("is not known here, so none is stated" in text) == (not wanted) and str(tmp_path) not in text


def test_the_licence_of_a_base_on_the_hub_comes_from_its_card(hub, tmp_path):
    hub.repositories["some/base"] = {"main": {"README.md": b"---\nlicense: other\nlicense_link: ./LICENSE.md\n---\n"}}
    metadata = metadata_of(card_of(tmp_path, f"--hub_token={TOKEN}"))
    assert metadata["base_model"] == "some/base" and metadata["datasets"] == ["some/data"]
    assert metadata["license_link"] == "https://huggingface.co/some/base/blob/main/LICENSE.md"


def test_a_second_card_changes_its_section_and_leaves_what_people_wrote(tmp_path):
    first = card_of(tmp_path, "--mitigation=none")
    before, _, after = first.partition(START)
    mine = (
        before.replace("# me/model", "# My model\n\nMine. <!-- a note -->")
        + START
        + after.replace(END, f"{END}\n\n## Mine\n\nToo.")
    )
    mine = mine.replace("some/base\n", "another/base\n", 1)
    mine = mine.replace("tags:\n", "language: de\nlicense: mit\ntags:\n- cats\n")
    (tmp_path / "README.md").write_text(mine)
    second = card_of(tmp_path, "--mitigation=iet", rows=[{"skip_rate": 0.25, "augment_rate": 0}])
    assert "25.0%" in second and "`mitigation` | iet |" in second and "`mitigation` | none |" not in second
    assert "# My model\n\nMine. <!-- a note -->" in second and second.endswith("## Mine\n\nToo.\n")
    assert second.partition("---\n\n")[0] == mine.partition("---\n\n")[0]  # the metadata to the letter
    assert card_of(tmp_path, "--mitigation=iet", rows=[{"skip_rate": 0.25, "augment_rate": 0}]) == second


@pytest.mark.parametrize(
    "there", ["", "# Theirs\n", "---\n# a comment\nlicense: mit\n---\r\n# Theirs\r\n", "---\n[\n---\nx\n"]
)
def test_a_card_without_the_section_gets_it_at_its_end(tmp_path, there):
    new = card_of(tmp_path)
    merged = merge(there, new, "the card")
    assert merged.count(START) == merged.count(END) == 1 and merged.rstrip().endswith(END)
    assert split(there)[2].strip() in merged
    if "license" in there:
        assert metadata_of(merged)["license"] == "mit"
    assert merge(merged, new, "the card") == merged


def test_a_section_without_its_end_is_left_alone(tmp_path):
    new = card_of(tmp_path)
    with pytest.raises(UsageError, match=r"the card: has the line .* without"):
        merge(f"# Mine\n{START}\nwhose is this?", new, "the card")


def test_what_another_program_wrote_into_the_card_is_taken_along(tmp_path):
    audited = "<!-- memorization audit -->\n## Passed\n<!-- end of memorization audit -->"
    new = card_of(tmp_path) + audited
    there = f"# Theirs\n{audited.replace('Passed', 'Failed')}\nmore\n"
    assert "## Passed" in merge(there, new, "c") and "## Failed" not in merge(there, new, "c")


SCORES = {
    "copy_rate": 0.012, "copy_rate_ci95": [0.004, 0.03], "sim_score": 0.41, "sim_score_ci95": [0.38, 0.44],
    "excess_copy_rate": None, "heldout_copy_rate": math.nan, "patch_copy_rate": "none", "num_train": 500,
    "generated": "/home/someone/images", "train": "/home/someone/pictures", "skipped": {"train": ["cat.png"]},
    "protocol": {"name": "sscd", "descriptor": "/home/someone/own.onnx", "copy_similarity": 0.5, "neighbours": "exact"},
    "drawing": {"num_images": 256, "num_prompts": 250, "num_inference_steps": 50, "dtype": "float32", "lora": []},
}  # fmt: skip
VERDICT = {"verdict": "failed", "limits": {"copy_rate": 0.01, "sim_score": None}, "sentence": "/home/someone | <b>"}


def audited(tmp_path, scores=SCORES, verdict=VERDICT, **changes):
    """A run with a trained UNet and an audit of it in a folder of its own."""
    run = RunFolder(tmp_path)
    (run.path / "unet").mkdir(exist_ok=True)
    (run.path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    (run.path / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DConditionModel"]}))
    (run.path / "audit").mkdir(exist_ok=True)
    scores = {"weights_hash": run.weights_hash()} | scores | changes
    (run.path / "audit" / "scores.json").write_text(json.dumps(scores))
    (run.path / "audit" / "verdict.json").write_text(json.dumps(verdict))
    return run


def test_what_an_audit_found_is_on_the_card_with_intervals_and_protocol(tmp_path):
    audited(tmp_path)
    card = card_of(tmp_path)
    for line in (
        "Verdict: **failed** (copy rate at most 1.0%).",
        "| copy rate | 1.2% | 0.4% to 3.0% |",
        "| Sim Score (95th percentile of similarity) | 0.410 | 0.380 to 0.440 |",
    ):
        assert line in card
    assert "descriptor own.onnx" in card and "training images 500" in card
    assert "someone" not in card and "cat.png" not in card and "nan" not in card
    (model,) = metadata_of(card)["model-index"]
    (result,) = model["results"]
    assert model["name"] == "model" and result["task"]["type"] == "text-to-image"
    assert result["dataset"] == {"name": "some/data", "type": "some/data"}
    copy_rate = next(metric for metric in result["metrics"] if metric["type"] == "copy_rate")
    assert copy_rate["value"] == 0.012 and copy_rate["args"]["ci95"] == [0.004, 0.03]
    assert copy_rate["args"]["descriptor"] == "own.onnx" and copy_rate["args"]["verdict"] == "failed"


def test_a_later_audit_takes_the_place_of_the_earlier_and_other_people_s_results_stay(tmp_path):
    audited(tmp_path)
    first = card_of(tmp_path)
    metadata, _, text = split(first)
    theirs = {"task": {"type": "text-to-image"}, "dataset": {"name": "d", "type": "d"},
              "metrics": [{"type": "fid", "value": 9.0}]}  # fmt: skip
    metadata["model-index"][0]["results"].insert(0, theirs)
    (tmp_path / "README.md").write_text(join(metadata, text))
    audited(tmp_path, copy_rate=0.5)
    (model,) = metadata_of(card_of(tmp_path))["model-index"]
    assert model["results"][0] == theirs and len(model["results"]) == 2
    assert model["results"][1]["metrics"][0]["value"] == 0.5
    (tmp_path / "audit" / "verdict.json").unlink()
    (model,) = metadata_of(card_of(tmp_path))["model-index"]
    assert model["results"] == [theirs]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"weights_hash": "0" * 16}, "is not of the weights that are here now"),
        ({"weights_hash": None}, "is not of the weights that are here now"),
        ({"drawing": {"mitigation": "gni"}}, "drawn with mitigation"),
        ({"drawing": {"lora": ["other"]}}, "drawn with lora"),
    ],
)
def test_an_audit_of_something_else_says_nothing_of_the_model(tmp_path, caplog, changes, why):
    audited(tmp_path, **changes)
    assert "audit" not in card_of(tmp_path) and why in caplog.text


@pytest.mark.parametrize("broken", ["[]", "{", "null", '{"verdict": "great"}'])
def test_a_broken_verdict_costs_only_the_audit(tmp_path, broken):
    run = audited(tmp_path)
    (run.path / "audit" / "verdict.json").write_text(broken)
    assert "Memorization audit" not in card_of(tmp_path)


def test_the_card_of_a_run_s_records_is_that_of_its_settings(tmp_path):
    rows = [{"round": 1, "skip_rate": 0.25, "augment_rate": 0.5}]
    run = audited(tmp_path)
    argv = ["--pretrained_model_name_or_path=some/base", "--dataset_name=some/data", f"--output_dir={tmp_path}"]
    settings = parse_args([*argv, "--validation_prompts", "a cat", "--prior_dir=p", "--learning_rate=3e-5", "--seed=0"])
    run.records.mkdir()
    write_config(settings, run)
    run.rounds_file.write_text(json.dumps(rows[0]) + "\n")
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (run.path / "model_index.json").write_text(json.dumps(index))
    cards.write_card(settings, "me/model", [Image.new("RGB", (8, 8))], rows, StableDiffusion.tags)
    of_settings = run.card_file.read_text()
    assert "3e-05" in of_settings and "| seed | 0 |" in of_settings and "Prompts: “a cat”" in of_settings
    for _ in range(2):  # with a card and without one
        cards.write_card_of_records(run, "me/model")
        assert run.card_file.read_text() == of_settings
        run.card_file.unlink()


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("/home/me/pictures", "pictures"), ("/home/me/pictures/", "pictures"), ("~/pictures", "pictures"),
        ("C:\\Users\\me\\pictures", "pictures"), ("\\\\host\\share", "share"), ("file:///home/me/x", "x"),
        ("me/model", "me/model"), ("a cat / a dog", "a cat / a dog"), ("", ""), ("x" * 5000, "x" * 5000),
        (["/a/b", {"c": "/d/e", "f_dir": "g/h"}], ["b", {"c": "e", "f_dir": "h"}]), (None, None), (3, 3),
    ],
)  # fmt: skip
def test_places_are_told_by_their_last_part(value, wanted):
    assert without_places(value) == wanted
