"""The memory of prefixes: exact rows and logits worked out by hand, and what training excludes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from _helpers.common import TINY, VOCAB
from _helpers.predictor_variants import random_trace, training_stats
from hypothesis import given
from hypothesis import strategies as st

from moe_beyond.datamodules.training_stats import frequent_prefixes
from moe_beyond.predictors.batch import collate
from moe_beyond.predictors.modules.prefix_memory import PrefixMemory
from moe_beyond.predictors.stepping.prefix_memory import PrefixMemoryState
from moe_beyond.predictors.training_stats import LONGEST_PREFIX, NO_PREFIX, find_prefixes
from moe_beyond.testing.predictors import count_prefixes
from moe_beyond.traces.trace import Trace

LAYERS, EXPERTS, TOP_K = TINY.shape()
SEQUENCES = ([5, 6, 7], [5, 6, 8], [5, 9], [4, 6, 7])


def traces(sequences=SEQUENCES) -> list[Trace]:
    """Traces of these ids; the token at position p of sequence s uses the experts s + p and s + p + 1."""
    found = []
    for number, ids in enumerate(sequences):
        first = (number + np.arange(len(ids)))[:, None, None] + np.zeros((1, LAYERS, 1), int)
        experts = np.concatenate([first, first + 1], -1) % EXPERTS
        found.append(Trace(f"s{number}", "tests", np.array(ids, np.int32), experts.astype(np.uint8), len(ids)))
    return found


def memory(stored: list[Trace], limit: int = 20) -> PrefixMemory:
    made = PrefixMemory(VOCAB, limit, TINY.shape())
    made.prepare(training_stats(stored))
    with torch.no_grad():
        made.weight.copy_(torch.arange(1, LAYERS + 1))
    return made


def logits(made: PrefixMemory, read: list[Trace], starts: list[int] | None = None) -> torch.Tensor:
    batch = collate(read)
    used = batch.targets(EXPERTS).flatten(2).float()
    found = made(batch.token_ids, torch.tensor(starts or [0] * len(read)), used)
    return found.detach().unflatten(-1, (LAYERS, EXPERTS)) * batch.mask[:, :, None, None]


def test_prefixes_are_rows_of_a_trie_by_hand():
    """Rows: (4), (5), (4 6), (5 6), (5 9), (4 6 7), (5 6 7), (5 6 8); their parents: 0, 0, 1, 2, 2, 3, 4, 4."""
    starts = np.full((4, LONGEST_PREFIX), -1)
    for row, ids in enumerate(SEQUENCES):
        starts[row, : len(ids)] = ids
    expected = [4, 5, VOCAB + 6, 2 * VOCAB + 6, 2 * VOCAB + 9, 3 * VOCAB + 7, 4 * VOCAB + 7, 4 * VOCAB + 8]
    assert frequent_prefixes(starts, VOCAB, 20).tolist() == expected
    # (5) occurs three times and (5 6) twice; of the others, the shortest and then the lowest come first
    assert frequent_prefixes(starts, VOCAB, 2).tolist() == [5, VOCAB + 6]
    assert frequent_prefixes(starts, VOCAB, 4).tolist() == [4, 5, VOCAB + 6, 2 * VOCAB + 6]
    rows = find_prefixes(torch.tensor(expected), VOCAB, torch.tensor([[5, 6, 8, 1], [6, 4, 6, 7], [4, 6, -1, 7]]))
    assert rows.tolist() == [[1, 3, 7, -1], [-1] * 4, [0, 2, -1, -1]]


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=12), st.integers(1, 30))
def test_prefixes_are_those_of_a_plain_loop(sequences, limit):
    starts = np.full((len(sequences), LONGEST_PREFIX), -1)
    for row, ids in enumerate(sequences):
        starts[row, : len(ids)] = ids
    assert (
        frequent_prefixes(starts, VOCAB, limit).tolist()
        == count_prefixes(traces(sequences), EXPERTS, VOCAB)(limit)[0].tolist()
    )


def test_the_experts_of_a_prefix_gain_the_weight_of_their_layer():
    """(5) used experts 0 1, 1 2 and 2 3: 1 and 2 most. (5 6) used 1 2 and 2 3: 2, and of the others the lowest."""
    found = logits(memory(traces()).eval(), traces())
    for layer in range(LAYERS):
        used = [torch.nonzero(found[0, position, layer]).flatten().tolist() for position in range(3)]
        assert used == [[1, 2], [1, 2], [2, 3]]
        assert set(found[0, :, layer].unique().tolist()) == {0, layer + 1}
    other = Trace("o", "tests", np.array([5, 7, 7], np.int32), traces()[0].experts, 3)
    found = logits(memory(traces()).eval(), [other])
    assert found[0, 0].any()
    assert not found[0, 1:].any()


def test_a_later_segment_of_a_sequence_has_no_prefix():
    made = memory(traces()).eval()
    assert logits(made, traces()[:2], [0, 3])[0].any()
    assert not logits(made, traces()[:2], [0, 3])[1].any()


@pytest.mark.parametrize("left_out", range(len(SEQUENCES)))
def test_in_training_a_sequence_is_seen_as_if_it_had_not_been_counted(left_out):
    rest = [trace for number, trace in enumerate(traces()) if number != left_out]
    expected = logits(memory(rest).eval(), [traces()[left_out]])
    torch.testing.assert_close(logits(memory(traces()).train(), [traces()[left_out]]), expected)
    assert not torch.equal(logits(memory(traces()).eval(), [traces()[left_out]]), expected)


def test_steps_add_the_logits_of_batches():
    stored = [random_trace(f"t{n}", 20, n, vocab=2) for n in range(40)]
    read = [random_trace(f"r{n}", 20, 100 + n, vocab=3) for n in range(10)]
    made = memory(stored, 64).eval()
    expected = logits(made, read)
    assert (expected != 0).flatten(2).any(-1).sum() > 10
    for trace, rows in zip(read, expected, strict=True):
        state = PrefixMemoryState(made)
        for token_id, row in zip(trace.token_ids, rows, strict=True):
            found = np.zeros((LAYERS, EXPERTS), np.float32)
            state.add(found, int(token_id))
            np.testing.assert_array_equal(found, row)


def test_training_on_text_without_known_prefixes_adds_nothing():
    made = PrefixMemory(VOCAB, 4, TINY.shape()).train()
    nothing = np.zeros(0, np.int64), np.zeros((0, TINY.total_experts), np.int32)
    made.prepare(replace(training_stats(traces()), prefixes=lambda limit: nothing))
    assert not logits(made, traces()).any()


def test_ids_beyond_the_vocabulary_end_no_prefix():
    """The key of (5 6) is 2 V + 6, which is also that of the single id 2 V + 6."""
    made = memory(traces()).eval()
    ids = torch.tensor([[2 * VOCAB + 6, 6]])
    assert not made(ids, torch.tensor([0])).any()
    state, found = PrefixMemoryState(made), np.zeros((LAYERS, EXPERTS), np.float32)
    state.add(found, 2 * VOCAB + 6)
    assert not found.any()


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        ("keys", lambda keys: keys.flip(0), "keys are not those of a trie"),
        ("keys", lambda keys: torch.cat([keys[:1] * 0 + VOCAB * 9, keys[1:]]), "keys are not those of a trie"),
        ("keys", lambda keys: torch.cat([keys[:1] - 100, keys[1:]]), "keys are not those of a trie"),
        ("keys", lambda keys: torch.cat([keys[:1] * 0 + NO_PREFIX, keys[1:]]), "keys are not those of a trie"),
        ("experts", lambda experts: experts + 100, f"experts are not in 0..{EXPERTS}"),
        ("experts", lambda experts: experts * 0, "experts of a prefix are repeated"),
    ],
)
def test_weights_that_no_fit_gives_are_named(name, change, fault):
    made = memory(traces())
    assert made.weights_fault() is None
    assert memory(traces(), 3).weights_fault() is None
    setattr(made, name, change(getattr(made, name)))
    assert made.weights_fault() == fault
