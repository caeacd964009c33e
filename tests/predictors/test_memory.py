import numpy as np
import pytest
import torch
from _helpers.common import TINY, VOCAB
from _helpers.predictor_variants import random_trace, training_stats

from moe_beyond.predictors.batch import Batch, collate
from moe_beyond.predictors.modules.routing_memory import RoutingMemory

TOTAL = TINY.total_experts
TRACES = [random_trace(f"s{i}", length, i, vocab=12) for i, length in enumerate((9, 4, 14, 1))]


def memory(traces: list = TRACES, known: int = VOCAB) -> RoutingMemory:
    torch.manual_seed(0)
    made = RoutingMemory(VOCAB, known, TOTAL, 6)
    made.prepare(training_stats(traces))
    return made


def used(batch: Batch) -> torch.Tensor:
    return batch.targets(TINY.num_experts).flatten(2).float()


def in_batch(made: RoutingMemory, traces: list) -> list[torch.Tensor]:
    batch = collate(traces)
    return [row[: len(t)] for row, t in zip(made(batch.token_ids, None, used(batch)), traces, strict=True)]


def test_a_vector_is_the_map_of_shrunk_log_shares_by_hand():
    made = memory().eval()
    token = int(TRACES[0].token_ids[0])
    count, uses, popular, tokens = 0, np.zeros(TOTAL), np.zeros(TOTAL), 0
    for trace in TRACES:
        for token_id, experts in zip(trace.token_ids, trace.experts, strict=True):
            flat = (experts + np.arange(TINY.num_layers)[:, None] * TINY.num_experts).ravel()
            popular[flat] += 1
            tokens += 1
            if token_id == token:
                uses[flat] += 1
                count += 1
    popular /= tokens
    shares = (uses + 2 * popular) / (count + 2)
    expected = made.map.weight.detach().numpy() @ np.log((shares + 0.01) / (popular + 0.01))
    found = made(torch.tensor([[token]]))[0, 0]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("left_out", range(len(TRACES)))
def test_in_training_a_sequence_is_seen_as_if_it_had_not_been_counted(left_out: int):
    """The vectors of a training sequence are those of a memory without it, but for how popular experts are."""
    made, without = memory(), memory([t for i, t in enumerate(TRACES) if i != left_out])
    without.load_state_dict({**made.state_dict(), "rows": without.rows, "vectors": without.vectors})
    without._counts = (*without._counts[:2], made._counts[2])
    expected = in_batch(without.eval(), [TRACES[left_out]])[0]
    found = in_batch(made.train(), TRACES)[left_out]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (in_batch(made.eval(), TRACES)[left_out] - expected).abs().max() > 1e-3


def test_unknown_and_hidden_tokens_have_no_vector():
    made = memory(known=3)
    ids = torch.arange(VOCAB)[None]
    nothing = torch.zeros(1, VOCAB, TOTAL)
    for mode in (True, False):
        made.train(mode)
        found = made(ids, None, nothing)[0].abs().amax(-1) > 1e-7
        assert found.sum() == 3
        assert not made(ids, torch.ones_like(ids, dtype=torch.bool), nothing).abs().max() > 1e-6


def test_weights_hold_the_vectors_as_of_now():
    made = memory()
    with torch.no_grad():
        made.map.weight.mul_(3)
    copy = RoutingMemory(VOCAB, VOCAB, TOTAL, 6)
    copy.load_state_dict(made.state_dict())  # knows nothing of training
    for one in (copy.train(), copy.eval()):
        torch.testing.assert_close(in_batch(one, TRACES), in_batch(made.eval(), TRACES))
