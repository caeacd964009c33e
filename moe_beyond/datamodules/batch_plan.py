"""The batch plan: the assignment of segments to the batches of an epoch, a pure function of lengths, seed and epoch.

The plan is made before any worker starts, so the batches do not depend on the number of workers. Every epoch has the
same number of batches. The number of steps of a fit is therefore known before it starts, and Lightning, which reads
the number once, neither cuts an epoch short nor skips a validation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Segment(NamedTuple):
    """Tokens ``start`` to ``stop`` (exclusive) of row ``row`` of shard ``shard``."""

    shard: int
    row: int
    start: int
    stop: int


@dataclass(frozen=True)
class BatchingSettings:
    """Settings of a batch plan.

    Attributes:
        token_budget: Largest number of padded tokens per batch (rows times longest row); a longer segment is a batch
            of its own.
        max_tokens: Largest number of tokens per segment; None keeps sequences whole.
        window: Largest number of shards whose segments are mixed, which is also the number of shards in memory.
        seed: Seed of the shuffling.
        shuffle: Whether to shuffle shards, segments and batches.
    """

    token_budget: int
    max_tokens: int | None
    window: int
    seed: int
    shuffle: bool


def whole_in_order(token_budget: int) -> BatchingSettings:
    """Return the settings for evaluation: whole sequences in a fixed order.

    Args:
        token_budget: Largest number of padded tokens per batch.
    """
    return BatchingSettings(token_budget, max_tokens=None, window=1, seed=0, shuffle=False)


def plan_batches(
    lengths: Sequence[npt.NDArray[np.int64]], settings: BatchingSettings, epoch: int
) -> list[tuple[Segment, ...]]:
    """Return the batches of an epoch.

    The seed assigns the shards to windows, which are the same in every epoch; the epoch determines their order. The
    segments of a window are sorted by length, with ties in random order, and cut into batches of the token budget, so
    that little is padding. The batches of a window are then shuffled. The cuts depend only on the lengths, so every
    epoch has the same number of batches.

    Args:
        lengths: Numbers of tokens of the rows of each shard.
        settings: Settings of the plan.
        epoch: Index of the epoch, which changes the shuffling.
    """
    random = np.random.default_rng((settings.seed, epoch))
    windows = _windows(len(lengths), settings)
    order = random.permutation(len(windows)) if settings.shuffle else np.arange(len(windows))
    batches: list[tuple[Segment, ...]] = []
    for window in order:
        segments = _segments(lengths, windows[window], settings.max_tokens)
        sizes = segments[:, 3] - segments[:, 2]
        ties = random.permutation(len(segments)) if settings.shuffle else np.arange(len(segments))
        ranked = np.lexsort((ties, sizes))
        cut = _cut(sizes[ranked], settings.token_budget)
        in_window = [tuple(Segment(*map(int, row)) for row in segments[part]) for part in np.split(ranked, cut)]
        if settings.shuffle:
            in_window = [in_window[i] for i in random.permutation(len(in_window))]
        batches += in_window
    return batches


def _windows(shards: int, settings: BatchingSettings) -> list[npt.NDArray[np.int64]]:
    """Assign the shards to windows whose sizes differ by at most one; a small window would mix and pad badly."""
    order = np.random.default_rng(settings.seed).permutation(shards) if settings.shuffle else np.arange(shards)
    return np.array_split(order, -(-shards // settings.window))


def _segments(
    lengths: Sequence[npt.NDArray[np.int64]], shards: npt.NDArray[np.int64], max_tokens: int | None
) -> npt.NDArray[np.int64]:
    """Return the segments of some shards as rows ``shard, row, start, stop``."""
    segments = []
    for shard in shards:
        rows = lengths[shard]
        size = max_tokens or int(rows.max())
        count = -(-rows // size)
        row = np.repeat(np.arange(len(rows)), count)
        start = (np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)) * size
        segments.append(np.stack([np.full(len(row), shard), row, start, np.minimum(start + size, rows[row])], 1))
    return np.concatenate(segments)


def _cut(sizes: npt.NDArray[np.int64], token_budget: int) -> list[int]:
    """Return the indices that cut ascending sizes into parts whose count times largest size is within the budget."""
    cuts, begin = [], 0
    for index, size in enumerate(sizes):
        if index > begin and (index - begin + 1) * size > token_budget:
            cuts.append(index)
            begin = index
    return cuts
