"""Popularity, locality, gate mass and phases against hand-worked numbers and plain loops."""

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_beyond.geometry import Geometry
from moe_beyond.traces.analysis.counts import count_routing
from moe_beyond.traces.analysis.statistics import (
    distance_percentiles,
    jaccard,
    jaccard_by_chance,
    normalized_entropy,
    reuse,
    summarize,
    total_variation,
    used_again_within,
)
from moe_beyond.traces.manifest import Manifest, Tokenizer
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.writer import open_writer


def write(folder, experts_of, *, num_experts=4, shard_tokens=3, decode_starts=None, gates_of=None):
    """A set of one sequence per array of ``[T][L][K]`` ids."""
    layers, top_k = len(experts_of[0][0]), len(experts_of[0][0][0])
    geometry = Geometry("g", tuple(range(5, 5 + layers)), num_experts, top_k, 1000, 0)
    with open_writer(
        folder, Manifest(geometry, Tokenizer("t", 9), "g", 16.0, "dataset", "tests", "0"), shard_tokens=shard_tokens
    ) as w:
        for i, experts in enumerate(experts_of):
            ids = np.zeros(len(experts), np.int32)
            decode_start = len(experts) if decode_starts is None else decode_starts[i]
            gates = None if gates_of is None else np.array(gates_of[i], np.float16)
            trace = Trace(f"s{i}", "tests", ids, np.array(experts), decode_start, gates)
            w.write(trace, "train" if i == 0 else "validation")
    return TraceSet(str(folder))


HAND = [
    # layer 5: {0,1} {1,2} {2,1}; layer 6: {0,1} three times
    [[[0, 1], [0, 1]], [[1, 2], [1, 0]], [[2, 1], [0, 1]]],
    [[[3, 0], [0, 1]]],
]


def test_counts_by_hand(tmp_path):
    traces = write(tmp_path / "set", HAND)
    assert count_routing(traces).activations.tolist() == [[2, 3, 2, 1], [4, 4, 0, 0]]
    assert count_routing(traces, "validation").activations.tolist() == [[1, 0, 0, 1], [1, 1, 0, 0]]


def test_reuse_and_jaccard_by_hand_do_not_cross_sequences(tmp_path):
    traces = write(tmp_path / "set", HAND)
    # Layer 5: {0,1} -> {1,2} shares one of two, {1,2} -> {2,1} both: 3 of 4. The second sequence has no pair.
    counts = count_routing(traces)
    overlaps = counts.overlaps
    assert overlaps.tolist() == [[0, 1, 1], [0, 0, 2]]
    assert reuse(overlaps, counts.non_initial_uses).tolist() == [0.75, 1.0]
    np.testing.assert_allclose(jaccard(overlaps), [(1 / 3 + 1) / 2, 1.0])
    alone = count_routing(traces, "validation")
    assert np.isnan([reuse(alone.overlaps, alone.non_initial_uses), jaccard(alone.overlaps)]).all()


def test_reuse_distances_by_hand(tmp_path):
    # Layer 5: 0, 1 and 2 first, then 1 again, 2 and 1 again, each one token later; 3 and 0 in a sequence of their own.
    assert count_routing(write(tmp_path / "set", HAND)).distances.tolist() == [[5, 3, 0], [4, 4, 0]]
    gaps = [[[[expert]] for expert in (0, 1, 1, 2, 0, 1)]]  # 1 after one token, 0 after four, 1 after three
    assert count_routing(write(tmp_path / "gaps", gaps)).distances.tolist() == [[3, 1, 0, 1, 1, 0]]


def test_percentiles_of_distances_by_hand():
    distances = np.array([5, 4, 3, 2, 1])  # of ten that come again, four at 1, seven within 2, nine within 3
    assert distance_percentiles(distances) == {25: 1, 50: 2, 75: 3, 90: 3, 99: 4}
    assert used_again_within(distances) == {1: round(4 / 15, 6), 2: round(7 / 15, 6), 4: round(10 / 15, 6)}
    assert used_again_within(np.array([3, 1, 0, 0])) == {1: 0.25, 2: 0.25, 4: 0.25}
    assert used_again_within(np.array([3, 0, 1])) == {1: 0.0, 2: 0.25}
    for nothing in (np.array([3]), np.array([3, 0])):
        assert set(distance_percentiles(nothing).values()) == {None}
        assert used_again_within(nothing) == {1: 0.0}


def test_jaccard_by_chance_by_hand():
    activations = np.array([[2, 2, 2, 2], [4, 4, 0, 0], [4, 2, 2, 0]])
    # Among 36 pairs of two out of four, 6 are equal and 24 share one. Two certain experts are always shared. A certain
    # one and one of two by the toss of a coin are equal half the time, otherwise one of three is shared.
    np.testing.assert_allclose(jaccard_by_chance(activations, 2), [(6 + 24 / 3) / 36, 1, (1 + 1 / 3) / 2])


def test_entropy_by_hand():
    counts = np.array([[1, 1, 1, 1], [2, 2, 0, 0], [5, 0, 0, 0], [2, 1, 1, 0]])
    # ln 4 = 2 ln 2: two equal experts give half, and (1/2, 1/4, 1/4) gives 1.5 ln 2 of 2 ln 2.
    np.testing.assert_allclose(normalized_entropy(counts), [1, 0.5, 0, 0.75], atol=1e-12)


def test_total_variation_by_hand():
    apart, by_chance = total_variation(np.array([[3, 1, 0], [2, 2, 0]]), np.array([[1, 1, 2], [1, 1, 0]]), 1)
    # (3/4, 1/4, 0) against (1/4, 1/4, 1/2); the same.
    assert apart.tolist() == [0.5, 0]
    # Rates of both together: 1/2, 1/4, 1/4 of 4 and 4 tokens; 1/2 and 1/2 of 4 and 2.
    deviations = math.sqrt(0.25 / 2) + 2 * math.sqrt(0.1875 / 2), 2 * math.sqrt(0.25 * 0.75)
    np.testing.assert_allclose(by_chance, [math.sqrt(2 / math.pi) * sum_ / 2 for sum_ in deviations])


def test_two_samples_of_one_popularity_are_as_far_apart_as_chance_has_them():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(200):
        draws = (-rng.gumbel(size=(400, 12)) - np.linspace(0, 2, 12)).argsort(1)[:, :3]  # three of twelve, skewed
        parts = (np.bincount(part.ravel(), minlength=12)[None] for part in (draws[:300], draws[300:]))
        found.append(total_variation(*parts, 3))
    apart, by_chance = np.mean(found, axis=0)
    assert apart == pytest.approx(by_chance, rel=0.05)


def test_gate_mass_by_hand(tmp_path):
    experts = [[[[2, 0]], [[0, 1]], [[1, 3]]]]
    # Shares: 2 has 3/4 and 0 has 1/4; 1 has 3/4 (though named second), 0 has 1/4; all rounded to zero: not counted.
    gates = [[[[3, 1]], [[0.125, 0.375]], [[0, 0]]]]
    (row,) = summarize(write(tmp_path / "set", experts, gates_of=gates)).to_json()["by_layer"]
    assert row["gate_mass"] == {"by_rank": [0.75, 0.25], "popularity": [0.25, 0.375, 0.375, 0]}


def test_phases_by_hand(tmp_path):
    experts = [
        [[[0]], [[0]], [[1]], [[1]], [[0]]],  # two tokens read, three written
        [[[2]], [[2]]],  # all read: not compared
        [[[3]], [[3]]],  # all written: neither
    ]
    summary = summarize(write(tmp_path / "set", experts, decode_starts=[2, 2, 0])).to_json()
    assert summary["phases"] == {"sequences": 1, "prefill_tokens": 2, "decode_tokens": 3}
    (row,) = summary["by_layer"]
    assert row["popularity"] == [round(3 / 9, 6), round(2 / 9, 6), round(2 / 9, 6), round(2 / 9, 6)]
    assert row["token_to_token_reuse"] == round(4 / 6, 6)
    prefill, decode = row["phases"]["prefill"], row["phases"]["decode"]
    assert prefill == {"popularity": [1, 0, 0, 0], "normalized_entropy": 0, "token_to_token_reuse": 1}
    assert decode["popularity"] == [round(1 / 3, 6), round(2 / 3, 6), 0, 0]
    assert decode["token_to_token_reuse"] == round(1 / 3, 6)  # the first one written comes after the last one read
    assert decode["normalized_entropy"] == round((math.log(3) - 2 / 3 * math.log(2)) / math.log(4), 6)
    assert row["phases"]["total_variation"] == round(2 / 3, 6)


def test_summary_by_hand(tmp_path):
    traces = write(tmp_path / "set", HAND)
    summary = summarize(traces).to_json()
    size = sum(path.stat().st_size for path in (tmp_path / "set").glob("*.parquet"))
    assert (summary["sequences"], summary["tokens"], summary["entries"]) == (2, 4, 8)
    assert summary["bytes_per_entry"] == round(size / 8, 4)
    assert summary["token_to_token_reuse"] == 0.875
    assert summary["splits"] == {
        "train": {"sequences": 1, "tokens": 3},
        "validation": {"sequences": 1, "tokens": 1},
    }
    assert (summary["split"], summary["phases"]) == (None, None)
    first, second = summary["by_layer"]
    # Layer 6 uses only experts 0 and 1, so it has no information on layer 5.
    assert first.pop("next_layer") == {"mutual_information": 0, "dependence": None}
    assert 0 < first.pop("jaccard_by_chance") < 1
    assert first == {
        "layer": 5,
        "busiest_share": 0.375,
        "unused_experts": 0,
        "normalized_entropy": round(
            -(0.25 * math.log(0.25) * 2 + 0.375 * math.log(0.375) + 0.125 * math.log(0.125)) / math.log(4), 6
        ),
        "popularity": [0.25, 0.375, 0.25, 0.125],
        "token_to_token_reuse": 0.75,
        "jaccard": round(2 / 3, 6),
        "reuse_distance": {
            "percentiles": {"25": 1, "50": 1, "75": 1, "90": 1, "99": 1},
            "never_again": 0.625,
            "within": {"1": 0.375, "2": 0.375},
        },
        "gate_mass": None,
        "phases": None,
    }
    assert (second["layer"], second["unused_experts"], second["normalized_entropy"]) == (6, 2, 0.5)
    assert (second["next_layer"], second["jaccard_by_chance"]) == (None, 1)
    train = summarize(traces, "train").to_json()
    assert (train["split"], train["sequences"], train["tokens"], train["entries"]) == ("train", 1, 3, 6)
    assert train["bytes_per_entry"] == round((tmp_path / "set/train-00000.parquet").stat().st_size / 6, 4)


def test_a_figure_that_does_not_exist_is_null_in_json(tmp_path):
    summary = summarize(write(tmp_path / "set", [HAND[1]])).to_json()
    assert summary["token_to_token_reuse"] is None
    for layer in summary["by_layer"]:
        assert (layer["token_to_token_reuse"], layer["jaccard"]) == (None, None)
        assert set(layer["reuse_distance"]["percentiles"].values()) == {None}
        assert layer["reuse_distance"]["never_again"] == 1
    json.dumps(summary, allow_nan=False)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("layers", [1, 2])
def test_one_expert_a_layer_is_a_summary_without_warnings(layers, tmp_path):
    summary = summarize(write(tmp_path / "set", [[[[0]] * layers] * 2], num_experts=1, decode_starts=[1])).to_json()
    assert [layer["busiest_share"] for layer in summary["by_layer"]] == [1] * layers
    assert [layer["phases"]["total_variation"] for layer in summary["by_layer"]] == [0] * layers
    assert summary["dependence"] == [[None] * layers] * layers
    json.dumps(summary, allow_nan=False)


@pytest.mark.filterwarnings("error")
def test_slots_without_an_expert_count_for_nothing(tmp_path):
    # Layer 5: {0} {0,1} {}; layer 6 has none at all; layer 7 two each time.
    none, two = [-1, -1], [2, 3]
    experts = [[[[0, -1], none, two], [[1, 0], none, two], [none, none, two]]]
    traces = write(tmp_path / "set", experts, decode_starts=[1], gates_of=[np.array(experts[0]) >= 0])
    counts = count_routing(traces)
    assert counts.activations.tolist() == [[2, 1, 0, 0], [0, 0, 0, 0], [0, 0, 3, 3]]
    assert (counts.tokens, counts.all_top_k.tolist()) == (3, [False, False, True])
    # The second token uses two experts, one of them again; the third has none.
    np.testing.assert_array_equal(reuse(counts.overlaps, counts.non_initial_uses), [0.5, np.nan, 1])
    summary = summarize(traces).to_json()
    assert (summary["token_to_token_reuse"], summary["phases"]["decode_tokens"]) == (0.75, 2)
    first, second, third = summary["by_layer"]
    assert (first["busiest_share"], first["unused_experts"]) == (round(2 / 3, 6), 2)
    assert (second["busiest_share"], second["unused_experts"], second["token_to_token_reuse"]) == (0, 4, None)
    assert [row["jaccard"] for row in (first, second, third)] == [None, None, 1]
    assert first["gate_mass"] == {"by_rank": [0.75, 0.25], "popularity": [0.75, 0.25, 0, 0]}
    assert (first["next_layer"]["dependence"], first["reuse_distance"]["never_again"]) == (None, round(2 / 3, 6))
    json.dumps(summary, allow_nan=False)


entries = st.permutations(range(6)).map(lambda ids: ids[:3])
sequences = st.lists(st.lists(st.tuples(entries, entries), min_size=1, max_size=8), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(sequences, st.integers(1, 9), st.data())
def test_counts_equal_plain_loops(tmp_path_factory, experts_of, shard_tokens, data):
    decode_starts = [data.draw(st.integers(0, len(sequence))) for sequence in experts_of]
    traces = write(
        tmp_path_factory.mktemp("s") / "set",
        experts_of,
        num_experts=6,
        shard_tokens=shard_tokens,
        decode_starts=decode_starts,
    )
    counts = count_routing(traces)
    shared, alike = reuse(counts.overlaps, counts.non_initial_uses), jaccard(counts.overlaps)
    chance = jaccard_by_chance(counts.activations, 3)
    for layer in range(2):
        sets = [[set(token[layer]) for token in sequence] for sequence in experts_of]
        plain = Counter(expert for sequence in sets for token in sequence for expert in token)
        assert counts.activations[layer].tolist() == [plain[expert] for expert in range(6)]
        pairs = [(before, now) for sequence in sets for before, now in itertools.pairwise(sequence)]
        if pairs:
            assert shared[layer] == pytest.approx(np.mean([len(before & now) / 3 for before, now in pairs]))
            assert alike[layer] == pytest.approx(np.mean([len(a & b) / len(a | b) for a, b in pairs]))
        else:
            assert np.isnan([shared[layer], alike[layer]]).all()
        distances = Counter(
            min((now - before for before in range(now) if expert in sequence[before]), default=0)
            for sequence in sets
            for now, token in enumerate(sequence)
            for expert in token
        )
        assert counts.distances[layer].tolist() == [distances[d] for d in range(max(map(len, sets)))]
        decoded = Counter(
            expert
            for sequence, start in zip(sets, decode_starts, strict=True)
            for token in (sequence[start:] if start else [])
            for expert in token
        )
        assert counts.phase_activations[1, layer].tolist() == [decoded[expert] for expert in range(6)]
        # Every set of three, as likely as its experts' rates make it.
        rates = [plain[expert] / sum(map(len, sets)) for expert in range(6)]
        chances = {
            chosen: math.prod(rate if expert in chosen else 1 - rate for expert, rate in enumerate(rates))
            for chosen in map(frozenset, itertools.combinations(range(6), 3))
        }
        expected = sum(p * q * len(a & b) / len(a | b) for a, p in chances.items() for b, q in chances.items())
        assert chance[layer] == pytest.approx(expected / sum(chances.values()) ** 2)
    pairs = Counter(
        pair for sequence in experts_of for token in sequence for pair in itertools.product(token[0], token[1])
    )
    assert counts.pairs[0, 1].tolist() == [[pairs[a, b] for b in range(6)] for a in range(6)]
    divided = sum(0 < start < len(s) for s, start in zip(experts_of, decode_starts, strict=True))
    assert (counts.sequences, counts.divided_sequences) == (len(experts_of), divided)
