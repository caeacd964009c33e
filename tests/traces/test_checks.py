"""What the writer and the reader check, against plain loops."""

from dataclasses import replace

import numpy as np
import pytest
from _helpers.common import TINY
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moe_beyond.traces import schema
from moe_beyond.traces.checks import first_fault
from moe_beyond.traces.schema import check_experts, first_invalid_entry


def plainly_wrong(entry: list[int], num_experts: int, none: int) -> bool:
    chosen = [expert for expert in entry if expert != none]
    return any(not 0 <= expert < num_experts for expert in chosen) or len(set(chosen)) < len(chosen)


@given(st.data(), st.sampled_from([(np.uint8, 255), (np.int16, -1)]), st.integers(1, 4), st.integers(2, 6))
def test_the_first_invalid_entry_is_that_of_plain_loops(data, stored, top_k, num_experts):
    dtype, none = stored
    ids = st.sampled_from([*range(num_experts + 1), none] + ([-2] if none == -1 else []))
    entries = data.draw(arrays(dtype, (data.draw(st.integers(0, 9)), top_k), elements=ids))
    wrong = [number for number, entry in enumerate(entries.tolist()) if plainly_wrong(entry, num_experts, none)]
    found = first_invalid_entry(entries, num_experts)
    assert (found and found[0]) == (wrong[0] if wrong else None)
    assert (check_experts(entries, num_experts) is None) == (not wrong)


@pytest.mark.parametrize("entry", [0, 4, 5, 9, 12])
def test_entries_are_numbered_over_all_that_is_checked_at_once(entry, monkeypatch):
    monkeypatch.setattr(schema, "CHECKED_ENTRIES", 5)
    entries = np.tile(np.array([1, 0, 2], np.uint8), (13, 1))
    assert first_invalid_entry(entries, 3) is None
    entries[entry, 2] = 3
    assert first_invalid_entry(entries, 3) == (entry, "expert id 3 is out of range 0..2")
    entries[entry, 2] = 1
    assert first_invalid_entry(entries, 3) == (entry, "an expert occurs twice in one entry")


OFFSETS, STARTS = np.array([0, 2, 5]), np.array([2, 0])
TOKENS = np.array([0, 31, 4, 4, 9], np.int32)
EXPERTS = np.tile(np.array([3, 5], np.uint8), (5, 4, 1))
GATES = np.full((5, 4, 2), 0.5, np.float16)


def fault(**changes: np.ndarray) -> tuple[int, str] | None:
    found = {
        "offsets": OFFSETS,
        "token_ids": TOKENS,
        "decode_starts": STARTS,
        "experts": EXPERTS,
        "gate_weights": GATES,
    }
    return first_fault(TINY, 32, **(found | changes))


def at(array: np.ndarray, place: tuple[int, ...], value: float) -> np.ndarray:
    array = array.copy()
    array[place] = value
    return array


def test_right_sequences_have_no_fault():
    assert fault() is None
    assert fault(experts=at(EXPERTS, (0, 0), 255)) is None  # no expert at all
    assert fault(gate_weights=at(GATES, (0, 0, 0), 65504)) is None
    assert fault(gate_weights=at(GATES, (0, 0, 0), -0.0)) is None
    assert fault(gate_weights=at(GATES, (0, 0, 0), 6e-8)) is None  # the least above 0
    assert fault(decode_starts=np.array([0, 3])) is None


@pytest.mark.parametrize(
    ("changes", "row", "says"),
    [
        ({"offsets": np.array([0, 5, 5])}, 1, "has no tokens"),
        ({"decode_starts": np.array([2, -1])}, 1, "decode_start -1 is not in 0..3"),
        ({"decode_starts": np.array([3, 0])}, 0, "decode_start 3 is not in 0..2"),
        ({"token_ids": at(TOKENS, (2,), -1)}, 1, "token id -1 is out of range 0..31"),
        ({"token_ids": at(TOKENS, (1,), 32)}, 0, "token id 32 is out of range 0..31"),
        ({"experts": at(EXPERTS, (1, 3, 1), 8)}, 0, "expert id 8 is out of range 0..7"),
        ({"experts": at(EXPERTS, (2, 0, 1), 3)}, 1, "an expert occurs twice in one entry"),
        ({"gate_weights": at(GATES, (4, 3, 1), np.inf)}, 1, "gate weights are negative or not finite"),
        ({"gate_weights": at(GATES, (1, 3, 1), -np.inf)}, 0, "gate weights are negative or not finite"),
        ({"gate_weights": at(GATES, (0, 0, 0), np.nan)}, 0, "gate weights are negative or not finite"),
        ({"gate_weights": at(GATES, (2, 0, 0), -6e-8)}, 1, "gate weights are negative or not finite"),
    ],
)
def test_the_row_and_the_fault_by_hand(changes, row, says):
    found = fault(**changes)
    assert found is not None
    assert found[0] == row
    assert found[1].startswith(says)


def test_other_shapes_are_checked_alike():
    wide = replace(TINY, num_experts=300)
    ids = np.tile(np.array([299, 256], np.int16), (5, 4, 1))
    assert first_fault(wide, 32, OFFSETS, TOKENS, STARTS, ids) is None
    assert first_fault(wide, 32, OFFSETS, TOKENS, STARTS, at(ids, (3, 0, 0), 300)) == (
        1,
        "expert id 300 is out of range 0..299",
    )
