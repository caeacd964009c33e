"""Experts to pin: the most used that fill a budget."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from _helpers.common import there, tiny_traces

from moe_beyond.errors import UserError
from moe_beyond.evaluation.pins import count_uses, fill_budget
from moe_beyond.evaluation.strategies import even_split
from moe_beyond.traces.reader import TraceSet


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> TraceSet:
    return tiny_traces(tmp_path_factory.mktemp("traces"))


def counts(traces: TraceSet, split: str | None) -> Counter[tuple[int, int]]:
    return Counter(
        (layer, int(expert))
        for trace in traces.traces(split)
        for token in trace.experts
        for layer, row in enumerate(token)
        for expert in there(row)
    )


@pytest.mark.parametrize("split", [None, "validation"])
@pytest.mark.parametrize("slots", [2, 11, 32])
def test_pins_are_the_most_used(traces: TraceSet, split: str | None, slots: int) -> None:
    used = counts(traces, split)
    every = [(layer, expert) for layer in range(4) for expert in range(8)]
    chosen = sorted(every, key=lambda one: (-used[one], one))[:slots]
    found = fill_budget(traces.geometry, count_uses(traces, split), slots, "global", even_split)
    assert found == {str(layer + 1): [e for one, e in chosen if one == layer] for layer in range(4)}


def test_pins_are_no_slots_without_an_expert(tmp_path: Path) -> None:
    test_pins_are_the_most_used(tiny_traces(tmp_path / "traces", holes=0.4), None, 11)


def test_pins_keep_to_a_layers_slots_and_to_a_profile(traces: TraceSet) -> None:
    quotas = (2, 5, 3, 4)
    used = counts(traces, None)
    found = fill_budget(traces.geometry, count_uses(traces, None), 14, "per-layer", lambda slots: quotas)
    for layer, quota in enumerate(quotas):
        chosen = sorted(range(8), key=lambda expert: (-used[layer, expert], expert))[:quota]
        assert found[str(layer + 1)] == chosen
    popularity = np.random.default_rng(0).random((4, 8))
    popularity[1] = 0.5  # ties go to the lower id
    found = fill_budget(traces.geometry, popularity, 14, "per-layer", lambda slots: quotas)
    assert found["2"] == [0, 1, 2, 3, 4]
    assert found["4"] == np.argsort(-popularity[3])[:4].tolist()
    even = fill_budget(traces.geometry, popularity, 14, "per-layer", even_split)
    assert [len(experts) for experts in even.values()] == [4, 4, 3, 3]


def test_pins_of_slots_that_do_not_do(traces: TraceSet) -> None:
    uses = count_uses(traces, None)
    with pytest.raises(UserError, match="below one event's demand"):
        fill_budget(traces.geometry, uses, 7, "per-layer", even_split)
    with pytest.raises(
        UserError, match=r"quotas must be 4 numbers that sum to 15 slots \(got 4 numbers that sum to 14\)"
    ):
        fill_budget(traces.geometry, uses, 15, "per-layer", lambda slots: (2, 5, 3, 4))
