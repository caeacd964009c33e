"""Reading verifies: what is damaged is named and never skipped."""

import hashlib
import json
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from _helpers.common import TINY, VOCAB, error_line, tiny_trace, word_tokenizer

from moe_beyond.cli.main import main
from moe_beyond.errors import UserError
from moe_beyond.traces.manifest import Manifest
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.schema import to_table
from moe_beyond.traces.shard import decode
from moe_beyond.traces.tokenizers import load_vocabulary
from moe_beyond.traces.writer import open_writer


def test_a_split_is_read_alone_and_all_splits_in_order(trace_set):
    # tiny_traces sends every fourth of its twelve sequences to validation.
    held_out = ["s3", "s7", "s11"]
    train = [f"s{i}" for i in range(12) if f"s{i}" not in held_out]
    assert [trace.sequence_id for trace in trace_set.traces("validation")] == held_out
    assert [trace.sequence_id for trace in trace_set.traces("train")] == train
    assert [trace.sequence_id for trace in trace_set.traces()] == train + held_out
    assert len(trace_set.shards("train")) > 1  # or this test would not see shard boundaries
    assert trace_set.token_strings is None


def test_any_filesystem_will_do(trace_set):
    memory = fsspec.filesystem("memory")
    memory.put(trace_set.folder, "/elsewhere", recursive=True)
    remote = TraceSet("memory://elsewhere")
    for here, there in zip(trace_set.traces(), remote.traces(), strict=True):
        np.testing.assert_array_equal(here.experts, there.experts)
    memory.rm(f"/elsewhere/{trace_set.shards()[0].file}")
    with pytest.raises(UserError, match=r"memory://elsewhere/train-00000\.parquet: shard named in manifest"):
        list(remote.traces())


def test_a_folder_may_be_moved(trace_set, tmp_path):
    shutil.move(trace_set.folder, tmp_path / "moved")
    assert len(list(TraceSet(str(tmp_path / "moved")).traces())) == 12


def test_an_unknown_split_lists_the_splits(trace_set):
    with pytest.raises(UserError, match=r"unknown split of .* 'valid'; did you mean 'validation'"):
        list(trace_set.traces("valid"))
    with pytest.raises(UserError, match="known: train, validation"):
        trace_set.lengths("x")


@pytest.mark.parametrize("damage", ["flip", "truncate", "append"])
def test_a_damaged_shard_is_named_by_every_reader(damage, trace_set):
    info = trace_set.shards()[1]
    path = Path(trace_set.folder) / info.file
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes({"flip": content, "truncate": content[:-1], "append": content + b"x"}[damage])
    for read in (lambda: trace_set.read(info), trace_set.lengths, lambda: list(trace_set.traces())):
        with pytest.raises(UserError, match=r"train-00001\.parquet: shard is damaged"):
            read()


def test_traces_before_a_damaged_shard_are_not_the_whole_answer(trace_set):
    (Path(trace_set.folder) / trace_set.shards()[-1].file).unlink()
    with pytest.raises(UserError, match="is missing"):
        list(trace_set.traces())


def test_a_folder_without_a_readable_manifest(trace_set, tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no trace set here .*; give the folder of one"):
        TraceSet(str(tmp_path / "nowhere"))
    manifest = Path(trace_set.folder) / "manifest.json"
    for content in (b"", b"{", b"\xff\xfe"):
        manifest.write_bytes(content)
        with pytest.raises(UserError, match=r"manifest\.json: is not JSON"):
            TraceSet(trace_set.folder)
    manifest.write_text("[]")
    with pytest.raises(UserError, match=r"manifest\.json: "):
        TraceSet(trace_set.folder)


@pytest.mark.parametrize("name", ["", " ", "a\0b"])
def test_a_name_that_names_no_folder(name, capsys):
    assert error_line(capsys, ["inspect", name]).startswith(
        f"{name!r} is not the name of a folder; give the folder of a"
    )
    words = ["replay", "--traces", name, "--budget", "8"]
    assert error_line(capsys, words).startswith(f"{name!r} is not the name of a folder; give the folder of a trace set")


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_tokenizer_that_is_not_the_manifests_is_refused_by_every_command(content, tmp_path, capsys):
    words = word_tokenizer(tmp_path / "words.json", [str(number) for number in range(VOCAB)])
    manifest = Manifest(TINY, load_vocabulary(str(words)).describe(), "tiny", 16.0, "dataset", "tests", "0")
    with open_writer(tmp_path / "set", manifest, vocabulary=words) as writer:
        writer.write(tiny_trace("a", 8, np.random.default_rng(0)), "train")
    carried, folder = tmp_path / "set/tokenizer.json", str(tmp_path / "set")
    assert main(["inspect", folder]) == 0
    capsys.readouterr()
    carried.unlink()
    if content is not None:
        carried.write_text(content)
    says = "tokenizer named in manifest.json is missing" if content is None else "tokenizer is damaged"
    for command in (["inspect", folder], ["replay", "--traces", folder, "--budget", "8"]):
        assert error_line(capsys, command).startswith(f"{carried}: {says}")


@pytest.mark.parametrize("place", ["file", "foo://bar"])
def test_a_place_that_cannot_be_a_folder(place, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=place):
        TraceSet(place if "://" in place else str(tmp_path / place))


TABLE = to_table([tiny_trace("a", 3, np.random.default_rng(0)), tiny_trace("b", 2, np.random.default_rng(1))], TINY)


def with_column(name: str, values: pa.Array) -> pa.Table:
    return TABLE.set_column(TABLE.schema.get_field_index(name), name, values)


def test_decode_finds_the_rows():
    shard = decode(TABLE, TINY, "here")
    assert shard.offsets.tolist() == [0, 3, 5]
    assert [len(shard.trace(row)) for row in range(2)] == [3, 2]
    assert shard.experts.shape == (5, 4, 2)


@pytest.mark.parametrize("name", TABLE.schema.names)
def test_a_shard_without_a_column_is_named(name):
    with pytest.raises(UserError, match=f"here: column '{name}' is missing"):
        decode(TABLE.drop_columns([name]), TINY, "here")


def test_a_column_of_another_type_is_named():
    wide = with_column("experts", TABLE["experts"].cast(pa.list_(pa.int64())))
    with pytest.raises(UserError, match=r"here: column 'experts' must be list<.*uint8> \(got list<.*int64>\)"):
        decode(wide, TINY, "here")


def test_rows_whose_lists_do_not_match_are_named():
    # The total is right, so only the row by row check sees it.
    experts = TABLE["experts"].combine_chunks().values
    shifted = pa.ListArray.from_arrays(pa.array([0, 32, 40], pa.int32()), experts)
    with pytest.raises(UserError, match="here: row 0: experts must be 4 x 2 ids per token"):
        decode(with_column("experts", shifted), TINY, "here")


def test_an_expert_that_does_not_exist_is_named():
    ids = TABLE["experts"].combine_chunks().values.to_numpy().copy()
    ids[7] = 8
    column = pa.ListArray.from_arrays(pa.array([0, 24, 40], pa.int32()), pa.array(ids))
    with pytest.raises(UserError, match=r"here: row 0 \(sequence 'a'\): expert id 8 is out of range 0\.\.7"):
        decode(with_column("experts", column), TINY, "here")


def test_gate_weights_whose_rows_do_not_match_are_named():
    weights = pa.ListArray.from_arrays(pa.array([0, 32, 40], pa.int32()), pa.array(np.ones(40, np.float16)))
    with pytest.raises(UserError, match=r"here: .*gate_weights|here: row 0"):
        decode(TABLE.append_column("gate_weights", weights), TINY, "here")


def test_an_empty_table_has_no_rows():
    shard = decode(TABLE.schema.empty_table(), TINY, "here")
    assert len(shard) == 0
    assert shard.experts.shape == (0, 4, 2)


def test_a_shard_in_several_row_groups_is_one_table(tmp_path):
    traces = [tiny_trace(f"s{i}", 1 + i % 3, np.random.default_rng(i)) for i in range(7)]
    pq.write_table(to_table(traces, TINY), tmp_path / "x.parquet", row_group_size=2)
    chunks = [pq.ParquetFile(tmp_path / "x.parquet").read_row_group(i) for i in range(4)]
    shard = decode(pa.concat_tables(chunks), TINY, "here")
    for row, trace in enumerate(traces):
        np.testing.assert_array_equal(shard.trace(row).experts, trace.experts)
        np.testing.assert_array_equal(shard.trace(row).token_ids, trace.token_ids)


def test_a_changed_tokenizer_is_not_used_for_its_strings(tmp_path):
    words = word_tokenizer(tmp_path / "words.json", ["<unk>", "a", "b"])
    manifest = Manifest(TINY, load_vocabulary(str(words)).describe(), "tiny", 16.0, "dataset", "tests", "0")
    with open_writer(tmp_path / "set", manifest, vocabulary=words) as writer:
        writer.write(tiny_trace("a", 2, np.random.default_rng(0), vocab=3))
    carried = tmp_path / "set" / "tokenizer.json"
    assert hashlib.sha256(carried.read_bytes()).hexdigest() == manifest.tokenizer.sha256
    assert TraceSet(str(tmp_path / "set")).token_strings == ["<unk>", "a", "b"]
    changed = json.loads(carried.read_text())
    changed["model"]["vocab"] = {"<unk>": 0, "b": 1, "a": 2}  # the same strings, but other ids
    carried.write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        _ = TraceSet(str(tmp_path / "set")).token_strings
