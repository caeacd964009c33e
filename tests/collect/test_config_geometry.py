"""The geometry read from a config.json is that of the modules that transformers builds of it, in every architecture."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from _helpers import moe_architectures as moes

from moe_beyond.collect.geometry import measured_geometry
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry, geometry_from_config
from moe_beyond.model_config.families import FAMILIES, TOP_K

NAMES = [name for name in moes.architectures() if name not in moes.REFUSED]
# Every field about dense layers that an architecture of transformers or a published file has, and values for 4 layers.
LAYER_FIELDS: dict[str, list[Any]] = {
    "decoder_sparse_step": [1, 2, 3],
    "dense_mlp_idx": [0, 2],
    "enable_moe_block": [True, False],
    "expert_layer_offset": [0, 1],
    "expert_layer_period": [1, 2, 3],
    "first_k_dense_replace": [0, 1, 2, 4],
    "hybrid_override_pattern": ["MEM*", "E-E*", "EEEE", "M-M*"],
    "interleave_moe_layer_step": [1, 2, 4],
    "layers_block_type": [["moe", "mlp", "moe", "full_attention"], ["mamba", "moe", "attention", "mlp"]],
    "mlp_layer_types": [
        ["sparse", "dense", "sparse", "dense"], ["dense", "dense", "sparse", "sparse"], ["sparse"] * 4,
        ["hash_moe", "moe", "moe", "moe"], ["dense"] * 4,
    ],
    "mlp_only_layers": [[], [0], [1, 3]],
    "moe_layer_end_index": [-1, 1, 2],
    "moe_layer_freq": [1, 2, [1, 0, 1, 1], [0, 1, 1, 1]],
    "moe_layer_interval": [1, 2],
    "moe_layer_start_index": [0, 1, 2],
    "moe_layers": [[0, 1, 2, 3], [1, 3], [2]],
    "num_dense_layers": [0, 1, 2],
    "num_hash_layers": [0, 2],
}  # fmt: skip
# How many, how wide, of how many matrices.
SIZE_FIELDS: dict[str, list[Any]] = {
    "dense_intermediate_size": [48],
    "expert_ffn_hidden_size": [48],
    "ffn_hidden_size": [48],
    "hidden_act": ["gelu", "relu2"],
    "hidden_activation": ["gelu"],
    "intermediate_size": [48],
    "mlp_bias": [True],
    "mlp_hidden_act": ["silu"],
    "moe_intermediate_size": [48],
    "moe_latent_size": [16],
    "moe_num_experts": [6],
    "moe_topk": [1, [2, 2, 2, 2]],
    "n_routed_experts": [6],
    "num_experts": [6, [8, 8, 8, 8], [8, 4, 8, 4]],
    "num_experts_per_tok": [1],
    "num_local_experts": [6],
    "zero_expert_num": [2],
}
ESTIMATED = {
    "afmoe", "axk2", "beam", "deepseek_v32", "deepseek_v4", "dots3_note", "gemma4", "glm_moe_dsa", "granitemoehybrid",
    "hy_v4", "inkling", "inkling2", "jamba", "jetmoe", "mimo_v2_flash", "qwen3_5_moe", "qwen3_next", "qwen4_exp",
    "zaya",
}  # fmt: skip
"""Whose other parameters are only estimated: gated, indexed, linear or several kinds of attention."""

BLOCKS = ("hybrid_override_pattern", "layers_block_type")
KEPT = (*BLOCKS, "enable_moe_block")  # without which there are no experts

Outcome = tuple[tuple[int, ...], int, int] | None


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


def measured(name: str, config: Any) -> Geometry | None:
    """The geometry of the modules, without their memory; None of a dense model."""
    with torch.device("meta"):
        model = moes.model_class(name)(config)
    try:
        return measured_geometry(model, "tiny", 1)
    except UserError:
        return None


def shape(geometry: Geometry | None) -> Outcome:
    return geometry and (geometry.moe_layers, geometry.num_experts, geometry.params_per_expert)


def read(content: dict[str, Any]) -> Outcome | str:
    """What a config.json gives, or why it is refused."""
    try:
        return shape(geometry_from_config(json.loads(json.dumps(content))))
    except UserError as error:
        return str(error)


@cache
def published(name: str) -> dict[str, Any]:
    """A config.json without any field about dense layers that has a default in the architecture's code."""
    saved = json.loads(moes.tiny_config(name).to_json_string(use_diff=True))
    saved.pop("time_step_limit", None)  # transformers cannot read an infinite value back
    return {key: value for key, value in saved.items() if key not in LAYER_FIELDS or key in KEPT}


def changed(name: str, field: str, value: Any) -> dict[str, Any]:
    """The same model with one field set, in place of other spellings of it that the architecture knows."""
    spellings = moes.model_class(name).config_class.attribute_map
    same = {key for pair in spellings.items() if field in pair for key in pair} | (
        {*BLOCKS} if field in BLOCKS else set()
    )
    return {**{key: old for key, old in published(name).items() if key not in same}, field: value}


def text_of(name: str) -> str:
    """The code of an architecture: a field that is not in it changes nothing."""
    kind = moes.model_class(name).config_class
    folder = Path(transformers.__file__).parent / "models" / moes.architectures()[name]
    return (
        moes.mixtures()[moes.architectures()[name]]
        + "".join(path.read_text(encoding="utf-8") for path in folder.glob("configuration_*.py"))
        + str(kind.attribute_map)
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_configuration_gives_what_the_modules_have(name):
    config = moes.tiny_config(name)
    geometry = measured(name, moes.tiny_config(name))
    saved, whole = json.loads(config.to_json_string(use_diff=True)), config.to_dict()
    assert read(saved) == read(whole) == shape(geometry)
    assert config.model_type in FAMILIES  # what is common to many would be too little
    top_k = next(value for value in map(saved.get, TOP_K) if value) if "ffn_config" not in saved else moes.TOP_K
    assert geometry_from_config(saved).top_k == top_k
    if moes.architectures()[name] not in ESTIMATED:
        other = geometry_from_config(saved).other_params_per_layer
        assert other == pytest.approx(geometry.other_params_per_layer, rel=0.03)  # norms and biases are left out


@pytest.mark.parametrize("name", NAMES)
def test_each_field_is_read_as_the_modules_are_built_or_refused(name):
    """One field at a time: whatever changes the modules is read; what does not changes nothing, or is refused."""
    kind, text = moes.model_class(name).config_class, text_of(name)
    base = shape(measured(name, kind.from_dict(published(name))))
    assert read(published(name)) == base
    reached = 0
    for field, values in {**LAYER_FIELDS, **SIZE_FIELDS}.items():
        for value in values:
            if field not in text:
                content = {**published(name), field: value}
                assert (found := read(content)) == base or field in found, (field, value, found, base)
                continue
            content = changed(name, field, value)
            try:
                config = kind.from_dict(json.loads(json.dumps(content)))
                expected = shape(measured(name, config))
            except Exception:  # what transformers itself cannot build has no right answer
                read(content)  # raises nothing but a `UserError`
                continue
            forms = {
                "published": content,
                "to_dict": config.to_dict(),
                "saved": json.loads(config.to_json_string(use_diff=True)),
            }
            for form, fields in forms.items():
                found = read(fields)
                where = (form, field, value, found, expected)
                if expected is None:
                    assert isinstance(found, str), where
                elif expected != base:
                    assert found == expected or "contradict" in found, where
                else:
                    assert found == expected or field in found, where
            reached += expected != base
    assert reached >= 2 or name == "DbrxForCausalLM", "the fields above do not reach this architecture"


@pytest.mark.parametrize("field", ["ffn_hidden_size", "moe_num_experts"])
def test_the_parts_of_dbrx_are_read_as_its_modules_are_built(field):
    parts = {**moes.EXCEPTIONS["dbrx"]["ffn_config"], field: 6}
    config = moes.tiny_config("DbrxForCausalLM", ffn_config=parts)
    expected = {"ffn_hidden_size": ((0, 1, 2, 3), 8, 3 * 64 * 6), "moe_num_experts": ((0, 1, 2, 3), 6, 3 * 64 * 32)}
    assert read(config.to_dict()) == shape(measured("DbrxForCausalLM", config)) == expected[field]


def test_experts_that_differ_by_layer_are_refused():
    config = moes.tiny_config("HunYuanMoEV1ForCausalLM")
    with torch.device("meta"):
        model = moes.model_class("HunYuanMoEV1ForCausalLM")(config)
    model.model.layers[2].mlp.experts.num_experts = 4
    with pytest.raises(UserError, match=r"layer 2 has 4 experts of .* layer 0 has 8 of 6,144; a geometry"):
        measured_geometry(model, "tiny", 2)
