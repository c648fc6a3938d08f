"""Presets are the paper's rows; wrong numbers and recipes are refused by name."""

import math

import pytest

from ietagc_diffusers import MitigationConfig, UsageError
from ietagc_diffusers.method.presets import PRESETS
from ietagc_diffusers.method.recipes import read_recipe


def test_presets_are_the_rows_of_table_4():
    switches = {
        name: (c.skip_threshold > 0, c.num_shards > 1, c.augment_range > 1, c.redistribute_fraction > 0)
        for name in PRESETS
        if (c := MitigationConfig.preset(name))
    }
    assert switches == {
        "none": (False, False, False, False),
        "agc": (True, False, False, False),
        "iet": (False, True, False, False),
        "iet-agc": (True, True, False, False),
        "iet-agc-taa": (True, True, True, False),
        "iet-agc+": (True, True, True, True),
        "agc-c": (True, False, False, False),
        "iet-agc-c": (True, True, False, False),
        "iet-agc+c": (True, True, True, True),
    }
    assert MitigationConfig.preset("none").is_plain and not MitigationConfig.preset("agc").is_plain


def test_default_has_the_paper_s_laion_numbers():
    c = MitigationConfig.preset("iet-agc+")
    numbers = (c.num_shards, c.skip_threshold, c.augment_range, c.augment_decay, c.bank_decay, c.randaugment_magnitude)
    assert numbers == (4, 0.8, math.inf, 5.0, 0.8, 5) and c.redistribute_fraction == 0.25


def test_without_shards_nothing_is_redistributed():
    c = MitigationConfig.preset("iet-agc+", shard_data=False)
    assert (c.num_shards, c.num_parts, c.redistribute_fraction, c.skip_threshold) == (4, 1, 0, 0.8)
    assert MitigationConfig.preset("iet-agc+").num_parts == 4


def test_single_flags_override_and_none_does_not():
    c = MitigationConfig.preset("iet-agc+", num_shards=2, skip_threshold=None)
    assert (c.num_shards, c.skip_threshold) == (2, 0.8)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_shards": 0}, "`num_shards` 0: must be at least 1"),
        ({"skip_threshold": -0.1}, "`skip_threshold` -0.1"),
        ({"skip_threshold": 1.5}, "`skip_threshold` 1.5"),
        ({"skip_threshold": math.nan}, "`skip_threshold` nan"),
        ({"augment_range": 0.9}, "`augment_range` 0.9: must be over 1"),
        ({"redistribute_fraction": 1.1}, "`redistribute_fraction` 1.1"),
        ({"bank_decay": 1.0}, "`bank_decay` 1.0"),
        ({"bank_buckets": 0}, "`bank_buckets` 0"),
        ({"epochs_per_round": 2, "steps_per_round": 3}, "`epochs_per_round` and `steps_per_round` were both given"),
        ({"steps_per_round": 0}, "`steps_per_round` 0"),
        ({"shard_data": False, "num_shards": 1}, "`shard_data` off: one proxy has all data anyway"),
        ({"shard_data": False, "redistribute_fraction": 0.1}, "`redistribute_fraction` 0.1: without `shard_data`"),
        ({"randaugment_magnitude": 31}, "`randaugment_magnitude` 31"),
        ({"skip_threshold": 0.0}, "`augment_range` inf needs a `skip_threshold` or `skip_rate` over 0"),
        ({"random_skip_rate": 0.2}, "`random_skip_rate` and `random_augment_rate` replace"),
        ({"wen_threshold": 0.0}, "`wen_threshold` 0.0: must be over 0"),
        ({"wen_threshold": math.nan}, "`wen_threshold` nan"),
        ({"embedding_noise": -0.1}, "`embedding_noise` -0.1: must be at least 0"),
        ({"embedding_noise": math.inf}, "`embedding_noise` inf: must be at least 0, and finite"),
        ({"noisy_data_sigma": math.inf}, "`noisy_data_sigma` inf: must be over 0, and finite"),
        ({"ambient_corruption": 1.0}, "`ambient_corruption` 1.0: must be over 0 and under 1"),
        ({"ambient_further_corruption": 0.1}, "`ambient_further_corruption` 0.1: belongs to `ambient_corruption`"),
        ({"ambient_corruption": 0.4, "noisy_data_sigma": 0.5}, "are two ways to hide the images"),
        ({"pixel_noise": 0.0}, "`pixel_noise` 0.0: must be over 0"),
        ({"caption_mitigation": "rt", "caption_mitigation_probability": 1.5}, "`caption_mitigation_probability` 1.5"),
        ({"caption_mitigation_probability": 0.5}, "0.5: belongs to `caption_mitigation` rc, rt or cwr"),
        ({"caption_mitigation": "mc", "caption_mitigation_probability": 1.0}, "mc draws a caption at every visit"),
    ],
)
def test_numbers_out_of_range_name_their_flag(flags, message):
    with pytest.raises(UsageError) as error:
        MitigationConfig.preset("iet-agc+", **flags)
    assert message in str(error.value)


def test_rivals_are_off_unless_asked_for_and_caption_mitigations_have_their_authors_share():
    rivals = (
        "wen_threshold", "embedding_noise", "caption_mitigation", "caption_mitigation_probability", "pixel_noise",
        "noisy_data_sigma", "ambient_corruption", "ambient_further_corruption",
    )  # fmt: skip
    default = MitigationConfig.preset("none").to_dict()
    assert {default[name] for name in rivals} == {None}
    shares = {
        name: MitigationConfig.preset("none", caption_mitigation=name).caption_mitigation_probability
        for name in ("mc", "rc", "rt", "cwr")
    }
    assert shares == {"mc": None, "rc": 0.1, "rt": 0.1, "cwr": 0.1}
    given = MitigationConfig.preset("none", caption_mitigation="rt", caption_mitigation_probability=0.0)
    assert given.caption_mitigation_probability == 0 and given.is_plain
    assert not MitigationConfig.preset("none", wen_threshold=2.0).is_plain


def test_unknown_preset_is_named():
    with pytest.raises(UsageError, match="`mitigation` iet-agd: not one of none, agc"):
        MitigationConfig.preset("iet-agd")


def test_auto_buckets_are_the_paper_s_at_its_scale():
    c = MitigationConfig.preset("iet-agc+")
    assert c.resolve_bank_buckets(50_000 * 8, 1000) == 1000
    assert c.resolve_bank_buckets(8_000, 1000) == 80
    assert c.resolve_bank_buckets(50, 1000) == 10
    assert MitigationConfig.preset("agc", bank_buckets=7).resolve_bank_buckets(10**6, 1000) == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("skip_treshold: 0.8", "unknown key 'skip_treshold'; did you mean 'skip_threshold'?"),
        ("qqq: 1", "unknown key 'qqq'"),
        ("- a\n- b", "expected 'flag: value' lines"),
        ("a: [", "not YAML"),
    ],
)
def test_wrong_recipes_are_refused(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        read_recipe(path, ["skip_threshold", "num_shards"])
    assert message in str(error.value) and str(path) in str(error.value)


def test_missing_and_empty_recipes(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        read_recipe(tmp_path / "absent.yaml", [])
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_recipe(tmp_path / "empty.yaml", []) == {}
