"""What is exported and imported again is the same; libCacheSim reads what is written for it, and counts the same."""

import json
import tempfile
from itertools import pairwise
from pathlib import Path

import libcachesim
import numpy as np
import pytest
from _helpers.common import VOCAB, tiny_traces, word_tokenizer
from _helpers.recordings import SMALL, random_experts
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_beyond.cli.main import main
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry, Preset
from moe_beyond.traces.formats import FORMATS
from moe_beyond.traces.formats import libcachesim as libcachesim_export
from moe_beyond.traces.manifest import NO_TOKEN_IDS, Manifest, Tokenizer
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.writer import open_writer


def small_set(folder, shapes, geometry=SMALL, tokenizer=NO_TOKEN_IDS):
    """A trace set with a sequence for each (length, decode_start)."""
    manifest = Manifest(geometry, tokenizer, "small", 16.0, "mixed", "tests", "0")
    with open_writer(folder, manifest) as writer:
        for number, (length, start) in enumerate(shapes):
            ids = np.random.default_rng(number).integers(0, tokenizer.vocab_size, length)
            writer.write(Trace(f"s{number}", "tests", ids, random_experts(length, number, geometry), start))
    return TraceSet(str(folder))


@pytest.mark.parametrize("name", ["arrays.npz", "arrays"])
def test_arrays_come_back_with_names_token_ids_and_decode_starts(name, tmp_path):
    traces = small_set(tmp_path / "set", [(3, 3), (12, 4), (1, 0)], tokenizer=Tokenizer("words", VOCAB))
    FORMATS["vllm"].writer(traces, tmp_path / name)
    words = word_tokenizer(tmp_path / "words.json", [f"w{i}" for i in range(VOCAB)])
    again = FORMATS["vllm"].reader(tmp_path / name, tmp_path / "again", Preset(SMALL), tokenizer=str(words))
    for before, after in zip(traces.traces(), again.traces(), strict=True):
        assert (before.sequence_id, before.decode_start) == (after.sequence_id, after.decode_start)
        np.testing.assert_array_equal(before.token_ids, after.token_ids)
        np.testing.assert_array_equal(before.experts, after.experts)
    assert again.manifest.author == "mixed"


def test_arrays_are_what_numpy_loads_and_the_same_set_gives_the_same_bytes(tmp_path):
    wide = Geometry("wide", (0, 3), num_experts=300, top_k=3, params_per_expert=10, other_params_per_layer=0)
    traces = small_set(tmp_path / "set", [(40, 2)], wide)
    for name in ("a.npz", "b.npz"):
        FORMATS["vllm"].writer(traces, tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert sorted(arrays.files) == ["s0", "s0.decode_start"]  # no token ids were recorded
        assert arrays["s0"].dtype == np.int16
        np.testing.assert_array_equal(arrays["s0"], random_experts(40, 0, wide))


# A sequence that was only read, and after it one that was only written, look like one in a merged profile.
sequences = st.lists(
    st.integers(1, 9).flatmap(lambda length: st.tuples(st.just(length), st.integers(0, length))), min_size=1, max_size=5
)


@settings(max_examples=40)
@given(sequences, st.sampled_from([SMALL, Geometry("one layer", (4,), 8, 3, 10, 0)]))
def test_a_llama_cpp_profile_comes_back(shapes, geometry):
    assume(not any(length == start and following == 0 for (length, start), (_, following) in pairwise(shapes)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        traces = small_set(folder / "set", shapes, geometry)
        FORMATS["llama-cpp"].writer(traces, folder / "profile.csv")
        again = FORMATS["llama-cpp"].reader(folder / "profile.csv", folder / "again", Preset(geometry))
        for before, after in zip(traces.traces(), again.traces(), strict=True):
            np.testing.assert_array_equal(before.experts, after.experts)
            assert before.decode_start == after.decode_start


def test_a_llama_cpp_profile_is_written_as_its_tool_writes_it(tmp_path):
    traces = small_set(tmp_path / "set", [(3, 2)])
    FORMATS["llama-cpp"].writer(traces, tmp_path / "profile.csv")
    ids = random_experts(3)
    expected = [(-2, 1, 0, 0), (-1, 1, 1, 0), (-2, 2, 0, 1), (-1, 2, 1, 1), (-2, 3, 0, 2), (-1, 3, 1, 2)]
    expected += [(0, 1, 2, 0), (0, 2, 2, 1), (0, 3, 2, 2)]
    lines = [f"{position},{layer},{ids[t, row][0]},{ids[t, row][1]}" for position, layer, t, row in expected]
    assert (tmp_path / "profile.csv").read_text().splitlines() == lines


def test_a_split_alone_is_exported(tmp_path):
    traces = tiny_traces(tmp_path / "set")
    FORMATS["vllm"].writer(traces, tmp_path / "out", "validation")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {name for name in names if name.count(".") == 1} == {"s3.npy", "s7.npy", "s11.npy"}
    FORMATS["libcachesim"].writer(traces, tmp_path / "out.oracleGeneral", "validation")
    tokens = sum(shard.tokens for shard in traces.shards("validation"))
    assert (tmp_path / "out.oracleGeneral").stat().st_size == 24 * tokens * traces.geometry.demand_per_token


@pytest.mark.parametrize(("policy", "theirs"), [("lru", "LRU"), ("belady", "Belady")])
def test_libcachesim_reads_the_stream_and_counts_as_a_sequential_replay(policy, theirs, tmp_path, capsys):
    traces, stream = tiny_traces(tmp_path / "set", sequences=40), tmp_path / "set.oracleGeneral"
    assert main(["export", "libcachesim", traces.folder, str(stream)]) == 0
    assert "40 sequences" in capsys.readouterr().out
    words = ["replay", "--traces", traces.folder, "--budget", "9", "--policy", policy, "--sequential", "--carry-over"]
    assert main([*words, "--json", "-"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    (found,) = [result for result in results if result["policy"] == policy]
    reader = libcachesim.TraceReader(str(stream), libcachesim.TraceType.ORACLE_GENERAL_TRACE)
    miss_ratio, _ = getattr(libcachesim, theirs)(cache_size=9).process_trace(reader)
    accesses = traces.manifest.tokens * traces.geometry.demand_per_token
    assert found["accesses"] == accesses
    assert found["hits"] == accesses - round(miss_ratio * accesses)
    assert 0.1 < found["hit_rate"] < 0.9


def test_a_slot_without_an_expert_is_no_request_and_formats_that_cannot_say_it_refuse(tmp_path):
    experts = np.array([[[3, 255], [1, 2], [255, 0]], [[3, 0], [255, 255], [7, 6]]], np.uint8)
    with open_writer(tmp_path / "set", Manifest(SMALL, NO_TOKEN_IDS, "small", 16.0, "mixed", "tests", "0")) as writer:
        writer.write(Trace("s0", "tests", np.zeros(2, np.int64), experts, 1))
    traces = TraceSet(str(tmp_path / "set"))
    FORMATS["libcachesim"].writer(traces, tmp_path / "set.oracleGeneral")
    records = np.fromfile(tmp_path / "set.oracleGeneral", libcachesim_export.RECORD)
    size = SMALL.num_experts
    assert records["id"].tolist() == [3, size + 1, size + 2, 2 * size, 3, 0, 2 * size + 7, 2 * size + 6]
    assert records["next_access"].tolist() == [4, -1, -1, -1, -1, -1, -1, -1]
    for name in ("vllm", "llama-cpp"):
        with pytest.raises(UserError, match="'s0' has entries with fewer than 2 experts"):
            FORMATS[name].writer(traces, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_set_and_a_split_are_copied_whole(tmp_path):
    traces = tiny_traces(tmp_path / "set", hidden_states=True)
    assert main(["export", "trace-set", str(tmp_path / "set"), str(tmp_path / "copy")]) == 0
    copy = TraceSet(str(tmp_path / "copy"))
    assert copy.manifest.tokenizer == traces.manifest.tokenizer
    for before, after in zip(traces.traces(hidden_states=True), copy.traces(hidden_states=True), strict=True):
        assert (before.sequence_id, before.source, before.decode_start) == (
            after.sequence_id, after.source, after.decode_start,
        )  # fmt: skip
        np.testing.assert_array_equal(before.token_ids, after.token_ids)
        np.testing.assert_array_equal(before.experts, after.experts)
        np.testing.assert_array_equal(before.hidden_states.layer_inputs, after.hidden_states.layer_inputs)
    assert np.array_equal(copy.routers.weight, traces.routers.weight)
    assert main(["export", "trace-set", str(tmp_path / "set"), str(tmp_path / "half"), "--split", "validation"]) == 0
    half = TraceSet(str(tmp_path / "half"))
    assert half.manifest.splits == ("validation",)
    assert [trace.sequence_id for trace in half] == [trace.sequence_id for trace in traces.split("validation")]


def test_without_tokens_a_set_holds_nothing_from_which_text_can_be_read(tmp_path, capsys):
    traces = tiny_traces(tmp_path / "set", hidden_states=True)
    before = sorted(tmp_path.iterdir())
    assert main(["export", "trace-set", str(tmp_path / "set"), str(tmp_path / "public"), "--drop-tokens"]) == 0
    assert set(tmp_path.iterdir()) - set(before) == {tmp_path / "public"}
    public = TraceSet(str(tmp_path / "public"))
    assert not public.manifest.has_token_ids
    assert public.manifest.hidden_size is None
    assert {path.suffix for path in (tmp_path / "public").iterdir()} == {".parquet", ".json", ".md"}
    assert "none; token ids were not recorded" in (tmp_path / "public/README.md").read_text()
    splits = [trace for name in traces.manifest.splits for trace in traces.split(name)]
    for number, (kept, trace) in enumerate(zip(public, splits, strict=True)):
        assert (kept.sequence_id, kept.source, kept.decode_start) == (str(number), "", trace.decode_start)
        assert not kept.token_ids.any()
        assert kept.gate_weights is None
        np.testing.assert_array_equal(kept.experts, trace.experts)
    assert main(["export", "vllm", str(tmp_path / "set"), str(tmp_path / "arrays"), "--drop-tokens"]) == 0
    assert {path.name.partition(".")[2] for path in (tmp_path / "arrays").iterdir()} == {"npy", "decode_start.npy"}
