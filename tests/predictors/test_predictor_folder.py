import hashlib
import json
import os
import pickle
import re
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _helpers.common import TINY, VOCAB
from _helpers.predictor_variants import LONG, VARIANTS, Variant, fitted_once, probabilities, random_trace
from safetensors.torch import load_file, save_file

from moe_beyond.errors import UserError
from moe_beyond.files import sealed
from moe_beyond.hub.push import prepare_upload
from moe_beyond.predictors.batch import Batch, collate
from moe_beyond.predictors.io.folder import check_fits, read_config, read_predictor, save_predictor
from moe_beyond.predictors.registry import ARCHITECTURES
from moe_beyond.traces.manifest import Manifest, Tokenizer

TRAINING = {
    "fingerprint": "f" * 64,
    "split": "train",
    "source": "tests",
    "tokenizer": {"name": "tests", "sha256": "0" * 64},
}
ONE_EACH = [next(v for v in VARIANTS if v.architecture == name) for name in ARCHITECTURES]
WITH_FRACTIONS = [
    variant
    for variant in ONE_EACH
    if any(weight.is_floating_point() for weight in fitted_once(variant).state_dict().values())
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved cross_layer."""
    path = tmp_path / "predictor"
    variant = next(variant for variant in VARIANTS if variant.architecture == "cross_layer")
    save_predictor(fitted_once(variant), path, TRAINING)
    return path


def batch() -> Batch:
    return collate([random_trace("a", LONG, 0), random_trace("b", 7, 1)])


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of the configuration; None removes one."""
    content = json.loads((folder / "config.json").read_text())
    content.update(changes)
    kept = {name: value for name, value in content.items() if changes.get(name, 0) is not None}
    (folder / "config.json").write_text(json.dumps(sealed(kept)))


def replace_weights(folder: Path, content: bytes) -> None:
    """Put other bytes in the weights' place, with a hash that agrees with them."""
    (folder / "model.safetensors").write_bytes(content)
    edit_config(folder, sha256=hashlib.sha256(content).hexdigest())


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    weights = {name: part.short() if part.dtype == torch.uint8 else part for name, part in weights.items()}
    change(weights)  # also to negative numbers
    save_file(weights, folder / "model.safetensors")
    replace_weights(folder, (folder / "model.safetensors").read_bytes())


def refused(folder: Path, file: str, reason: str = "") -> None:
    """Loading fails with one line that names the file."""
    with pytest.raises(UserError, match=re.escape(str(folder / file))) as caught:
        read_predictor(folder)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_what_is_loaded_scores_to_the_bit_as_what_was_saved(variant: Variant, tmp_path: Path):
    predictor = fitted_once(variant)
    save_predictor(predictor, tmp_path / "p", TRAINING)
    loaded = read_predictor(tmp_path / "p")
    assert type(loaded) is type(predictor)
    assert not loaded.training
    assert loaded.geometry == TINY
    assert loaded.vocab_size == VOCAB
    assert loaded.arguments() == predictor.arguments()
    assert loaded.information == predictor.information
    assert np.array_equal(probabilities(loaded, batch()), probabilities(predictor, batch()))
    for name, tensor in predictor.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("variant", ONE_EACH, ids=str)
def test_half_precision_scores_nearly_the_same_in_half_the_bytes(variant: Variant, tmp_path: Path):
    predictor = fitted_once(variant)
    save_predictor(predictor, tmp_path / "p", TRAINING, dtype=torch.float16)
    loaded = read_predictor(tmp_path / "p")
    np.testing.assert_allclose(probabilities(loaded, batch()), probabilities(predictor, batch()), atol=5e-3)
    stored = load_file(tmp_path / "p" / "model.safetensors")
    for name, tensor in predictor.state_dict().items():
        if tensor.is_floating_point():
            assert stored[name].dtype == torch.float16, name
        else:  # in no more bytes than the numbers need
            least, most = (0, 0) if tensor.numel() == 0 else (int(tensor.min()), int(tensor.max()))
            bits = 16 if most < 2**15 else 32 if most < 2**31 else 64
            expected = torch.uint8 if least >= 0 and most < 256 else getattr(torch, f"int{bits}")
            assert stored[name].dtype == expected, name
            assert torch.equal(loaded.state_dict()[name], tensor), name
        assert loaded.state_dict()[name].dtype == tensor.dtype, name


def test_a_folder_holds_the_weights_the_configuration_and_a_card(folder: Path):
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = read_config(folder)
    weights = (folder / "model.safetensors").read_bytes()
    expected = {
        "format_version": 1,
        "architecture": "cross_layer",
        "package": "moe_beyond",
        "activation": "softmax",
        "geometry": TINY.to_json(),
        "vocab_size": VOCAB,
        "lookaheads": [1],
        "hidden_states": [],
        "causal": True,
        "training": TRAINING,
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    assert config.items() >= expected.items()
    card = (folder / "README.md").read_text()
    for said in ("cross_layer", "tiny", "lookahead 1", "split 'train'", "f" * 64):
        assert said in card


def test_whoever_may_read_the_configuration_may_read_the_weights(folder: Path):
    modes = {path.name: oct(path.stat().st_mode) for path in folder.iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_saving_the_same_predictor_twice_writes_the_same_bytes(folder: Path, tmp_path: Path):
    save_predictor(read_predictor(folder), tmp_path / "again", TRAINING)
    for name in ("README.md", "config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name


def test_saving_over_a_predictor_replaces_all_of_it(folder: Path, tmp_path: Path):
    (folder / "README.md").write_text("of the one before")
    save_predictor(fitted_once(ONE_EACH[0]), folder, TRAINING)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert read_predictor(folder).architecture == ONE_EACH[0].architecture
    assert f"# {ONE_EACH[0].architecture}" in (folder / "README.md").read_text()
    assert list(tmp_path.iterdir()) == [folder]


def test_saving_over_a_folder_that_holds_more_is_refused(folder: Path):
    (folder / "thesis.txt").write_text("not part of a predictor")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="holds other files too"):
        save_predictor(fitted_once(ONE_EACH[0]), folder, TRAINING)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_an_empty_folder_is_filled(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    save_predictor(fitted_once(ONE_EACH[0]), tmp_path / "empty", TRAINING)
    read_predictor(tmp_path / "empty")


@pytest.mark.parametrize("existing", [False, True])
def test_a_failing_save_leaves_nothing_and_harms_nothing(folder: Path, tmp_path: Path, existing: bool):
    target = folder if existing else tmp_path / "new" / "predictor"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(TypeError, match="not JSON serializable"):  # after the weights were written
        save_predictor(fitted_once(ONE_EACH[0]), target, {"steering": {"other": object()}})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert target.exists() == existing


def test_saving_over_another_folder_is_refused(tmp_path: Path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    with pytest.raises(UserError, match="notes exists and is not a predictor folder"):
        save_predictor(fitted_once(ONE_EACH[0]), tmp_path / "notes", TRAINING)
    assert (tmp_path / "notes" / "diary.txt").read_text() == "dear diary"


def test_saving_over_a_language_model_is_refused(tmp_path: Path):
    # It has a config.json and a model.safetensors too, and may have taken hours to download.
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "deepseek_v2", "architectures": ["DeepseekV2"]}))
    save_file({"weight": torch.zeros(2)}, model / "model.safetensors")
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="model exists and is not a predictor folder"):
        save_predictor(fitted_once(ONE_EACH[0]), model, TRAINING)
    assert sorted(path.name for path in model.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_saving_over_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(UserError, match="file exists and is not a predictor folder"):
        save_predictor(fitted_once(ONE_EACH[0]), tmp_path / "file", TRAINING)
    assert (tmp_path / "file").read_text() == "text"


def test_a_missing_folder_or_configuration_is_named(folder: Path, tmp_path: Path):
    for missing in (tmp_path / "nowhere", folder):
        (missing / "config.json").unlink(missing_ok=True)
        with pytest.raises(UserError, match=re.escape(f"{missing}: is not a predictor folder (it has no config.json)")):
            read_predictor(missing)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '"text"', "{}", '{"architecture": "cross_layer"}'])
def test_a_configuration_that_is_none_is_named(folder: Path, content: str):
    (folder / "config.json").write_text(content)
    refused(folder, "config.json")


def test_a_configuration_that_is_not_text_is_named(folder: Path):
    (folder / "config.json").write_bytes(b"\xff\xfe\x00{")
    refused(folder, "config.json")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format_version": 2}, "format version 2"),
        ({"format_version": "1"}, "format version '1'"),
        ({"architecture": "cros_layer"}, "did you mean 'cross_layer'"),
        ({"architecture": 7}, ""),
        ({"arguments": {"no_such": 1}}, "no_such"),
        ({"arguments": {"width": "wide"}}, ""),
        ({"arguments": {"width": -8}}, ""),
        ({"arguments": None}, "arguments"),
        ({"arguments": 3}, ""),
        ({"geometry": None}, "geometry"),
        ({"geometry": {"model": "tiny"}}, ""),
        ({"package": "elsewhere"}, "cross_layer is a predictor of package elsewhere (got moe_beyond's)"),
        (
            {"package": "elsewhere", "architecture": "new"},
            "new is a predictor of package elsewhere, which is not",
        ),
        ({"vocab_size": None}, "vocab_size"),
        ({"vocab_size": "many"}, "many"),
        ({"sha256": None}, "sha256"),
    ],
    ids=str,
)
def test_a_wrong_field_of_the_configuration_is_refused(folder: Path, changes: dict[str, Any], reason: str):
    edit_config(folder, **changes)
    refused(folder, "config.json", reason)


def test_missing_weights_are_named(folder: Path):
    (folder / "model.safetensors").unlink()
    refused(folder, "model.safetensors", "not found")


@pytest.mark.parametrize("where", [0, 100, -1])
def test_damaged_weights_are_named(folder: Path, where: int):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[where] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, "model.safetensors", "damaged")


def test_cut_weights_are_named(folder: Path):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-10])
    refused(folder, "model.safetensors", "damaged")
    replace_weights(folder, content[:-10])  # as whoever made the folder left it
    refused(folder, "model.safetensors", "a damaged safetensors file")
    replace_weights(folder, b"")
    refused(folder, "model.safetensors", "a damaged safetensors file")


def test_a_missing_weight_is_named(folder: Path):
    edit_weights(folder, lambda weights: weights.pop("start.bias"))
    refused(folder, "model.safetensors", "start.bias")


def test_an_extra_weight_is_named(folder: Path):
    edit_weights(folder, lambda weights: weights.update(bonus=torch.zeros(1)))
    refused(folder, "model.safetensors", "bonus")


def test_a_renamed_weight_is_named(folder: Path):
    edit_weights(folder, lambda weights: weights.update(finish=weights.pop("start.bias")))
    refused(folder, "model.safetensors", "finish")


def test_a_weight_of_another_shape_is_named(folder: Path):
    edit_weights(folder, lambda weights: weights.update({"start.bias": torch.zeros(5)}))
    refused(folder, "model.safetensors", "start.bias")


@pytest.mark.parametrize("variant", ONE_EACH, ids=str)
def test_weights_of_another_architecture_are_refused(folder: Path, tmp_path: Path, variant: Variant):
    other = next(v for v in ONE_EACH if v.architecture != variant.architecture)
    save_predictor(fitted_once(variant), tmp_path / "a", TRAINING)
    save_predictor(fitted_once(other), tmp_path / "b", TRAINING)
    replace_weights(tmp_path / "a", (tmp_path / "b" / "model.safetensors").read_bytes())
    refused(tmp_path / "a", "model.safetensors", variant.architecture)


class Harm:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_in_place_of_weights_is_refused_and_not_run(folder: Path, tmp_path: Path):
    harm = tmp_path / "harm"
    replace_weights(folder, pickle.dumps({"start.bias": Harm(harm)}))
    refused(folder, "model.safetensors", "a damaged safetensors file")
    torch.save({"start.bias": Harm(harm)}, tmp_path / "weights.pt")
    replace_weights(folder, (tmp_path / "weights.pt").read_bytes())
    refused(folder, "model.safetensors", "a damaged safetensors file")
    assert not harm.exists()


def manifest(geometry: Any = TINY, vocab_size: int = VOCAB, sha256: str | None = None) -> Manifest:
    return Manifest(geometry, Tokenizer("named", vocab_size, sha256), "tiny", 16.0, "dataset", "tests", "0")


def test_traces_of_the_same_shape_and_tokenizer_fit():
    predictor = fitted_once(ONE_EACH[0])
    check_fits(predictor, manifest(), "traces")
    check_fits(predictor, manifest(replace(TINY, model="another name")), "traces")
    check_fits(predictor, manifest(sha256="a" * 64), "traces", "a" * 64)
    # Where one side does not know its tokenizer there is nothing to compare.
    check_fits(predictor, manifest(sha256="a" * 64), "traces")
    check_fits(predictor, manifest(), "traces", "a")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (manifest(replace(TINY, moe_layers=(1, 2, 3))), "3 MoE layers x 8 experts, top-2"),
        (manifest(replace(TINY, num_experts=9)), "4 MoE layers x 9 experts, top-2"),
        (manifest(replace(TINY, top_k=3)), "4 MoE layers x 8 experts, top-3"),
        (manifest(vocab_size=VOCAB + 1), "'named' has 33 ids, but the predictor was fitted with 32"),
        (manifest(sha256="b" * 64), "'named' is not the tokenizer of the predictor's training text"),
    ],
    ids=["layers", "experts", "top_k", "vocabulary", "tokenizer"],
)
def test_other_traces_do_not_fit(found: Manifest, said: str):
    with pytest.raises(UserError, match=f"^some/traces: .*{re.escape(said)}"):
        check_fits(fitted_once(ONE_EACH[0]), found, "some/traces", "a")


def test_the_card_says_that_the_traces_were_steered(tmp_path: Path):
    for name, more in (("steered", {"steering": {"on": [[1, 2]], "off": []}}), ("plain", {})):
        save_predictor(fitted_once(ONE_EACH[0]), tmp_path / name, {"source": "tests", **more})
        assert ("steered" in (tmp_path / name / "README.md").read_text()) == bool(more)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lookaheads": [1, "next"]}, "lookaheads contradicts the architecture and its arguments"),
        ({"lookaheads": ["soon"]}, "lookaheads must be a list of"),
        ({"causal": False}, "causal contradicts"),
        ({"causal": "no"}, "causal must be true or false"),
        ({"lookaheads": ["computed"]}, "lookaheads contradicts"),
        ({"hidden_states": ["router_inputs"]}, "hidden_states contradicts"),
        ({"hidden_states": "router_inputs"}, "hidden_states must be a list"),
        ({"activation": "sigmoid"}, "activation contradicts"),
        ({"parameters": 1}, "parameters contradicts"),
        ({"link": 5}, "field 'link' is unknown"),
        ({"training": 5}, "training must be an object"),
        ({"training": {"tokenizer": 5}}, "training: tokenizer must be an object"),
        ({"training": {"source": "\x1b[31m"}}, "training: source must be text"),
        ({"training": {"texts": "not hexadecimal"}}, "training: texts must be hexadecimal digits"),
        ({"training": {"seen": [5]}}, "training: seen must be a list of objects"),
        ({"figures": 5}, "figures must be a list of objects"),
        ({"figures": [{"source": "x"}]}, "figures: field 'fingerprint' is missing"),
        ({"vocab_size": float("inf")}, "vocab_size must be a whole number"),
        ({"vocab_size": 10**400}, "vocab_size must be a whole number"),
        ({"arguments": {"geometry": {}}}, "arguments: 'geometry' is no argument of an architecture"),
        ({"arguments": {"source": "x"}}, "arguments: 'source' is no argument of an architecture"),
        ({"arguments": {"depth": 10**9}}, "depth must be a whole number within 1..1024"),
        ({"arguments": {"lookaheads": 10**9}}, "lookaheads must be a whole number within 1..10000"),
        ({"arguments": {"dropout": 10**400}}, "dropout must be"),
        ({"calibration": {"scale": [[10**400]], "shift": [[0.0]]}}, "calibration has no scale and shift of numbers"),
        ({"calibration": {"scale": [[1e300]] * 4, "shift": [[0.0]]}}, "calibration must have shapes"),
    ],
    ids=str,
)
def test_a_configuration_that_contradicts_itself_is_refused(folder: Path, changes: dict[str, Any], reason: str):
    edit_config(folder, **changes)
    refused(folder, "config.json", reason)


def test_a_configuration_edited_without_its_hash_is_refused(folder: Path):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"recipe"', '"recipes"').replace("0.1", "0.3"))
    refused(folder, "config.json", "content_sha256 does not match the other fields")
    content = json.loads(path.read_text())
    del content["content_sha256"]
    path.write_text(json.dumps(content))
    read_predictor(folder)


def test_a_flipped_bit_of_weights_and_configuration_is_noticed(folder: Path):
    for name in ("config.json", "model.safetensors"):
        path = folder / name
        whole = path.read_bytes()
        for bit in range(0, 8 * len(whole), 1 + 8 * (len(whole) // 60)):
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            refused(folder, name)
        path.write_bytes(whole)
    read_predictor(folder)


@pytest.mark.parametrize("width", [8192, 2**24, 10**9])
def test_a_small_folder_that_asks_for_a_large_predictor_takes_no_memory(folder: Path, width: int):
    config = read_config(folder)
    edit_config(folder, arguments=config["arguments"] | {"width": width, "layer_width": width})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"the weights do not match a cross_layer|width must be a whole number"):
        read_predictor(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # in units of 1024 bytes


@pytest.mark.parametrize("variant", WITH_FRACTIONS, ids=str)
def test_numbers_that_are_not_finite_are_neither_loaded_nor_uploaded(variant: Variant, tmp_path: Path):
    save_predictor(fitted_once(variant), tmp_path / "p", TRAINING)
    stored = load_file(tmp_path / "p" / "model.safetensors")
    name = next(name for name, weight in stored.items() if weight.is_floating_point() and weight.numel())
    for value in (float("nan"), float("inf")):
        edit_weights(tmp_path / "p", lambda weights, value=value: weights[name].view(-1)[-1:].fill_(value))
        refused(tmp_path / "p", "model.safetensors", f"{name} must hold only finite numbers")
        with pytest.raises(UserError, match="must hold only finite numbers"):
            prepare_upload(tmp_path / "p", "org/p")


@pytest.mark.parametrize(
    ("architecture", "name", "position", "value", "reason"),
    [
        ("popularity", "counts", 0, -1, "counts are not in 0..tokens"),
        ("popularity", "tokens", 0, 1, "counts are not in 0..tokens"),
        ("history", "uses", 0, -1, "uses are not in 0..trials"),
        ("eamc", "matrices", 0, -1, "matrices are not in 0..tokens"),
        ("token_table", "table", 0, -1, "table is not in 0..occurrences"),
        ("token_table", "token_ids", 0, 0, "token_ids are not -1"),
        ("token_table", "token_ids", 1, 30, "then ascending"),
        ("naive_bayes", "pairs", 0, -1, "pairs are negative"),
        ("naive_bayes", "past.counts", 0, -1, "past: counts are not in 0..tokens"),
        ("next_gate", "counts", 0, -1, "counts are not in 0..tokens"),
        ("next_gate", "scoring", 0, 99, "scoring is not in 0.."),
        ("row_encoder", "tokens.rows", 0, 99, "tokens: rows are not in 0..24"),
        ("row_encoder", "tokens.ngrams", 0, -1, "tokens: ngrams are not in 0..64"),
    ],
)
def test_counts_that_no_fit_gives_are_refused(
    architecture: str, name: str, position: int, value: int, reason: str, tmp_path: Path
):
    variant = next(variant for variant in ONE_EACH if variant.architecture == architecture)
    save_predictor(fitted_once(variant), tmp_path / "p", TRAINING)
    edit_weights(tmp_path / "p", lambda weights: weights[name].view(-1)[position : position + 1].fill_(value))
    refused(tmp_path / "p", "model.safetensors", reason)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_weights_of_another_kind_of_number_are_refused(folder: Path, dtype: torch.dtype):
    edit_weights(folder, lambda weights: weights.update({"start.bias": weights["start.bias"].to(dtype)}))
    reason = "unknown type" if dtype.is_complex else "start.bias must hold floating-point numbers"
    refused(folder, "model.safetensors", reason)


def test_counts_in_place_of_fractions_are_refused(tmp_path: Path):
    save_predictor(fitted_once(ONE_EACH[0]), tmp_path / "p", TRAINING)
    edit_weights(tmp_path / "p", lambda weights: weights.update(counts=weights["counts"].float()))
    refused(tmp_path / "p", "model.safetensors", "counts must hold whole numbers (got floating-point)")


def test_a_link_out_of_the_folder_is_not_followed(folder: Path, tmp_path: Path):
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        refused(folder, name, "is a link to a file outside the folder")
        (folder / name).unlink()
        (tmp_path / name).rename(folder / name)


def test_a_pipe_is_not_read(folder: Path):
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        refused(folder, name, "is not a regular file")
