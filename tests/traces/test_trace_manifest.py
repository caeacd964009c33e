"""The manifest: what it counts, what its fingerprint covers, and what is refused."""

import json
from dataclasses import replace

import pytest
from helpers import TINY

from moe_beyond.errors import UserError
from moe_beyond.traces.manifest import Manifest, ShardInfo, Tokenizer
from moe_beyond.traces.steering import Steering

SHARDS = (
    ShardInfo("train-00000.parquet", "train", 3, 30, 400, "aa"),
    ShardInfo("train-00001.parquet", "train", 2, 20, 300, "bb"),
    ShardInfo("validation-00000.parquet", "validation", 1, 7, 100, "cc"),
)
MANIFEST = Manifest(TINY, Tokenizer("words", 32, "dd"), "tiny", 16.0, "dataset", "tests", "0", "main", shards=SHARDS)


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
    del content["steering"]  # as of sets that know nothing of it
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
        {"tokenizer": Tokenizer("words", 32, "ee")},
        {"shards": (replace(SHARDS[0], sha256="ff"), *SHARDS[1:])},
        {"shards": (replace(SHARDS[0], split="validation"), *SHARDS[1:])},
        {"shards": SHARDS[:2]},
    ],
    ids=["geometry", "tokenizer", "shard", "split", "missing"],
)
def test_the_fingerprint_follows_the_content(change):
    assert replace(MANIFEST, **change).fingerprint != MANIFEST.fingerprint


def test_the_fingerprint_ignores_where_and_with_what_it_was_written():
    moved = replace(MANIFEST, tool_version="9", source="elsewhere", tokenizer=Tokenizer("other name", 32, "dd"))
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
