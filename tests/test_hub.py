"""The model card says what was done, and never a token."""

from PIL import Image

from ietagc_diffusers import RunFolder, hub
from ietagc_diffusers.arguments import parse_args
from ietagc_diffusers.training.records import write_config


def test_the_card_tells_base_mitigation_and_outcome(tmp_path):
    argv = ["--pretrained_model_name_or_path=some/base", "--dataset_name=some/data", f"--output_dir={tmp_path}"]
    argv += ["--wen_threshold=2", "--embedding_noise=0.1", "--caption_mitigation=rt"]
    args = parse_args([*argv, "--hub_token=secret", "--validation_prompts", "a cat", "a dog", "--skip_threshold=0.7"])
    rows = [{"skip_rate": 0.25, "augment_rate": 0.5}]
    hub.write_card(args, "me/model", [Image.new("RGB", (8, 8))] * 2, rows)
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


def test_training_pictures_are_never_uploaded(tmp_path, monkeypatch):
    from fnmatch import fnmatch

    args = parse_args([f"--pretrained_model_name_or_path={tmp_path}", "--train_data_dir=d", f"--output_dir={tmp_path}"])
    asked, sent = {}, {}
    monkeypatch.setattr(hub, "upload_folder", lambda **options: asked.update(options))
    monkeypatch.setattr(hub, "upload_file", lambda **options: sent.update(options))
    run = RunFolder(tmp_path)
    run.records.mkdir()
    write_config(args, run)
    hub.upload(args, "me/model")
    assert str(tmp_path).encode() not in sent["path_or_fileobj"] and b"num_shards: 4" in sent["path_or_fileobj"]
    secret = (
        "ietagc/shards/shard-0/data.arrow",
        "ietagc/bad_samples.jsonl",
        "ietagc/config.yaml",
        "checkpoint-5/unet/config.json",
        "logs/a/b",
    )
    public = ("unet/config.json", "README.md", "ietagc/rounds.jsonl", "model_index.json")
    ignored = [
        [any(fnmatch(name, p) for p in asked["ignore_patterns"]) for name in names] for names in (secret, public)
    ]
    assert all(ignored[0]) and not any(ignored[1])


def test_a_card_without_images_or_rounds(tmp_path):
    args = parse_args(["--pretrained_model_name_or_path=b", "--train_data_dir=d", f"--output_dir={tmp_path}"])
    hub.write_card(args, "me/model", [], [])
    assert "an image folder" in (tmp_path / "README.md").read_text()


def test_the_card_of_an_adapter_says_how_it_is_put_onto_its_base(tmp_path):
    argv = ["--pretrained_model_name_or_path=some/base", "--dataset_name=some/data", f"--output_dir={tmp_path}"]
    hub.write_card(parse_args([*argv, "--lora_rank=8"]), "me/model", [], [])
    card = (tmp_path / "README.md").read_text()
    assert 'from_pretrained("some/base"' in card and 'load_lora_weights("me/model")' in card
    assert "- lora\n" in card and "| LoRA rank, alpha | 8, 8.0 |" in card
