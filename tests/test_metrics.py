"""Similarity, Frechet, kernel and CLIP numbers equal their definitions and other implementations."""

import json
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision import transforms

from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.eval.features import Pixels
from ietagc_diffusers.eval.metrics import KINDS, METRICS, frechet, measured_distances
from ietagc_diffusers.eval.metrics.base import mean
from ietagc_diffusers.eval.metrics.clip_score import ClipScorer, clip_scores
from ietagc_diffusers.eval.metrics.frechet import (
    PooledPixels,
    frechet_distance,
    kernel_distance,
    load_inception,
    load_inception_dcr,
)
from ietagc_diffusers.eval.metrics.intervals import bootstrap_interval, newcombe_interval, wilson_interval
from ietagc_diffusers.eval.metrics.l2 import l2_ratio, memorized_quantity
from ietagc_diffusers.eval.metrics.patches import PatchDescriptor, most_similar_crops
from ietagc_diffusers.eval.metrics.similarity import EXCESS_COPY_RATE, TRAINING_PREFERENCE, is_copy, sim_score
from ietagc_diffusers.eval.neighbours import most_similar, nearest_l2
from ietagc_diffusers.eval.protocol import Protocol
from ietagc_diffusers.eval.vectors import Several
from ietagc_diffusers.sscd import pixel_descriptor


def features(seed, n, d=12):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def pictures(seed, n, size=20):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_every_metric_finds_what_it_wrote_under_a_name_of_its_own():
    metrics = [metric for kind in KINDS for metric in kind.metrics]
    assert [metric.name for metric in metrics] == list(METRICS)
    assert len({metric.title for metric in metrics}) == len(metrics)
    hits, two_sets = [(features(0, 50, 1)[:, 0] > 0).float()], [features(1, 20), features(2, 20)]
    for metric in metrics:
        others = {EXCESS_COPY_RATE: hits * 2, TRAINING_PREFERENCE: [*hits, torch.tensor(0.5)]}
        values = two_sets if metric in frechet.Frechet.metrics else others.get(metric, hits)
        scores = metric.of(*values)
        assert list(scores) == metric.keys and metric.value(scores) == metric.statistic(*values)
        assert (metric.interval(scores) is None) == (metric.interval_by is None)
        assert metric.value({}) is metric.interval({}) is metric.number({}) is None
        assert metric.value(dict.fromkeys(metric.keys)) is None


def test_metrics_are_shown_with_their_unit_and_direction():
    assert METRICS["copy_rate"].format(0.1234) == "12.3%" and METRICS["clip_score"].format(29.876) == "29.88"
    assert METRICS["kid"].format([0.01, 0.002]) == "0.0100 ± 0.0020"
    assert METRICS["num_copied_train"].format(1234) == "1,234"
    assert METRICS["mq_0.4_count"].format(0.0125) == "819" and METRICS["mq_0.4"].format(0.0125) == "1.2%"
    protocol = {"frechet": {"features": "pixel-8"}}
    shown = {name: metric.heading(protocol) for name, metric in METRICS.items()}
    assert shown["frechet_distance"] == "Fréchet distance (pixel-8) ↓" and shown["clip_score"] == "CLIP score ↑"
    assert (shown["fid"], shown["fid_dcr"], shown["mq_0.4_count"]) == ("FID ↓", "FID (dcr) ↓", "MQ 0.4 of 65,536 ↓")
    assert shown["train_train_sim_score"] == "Sim Score of training images among themselves"


def test_the_distance_between_distributions_is_that_of_the_features_that_were_used():
    other = {"frechet_distance": 2.0, "kernel_distance": [0.5, 0.1]}
    assert measured_distances({"fid": None, "kid": None} | other) == (2.0, 0.5)
    assert measured_distances({"fid": 9.0, "kid": [0.2, 0.1]} | dict.fromkeys(other)) == (9.0, 0.2)
    assert measured_distances({"fid": None, "kid": None, "fid_dcr": 3.0} | other) == (3.0, 0.5)
    assert measured_distances(dict.fromkeys(("fid", "kid", *other))) == (None, None)


def test_identical_sets_are_copies():
    images = pictures(0, 60)
    descriptors = pixel_descriptor()(images)
    similarity, indices = most_similar(descriptors, descriptors)
    assert sim_score(similarity) == pytest.approx(1, abs=1e-5) and mean(is_copy(similarity, 0.5)) == 1
    assert torch.equal(indices[:, 0], torch.arange(60))
    flat = Pixels(20)(images)
    ratios = l2_ratio(*nearest_l2(flat, flat, 50), flat, "iet-agc")
    assert memorized_quantity(ratios)["memorized_quantity"] == {"0.4": 1, "0.5": 1, "0.6": 1}


def test_sim_score_is_the_95th_percentile():
    values = torch.rand(1001)
    assert sim_score(values) == values.sort().values[950].item()  # 950 of 1,000 others are smaller
    assert sim_score([3, 0, 1, 2]) == pytest.approx(2.85)  # 95% of the way from the least to the greatest


def test_images_of_one_prompt_do_not_narrow_an_interval():
    """Rates over prompts that differ: 60 prompts, a hit of one prompt being a hit of nearly all its images. Intervals
    that take the images for independent miss the rate often, those by prompts do not; nor do unequal numbers matter.
    """
    rng, rate, num_prompts = np.random.default_rng(0), 0.1, 60
    held = {"plain": 0, "equal": 0, "unequal": 0, "bootstrap": 0}
    for trial in range(300):
        prone = rng.random(num_prompts) < rate
        for kind, sizes in (("equal", np.full(num_prompts, 5)), ("unequal", rng.integers(1, 12, num_prompts))):
            groups = np.repeat(np.arange(num_prompts), sizes)
            hits = prone[groups].astype(float)
            low, high = wilson_interval(hits, groups=groups)
            held[kind] += low <= rate <= high
            if kind == "equal":
                low, high = wilson_interval(hits)
                held["plain"] += low <= rate <= high
                if trial < 100:
                    low, high = bootstrap_interval(hits, np.mean, resamples=200, groups=groups)
                    held["bootstrap"] += low <= rate <= high
    assert held["plain"] < 0.8 * 300 and held["bootstrap"] > 85
    assert held["equal"] > 0.92 * 300 and held["unequal"] > 0.92 * 300


def test_groups_of_one_image_change_no_interval_and_equal_groups_count_as_one_each():
    hits, order = np.arange(40) % 5 == 0, np.random.default_rng(0).permutation(40)
    assert wilson_interval(hits, groups=order) == wilson_interval(hits)
    assert bootstrap_interval(hits, np.mean, groups=order) == bootstrap_interval(hits, np.mean)
    assert wilson_interval(np.repeat(hits, 3), groups=np.repeat(order, 3)) == pytest.approx(wilson_interval(hits))
    groups = np.repeat(np.arange(20), 2)[order]
    # Whole groups are drawn: of values that are their group's, every resample has each an even number of times.
    seen = []
    bootstrap_interval(groups, lambda x: seen.append(np.bincount(x.astype(int))) or 0, resamples=20, groups=groups)
    assert all((counts % 2 == 0).all() and counts.sum() == 40 for counts in seen)


def test_the_interval_of_a_difference_is_newcombe_s():
    """His example: 56 of 70 against 48 of 80."""
    first, second = (np.arange(n) < hits for hits, n in ((56, 70), (48, 80)))
    assert newcombe_interval(first, second) == pytest.approx([0.0524, 0.3339], abs=1e-4)


def test_the_bootstrap_interval_of_a_mean_is_the_normal_one():
    values = features(1, 2000, 1)[:, 0]
    low, high = bootstrap_interval(values, lambda x: x.mean())
    error = values.std().item() / 2000**0.5
    assert low == pytest.approx(values.mean().item() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean().item() + 1.96 * error, abs=0.15 * error)
    assert bootstrap_interval(values, lambda x: x.mean()) == [low, high]


def test_the_interval_of_a_share_holds_it_95_times_in_100():
    rng = np.random.default_rng(0)
    for share, n in ((0.02, 200), (0.3, 50)):
        held = [low <= share <= high for low, high in (wilson_interval(rng.random(n) < share) for _ in range(2000))]
        assert 0.93 < np.mean(held) < 0.98
    low, high = wilson_interval(np.zeros(100))
    assert low == 0 and high == pytest.approx(0.037, abs=0.001)  # nothing seen is not nothing


@pytest.mark.parametrize(("n", "d"), [(300, 12), (20, 192), (150, 100)])
def test_identical_sets_are_at_distance_zero(n, d):
    x = features(2, n, d) * 10
    assert frechet_distance(x, x.clone()) < 1e-9
    assert kernel_distance(x, x.clone())[0] < 0.05


def test_frechet_distance_of_known_normals():
    """Diagonal covariances: the sum of squared differences of means and of standard deviations."""
    z = features(3, 4000, 3).double()
    z = (z - z.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T))).T  # exactly white
    first, second = z * torch.tensor([1.0, 2.0, 3.0]), z * torch.tensor([2.0, 2.0, 1.0]) + torch.tensor([0.5, 0.0, 1.0])
    assert frechet_distance(first, second) == pytest.approx(1 + 0 + 4 + 0.25 + 1, rel=1e-6)


@pytest.mark.parametrize(("n", "tolerance"), [(500, 1e-9), (30, 1e-4)])
def test_distances_equal_torch_fidelity_s(n, tolerance):
    """Of fewer images than dimensions torch-fidelity itself is only that exact."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    first, second = features(4, n, 64).double(), features(5, 400, 64).double() * 1.3 + 0.2
    statistics = [fid_features_to_statistics(x) for x in (first, second)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(first, second) == pytest.approx(theirs, rel=tolerance)


def test_kernel_distance_is_the_unbiased_mmd():
    first, second = features(6, 40, 8).double(), features(7, 40, 8).double() + 0.5

    def kernel(a, b):
        return (a @ b.T / 8 + 1) ** 3

    within = sum((kernel(x, x).sum() - kernel(x, x).diagonal().sum()) / (40 * 39) for x in (first, second))
    wanted = within - 2 * kernel(first, second).mean()
    mean, spread = kernel_distance(first, second, subset_size=40)
    assert mean == pytest.approx(wanted.item(), rel=1e-4) and spread < 1e-5
    mean, spread = kernel_distance(first, second, subsets=1000)
    assert mean == pytest.approx(wanted.item(), abs=4 * spread / 1000**0.5) and spread > 0.1 * wanted.item()


def test_pooled_pixels_are_coarse_and_bounded():
    made = PooledPixels(8)(pictures(8, 5, 64))
    assert made.shape == (5, 192) and made.min() >= 0 and made.max() <= 1
    torch.testing.assert_close(PooledPixels(8)(pictures(8, 2, 8)), pictures(8, 2, 8).flatten(1) / 255)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights in the shape of FID's."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Extractor

    path = tmp_path_factory.mktemp("inception") / frechet.INCEPTION_FILE
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        patch.setattr(Extractor, "load_state_dict", lambda self, state: None)
        empty = path.with_name("empty.pth")
        torch.save({}, empty)
        torch.save(Extractor("inception-v3-compat", ["2048"], str(empty)).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(inception_file):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frechet, "INCEPTION_SHA256", "")
        return load_inception(inception_file)


def test_inception_is_torch_fidelity_s_network_and_no_other(inception_file, inception, monkeypatch):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with pytest.raises(UsageError, match="its SHA-256 is"):
        load_inception(inception_file)
    monkeypatch.setattr(frechet, "INCEPTION_SHA256", "")
    images = pictures(9, 2, 40)
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(inception_file))(images)[0]
    torch.testing.assert_close(inception(images), theirs)
    smooth = load_inception(inception_file, antialias=True)
    assert smooth.identity["antialias"] and inception.identity != smooth.identity


def test_the_paper_s_fid_feeds_the_network_what_its_script_feeds(inception_file, inception, monkeypatch):
    """Resize, crop the centre, normalise to [-1, 1], and once more as if that were [0, 1]."""
    monkeypatch.setattr(frechet, "INCEPTION_SHA256", "")
    extractor = load_inception_dcr(inception_file)
    image = pictures(9, 1, 340)[:, :, :299]
    steps = [
        transforms.Resize(299),
        transforms.CenterCrop(299),
        transforms.ToTensor(),
        transforms.Normalize([0.5], [0.5]),
    ]
    fed = 2 * transforms.Compose(steps)(Image.fromarray(image[0].permute(1, 2, 0).numpy()))[None] - 1
    with torch.no_grad():
        for name, layer in inception.network.named_children():
            fed = layer(fed) if name != "fc" else fed
    torch.testing.assert_close(extractor(image), fed.flatten(1))
    assert extractor.name == "inception-dcr" and extractor.identity != inception.identity
    with pytest.raises(UsageError, match="`fid_antialias`"):
        Protocol(descriptor="pixel", fid="dcr", fid_antialias=True)


def measured_by(features, reference_name="train"):
    """What the Fréchet kind measures with features of a name."""
    kind = frechet.Frechet(Protocol(descriptor="pixel"), pixel_descriptor())
    kind.features = SimpleNamespace(name=features, identity={})
    one, two = (SimpleNamespace(features={"features": globals()["features"](seed, 30)}) for seed in (1, 2))
    return kind.measure(SimpleNamespace(generated=one, reference=two, reference_name=reference_name))


def test_only_fid_s_own_features_make_a_fid():
    computed = {"inception": ["fid", "kid"], "inception-dcr": ["fid_dcr", "kernel_distance"]}
    computed["pixel-8"] = ["frechet_distance", "kernel_distance"]
    for name, keys in computed.items():
        found = measured_by(name)
        assert [key for key, value in found.scores.items() if value is not None] == keys
        assert set(found.reasons) == found.scores.keys() - set(keys)
        assert all(keys[0] in why for why in found.reasons.values())


def test_a_distance_to_the_training_images_is_said_to_reward_copying():
    assert any("rewards copying" in note for note in measured_by("pixel-8").notes)
    assert not any("rewards copying" in note for note in measured_by("pixel-8", "held out").notes)


def test_inception_that_cannot_be_had_is_named(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(UsageError, match=r"cannot be reached.*`fid` inception:FILE"):
        load_inception()
    with pytest.raises(UsageError, match="no such file"):
        load_inception(tmp_path / "absent.pth")


@pytest.fixture(scope="module")
def clip_weights(tmp_path_factory):
    """A tiny random CLIP of open_clip, its model registered as `tiny-clip`."""
    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 224, "layers": 1, "width": 64, "patch_size": 32, "head_width": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (folder / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-clip")
    torch.save(model.state_dict(), folder / "weights.pt")
    return folder / "weights.pt"


def test_clip_score_equals_open_clip_by_hand(clip_weights):
    images, prompts = pictures(10, 4, 250), ["a red square", "a blue disc", "a red square", "привет"]
    scorer = ClipScorer("tiny-clip", str(clip_weights))
    vectors, longer = scorer.texts(prompts)
    made = clip_scores(scorer.images(images), vectors)
    model, _, preprocess = open_clip.create_model_and_transforms("tiny-clip", str(clip_weights))
    with torch.no_grad():
        tokens = open_clip.get_tokenizer("tiny-clip")(prompts)
        inputs = torch.stack([preprocess(Image.fromarray(x.permute(1, 2, 0).numpy())) for x in images])
        ours, theirs = model.eval().encode_image(inputs), model.encode_text(tokens)
        by_hand = 100 * torch.nn.functional.cosine_similarity(ours, theirs)
    torch.testing.assert_close(made, by_hand, rtol=1e-4, atol=1e-4)
    assert longer == 0


@pytest.mark.parametrize(("model", "quick"), [("ViT-B-16", True), ("ViT-B-16-quickgelu", True)])
def test_openai_s_weights_get_their_own_gelu(monkeypatch, model, quick):
    monkeypatch.setattr(open_clip.factory, "load_checkpoint", lambda *_, **__: {})
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: __file__)
    scorer = ClipScorer(model, "openai")
    kinds = {type(part).__name__ for part in scorer.model.modules() if "GELU" in type(part).__name__}
    assert kinds == {"QuickGELU"} and scorer.record["quick_gelu"] is quick


def test_weights_from_a_file_are_advised_by_the_name_that_has_their_gelu(monkeypatch, clip_weights):
    assert ClipScorer("tiny-clip", str(clip_weights)).note is None
    monkeypatch.setattr(open_clip, "list_models", lambda: ["tiny-clip", "tiny-clip-quickgelu", "ViT-B-16"])
    assert "`clip` tiny-clip-quickgelu:FILE" in ClipScorer("tiny-clip", str(clip_weights)).note

    def unreachable(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", unreachable)
    with pytest.raises(UsageError, match=r"use `clip` ViT-B-16-quickgelu:FILE"):
        ClipScorer("ViT-B-16", "openai")


def test_the_dcr_convention_feeds_clip_with_what_sscd_saw(clip_weights):
    images = pictures(11, 2, 250)
    own, dcr = (ClipScorer("tiny-clip", str(clip_weights), p) for p in ("own", "dcr"))
    assert not torch.allclose(own.images(images), dcr.images(images), atol=1e-3)
    assert own.images.identity != dcr.images.identity


@pytest.mark.parametrize(("words", "longer"), [(75, 0), (76, 1), (200, 1)])
def test_prompts_beyond_the_context_are_counted(clip_weights, words, longer):
    """77 places, two of which mark start and end."""
    scorer = ClipScorer("tiny-clip", str(clip_weights))
    assert scorer.texts(["cat " * words, "short"])[1] == longer
    assert scorer.texts(["! " * words])[1] == longer  # whose token is 0, as the padding's


def test_wrong_clips_are_named(clip_weights, tmp_path):
    with pytest.raises(UsageError, match="no such model"):
        ClipScorer("ViT-B-16x")
    with pytest.raises(UsageError, match="neither a file nor a tag"):
        ClipScorer("ViT-B-16", "openia")
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    with pytest.raises(UsageError, match="cannot be loaded"):
        ClipScorer("tiny-clip", str(tmp_path / "broken.pt"))


def scene(seed, logo=None, at=(0, 0)):
    """A smooth random picture of 64 pixels, with a 32-pixel logo in it."""
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    image = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear")[0]
    if logo is not None:
        image[:, at[0] : at[0] + 32, at[1] : at[1] + 32] = logo
    return (image * 255).to(torch.uint8)


def test_an_object_copied_into_another_scene_is_found():
    logo = (
        torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(99)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    )
    training = torch.stack([scene(n) for n in range(8)] + [scene(8, logo, (0, 32))])
    generated = torch.stack([scene(20, logo, (32, 0)), scene(21)])
    patches = PatchDescriptor(pixel_descriptor())
    similarity, image, crop, of_training = most_similar_crops(
        Several.of_each(patches(generated)), Several.of_each(patches(training))
    )
    assert similarity[0] > 0.999 and image[0] == 8
    assert (crop[0], of_training[0]) == (6, 2)  # bottom left, top right of a 3 x 3 grid
    assert similarity[1] < 0.99
    whole, _ = most_similar(pixel_descriptor()(generated), pixel_descriptor()(training))
    assert whole[0, 0] < 0.9  # which the whole image hides


def test_flat_crops_are_similar_to_nothing_and_an_image_not_to_itself():
    patches = PatchDescriptor(pixel_descriptor(), grid=2)
    flat = torch.full((1, 3, 40, 40), 200, dtype=torch.uint8)
    assert not patches(flat).any()
    training = Several.of_each(patches(torch.stack([scene(n) for n in range(6)])))
    own = torch.arange(6)
    similarity, image, *_ = most_similar_crops(training, training, (own, own))
    assert (image != torch.arange(6)).all() and (similarity < 0.999).all()


def test_crops_tile_the_image_with_overlap():
    boxes = PatchDescriptor(pixel_descriptor()).boxes(40, 60)
    assert len(boxes) == 15 and boxes[0] == (0, 0, 20) and boxes[-1] == (20, 40, 20) and boxes[1] == (0, 10, 20)
