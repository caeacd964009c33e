"""Statistics of the training split that a predictor may read before it is fitted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_beyond.traces.router_weights import Routers
from moe_beyond.traces.state_projection import StateProjection

LONGEST_PREFIX = 16
"""Maximum number of tokens of a prefix."""
NO_PREFIX = 2**63 - 1
"""Key of a row without a prefix."""


@dataclass(frozen=True)
class TrainingStats:
    """Token and routing counts of the training split.

    A prefix is the first n tokens of a sequence, n up to `LONGEST_PREFIX`. Prefixes are rows of a trie: the key of a
    prefix is ``parent * V + token id``, where the parent is 0 for the empty prefix and r + 1 for row r. Rows are in the
    order of their keys, so prefixes come before their continuations.

    Attributes:
        token_counts: ``(V,)`` int64 occurrences of each token id.
        token_strings: String of each token id; None if the trace set has no tokenizer.
        expert_counts: Function from ``(n,)`` token ids to ``(n, L*E)`` int32: how often each token was routed to each
            expert.
        prefixes: Function from a number N to the keys ``(n,)`` int64 of the N most frequent prefixes, n <= N, and
            ``(n, L*E)`` int32: how often the last token of each prefix was routed to each expert.
        routers: Routers of the model; None if the trace set does not contain them.
        projection: Projection of the hidden states; None if they are not projected, or not recorded.
    """

    token_counts: npt.NDArray[np.int64]
    token_strings: Sequence[str] | None
    expert_counts: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int32]]
    prefixes: Callable[[int], tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]]
    routers: Routers | None = None
    projection: StateProjection | None = None

    def most_frequent(self, limit: int, min_count: int = 1) -> npt.NDArray[np.int64]:
        """Return the ids of the most frequent tokens in descending order of frequency; ties are ordered by id.

        Args:
            limit: Maximum number of ids.
            min_count: Minimum number of occurrences of each token (default: 1).
        """
        ids = np.argsort(-self.token_counts, kind="stable")[:limit]
        return ids[self.token_counts[ids] >= min_count]


def find_prefixes(keys: Tensor, vocab_size: int, token_ids: Tensor) -> Tensor:
    """Return the row ``(S, n)`` int64 of the prefix that ends at each token; -1 if it is not known.

    Args:
        keys: Keys of the prefixes in ascending order, ``(N,)`` int64; `NO_PREFIX` for rows without one.
        vocab_size: Number of token ids of the tokenizer, V.
        token_ids: First token ids of sequences, ``(S, n)`` int64; ids outside 0 .. V - 1 end no known prefix.
    """
    rows = torch.full_like(token_ids, -1)
    parents = torch.zeros_like(token_ids[:, 0])
    for position, ids in enumerate(token_ids.T if len(keys) else ()):
        known = (parents >= 0) & (ids >= 0) & (ids < vocab_size)
        wanted = torch.where(known, parents * vocab_size + ids, -1)
        found = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        rows[:, position] = torch.where(keys[found] == wanted, found, -1)
        parents = torch.where(rows[:, position] >= 0, rows[:, position] + 1, -1)
    return rows
