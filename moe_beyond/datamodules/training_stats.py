"""Counts of the training split; each rank counts its own shards."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from moe_beyond.datamodules.ranks import rank_and_ranks, shared_map
from moe_beyond.predictors.training_stats import LONGEST_PREFIX, TrainingStats, find_prefixes
from moe_beyond.traces.manifest import ShardInfo
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.schema import expert_ids
from moe_beyond.traces.shard import Shard

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

    def uses(rows_of: Callable[[Shard], npt.NDArray[np.int64]], rows: int) -> npt.NDArray[np.int32]:
        counts = shared_map(lambda part: _expert_counts(traces, part, rows_of, rows), parts)
        total: npt.NDArray[np.int32] = np.sum(counts, axis=0, dtype=np.int32)
        return total

    def experts(token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        row_of = np.full(vocab_size, -1)
        row_of[token_ids] = np.arange(len(token_ids))
        return uses(lambda shard: row_of[shard.token_ids], len(token_ids))

    def prefixes(limit: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        starts = shared_map(lambda part: [_starts(traces.read(info))[0] for info in part], parts)
        first = np.full((0, LONGEST_PREFIX), -1)
        keys = frequent_prefixes(np.concatenate([first, *(s for part in starts for s in part)]), vocab_size, limit)

        def rows_of(shard: Shard) -> npt.NDArray[np.int64]:
            token_ids, positions = _starts(shard)
            found = find_prefixes(torch.from_numpy(keys), vocab_size, torch.from_numpy(token_ids)).numpy()
            rows = np.full(len(shard.token_ids), -1)
            rows[positions[found >= 0]] = found[found >= 0]
            return rows

        return keys, uses(rows_of, len(keys))

    counts = np.sum(shared_map(tokens, parts), axis=0)
    return TrainingStats(counts, traces.token_strings, experts, prefixes, traces.routers, traces.projection)


def frequent_prefixes(starts: npt.NDArray[np.int64], vocab_size: int, limit: int) -> npt.NDArray[np.int64]:
    """Return the keys of the most frequent prefixes of sequences, as `TrainingStats.prefixes` orders them.

    Equally frequent prefixes are ordered by length, then by token ids. A prefix is at least as frequent as its
    continuations, so the parent of every returned prefix is returned, too.

    Args:
        starts: First token ids of each sequence, ``(S, n)`` int64; -1 past its end.
        vocab_size: Number of token ids of the tokenizer, V.
        limit: Maximum number of prefixes.
    """
    parents, alive, rows = np.zeros(len(starts), np.int64), np.arange(len(starts)), 0
    keys, counts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for token_ids in starts.T:  # all prefixes of one length at a time, in the order of their keys
        alive = alive[token_ids[alive] >= 0]
        unique, inverse, times = np.unique(
            parents[alive] * vocab_size + token_ids[alive], return_inverse=True, return_counts=True
        )
        parents[alive] = rows + 1 + inverse
        rows += len(unique)
        keys.append(unique)
        counts.append(times)
    all_keys = np.concatenate(keys)
    kept = np.sort(np.argsort(-np.concatenate(counts), kind="stable")[:limit])
    renumbered = np.zeros(rows + 1, np.int64)
    renumbered[kept + 1] = np.arange(1, len(kept) + 1)
    chosen: npt.NDArray[np.int64] = renumbered[all_keys[kept] // vocab_size] * vocab_size + all_keys[kept] % vocab_size
    return chosen


def _starts(shard: Shard) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the first token ids of each row ``(rows, LONGEST_PREFIX)``, -1 past its end, and their positions."""
    positions = shard.offsets[:-1, None] + np.arange(LONGEST_PREFIX)
    inside = positions < shard.offsets[1:, None]
    token_ids = shard.token_ids[np.minimum(positions, len(shard.token_ids) - 1)].astype(np.int64)
    return np.where(inside, token_ids, -1), positions


def _expert_counts(
    traces: TraceSet, part: tuple[ShardInfo, ...], rows_of: Callable[[Shard], npt.NDArray[np.int64]], rows: int
) -> npt.NDArray[np.int32]:
    """Count how often the tokens of each row were routed to each expert.

    Args:
        traces: Trace set of the fit.
        part: Shards to count.
        rows_of: Function from a shard to the row of each of its tokens, ``(tokens,)`` int64; -1 for none.
        rows: Number of rows.

    Returns:
        ``(rows, L*E)`` int32.
    """
    layers, experts, _ = traces.geometry.shape()
    counts, base = np.zeros((rows, layers * experts), np.int32), np.arange(layers)[:, None] * experts
    for info in part:
        shard = traces.read(info)
        row = rows_of(shard)
        for start in range(0, len(row), COUNTED_TOKENS):
            block = slice(start, start + COUNTED_TOKENS)
            counted = row[block] >= 0
            ids = expert_ids(shard.experts[block][counted], experts)
            real = ids < experts
            token = np.broadcast_to(row[block][counted][:, None, None], ids.shape)
            np.add.at(counts, (token[real], (ids + base)[real]), 1)
    return counts
