"""The manifest: its counts, the content of its fingerprint, and its errors."""

import hashlib
import json
from dataclasses import replace

import pytest
from _helpers.common import TINY

from moe_beyond.errors import UserError
from moe_beyond.files import parse_json
from moe_beyond.traces.manifest import Manifest, ShardInfo, Tokenizer
from moe_beyond.traces.steering import Steering


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


SHARDS = (
    ShardInfo("train-00000.parquet", "train", 3, 30, 400, sha("a")),
    ShardInfo("train-00001.parquet", "train", 2, 20, 300, sha("b")),
    ShardInfo("validation-00000.parquet", "validation", 1, 7, 100, sha("c")),
)
WORDS = Tokenizer("words", 32, sha("d"))
MANIFEST = Manifest(TINY, WORDS, "tiny", 16.0, "dataset", "tests", "0", "main", shards=SHARDS)


def test_json_holds_the_counts_of_every_split_and_reads_back():
    content = json.loads(json.dumps(MANIFEST.to_json()))
    assert content["format_version"] == 1
    assert content["splits"] == {
        "train": {"sequences": 5, "tokens": 50},
        "validation": {"sequences": 1, "tokens": 7},
    }
    assert MANIFEST.tokens == 57
    assert MANIFEST.splits == ("train", "validation")
    assert Manifest.from_json(content) == MANIFEST
    assert Manifest.from_json(content).fingerprint == content["fingerprint"]


@pytest.mark.parametrize("steering", [Steering(((1, 2), (4, 0)), ((1, 3),)), Steering(off=((1, 3),)), None])
def test_what_was_steered_reads_back(steering):
    steered = replace(MANIFEST, steering=steering)
    assert Manifest.from_json(json.loads(json.dumps(steered.to_json()))) == steered
    content = MANIFEST.to_json()
    del content["steering"], content["content_sha256"]  # as of sets that know nothing of them
    assert Manifest.from_json(content).steering is None


@pytest.mark.parametrize(
    ("steering", "says"),
    [
        (Steering(((1, 2),)), "1 expert on"),
        (Steering(off=((1, 2), (1, 3))), "2 experts off"),
        (Steering(((1, 2),), ((1, 3), (2, 0))), "1 expert on, 2 off"),
    ],
)
def test_a_steering_is_told_in_words(steering, says):
    assert str(steering) == says


@pytest.mark.parametrize(
    "change",
    [
        {"geometry": replace(TINY, top_k=3)},
        {"tokenizer": replace(WORDS, sha256=sha("e"))},
        {"shards": (replace(SHARDS[0], sha256=sha("f")), *SHARDS[1:])},
        {"shards": (replace(SHARDS[0], split="validation"), *SHARDS[1:])},
        {"shards": SHARDS[:2]},
    ],
    ids=["geometry", "tokenizer", "shard", "split", "missing"],
)
def test_the_fingerprint_follows_the_content(change):
    assert replace(MANIFEST, **change).fingerprint != MANIFEST.fingerprint


def test_the_fingerprint_ignores_where_and_with_what_it_was_written():
    moved = replace(MANIFEST, tool_version="9", source="elsewhere", tokenizer=replace(WORDS, name="other name"))
    assert moved.fingerprint == MANIFEST.fingerprint


@pytest.mark.parametrize("version", [None, 0, 2, "1"])
def test_another_format_version_is_refused(version):
    with pytest.raises(UserError, match=rf"here\.json: format version {version!r}, not 1"):
        Manifest.from_json({**MANIFEST.to_json(), "format_version": version}, source="here.json")


@pytest.mark.parametrize(
    "change",
    [
        {"geometry": "tiny"},
        {"geometry": {**TINY.to_json(), "top_k": 99}},
        {"geometry": {"model": "tiny"}},
        {"tokenizer": {"name": "words"}},
        {"shards": [{"file": "x"}]},
        {"shards": 3},
        {"surprise": 1},
        {"steering": []},
        {"steering": {"on": [[1]]}},
    ],
    ids=str,
)
def test_wrong_fields_are_refused_with_the_name_of_the_file(change):
    with pytest.raises(UserError, match=r"^here\.json: "):
        Manifest.from_json({**MANIFEST.to_json(), **change}, source="here.json")


@pytest.mark.parametrize("name", ["geometry", "tokenizer", "shards", "model_id", "quantization_bits"])
def test_missing_fields_are_refused(name):
    content = MANIFEST.to_json()
    del content[name]
    with pytest.raises(UserError, match=rf"^here\.json: .*{name}"):
        Manifest.from_json(content, source="here.json")


@pytest.mark.parametrize("content", [[], "text", 3, None])
def test_json_that_is_no_object_is_refused(content):
    with pytest.raises(UserError, match=r"^here\.json: "):
        Manifest.from_json(content, source="here.json")


def edited(**changes):
    """The JSON of a manifest whose fields were changed, a shard's by its number and the field's name."""
    content = json.loads(json.dumps(MANIFEST.to_json()))
    for name, value in changes.items():
        if name[5:6].isdigit():
            content["shards"][int(name[5])][name[7:]] = value
        elif name.startswith("tokenizer_"):
            content["tokenizer"][name.removeprefix("tokenizer_")] = value
        else:
            content[name] = value
    return content


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"shard0_sequences": -3}, "shard 'train-00000.parquet': sequences must be a whole number"),
        ({"shard0_tokens": "30"}, r"tokens must be a whole number .* \(got '30'\)"),
        ({"shard0_tokens": None}, r"tokens must be a whole number .* \(got None\)"),
        ({"shard0_tokens": True}, r"tokens must be a whole number .* \(got True\)"),
        ({"shard0_tokens": 30.0}, r"tokens must be a whole number .* \(got 30.0\)"),
        ({"shard0_tokens": 2}, r"has fewer tokens than sequences \(got 2 and 3\)"),
        ({"shard0_bytes": float("nan")}, "bytes must be a whole number"),
        ({"shard0_bytes": 10**400}, r"bytes must be a whole number .* \(got a number of \d+ bits\)"),
        ({"shard0_sha256": 5}, r"sha256 must be 64 hexadecimal digits \(got 5\)"),
        ({"shard0_sha256": sha("a").upper()}, "sha256 must be 64 hexadecimal digits"),
        ({"shard0_states_bytes": 7}, "states_bytes and states_sha256 go together"),
        ({"shard0_file": "../outside/x.parquet"}, "file must be a plain name"),
        ({"shard0_file": "/etc/x.parquet"}, "file must be a plain name"),
        ({"shard0_file": "x.txt"}, "does not end with .parquet"),
        ({"shard0_split": "a\r\nmoe-beyond: error: fake"}, "split must be a plain name"),
        ({"shard0_split": "\ud800"}, "split must be a plain name"),
        ({"shard1_file": "train-00000.parquet"}, "two shards have the file train-00000.parquet"),
        ({"shard1_sha256": sha("a")}, f"two shards have the sha256 {sha('a')}"),
        ({"hidden_size": -1}, "hidden_size must be a whole number"),
        ({"hidden_size": 8}, "shard train-00000.parquet: all shards of this set must be with hidden states"),
        ({"states": {"dtype": "int8", "layers": [1]}}, "states and hidden_size go together"),
        ({"hidden_size": 8, "states": {"dtype": "int4", "layers": [1]}}, r"states: dtype must be .*\(got 'int4'\)"),
        ({"hidden_size": 8, "states": {"dtype": "int8", "layers": [2, 1]}}, "states: layers must be an ascending list"),
        ({"hidden_size": 8, "states": {"dtype": "int8", "layers": []}}, "states: layers must be an ascending list"),
        ({"hidden_size": 8, "states": {"dtype": "int8", "layers": [1, 9]}}, "states: layer 9 is no MoE layer"),
        ({"hidden_size": 8, "states": {"layers": [1]}}, r"states: fields are missing or unknown \(missing: dtype"),
        (
            {"hidden_size": 8, "states": {"dtype": "int8", "layers": [1], "projected_from": 16}},
            "states: projected_from and projection_sha256 go together",
        ),
        (
            {
                "hidden_size": 8,
                "states": {"dtype": "int8", "layers": [1], "projected_from": 8, "projection_sha256": sha("p")},
            },
            r"states: projected_from must exceed hidden_size 8 \(got 8\)",
        ),
        ({"quantization_bits": float("nan")}, "quantization_bits must be a number above 0"),
        ({"quantization_bits": 0}, "quantization_bits must be a number above 0"),
        ({"quantization_bits": "16"}, "quantization_bits must be a number above 0"),
        ({"author": ["dataset"]}, r"author must be 'dataset' or 'model' or .* \(got a list of 1\)"),
        ({"source": {}}, r"source must be text .* \(got an object of 0\)"),
        ({"model_id": 3}, "model_id must be text"),
        ({"model_id": "x\x1b]0;title\x07"}, r"model_id must be text .* \(got 'x\\x1b"),
        ({"source": "a\u202eb"}, "source must be text"),
        ({"revision": 1}, "revision must be text"),
        ({"tool_version": None}, "tool_version must be text"),
        ({"generation": 5}, "generation must be an object"),
        ({"generation": {"tokens": 5}}, "generation: field 'temperature' is missing"),
        ({"generation": {"tokens": 5, "temperature": -1}}, "generation: temperature must be a number"),
        ({"generation": {"tokens": 5, "temperature": 0, "x": 1}}, "generation: unknown field 'x'"),
        ({"routers_sha256": "none"}, "routers_sha256 must be 64 hexadecimal digits, or null"),
        ({"tokenizer": None}, r"tokenizer must be an object \(got None\)"),
        ({"tokenizer_vocab_size": 2**31}, "tokenizer: vocab_size must be a whole number within 1..16777216"),
        ({"tokenizer_name": "a\0b"}, "tokenizer: name must be text"),
        ({"geometry": {**TINY.to_json(), "model": "a\nb"}}, "geometry: model must be text"),
        ({"steering": {"on": [[9, 1]]}}, "steering: layer 9 of tiny has no experts"),
        ({"format_version": True}, "format version True, not 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_field_of_a_wrong_type_or_out_of_bounds_is_named_in_one_line(change, says):
    with pytest.raises(UserError, match=rf"^here\.json: .*{says}") as error:
        Manifest.from_json(edited(**change), source="here.json")
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"shards": [*MANIFEST.to_json()["shards"]][:2]}, "splits"),
        ({"shards": [*MANIFEST.to_json()["shards"]][::-1]}, "fingerprint"),
        ({"shard0_split": "validation", "shard1_split": "validation", "shard2_split": "train"}, "splits"),
        ({"shard0_tokens": 31}, "splits"),
        ({"shard0_tokens": 31, "shard1_tokens": 19}, "content_sha256"),  # the sums agree
        ({"splits": {"train": {"sequences": 5, "tokens": 57}}}, "splits"),
        ({"splits": None}, "splits"),
        ({"shard0_sha256": sha("x")}, "fingerprint"),
        ({"fingerprint": sha("x")}, "fingerprint"),
        ({"fingerprint": None}, "fingerprint"),
        ({"tokenizer_sha256": None}, "fingerprint"),
        ({"tokenizer_vocab_size": 33}, "content_sha256"),
        ({"model_id": "another"}, "content_sha256"),
        ({"quantization_bits": 4.0}, "content_sha256"),
        ({"content_sha256": None}, "content_sha256"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_a_manifest_that_does_not_agree_with_itself_is_refused(change, name):
    with pytest.raises(UserError, match=rf"^here\.json: {name} (and shards disagree|does not match the other fields)"):
        Manifest.from_json(edited(**change), source="here.json")


def test_a_flipped_bit_is_noticed():
    text = json.dumps(MANIFEST.to_json(), indent=2).encode()
    for bit in range(0, 8 * len(text), 7):  # every byte, every bit of a byte in turn
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(UserError, match=r"^here\.json: .*\Z"):
            Manifest.from_json(parse_json(bytes(flipped), "here.json"), source="here.json")
