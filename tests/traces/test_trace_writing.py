"""Entries in = entries out, on disk and for other readers; what does not fit leaves nothing behind."""

import hashlib
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from _helpers.common import TINY, tiny_trace, with_holes, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.traces.manifest import Manifest, Tokenizer
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.schema import arrow_schema, experts_dtype
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.writer import open_writer


def manifest_of(geometry: Geometry) -> Manifest:
    return Manifest(geometry, Tokenizer("tests", 1000), "tiny", 16.0, "dataset", "tests", "0")


def write_all(folder, traces):
    with open_writer(folder, manifest_of(TINY)) as writer:
        for trace in traces:
            writer.write(trace)


def random_trace(name, length, decode_start, geometry, rng, *, gates):
    layers, experts, top_k = geometry.shape()
    chosen = rng.permuted(np.tile(np.arange(experts), (length, layers, 1)), axis=-1)[..., :top_k]
    chosen = with_holes(chosen, rng)  # -1 here, and 255 where ids are bytes
    weights = rng.random(chosen.shape).astype(np.float16) if gates else None
    token_ids = rng.integers(0, 1000, length).astype(np.int32)
    return Trace(name, f"from {name}", token_ids, chosen.astype(experts_dtype(geometry)), decode_start, weights)


def same(one: Trace, other: Trace) -> bool:
    if (one.gate_weights is None) != (other.gate_weights is None):
        return False
    return (
        (one.sequence_id, one.source, one.decode_start) == (other.sequence_id, other.source, other.decode_start)
        and all(
            a.dtype == b.dtype and np.array_equal(a, b)
            for a, b in [(one.token_ids, other.token_ids), (one.experts, other.experts)]
        )
        and (one.gate_weights is None or np.array_equal(one.gate_weights, other.gate_weights))
    )


shapes = st.tuples(st.integers(1, 4), st.sampled_from([2, 8, 64, 255, 256, 300]), st.integers(1, 2))


@settings(max_examples=40, deadline=None)
@given(
    shape=shapes,
    rows=st.lists(
        st.tuples(st.text(max_size=6), st.integers(1, 30), st.sampled_from(["train", "validation", "test"])),
        min_size=1,
        max_size=8,
        unique_by=lambda row: row[0],
    ),
    shard_tokens=st.integers(1, 60),
    gates=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_trace_set_is_read_as_it_was_written(shape, rows, shard_tokens, gates, seed):
    layers, experts, top_k = shape
    geometry = Geometry("any", tuple(range(layers)), experts, top_k, 1000, 0)
    rng = np.random.default_rng(seed)
    written: dict[str, list[Trace]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set"
        with open_writer(path, manifest_of(geometry), shard_tokens=shard_tokens) as writer:
            for name, length, split in rows:
                trace = random_trace(name, length, int(rng.integers(0, length + 1)), geometry, rng, gates=gates)
                writer.write(trace, split)
                written.setdefault(split, []).append(trace)
                assert writer.tokens == sum(len(t) for traces in written.values() for t in traces)
        traces = TraceSet(str(path))
        assert set(traces.manifest.splits) == set(written)
        for split, expected in written.items():
            found = list(traces.traces(split))
            assert len(found) == len(expected)
            assert all(map(same, found, expected))
            assert np.concatenate(traces.lengths(split)).tolist() == [len(trace) for trace in expected]
            # A shard closes with the sequence that fills it, so only a split's last one may hold less.
            assert all(info.tokens >= shard_tokens for info in traces.shards(split)[:-1])
        assert len(list(traces.traces())) == len(rows)
        for info in traces.shards():
            shard = traces.read(info)
            assert (len(shard), len(shard.token_ids)) == (info.sequences, info.tokens)
            content = (path / info.file).read_bytes()
            assert (info.bytes, info.sha256) == (len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize(("experts", "dtype"), [(64, "uint8"), (255, "uint8"), (256, "int16"), (512, "int16")])
def test_ids_are_two_bytes_only_where_one_is_too_small(experts, dtype, tmp_path):
    geometry = replace(TINY, num_experts=experts)
    trace = random_trace("a", 3, 3, geometry, np.random.default_rng(0), gates=False)
    trace.experts[0, 0] = [experts - 1, 0]
    with open_writer(tmp_path / "set", manifest_of(geometry)) as writer:
        writer.write(trace)
    schema = pq.read_schema(tmp_path / "set" / "train-00000.parquet")
    assert schema.field("experts").type == pa.list_(pa.from_numpy_dtype(np.dtype(dtype)))
    read = next(TraceSet(str(tmp_path / "set")).traces())
    assert read.experts.dtype == dtype
    assert read.experts[0, 0].tolist() == [experts - 1, 0]


def test_the_columns_on_disk_are_those_of_the_contract(tmp_path):
    rng = np.random.default_rng(0)
    with open_writer(tmp_path / "set", manifest_of(TINY)) as writer:
        writer.write(random_trace("a", 5, 2, TINY, rng, gates=True))
    file = pq.ParquetFile(tmp_path / "set" / "train-00000.parquet")
    assert {field.name: str(field.type).split(":")[-1].strip(" >") for field in file.schema_arrow} == {
        "sequence_id": "string",
        "source": "string",
        "token_ids": "int32",
        "decode_start": "int32",
        "experts": "uint8",
        "gate_weights": "halffloat",
    }
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    assert [field.name for field in arrow_schema(TINY)] == file.schema_arrow.names[:-1]  # gate weights are optional


@pytest.mark.parametrize("gates", [False, True])
def test_datasets_reads_the_folder_as_it_is(gates, tmp_path):
    rng = np.random.default_rng(0)
    written = [random_trace(f"s{i}", 4 + i, 2, TINY, rng, gates=gates) for i in range(3)]
    with open_writer(tmp_path / "set", manifest_of(TINY), shard_tokens=5) as writer:
        for trace in written:
            writer.write(trace)
    files = {"train": str(tmp_path / "set" / "train-*.parquet")}
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["sequence_id"] == ["s0", "s1", "s2"]
    for row, trace in zip(loaded, written, strict=True):
        assert row["token_ids"] == trace.token_ids.tolist()
        assert row["experts"] == trace.experts.ravel().tolist()
        assert row["decode_start"] == 2
        assert row.get("gate_weights") == (trace.gate_weights.ravel().tolist() if gates else None)


def test_the_same_traces_are_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        rng = np.random.default_rng(0)
        with open_writer(tmp_path / name, manifest_of(TINY)) as writer:
            writer.write(tiny_trace("a", 9, rng))
    for file in os.listdir(tmp_path / "one"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert sorted(os.listdir(tmp_path / "one")) == ["README.md", "manifest.json", "train-00000.parquet"]


def test_the_vocabulary_travels_with_the_set(tmp_path):
    words = word_tokenizer(tmp_path / "words.json", ["<unk>", "Ġthe", "a,b"])
    manifest = replace(manifest_of(TINY), tokenizer=Tokenizer("words", 5))
    with open_writer(tmp_path / "set", manifest, vocabulary=words) as writer:
        writer.write(tiny_trace("a", 2, np.random.default_rng(0), vocab=5))
    # Ids 3 and 4 have no string, which predictors must still be able to look up.
    assert TraceSet(str(tmp_path / "set")).token_strings == ["<unk>", "Ġthe", "a,b", "", ""]


GOOD = tiny_trace("bad", 3, np.random.default_rng(0))
NEGATIVE = GOOD.experts.astype(np.int16)
NEGATIVE[1, 2, 1] = -2
WEIGHTS = np.ones(GOOD.experts.shape, np.float16)


@pytest.mark.parametrize(
    ("trace", "says"),
    [
        (replace(GOOD, token_ids=GOOD.token_ids[:0], experts=GOOD.experts[:0]), "has no tokens"),
        (replace(GOOD, token_ids=GOOD.token_ids[:2]), r"shape \(2, 4, 2\) for .* \(got \(3, 4, 2\)\)"),
        (replace(GOOD, experts=GOOD.experts[:, :3]), r"shape \(3, 4, 2\) for 4 MoE layers x 8 .* \(got \(3, 3, 2\)\)"),
        (replace(GOOD, experts=GOOD.experts[..., :1]), r"shape \(3, 4, 2\) for .* \(got \(3, 4, 1\)\)"),
        (replace(GOOD, experts=GOOD.experts + np.uint8(8)), r"expert id \d+ is out of range 0\.\.7"),
        (replace(GOOD, experts=NEGATIVE), r"expert id -2 is out of range 0\.\.7"),
        (replace(GOOD, experts=np.full_like(GOOD.experts, 3)), "an expert occurs twice in one entry"),
        (replace(GOOD, gate_weights=WEIGHTS[:2]), "gate"),
        (replace(GOOD, gate_weights=WEIGHTS * np.float16(np.inf)), "gate weights are negative or not finite"),
        (replace(GOOD, gate_weights=np.full(GOOD.experts.shape, 1e6)), "gate weights are negative or not finite"),
        (replace(GOOD, token_ids=np.array([0, 1, 1000])), r"token id 1000 is out of range 0\.\.999"),
        (replace(GOOD, decode_start=4), r"decode_start 4 is not in 0\.\.3"),
    ],
    ids=["empty", "lengths", "layers", "top_k", "beyond", "negative", "twice", "gates", "inf", "large", "id", "start"],
)
def test_a_trace_that_does_not_fit_is_named_and_leaves_nothing(trace, says, tmp_path):
    with pytest.raises(UserError, match=says) as error:
        write_all(
            tmp_path / "set", [tiny_trace("good", 3, np.random.default_rng(1)), trace][trace.gate_weights is not None :]
        )
    assert "'bad'" in str(error.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("order", [1, -1])
def test_gate_weights_of_some_sequences_are_not_dropped_silently(order, tmp_path):
    both = [GOOD, replace(GOOD, sequence_id="weighted", gate_weights=WEIGHTS)]
    with pytest.raises(UserError, match="gate"):
        write_all(tmp_path / "set", both[::order])
    assert os.listdir(tmp_path) == []


def test_a_set_without_sequences_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no sequence was written"), open_writer(tmp_path / "set", manifest_of(TINY)):
        pass
    assert os.listdir(tmp_path) == []


def test_an_existing_set_is_kept(trace_set, tmp_path):
    before = {path.name: path.read_bytes() for path in Path(trace_set.folder).iterdir()}
    with pytest.raises(UserError, match="already exists"), open_writer(trace_set.folder, manifest_of(TINY)) as writer:
        writer.write(GOOD)
    assert {path.name: path.read_bytes() for path in Path(trace_set.folder).iterdir()} == before
    assert os.listdir(tmp_path) == [Path(trace_set.folder).name]


def test_an_id_is_written_once_and_a_split_is_a_plain_name(tmp_path):
    with pytest.raises(UserError, match="'bad': was written before"):
        write_all(tmp_path / "set", [GOOD, GOOD])
    for split in ("", "..", "a/b", "a\nb"):
        with pytest.raises(UserError, match=r"'bad': split must be a plain name"):
            with open_writer(tmp_path / "set", manifest_of(TINY)) as writer:
                writer.write(GOOD, split)
    assert os.listdir(tmp_path) == []
