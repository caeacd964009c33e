"""95 % intervals over sequences, by the paired bootstrap.

Sequences are drawn with replacement, and all figures are computed for each draw.

Every draw is used for all strategies, so that a difference between two is of the same sequences. What was fitted or
tuned before stays as it is: the intervals say how far other sequences of the same kind would move a figure, not how
far another fit would.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.errors import UserError
from moe_beyond.simulator import Result
from moe_beyond.simulator.sums import COLUMNS, SequenceSums

Floats = npt.NDArray[np.float64]

FEWEST = 100
"""Draws, at least: fewer do not have 95 % of anything."""
SEED = 0
ENDS = (0.025, 0.975)
TOGETHER = 128
"""Draws whose weights are in memory at once."""


def check_resamples(resamples: int) -> None:
    """Check the number of draws.

    Raises:
        UserError: It is neither 0 nor large enough.
    """
    if resamples and resamples < FEWEST:
        raise UserError(
            f"--bootstrap {resamples}: too few draws for an interval; give at least {FEWEST}, or 0 for none"
        )


@dataclass
class RecallSums:
    """Numerators and denominators of recall@k, one of each per sequence.

    Attributes:
        names: Ids of the sequences.
        found: ``(H, L)`` each, the chosen experts among the k best scored.
        named: ``(H, L)`` each, the chosen experts.
    """

    names: list[str] = field(default_factory=list)
    found: list[Floats] = field(default_factory=list)
    named: list[Floats] = field(default_factory=list)


def resampled(rows: Floats, resamples: int) -> Floats:
    """Draw rows with replacement, as many as there are, and add them up; ``(n, C) -> (resamples, C)``.

    The draws depend only on n and on their number, so that tables of the same sequences are drawn alike.

    Raises:
        UserError: There is but one row.
    """
    if len(rows) < 2:
        raise UserError("--bootstrap draws among sequences, and not two count; give more sequences or --bootstrap 0")
    rng, sums = np.random.default_rng(SEED), np.empty((resamples, rows.shape[1]))
    for start in range(0, resamples, TOGETHER):
        part = sums[start : start + TOGETHER]
        part[:] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=len(part)) @ rows
    return sums


def interval(values: Floats) -> list[float]:
    """Return the ends of the middle 95 % of values; draws in which there was nothing to divide by are left out."""
    return [float(end) for end in np.nanquantile(values, ENDS)]


def recall_intervals(sums: RecallSums, resamples: int) -> list[list[float]]:
    """Return the interval of each lookahead's recall@k, the mean over layers."""
    order = np.argsort(sums.names, kind="stable")
    rows = np.stack([np.stack(sums.found), np.stack(sums.named)], axis=1)[order]  # (n, 2, H, L)
    found, named = np.moveaxis(resampled(rows.reshape(len(rows), -1), resamples).reshape(-1, *rows.shape[1:]), 1, 0)
    recall = _quotient(found, named).mean(-1)
    return [interval(recall[:, lookahead]) for lookahead in range(recall.shape[1])]


def result_intervals(results: Sequence[Result], sums: Sequence[SequenceSums], resamples: int) -> list[Result]:
    """Return the results with intervals of hit rate, bytes and speed, and of their differences from LRU's.

    Args:
        results: One record per strategy.
        sums: Contributions of the sequences, one object per result.
        resamples: Number of draws.
    """
    tables = [_by_name(part) for part in sums]
    drawn = np.split(resampled(np.concatenate(tables, axis=1), resamples), len(tables), axis=1)
    figures = [_figures(result, table, part.once) for result, table, part in zip(results, drawn, sums, strict=True)]
    lru = {result.budget_slots: n for n, result in enumerate(results) if result.strategy == "lru"}
    with_intervals = []
    for result, figure in zip(results, figures, strict=True):
        intervals: dict[str, Any] = {name: interval(values) for name, values in figure.items()}
        if result.strategy != "lru" and result.budget_slots in lru:
            reference = figures[lru[result.budget_slots]]
            intervals["minus_lru"] = {name: interval(figure[name] - reference[name]) for name in figure}
        with_intervals.append(replace(result, intervals=intervals))
    return with_intervals


def _by_name(sums: SequenceSums) -> Floats:
    """Return the rows ``(n, C)`` by the names of their sequences: strategies need not have gone over them alike."""
    order = sorted(range(len(sums.names)), key=sums.names.__getitem__)
    return np.stack(sums.rows)[order]


def _figures(result: Result, table: Floats, once: int) -> dict[str, Floats]:
    """Return the figures of each draw."""
    column = dict(zip(COLUMNS, table.T, strict=True))
    figures = {
        "hit_rate": _quotient(column["hits"], column["accesses"]),
        "bytes_ratio": _quotient(column["transfers"] + once, column["demanded"]),
    }
    if result.tokens_per_second is not None:
        figures["tokens_per_second"] = _quotient(column["tokens"], column["seconds"])
    return figures


def _quotient(above: Floats, below: Floats) -> Floats:
    quotient = np.full(above.shape, np.nan)
    np.divide(above, below, out=quotient, where=below > 0)
    return quotient
