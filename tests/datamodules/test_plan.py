from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_beyond.datamodules.batch_plan import BatchingSettings, Segment, plan_batches
from moe_beyond.datamodules.stream import PlannedBatches

shards = st.lists(
    st.lists(st.integers(1, 60), min_size=1, max_size=12).map(lambda rows: np.array(rows, np.int64)),
    min_size=1,
    max_size=6,
)
plans = st.builds(
    BatchingSettings,
    token_budget=st.integers(1, 200),
    max_tokens=st.none() | st.integers(1, 70),
    window=st.integers(1, 8),
    seed=st.integers(0, 1000),
    shuffle=st.booleans(),
)
SHUFFLED = BatchingSettings(token_budget=64, max_tokens=16, window=2, seed=0, shuffle=True)
LENGTHS = [np.random.default_rng(i).integers(1, 40, 10) for i in range(5)]


@settings(max_examples=150, deadline=None)
@given(lengths=shards, plan=plans, epoch=st.integers(0, 9))
def test_every_token_is_in_exactly_one_piece(lengths, plan, epoch):
    batches = plan_batches(lengths, plan, epoch)
    planned = Counter(
        (piece.shard, piece.row, token)
        for batch in batches
        for piece in batch
        for token in range(piece.start, piece.stop)
    )
    expected = {(shard, row, token) for shard, rows in enumerate(lengths) for row in range(len(rows))
                for token in range(rows[row])}  # fmt: skip
    assert planned.keys() == expected
    assert set(planned.values()) == {1}


@settings(max_examples=150, deadline=None)
@given(lengths=shards, plan=plans, epoch=st.integers(0, 9))
def test_pieces_and_batches_keep_their_limits(lengths, plan, epoch):
    for batch in plan_batches(lengths, plan, epoch):
        sizes = [piece.stop - piece.start for piece in batch]
        assert min(sizes) >= 1
        assert len(batch) == 1 or len(batch) * max(sizes) <= plan.token_budget
        for piece in batch:
            if plan.max_tokens is None:
                assert (piece.start, piece.stop) == (0, lengths[piece.shard][piece.row])
            else:
                assert piece.start % plan.max_tokens == 0
                assert piece.stop in (piece.start + plan.max_tokens, lengths[piece.shard][piece.row])
                assert piece.stop - piece.start <= plan.max_tokens


@settings(max_examples=100, deadline=None)
@given(lengths=shards, plan=plans, epoch=st.integers(0, 9))
def test_a_plan_follows_from_its_arguments_alone(lengths, plan, epoch):
    first = plan_batches(lengths, plan, epoch)
    np.random.default_rng(0).random(7)
    assert plan_batches([rows.copy() for rows in lengths], plan, epoch) == first
    if not plan.shuffle:
        assert plan_batches(lengths, plan, epoch + 1) == first
    assert all(type(value) is int for batch in first for piece in batch for value in piece)  # to be pickled


@settings(max_examples=100, deadline=None)
@given(lengths=shards, plan=plans, epoch=st.integers(0, 9))
def test_no_more_shards_than_the_window_are_mixed(lengths, plan, epoch):
    """Walking through the plan, a shard that was left is never needed again."""
    batches = [{piece.shard for piece in batch} for batch in plan_batches(lengths, plan, epoch)]
    first = {shard: min(at for at, used in enumerate(batches) if shard in used) for shard in range(len(lengths))}
    last = {shard: max(at for at, used in enumerate(batches) if shard in used) for shard in range(len(lengths))}
    for at in range(len(batches)):
        assert sum(first[shard] <= at <= last[shard] for shard in first) <= plan.window


@settings(max_examples=150, deadline=None)
@given(lengths=shards, plan=plans, epochs=st.lists(st.integers(0, 99), min_size=2, max_size=4))
def test_every_epoch_has_the_same_number_of_batches(lengths, plan, epochs):
    assert len({len(plan_batches(lengths, plan, epoch)) for epoch in epochs}) == 1


def test_windows_are_of_equal_size():
    """Nine shards of one batch each in windows of eight: five are mixed, and four."""
    lengths = [np.full(4, 4)] * 9
    batches = plan_batches(lengths, BatchingSettings(16, None, 8, 0, True), epoch=3)
    mixed = [{piece.shard for batch in part for piece in batch} for part in (batches[:5], batches[5:])]
    if len(mixed[0]) != 5:
        mixed = [{piece.shard for batch in part for piece in batch} for part in (batches[:4], batches[4:])]
    assert sorted(map(len, mixed)) == [4, 5]
    assert mixed[0].isdisjoint(mixed[1])


def test_other_epochs_and_seeds_give_other_plans():
    plans = [
        plan_batches(LENGTHS, SHUFFLED, 0),
        plan_batches(LENGTHS, SHUFFLED, 1),
        plan_batches(LENGTHS, BatchingSettings(64, 16, 2, 1, True), 0),
    ]
    assert all(first != second for i, first in enumerate(plans) for second in plans[:i])
    # Not only the order of the batches: other pieces meet.
    assert len({frozenset(frozenset(batch) for batch in plan) for plan in plans}) == 3


def test_an_unshuffled_plan_by_hand():
    lengths = [np.array([3, 1, 2]), np.array([5, 1])]
    plan = plan_batches(lengths, BatchingSettings(4, None, 1, 0, False), epoch=3)
    # By length within a shard; 1 and 2 share a batch of 2 x 2, a third piece of 3 would make 9.
    assert plan == [
        (Segment(0, 1, 0, 1), Segment(0, 2, 0, 2)),
        (Segment(0, 0, 0, 3),),
        (Segment(1, 1, 0, 1),),
        (Segment(1, 0, 0, 5),),
    ]


def test_pieces_of_similar_length_share_batches():
    lengths = [np.random.default_rng(0).integers(1, 257, 2000)]
    batches = plan_batches(lengths, BatchingSettings(2048, 256, 1, 0, True), epoch=0)
    padded = sum(len(batch) * max(piece.stop - piece.start for piece in batch) for batch in batches)
    assert lengths[0].sum() / padded > 0.97


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("shuffle", [False, True])
def test_no_shard_is_read_by_two_ranks(ranks, shuffle):
    settings = BatchingSettings(64, 16, 2, 0, shuffle)
    for epoch in (0, 1):
        plans = []
        for rank in range(ranks):
            sampler = PlannedBatches(LENGTHS, settings, ranks=ranks, rank=rank)
            whole = PlannedBatches(LENGTHS, settings, ranks=ranks, rank=rank, even=False)
            sampler.set_epoch(epoch)
            whole.set_epoch(epoch)
            assert list(sampler) == list(whole)[: min(sampler.counts)]
            assert len(whole) == whole.counts[rank]
            plans.append(list(whole))
        read = [{piece.shard for batch in plan for piece in batch} for plan in plans]
        assert read == [set(range(rank, len(LENGTHS), ranks)) for rank in range(ranks)]
        tokens = sum(piece.stop - piece.start for plan in plans for batch in plan for piece in batch)
        assert tokens == sum(map(sum, LENGTHS))


def test_more_ranks_than_shards_share_the_batches():
    lengths, plan = LENGTHS[:2], plan_batches(LENGTHS[:2], SHUFFLED, 0)
    parts = [list(PlannedBatches(lengths, SHUFFLED, ranks=3, rank=rank)) for rank in range(3)]
    assert len({len(part) for part in parts}) == 1
    together = [batch for batches in zip(*parts, strict=True) for batch in batches]
    assert together == plan[: len(together)]
    assert len(plan) - len(together) < 3


def test_a_sampler_follows_the_epoch_it_is_told():
    sampler = PlannedBatches(LENGTHS, SHUFFLED)
    first = list(sampler)
    assert first == plan_batches(LENGTHS, SHUFFLED, 0)
    sampler.set_epoch(4)
    assert list(sampler) == plan_batches(LENGTHS, SHUFFLED, 4)
    sampler.set_epoch(0)
    assert list(sampler) == first


@pytest.mark.parametrize("done", [0, 1, 5])
def test_resuming_goes_on_in_the_epoch_once(done):
    sampler = PlannedBatches(LENGTHS, SHUFFLED, ranks=2, rank=1)
    sampler.set_epoch(3)
    whole = list(sampler)
    resumed = PlannedBatches(LENGTHS, SHUFFLED, ranks=2, rank=1)
    resumed.resume(3, done)
    assert list(resumed) == whole[done:]
    assert list(resumed) == whole[done:]  # data loaders make two iterators
    for each in (sampler, resumed):
        each.set_epoch(4)
    assert list(resumed) == list(sampler)
