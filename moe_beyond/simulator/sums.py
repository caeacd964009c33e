"""Contributions of each sequence to the sums behind the rates of a result, for intervals over sequences."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.counters import Counter

Floats = npt.NDArray[np.float64]

COLUMNS = ("accesses", "hits", "transfers", "demanded", "tokens", "seconds")
"""Columns of a sequence's row; ``transfers`` and ``demanded`` are in units of the geometry, experts if all have the
same size; ``tokens`` and ``seconds`` cover decoding, 0 without a device."""


@dataclass
class SequenceSums:
    """Rows of `COLUMNS`, one per group of sequences that were stepped together (one sequence, or a batch).

    Attributes:
        names: Ids of the sequences of each row.
        rows: Sums of each row, ``(6,)`` float64.
        once: Units that belong to no sequence: the best static choice transfers its experts once.
        units: Units of an expert of each layer, ``(L,)`` (default: 1).
    """

    names: list[tuple[str, ...]] = field(default_factory=list)
    rows: list[Floats] = field(default_factory=list)
    once: int = 0
    units: npt.ArrayLike = 1

    def add(
        self, names: Iterable[str], counts: npt.NDArray[np.int64], demanded: int, tokens: int, seconds: float
    ) -> None:
        """Add a row.

        Args:
            names: Ids of the sequences.
            counts: Counts that stepping them added, ``(L, 8)`` int64, columns `Counter`.
            demanded: Units that their counted tokens demanded, token by token.
            tokens: Number of counted tokens of decode.
            seconds: Seconds of decoding these tokens.
        """
        total = counts.sum(0)
        transfers = (counts[:, [Counter.DEMAND_TRANSFERS, Counter.PREFETCH_TRANSFERS]].sum(1) * self.units).sum()
        self.names.append(tuple(names))
        sums = [total[Counter.ACCESSES], total[Counter.HITS], transfers, demanded, tokens, seconds]
        self.rows.append(np.array(sums, np.float64))

    def extend(self, later: "SequenceSums") -> None:
        """Add the rows of later sequences."""
        self.names += later.names
        self.rows += later.rows
