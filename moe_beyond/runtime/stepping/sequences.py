"""The routing of the sequences that a model reads during a run."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moe_beyond.geometry import Geometry
from moe_beyond.traces.schema import experts_dtype

Ints = npt.NDArray[np.int64]


@dataclass
class RoutedSequence:
    """Tokens that a model read one after another, and their experts.

    Attributes:
        token_ids: Tokens of each complete forward, ``(T,)`` each.
        experts: Experts of each layer of these forwards, ``(T, K)`` each; L per forward.
    """

    token_ids: list[Ints] = field(default_factory=list)
    experts: list[npt.NDArray[np.integer]] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Number of tokens."""
        return sum(map(len, self.token_ids))

    @property
    def steps(self) -> list[int]:
        """Number of tokens of each forward."""
        return [len(ids) for ids in self.token_ids]

    def routing(self, num_layers: int) -> npt.NDArray[np.integer]:
        """Return the experts, ``(T, L, K)``."""
        forwards = range(0, len(self.experts), num_layers)
        return np.concatenate([np.stack(self.experts[first : first + num_layers], axis=1) for first in forwards])


class SequenceLog:
    """Sequences of a run: a forward continues the last sequence, or begins one.

    Forwards that read several sequences, or tokens after rejected drafts, belong to no sequence. Nor does an
    interrupted forward, which also ends its sequence.

    Args:
        geometry: Geometry of the model.

    Attributes:
        sequences: Sequences with at least one complete forward, in the order of their begin.
        unlogged: Number of forwards that belong to no sequence; a running forward counts until its last layer.
    """

    def __init__(self, geometry: Geometry) -> None:
        self._dtype, self._layers = experts_dtype(geometry), geometry.num_layers
        self.sequences: list[RoutedSequence] = []
        self.unlogged = 0
        self._current: RoutedSequence | None = None
        self._token_ids: Ints | None = None  # of the running forward
        self._experts: list[npt.NDArray[np.integer]] = []

    def begin(self, token_ids: Ints | None, past: int) -> int:
        """Begin a forward.

        Args:
            token_ids: Tokens that it reads, ``(T,)``; None for several sequences, or if they are unknown.
            past: Number of tokens of the sequence that were read before.

        Returns:
            Number of the sequence, -1 for none.
        """
        interrupted, current = self._token_ids is not None, self._current
        self.unlogged += 1
        self._current = self._token_ids = None
        self._experts = []
        if token_ids is None or (past > 0 and (current is None or interrupted or past != current.length)):
            return -1
        self._current = RoutedSequence() if past == 0 else current
        self._token_ids = token_ids
        return len(self.sequences) - (past > 0)

    def add(self, routed: Ints) -> None:
        """Add the next layer of the forward, which has computed.

        Args:
            routed: Chosen experts, ``(T, K)``.
        """
        if self._current is None or self._token_ids is None:
            return
        self._experts.append(routed.astype(self._dtype))
        if len(self._experts) == self._layers:
            if not self._current.token_ids:
                self.sequences.append(self._current)
            self._current.token_ids.append(self._token_ids)
            self._current.experts += self._experts
            self._token_ids = None
            self.unlogged -= 1
