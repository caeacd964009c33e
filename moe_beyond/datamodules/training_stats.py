"""Counts of the training split; each rank counts its own shards."""

import numpy as np
import numpy.typing as npt

from moe_beyond.datamodules.ranks import rank_and_ranks, shared_map
from moe_beyond.predictors.training_stats import TrainingStats
from moe_beyond.traces.manifest import ShardInfo
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.schema import expert_ids

COUNTED_TOKENS = 4096
"""Number of tokens that are counted at once."""


def training_stats(traces: TraceSet, split: str) -> TrainingStats:
    """Return the statistics that a predictor may read before a fit.

    Args:
        traces: Trace set of the fit.
        split: Name of the training split.
    """
    vocab_size, shards, ranks = traces.manifest.tokenizer.vocab_size, traces.shards(split), rank_and_ranks()[1]
    parts = [shards[rank::ranks] for rank in range(ranks)]

    def tokens(part: tuple[ShardInfo, ...]) -> npt.NDArray[np.int64]:
        counts = np.zeros(vocab_size, np.int64)
        for info in part:
            counts += np.bincount(traces.read(info).token_ids, minlength=vocab_size)
        return counts

    def experts(token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        row_of = np.full(vocab_size, -1)
        row_of[token_ids] = np.arange(len(token_ids))
        counts = shared_map(lambda part: _expert_counts(traces, part, row_of, len(token_ids)), parts)
        total: npt.NDArray[np.int32] = np.sum(counts, axis=0, dtype=np.int32)
        return total

    counts = np.sum(shared_map(tokens, parts), axis=0)
    return TrainingStats(counts, traces.token_strings, experts, traces.routers, traces.projection)


def _expert_counts(
    traces: TraceSet, part: tuple[ShardInfo, ...], row_of: npt.NDArray[np.int64], rows: int
) -> npt.NDArray[np.int32]:
    """Count how often some shards routed each token id to each expert.

    Args:
        traces: Trace set of the fit.
        part: Shards to count.
        row_of: Row of each token id, ``(V,)`` int64; -1 for none.
        rows: Number of rows.

    Returns:
        ``(rows, L*E)`` int32.
    """
    layers, experts, _ = traces.geometry.shape()
    counts, base = np.zeros((rows, layers * experts), np.int32), np.arange(layers)[:, None] * experts
    for info in part:
        shard = traces.read(info)
        row = row_of[shard.token_ids]
        for start in range(0, len(row), COUNTED_TOKENS):
            block = slice(start, start + COUNTED_TOKENS)
            counted = row[block] >= 0
            ids = expert_ids(shard.experts[block][counted], experts)
            real = ids < experts
            token = np.broadcast_to(row[block][counted][:, None, None], ids.shape)
            np.add.at(counts, (token[real], (ids + base)[real]), 1)
    return counts
