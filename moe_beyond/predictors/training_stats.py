"""Statistics of the training split that a predictor may read before it is fitted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_beyond.traces.router_weights import Routers
from moe_beyond.traces.state_projection import StateProjection


@dataclass(frozen=True)
class TrainingStats:
    """Token and routing counts of the training split.

    Attributes:
        token_counts: ``(V,)`` int64 occurrences of each token id.
        token_strings: String of each token id; None if the trace set has no tokenizer.
        expert_counts: Function from ``(n,)`` token ids to ``(n, L*E)`` int32: how often each token was routed to each
            expert.
        routers: Routers of the model; None if the trace set does not contain them.
        projection: Projection of the hidden states; None if they are not projected, or not recorded.
    """

    token_counts: npt.NDArray[np.int64]
    token_strings: Sequence[str] | None
    expert_counts: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int32]]
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
