"""Which pieces of which sequences make up each batch of an epoch: a pure function of lengths, seed and epoch.

Because the plan is made before any worker starts, the batches are the same with any number of workers. Every epoch has
the same number of batches, so the steps of a fit are known before it starts, and Lightning, which reads that number
once, neither cuts a longer epoch short nor passes over the validation of a shorter one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Segment(NamedTuple):
    """Tokens ``start .. stop`` of row ``row`` of shard ``shard``."""

    shard: int
    row: int
    start: int
    stop: int


@dataclass(frozen=True)
class BatchingSettings:
    """How sequences become batches.

    Attributes:
        token_budget: Padded tokens of a batch (rows times longest) at most; a longer single piece is a batch alone.
        max_tokens: Longer sequences are cut into pieces of this many tokens; None keeps them whole.
        window: Largest number of shards whose pieces are mixed; as many are in memory at once.
        seed: Seed of the shuffling.
        shuffle: Whether shards, pieces and batches are shuffled.
    """

    token_budget: int
    max_tokens: int | None
    window: int
    seed: int
    shuffle: bool


def whole_in_order(token_budget: int) -> BatchingSettings:
    """Return the plan of everything that is scored rather than trained on: whole sequences, in a fixed order."""
    return BatchingSettings(token_budget, max_tokens=None, window=1, seed=0, shuffle=False)


def plan_batches(
    lengths: Sequence[npt.NDArray[np.int64]], settings: BatchingSettings, epoch: int
) -> list[tuple[Segment, ...]]:
    """Plan an epoch.

    The seed deals the shards into windows, the same ones in every epoch; the epoch shuffles the order of the windows.
    Within a window the pieces are sorted by length, ties in random order, and cut into batches of the token budget, so
    that little is padding; then the batches are shuffled. The cuts depend only on the window's lengths, so every epoch
    has the same number of batches.

    Args:
        lengths: For each shard the tokens of its rows.
        settings: How.
        epoch: Changes the shuffling.
    """
    random = np.random.default_rng((settings.seed, epoch))
    windows = _windows(len(lengths), settings)
    order = random.permutation(len(windows)) if settings.shuffle else np.arange(len(windows))
    batches: list[tuple[Segment, ...]] = []
    for window in order:
        pieces = _pieces(lengths, windows[window], settings.max_tokens)
        sizes = pieces[:, 3] - pieces[:, 2]
        ties = random.permutation(len(pieces)) if settings.shuffle else np.arange(len(pieces))
        ranked = np.lexsort((ties, sizes))
        cut = _cut(sizes[ranked], settings.token_budget)
        in_window = [tuple(Segment(*map(int, row)) for row in pieces[part]) for part in np.split(ranked, cut)]
        if settings.shuffle:
            in_window = [in_window[i] for i in random.permutation(len(in_window))]
        batches += in_window
    return batches


def _windows(shards: int, settings: BatchingSettings) -> list[npt.NDArray[np.int64]]:
    """Deal the shards into windows of equal size, up to one shard; a window of few shards would mix and pad badly."""
    order = np.random.default_rng(settings.seed).permutation(shards) if settings.shuffle else np.arange(shards)
    return np.array_split(order, -(-shards // settings.window))


def _pieces(
    lengths: Sequence[npt.NDArray[np.int64]], shards: npt.NDArray[np.int64], max_tokens: int | None
) -> npt.NDArray[np.int64]:
    """List the pieces of some shards as rows ``shard, row, start, stop``."""
    found = []
    for shard in shards:
        rows = lengths[shard]
        size = max_tokens or int(rows.max())
        count = -(-rows // size)
        row = np.repeat(np.arange(len(rows)), count)
        start = (np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)) * size
        found.append(np.stack([np.full(len(row), shard), row, start, np.minimum(start + size, rows[row])], 1))
    return np.concatenate(found)


def _cut(sizes: npt.NDArray[np.int64], token_budget: int) -> list[int]:
    """Return where to cut ascending sizes so that each part times its longest stays within the budget."""
    cuts, begin = [], 0
    for index, size in enumerate(sizes):
        if index > begin and (index - begin + 1) * size > token_budget:
            cuts.append(index)
            begin = index
    return cuts
