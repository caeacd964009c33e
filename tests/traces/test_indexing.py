"""Positions, sequence ids and slices of a trace set and of its splits find the sequences that iteration yields."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from _helpers.common import tiny_traces
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_beyond.errors import UserError
from moe_beyond.traces import TraceSet
from moe_beyond.traces.storage import Storage


def same(one, other):
    np.testing.assert_array_equal(one.experts, other.experts)
    np.testing.assert_array_equal(one.token_ids, other.token_ids)
    assert (one.sequence_id, one.source, one.decode_start) == (other.sequence_id, other.source, other.decode_start)


@settings(max_examples=15, deadline=None)
@given(sequences=st.integers(1, 30), seed=st.integers(0, 5), data=st.data())
def test_indexing_agrees_with_iteration(sequences, seed, data):
    with tempfile.TemporaryDirectory() as folder:
        folder = tiny_traces(f"{folder}/set", sequences=sequences, seed=seed).folder
        for split in (None, *TraceSet(folder).manifest.splits):
            traces = TraceSet(folder)  # without the sequence ids that another split's reads have found
            part = traces if split is None else traces.split(split)
            listed = list(TraceSet(folder).traces(split))
            assert len(part) == len(listed)
            for order in data.draw(st.lists(st.integers(-len(listed), len(listed) - 1), max_size=8)):
                same(part[order], listed[order])
                same(part[listed[order].sequence_id], listed[order])
                assert listed[order].sequence_id in part
            for trace, expected in zip(part, listed, strict=True):
                same(trace, expected)
            cut = slice(
                data.draw(st.integers(-9, 9)), data.draw(st.integers(-9, 9)), data.draw(st.sampled_from([1, 2]))
            )
            assert [trace.sequence_id for trace in part[cut]] == [trace.sequence_id for trace in listed[cut]]


def test_what_is_not_there_is_an_error_with_the_folder(trace_set):
    validation = trace_set.split("validation")
    assert ("s0" in trace_set, "s0" in validation, "s3" in validation, 0 in trace_set) == (True, False, True, False)
    for sequences, count in ((trace_set, 12), (validation, 3)):
        for position in (count, -count - 1):
            with pytest.raises(IndexError, match=f"position {position} is out of range for {count} sequences"):
                sequences[position]
    for sequences, missing in ((trace_set, "x"), (validation, "s0")):
        with pytest.raises(UserError, match=f"{trace_set.folder}: has no sequence {missing!r}"):
            sequences[missing]
    with pytest.raises(UserError, match=r"unknown split of .* 'valid'; did you mean 'validation'"):
        trace_set.split("valid")
    with pytest.raises(TypeError):
        trace_set[1.0]


def test_only_the_shards_that_are_needed_are_read_and_each_is_verified(trace_set, monkeypatch):
    files = []
    verified = Storage.read_verified
    monkeypatch.setattr(
        Storage, "read_verified", lambda self, file, *rest: files.append(file) or verified(self, file, *rest)
    )
    opened = TraceSet(trace_set.folder)
    assert [opened[0].sequence_id, opened[1].sequence_id, opened["s0"].sequence_id] == ["s0", "s1", "s0"]
    assert files == ["train-00000.parquet"]
    (last,) = opened.shards("validation")
    path = Path(trace_set.folder, last.file)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=f"{last.file}: shard is damaged"):
        opened[-1]
    assert opened[0].sequence_id == "s0"


def test_a_line_says_what_the_set_is(trace_set):
    tokens = {split: sum(map(len, trace_set.split(split))) for split in ("train", "validation")}
    assert repr(trace_set) == (
        f"<TraceSet {trace_set.folder}: tiny; train: 9 sequences, {tokens['train']:,} tokens; "
        f"validation: 3 sequences, {tokens['validation']:,} tokens>"
    )
    assert repr(trace_set.split("train")) == (
        f"<Split train of {trace_set.folder}: tiny; 9 sequences, {tokens['train']:,} tokens>"
    )
