import numpy as np
import torch

from moe_beyond.predictors.batch import collate
from moe_beyond.traces.trace import Trace

FIRST = Trace("a", "tests", np.array([7, 8], np.int32), np.array([[[1, 3]], [[0, 2]]], np.uint8), 2)
SECOND = Trace("b", "tests", np.array([9], np.int32), np.array([[[3, 0]]], np.uint8), 1)


def test_collate_pads_on_the_right_with_zeros():
    batch = collate([FIRST, SECOND])
    assert batch.token_ids.tolist() == [[7, 8], [9, 0]]
    assert batch.experts.tolist() == [[[[1, 3]], [[0, 2]]], [[[3, 0]], [[0, 0]]]]
    assert (batch.token_ids.dtype, batch.experts.dtype) == (torch.int64, torch.uint8)
    assert batch.lengths.tolist() == [2, 1]
    assert batch.mask.tolist() == [[True, True], [True, False]]
    assert (batch.sequence_ids, batch.starts) == (("a", "b"), (0, 0))


def test_collate_keeps_where_pieces_start():
    assert collate([FIRST, SECOND], [4, 0]).starts == (4, 0)


def test_targets_are_the_chosen_experts_and_nothing_where_padded():
    targets = collate([FIRST, SECOND]).targets(4)
    assert targets.int().tolist() == [[[[0, 1, 0, 1]], [[1, 0, 1, 0]]], [[[1, 0, 0, 1]], [[0, 0, 0, 0]]]]


def test_a_slot_that_holds_none_chooses_nothing():
    for experts in (np.array([[[255, 3]]], np.uint8), np.array([[[-1, 3]]], np.int16)):
        batch = collate([Trace("a", "tests", np.array([7], np.int32), experts, 1), FIRST])
        assert batch.ids(4)[0].tolist() == [[[4, 3]], [[0, 0]]]
        assert batch.targets(4)[0].int().tolist() == [[[0, 0, 0, 1]], [[0, 0, 0, 0]]]


def test_a_batch_does_not_share_memory_with_the_shard_it_came_from():
    experts = FIRST.experts.copy()
    batch = collate([Trace("a", "tests", FIRST.token_ids, experts, 2)])
    experts[:] = 0
    assert batch.experts.tolist() == [FIRST.experts.tolist()]


def test_moving_a_batch_moves_its_tensors_and_keeps_the_rest():
    moved = collate([FIRST], [3]).to("meta")
    assert {moved.token_ids.device.type, moved.experts.device.type, moved.lengths.device.type} == {"meta"}
    assert (moved.sequence_ids, moved.starts) == (("a",), (3,))
