"""Contributions of each sequence to the sums behind the rates of a result, for intervals over sequences."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.core import ACCESSES, DEMAND_TRANSFERS, HITS, PREFETCH_TRANSFERS

Floats = npt.NDArray[np.float64]

COLUMNS = ("accesses", "hits", "transfers", "demanded", "tokens", "seconds")
"""Columns of a sequence's row; ``tokens`` and ``seconds`` cover decoding, 0 without a device."""


@dataclass
class SequenceSums:
    """Rows of `COLUMNS`, one for the sequences that were stepped together: one sequence, or a batch.

    Attributes:
        names: Ids of the sequences of each row.
        rows: ``(6,)`` float64 each.
        once: Transfers that belong to no sequence: the best fixed choice moves its experts in once.
    """

    names: list[tuple[str, ...]] = field(default_factory=list)
    rows: list[Floats] = field(default_factory=list)
    once: int = 0

    def add(
        self, names: Iterable[str], counts: npt.NDArray[np.int64], demanded: int, tokens: int, seconds: float
    ) -> None:
        """Note what stepping some sequences added.

        Args:
            names: Ids of the sequences.
            counts: ``(L, 8)`` of `moe_beyond.cache.core.COUNTERS`.
            demanded: Experts that their counted tokens demanded, token by token.
            tokens: Counted tokens of decode.
            seconds: Seconds of decoding these tokens.
        """
        total = counts.sum(0)
        transfers = total[DEMAND_TRANSFERS] + total[PREFETCH_TRANSFERS]
        self.names.append(tuple(names))
        self.rows.append(np.array([total[ACCESSES], total[HITS], transfers, demanded, tokens, seconds], np.float64))
