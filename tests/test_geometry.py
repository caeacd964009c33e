"""The shapes of known models, geometries out of config.json, and budgets."""

import json
import math
import re
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from moe_beyond.errors import UserError
from moe_beyond.geometry import PRESETS, Geometry, budget_slots, geometry_from_config, load_preset
from moe_beyond.safe_text import printable

# L, E, K, parameters of an expert, all experts, slots of a 10 % budget, experts one token demands: the published table,
# and the 3 x 2,880 biases of an expert of gpt-oss.
TABLE = {
    "deepseek-v2-lite": (26, 64, 6, 8_650_752, 1_664, 166, 156),
    "deepseek-moe-16b": (27, 64, 6, 8_650_752, 1_728, 172, 162),
    "qwen1.5-moe-a2.7b": (24, 60, 4, 8_650_752, 1_440, 144, 96),
    "qwen3-30b-a3b": (48, 128, 8, 4_718_592, 6_144, 614, 384),
    "qwen2-57b-a14b": (28, 64, 8, 27_525_120, 1_792, 179, 224),
    "mixtral-8x7b": (32, 8, 2, 176_160_768, 256, 25, 64),
    "olmoe-1b-7b": (16, 64, 8, 6_291_456, 1_024, 102, 128),
    "gpt-oss-20b": (24, 32, 4, 24_891_840, 768, 76, 96),
    "gpt-oss-120b": (36, 128, 4, 24_891_840, 4_608, 460, 144),
    "phi-3.5-moe": (32, 16, 2, 78_643_200, 512, 51, 64),
    "phi-mini-moe": (32, 16, 2, 11_796_480, 512, 51, 64),
    "granite-3.1-3b-a800m": (32, 40, 8, 2_359_296, 1_280, 128, 256),
    "granite-3.1-1b-a400m": (24, 32, 8, 1_572_864, 768, 76, 192),
}

# The fields that matter of the config.json that each model's publisher ships.
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "vocab_size": 32000,
}
QWEN3 = {
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "head_dim": 128,  # not hidden_size / heads, which would be 64
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "vocab_size": 151936,
}
QWEN15 = {
    "model_type": "qwen2_moe",
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "shared_expert_intermediate_size": 5632,
    "vocab_size": 151936,
}
OLMOE = {
    "model_type": "olmoe",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "vocab_size": 50304,
}
DEEPSEEK = {
    "model_type": "deepseek_v2",
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "sliding_window": 128,
    "vocab_size": 201088,
}
GRANITE = {
    "model_type": "granitemoe",
    "hidden_size": 1536,
    "intermediate_size": 512,
    "num_attention_heads": 24,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 40,
    "vocab_size": 49155,
}
CONFIGS = {
    "mixtral-8x7b": MIXTRAL,
    "qwen3-30b-a3b": QWEN3,
    "qwen1.5-moe-a2.7b": QWEN15,
    "olmoe-1b-7b": OLMOE,
    "deepseek-v2-lite": DEEPSEEK,
    "gpt-oss-20b": GPT_OSS,
    "granite-3.1-3b-a800m": GRANITE,
}


def shaped(layers=4, experts=8, top_k=2, params=1000):
    return Geometry("tiny", tuple(range(layers)), experts, top_k, params, 0)


@pytest.mark.parametrize("name", TABLE)
def test_presets_equal_the_published_table(name):
    geometry = PRESETS[name].geometry
    assert (
        *geometry.shape(),
        geometry.params_per_expert,
        geometry.total_experts,
        budget_slots("10%", geometry),
        geometry.demand_per_token,
    ) == TABLE[name]


def test_the_table_above_covers_every_preset():
    assert set(TABLE) == set(PRESETS)


# Parameters of dense layers and head, numbers in the KV cache per token: from the models' cards, by hand.
@pytest.mark.parametrize(
    ("name", "outside", "cached"),
    [
        # Layer 0: attention of 2048 x (3072 + 576 + 2048) + 512 x 4096, and 3 x 2048 x 10944; head 102,400 x 2048.
        ("deepseek-v2-lite", 13_762_560 + 67_239_936 + 209_715_200, 27 * (512 + 64)),
        ("mixtral-8x7b", 32_000 * 4096, 2 * 32 * 8 * 128),
        ("gpt-oss-20b", 201_088 * 2880, 2 * 12 * 8 * 64),
    ],
)
def test_what_decoding_reads_besides_the_moe_layers(name, outside, cached):
    geometry = PRESETS[name].geometry
    assert (geometry.outside_params, geometry.kv_values_per_token) == (outside, cached)


@pytest.mark.parametrize(
    ("change", "outside", "cached"),
    [
        ({}, True, True),
        ({"vocab_size": None}, False, True),
        ({"model_type": "kimi_linear", "kv_lora_rank": 8}, False, False),
        ({"sliding_window": 64}, True, False),
        ({"sliding_window": 64, "use_sliding_window": False}, True, True),
        ({"sliding_window": 64, "max_position_embeddings": 64}, True, True),
        ({"layer_types": ["linear_attention"] * 48}, True, False),
        ({"mlp_only_layers": [0]}, True, True),
    ],
)
def test_what_a_config_json_leaves_open_is_unknown(change, outside, cached):
    geometry = geometry_from_config({**QWEN3, **change})
    assert (geometry.outside_params is not None, geometry.kv_values_per_token is not None) == (outside, cached)
    unknown = {"outside_params", "kv_values_per_token"} - set(geometry.to_json())
    assert len(unknown) == 2 - outside - cached


def test_a_dense_layer_counts_with_its_attention():
    dense = geometry_from_config({**QWEN3, "mlp_only_layers": [0]}).outside_params
    attention = 2 * 2048 * 128 * (32 + 4)
    assert dense == 151_936 * 2048 + attention + 3 * 2048 * 6144


def test_deepseek_skips_its_dense_first_layer():
    assert PRESETS["deepseek-v2-lite"].geometry.moe_layers == tuple(range(1, 27))
    assert PRESETS["mixtral-8x7b"].geometry.moe_layers == tuple(range(32))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_json_gives_the_geometry_of_the_preset(name, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS[name]))
    expected = replace(PRESETS[name].geometry, model=CONFIGS[name]["model_type"])
    assert load_preset(str(path)).geometry == expected


def test_a_multimodal_config_is_read_from_its_text_part():
    nested = {"model_type": "both", "hidden_size": 7, "text_config": QWEN3, "vision_config": {"hidden_size": 3}}
    assert geometry_from_config(nested) == geometry_from_config(QWEN3)


def test_dbrx_nests_its_expert_fields():
    config = {
        "model_type": "dbrx",
        "d_model": 6144,
        "n_heads": 48,
        "n_layers": 40,
        "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
    }
    geometry = geometry_from_config(config)
    assert geometry.shape() == (40, 16, 4)
    assert geometry.params_per_expert == 3 * 6144 * 10752


def test_shared_experts_count_among_the_other_parameters():
    without = geometry_from_config({**DEEPSEEK, "n_shared_experts": 0})
    difference = geometry_from_config(DEEPSEEK).other_params_per_layer - without.other_params_per_layer
    assert difference == 2 * 3 * 2048 * 1408


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2}, "has no routed experts"),
        ({k: v for k, v in MIXTRAL.items() if k != "hidden_size"}, "is missing"),
        ({**MIXTRAL, "num_local_experts": "8"}, ""),  # a string where a number belongs
        ([1, 2, 3], ""),  # JSON, but not an object
    ],
)
def test_a_config_json_that_gives_no_geometry_is_named(config, says, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        load_preset(str(path))
    assert str(path) in str(error.value)
    assert says in str(error.value)


def test_load_preset_names_the_near_miss_and_the_missing_file(tmp_path):
    assert load_preset("olmoe-1b-7b") is PRESETS["olmoe-1b-7b"]
    with pytest.raises(UserError, match="did you mean 'mixtral-8x7b'"):
        load_preset("mixtral")
    with pytest.raises(UserError, match=r"absent\.json: cannot be read \(No such file"):
        load_preset(str(tmp_path / "absent.json"))


def test_a_geometry_json_is_read_as_it_was_written(tmp_path):
    geometry = Geometry("mine", (1, 3, 5), 300, 7, 123, 456)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(geometry.to_json()))
    assert load_preset(str(path)).geometry == geometry
    assert load_preset(str(path)).tokenizer is None


@pytest.mark.parametrize(
    "change",
    [{"top_k": None}, {"surprise": 1}, {"moe_layers": 3}, {"top_k": "two"}, {"top_k": 9}, {"moe_layers": [2, 1]}],
    ids=str,
)
def test_a_geometry_json_with_a_wrong_field_is_named(change, tmp_path):
    content = {**shaped().to_json(), **change}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    with pytest.raises(UserError) as error:
        load_preset(str(path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"moe_layers": "1234"}, {"moe_layers": [-1, 2]}, {"moe_layers": ["a"]}, {"moe_layers": [1.5]},
        {"moe_layers": [True]}, {"moe_layers": {"0": 1}}, {"moe_layers": [10**9]}, {"moe_layers": []},
        {"top_k": 2.0}, {"top_k": True}, {"num_experts": 8.0}, {"num_experts": 10**6}, {"num_experts": [8]},
        {"num_experts": float("nan")}, {"params_per_expert": 0}, {"params_per_expert": -1},
        {"params_per_expert": float("inf")}, {"params_per_expert": 10**4000}, {"other_params_per_layer": -1},
        {"other_params_per_layer": "0"}, {"model": 5}, {"model": None},
    ],
    ids=lambda change: str(change)[:40],
)  # fmt: skip
def test_a_geometry_has_whole_numbers_within_bounds(change):
    with pytest.raises(UserError, match=f"mine.*{next(iter(change))}") as error:
        Geometry.from_json({**shaped().to_json(), **change}, source="mine")
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("content", [[], "x", 5, None, {}])
def test_what_is_no_geometry_is_named(content):
    with pytest.raises(UserError, match=r"^mine: "):
        Geometry.from_json(content, source="mine")


def test_the_folder_of_a_model_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**MIXTRAL, "vocab_size": 32000}))
    preset = load_preset(str(tmp_path))
    assert preset.geometry.shape() == (32, 8, 2)
    assert (preset.tokenizer, preset.vocab_size) == (None, 32000)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert load_preset(str(tmp_path)).tokenizer == str(tmp_path)


def test_a_folder_without_a_config_json_is_named(tmp_path):
    with pytest.raises(
        UserError, match=f"{tmp_path}: has no config.json; give the folder of a model, a .json file or a pr"
    ):
        load_preset(str(tmp_path))
    with pytest.raises(
        UserError, match=r"some/model: is no model; give a folder with a config\.json, a \.json file, or a model"
    ):
        load_preset("some/model")


@pytest.mark.parametrize("layers", [(), (2, 1), (1, 1)])
def test_moe_layers_ascend(layers):
    with pytest.raises(UserError, match="moe_layers must be ascending"):
        replace(shaped(), moe_layers=layers)


@pytest.mark.parametrize("top_k", [0, -1, 9])
def test_top_k_lies_within_the_experts(top_k):
    with pytest.raises(UserError, match=rf"top_k must be a whole number of 1 to 8 \(got {top_k}\)"):
        replace(shaped(), top_k=top_k)


def test_derived_counts():
    geometry = Geometry("g", (1, 3, 5), 8, 2, 1000, 0)
    assert (geometry.num_layers, geometry.total_experts, geometry.demand_per_token) == (3, 24, 6)
    assert geometry.describe_shape() == "3 MoE layers x 8 experts, top-2"


@pytest.mark.parametrize(
    ("budget", "slots"),
    [
        ("50%", 16),
        ("49.9%", 15),  # 15.968: floored
        ("100%", 32),
        ("3.125%", 1),
        (7, 7),
        (" 7 ", 7),
        ("2000B", 1),
        ("3999B", 1),
        ("4KB", 2),
        ("4KiB", 2),
        ("63.9KB", 31),
        ("0.064MB", 32),
        ("0.05MiB", 26),  # 52428.8 bytes
        ("0.00005GiB", 26),  # 53687 bytes
    ],
)
def test_budgets_by_hand(budget, slots):
    assert budget_slots(budget, shaped()) == slots  # 32 experts of 2000 bytes


def test_fewer_bits_buy_more_slots():
    assert [budget_slots("8KB", shaped(), bits) for bits in (16, 8, 4, 4.25)] == [4, 8, 16, 15]


@pytest.mark.parametrize("budget", ["", "ten", "-5", "1e3", "10 percent", "2.9gb", "2.9TB", "5%%", "%", "GB", "٣"])
def test_budgets_that_cannot_be_read_are_quoted(budget):
    with pytest.raises(UserError, match="cannot be read") as error:
        budget_slots(budget, shaped())
    assert repr(budget) in str(error.value)


@pytest.mark.parametrize("budget", ["0", "0%", "3%", "1999B", "0GB"])
def test_a_budget_without_room_for_one_expert_is_an_error(budget):
    with pytest.raises(UserError, match="is too small for one expert of tiny"):
        budget_slots(budget, shaped())


@pytest.mark.parametrize("budget", ["33", "104%", "66KB", "1GiB"])
def test_a_budget_beyond_all_experts_is_an_error(budget):
    with pytest.raises(UserError, match="more than all 32 experts"):
        budget_slots(budget, shaped())


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ("0.1", "write 10% for that share of all experts, 166 for slots, or 2.9GB for bytes"),
        ("0.25", "write 25% for that share"),
        ("0.333", "write 33.3% for that share"),
        ("1.0", "write 100% for that share of all experts, 1 for slots"),
        ("2.5", "write 2.5% for a share of all experts, 166 for slots"),
        ("12.0", "write 12% for a share of all experts, 12 for slots"),
        (
            "0.01",
            "too small for one expert of tiny; a token needs 2 per layer: write 2 (slots), which is 6.25% or 0.00400MB",
        ),
        (
            "0.1%",
            "too small for one expert of tiny; a token needs 2 per layer: write 2 (slots), which is 6.25% or 0.00400MB",
        ),
    ],
)
def test_what_to_write_in_place_of_a_fraction_of_a_slot(budget, says):
    with pytest.raises(UserError) as error:
        budget_slots(budget, shaped())
    assert says in str(error.value)


@pytest.mark.parametrize("budget", ["9" * 5000, "0." + "1" * 5000, "1" * 5000 + "%", "9" * 5000 + "GB", "1\n2", None])
def test_an_endless_budget_is_one_short_line(budget):
    with pytest.raises(UserError) as error:
        budget_slots(10**5000 if budget is None else budget, shaped())
    assert len(str(error.value)) < 200
    assert len(str(error.value).splitlines()) == 1


UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
amounts = st.decimals(0, 1000, places=2)
geometries = st.builds(
    shaped, st.integers(1, 60), st.integers(2, 256), st.integers(1, 2), st.integers(1, 200_000_000).map(lambda n: 8 * n)
)


def slots_or_none(budget, geometry, bits=16.0):
    """Return the slots, 0 if the budget is too small, infinity if it is too large."""
    try:
        return budget_slots(budget, geometry, bits)
    except UserError as error:
        return 0 if "too small for one expert" in str(error) else math.inf


@given(amounts, st.sampled_from([*UNITS, "%"]), geometries, st.sampled_from([16.0, 8.0, 4.5, 4.25]))
def test_budgets_equal_exact_arithmetic(amount, unit, geometry, bits):
    if unit == "%":
        exact = math.floor(Fraction(amount) * geometry.total_experts / 100)
    else:
        exact = math.floor(Fraction(amount) * UNITS[unit] / (geometry.params_per_expert * Fraction(bits) / 8))
    too_large = amount > 100 if unit == "%" else exact > geometry.total_experts
    expected = math.inf if too_large else exact
    assert slots_or_none(f"{amount:f}{unit}", geometry, bits) == expected


@given(st.data(), st.integers(1, 100_000_000), st.sampled_from(["KB", "MB", "GB"]))
def test_bytes_for_exactly_n_experts_are_n_slots(data, params, unit):
    geometry = shaped(params=params)
    slots = data.draw(st.integers(1, geometry.total_experts))
    for spare, expected in ((0, slots), (-1, slots - 1)):
        budget = Decimal(slots * params * 2 + spare) / UNITS[unit]
        assert slots_or_none(f"{budget:f}{unit}", geometry) == expected


def test_decimal_megabytes_are_not_rounded_down_by_floating_point():
    geometry = shaped(layers=100, experts=100)  # 4.1 MB / 2000 B = 2050
    assert budget_slots("4.1MB", geometry) == 2050


@given(amounts, amounts, st.sampled_from(["%", "", *UNITS]), geometries)
@example(Decimal(0), Decimal(100), "%", shaped())
def test_a_larger_budget_never_buys_fewer_slots(one, other, unit, geometry):
    if not unit:
        one, other = Decimal(int(one)), Decimal(int(other))
    less, more = sorted((one, other))
    assume(less < more)
    assert slots_or_none(f"{less:f}{unit}", geometry) <= slots_or_none(f"{more:f}{unit}", geometry)


@given(
    st.sets(st.integers(0, 100), min_size=1),
    st.integers(1, 400),
    st.integers(1, 400),
    st.integers(1, 10**9),
    st.text(max_size=8).map(printable),
)
def test_geometry_survives_json(layers, experts, top_k, params, name):
    geometry = Geometry(name, tuple(sorted(layers)), experts, min(top_k, experts), params, params)
    assert Geometry.from_json(json.loads(json.dumps(geometry.to_json()))) == geometry
    assert Geometry.of(geometry.to_json()) == Geometry.of(geometry) == geometry


MIXED = Geometry("mixed", (0, 2), 4, 1, 0, 0, expert_bytes=(300, 200), other_bytes=(7, 9))


def test_bytes_by_layer_are_kept_and_left_out_if_unset():
    assert Geometry.from_json(MIXED.to_json()) == MIXED
    assert MIXED.to_json()["expert_bytes"] == [300, 200]
    plain = replace(MIXED, params_per_expert=1, expert_bytes=None, other_bytes=None)
    assert not {"expert_bytes", "other_bytes"} & set(plain.to_json())
    assert (plain.expert_units, plain.total_units, plain.has_one_size) == ((1, 1), 8, True)


def test_units_are_the_greatest_common_divisor():
    assert (MIXED.expert_units, MIXED.total_units, MIXED.has_one_size) == ((3, 2), 20, False)
    assert (MIXED.unit_bytes(16), MIXED.mean_expert_bytes(16), MIXED.mean_other_bytes(16)) == (100, 250, 8)
    equal = replace(MIXED, expert_bytes=(300, 300))
    assert (equal.expert_units, equal.unit_bytes(4), equal.has_one_size) == ((1, 1), 300, True)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"expert_bytes": None}, "params_per_expert must be a whole number of 1 to"),
        ({"expert_bytes": (1,)}, "expert_bytes must be one number for each of 2 layers (got a list of 1)"),
        ({"expert_bytes": (1, 0)}, "expert_bytes must be whole numbers of 1 to 2,147,483,647 (got 0)"),
        ({"expert_bytes": (1, 2**31)}, "expert_bytes must be whole numbers of 1 to 2,147,483,647 (got 2147483648)"),
        ({"other_bytes": (1, 2.0)}, "other_bytes must be whole numbers of 0 to 2,147,483,647 (got 2.0)"),
        ({"other_bytes": 3}, "other_bytes must be one number for each of 2 layers (got 3)"),
    ],
)
def test_bytes_that_are_wrong_are_named(changes, says):
    with pytest.raises(UserError, match=re.escape(says)):
        replace(MIXED, **changes)
    content = MIXED.to_json() | {"expert_bytes": 5}
    with pytest.raises(UserError, match="expert_bytes must be a list of whole numbers"):
        Geometry.from_json(content)
