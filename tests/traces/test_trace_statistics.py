"""Popularity, entropy and reuse against hand-worked numbers and plain loops."""

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_beyond.geometry import Geometry
from moe_beyond.traces.manifest import Manifest, Tokenizer
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.statistics import activation_counts, normalized_entropy, reuse, summarize
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.writer import writing


def write(folder, experts_of, *, num_experts=4, shard_tokens=3):
    """A set of one sequence per array of ``[T][L][K]`` ids."""
    layers, top_k = len(experts_of[0][0]), len(experts_of[0][0][0])
    geometry = Geometry("g", tuple(range(5, 5 + layers)), num_experts, top_k, 1000, 0)
    with writing(
        folder, Manifest(geometry, Tokenizer("t", 9), "g", 16.0, "dataset", "tests", "0"), shard_tokens=shard_tokens
    ) as w:
        for i, experts in enumerate(experts_of):
            ids = np.zeros(len(experts), np.int32)
            w.write(Trace(f"s{i}", "tests", ids, np.array(experts), len(experts)), "train" if i == 0 else "validation")
    return TraceSet(str(folder))


HAND = [
    # layer 5: {0,1} {1,2} {2,1}; layer 6: {0,1} three times
    [[[0, 1], [0, 1]], [[1, 2], [1, 0]], [[2, 1], [0, 1]]],
    [[[3, 0], [0, 1]]],
]


def test_counts_by_hand(tmp_path):
    traces = write(tmp_path / "set", HAND)
    assert activation_counts(traces).tolist() == [[2, 3, 2, 1], [4, 4, 0, 0]]
    assert activation_counts(traces, "validation").tolist() == [[1, 0, 0, 1], [1, 1, 0, 0]]


def test_reuse_by_hand_does_not_cross_sequences(tmp_path):
    traces = write(tmp_path / "set", HAND)
    # Layer 5: {0,1} -> {1,2} shares one of two, {1,2} -> {2,1} both: 3 of 4. The second sequence has no pair.
    assert reuse(traces).tolist() == [0.75, 1.0]
    assert np.isnan(reuse(traces, "validation")).all()


def test_entropy_by_hand():
    counts = np.array([[1, 1, 1, 1], [2, 2, 0, 0], [5, 0, 0, 0], [2, 1, 1, 0]])
    # ln 4 = 2 ln 2: two equal experts give half, and (1/2, 1/4, 1/4) gives 1.5 ln 2 of 2 ln 2.
    np.testing.assert_allclose(normalized_entropy(counts), [1, 0.5, 0, 0.75], atol=1e-12)


def test_summary_by_hand(tmp_path):
    summary = summarize(write(tmp_path / "set", HAND))
    size = sum(path.stat().st_size for path in (tmp_path / "set").glob("*.parquet"))
    assert (summary["sequences"], summary["tokens"], summary["entries"]) == (2, 4, 8)
    assert summary["bytes_per_entry"] == round(size / 8, 4)
    assert summary["token_to_token_reuse"] == 0.875
    assert summary["splits"] == {
        "train": {"sequences": 1, "tokens": 3},
        "validation": {"sequences": 1, "tokens": 1},
    }
    first, second = summary["by_layer"]
    assert first == {
        "layer": 5,
        "busiest_share": 0.375,
        "unused_experts": 0,
        "normalized_entropy": round(
            -(0.25 * math.log(0.25) * 2 + 0.375 * math.log(0.375) + 0.125 * math.log(0.125)) / math.log(4), 6
        ),
        "token_to_token_reuse": 0.75,
        "popularity": [0.25, 0.375, 0.25, 0.125],
    }
    assert (second["layer"], second["unused_experts"], second["normalized_entropy"]) == (6, 2, 0.5)


def test_a_figure_that_does_not_exist_is_null_in_json(tmp_path):
    summary = summarize(write(tmp_path / "set", [HAND[1]]))
    assert summary["token_to_token_reuse"] is None
    assert [layer["token_to_token_reuse"] for layer in summary["by_layer"]] == [None, None]
    json.dumps(summary, allow_nan=False)


@pytest.mark.filterwarnings("error")
def test_one_expert_a_layer_is_a_summary_without_warnings(tmp_path):
    summary = summarize(write(tmp_path / "set", [[[[0], [0]], [[0], [0]]]], num_experts=1))
    assert [layer["busiest_share"] for layer in summary["by_layer"]] == [1, 1]
    json.dumps(summary, allow_nan=False)


@pytest.mark.filterwarnings("error")
def test_slots_without_an_expert_count_for_nothing(tmp_path):
    # Layer 5: {0} {0,1} {}; layer 6 has none at all.
    traces = write(tmp_path / "set", [[[[0, -1], [-1, -1]], [[1, 0], [-1, -1]], [[-1, -1], [-1, -1]]]])
    assert activation_counts(traces).tolist() == [[2, 1, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(reuse(traces), [0.5, np.nan])  # of the two that the second token uses, one
    first, second = summarize(traces)["by_layer"]
    assert (first["busiest_share"], first["unused_experts"]) == (round(2 / 3, 6), 2)
    assert (second["busiest_share"], second["unused_experts"], second["token_to_token_reuse"]) == (0, 4, None)


entries = st.permutations(range(6)).map(lambda ids: ids[:3])
sequences = st.lists(st.lists(st.tuples(entries, entries), min_size=1, max_size=8), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(sequences, st.integers(1, 9))
def test_counts_and_reuse_equal_plain_loops(tmp_path_factory, experts_of, shard_tokens):
    traces = write(tmp_path_factory.mktemp("s") / "set", experts_of, num_experts=6, shard_tokens=shard_tokens)
    counts, shared = activation_counts(traces), reuse(traces)
    for layer in range(2):
        plain = Counter(expert for sequence in experts_of for token in sequence for expert in token[layer])
        assert counts[layer].tolist() == [plain[expert] for expert in range(6)]
        pairs = [
            len(set(before[layer]) & set(now[layer]))
            for sequence in experts_of
            for before, now in itertools.pairwise(sequence)
        ]
        assert shared[layer] == pytest.approx(sum(pairs) / (3 * len(pairs))) if pairs else np.isnan(shared[layer])
