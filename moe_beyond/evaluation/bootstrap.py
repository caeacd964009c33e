"""95 % intervals over sequences by the paired bootstrap.

A draw resamples the sequences with replacement and computes every figure. All strategies share each draw, so the
interval of a difference compares the same sequences. Fitting and tuning are not repeated: the intervals cover the
choice of sequences, not the choice of training text.
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

MIN_BOOTSTRAP_DRAWS = 100
"""Least number of draws: the ends of a 95 % interval need a few draws beyond them."""
SEED = 0
QUANTILES = (0.025, 0.975)
DRAWS_PER_BLOCK = 128
"""Draws whose weights are in memory at once."""


def check_bootstrap_draws(bootstrap_draws: int) -> None:
    """Check the number of draws.

    Raises:
        UserError: The number is neither 0 nor at least `MIN_BOOTSTRAP_DRAWS`.
    """
    if bootstrap_draws and bootstrap_draws < MIN_BOOTSTRAP_DRAWS:
        raise UserError(
            f"--bootstrap: too few draws for an interval (got {bootstrap_draws}); give {MIN_BOOTSTRAP_DRAWS} or more, "
            "or 0 for none"
        )


@dataclass
class RecallSums:
    """Numerators and denominators of recall@k, one of each per sequence.

    Attributes:
        names: Ids of the sequences.
        recalled: ``(H, L)`` float64 per sequence, the selected experts that are among the k best-scored.
        selected: ``(H, L)`` float64 per sequence, the selected experts.
    """

    names: list[str] = field(default_factory=list)
    recalled: list[Floats] = field(default_factory=list)
    selected: list[Floats] = field(default_factory=list)


def resampled(rows: Floats, bootstrap_draws: int) -> Floats:
    """Draw as many rows as there are, with replacement, and sum them.

    The draws depend only on both counts, so tables of the same sequences share their draws.

    Args:
        rows: ``(n, C)``, one row per sequence.
        bootstrap_draws: Number of draws.

    Returns:
        ``(bootstrap_draws, C)`` float64.

    Raises:
        UserError: There are fewer than two rows.
    """
    if len(rows) < 2:
        raise UserError(
            f"--bootstrap: draws need at least two sequences that count (got {len(rows)}); give more, or --bootstrap 0"
        )
    rng, sums = np.random.default_rng(SEED), np.empty((bootstrap_draws, rows.shape[1]))
    for start in range(0, bootstrap_draws, DRAWS_PER_BLOCK):
        part = sums[start : start + DRAWS_PER_BLOCK]
        part[:] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=len(part)) @ rows
    return sums


def interval(values: Floats) -> list[float]:
    """Return the ends of the middle 95 % of values; draws with a zero denominator (NaN) are left out."""
    return [float(end) for end in np.nanquantile(values, QUANTILES)]


def recall_intervals(sums: RecallSums, bootstrap_draws: int) -> list[list[float]]:
    """Return the interval of each lookahead's recall@k, the mean over layers."""
    order = np.argsort(sums.names, kind="stable")
    rows = np.stack([np.stack(sums.recalled), np.stack(sums.selected)], axis=1)[order]  # (n, 2, H, L)
    recalled, selected = np.moveaxis(
        resampled(rows.reshape(len(rows), -1), bootstrap_draws).reshape(-1, *rows.shape[1:]), 1, 0
    )
    recall = _quotient(recalled, selected).mean(-1)
    return [interval(recall[:, lookahead]) for lookahead in range(recall.shape[1])]


def result_intervals(results: Sequence[Result], sums: Sequence[SequenceSums], bootstrap_draws: int) -> list[Result]:
    """Add intervals of hit rate, bytes ratio and speed, and of their differences from LRU, to results.

    Args:
        results: One record per strategy.
        sums: Contributions of the sequences, one object per result.
        bootstrap_draws: Number of draws.

    Returns:
        The records with ``intervals``.
    """
    tables = [_sorted_rows(part) for part in sums]
    drawn = np.split(resampled(np.concatenate(tables, axis=1), bootstrap_draws), len(tables), axis=1)
    figures = [_figures(result, table, part.once) for result, table, part in zip(results, drawn, sums, strict=True)]
    lru = {result.budget_slots: n for n, result in enumerate(results) if result.strategy == "lru"}
    with_intervals = []
    for result, figure in zip(results, figures, strict=True):
        intervals: dict[str, Any] = {name: interval(values) for name, values in figure.items()}
        if result.strategy != "lru" and result.budget_slots in lru:
            baseline = figures[lru[result.budget_slots]]
            intervals["minus_lru"] = {name: interval(figure[name] - baseline[name]) for name in figure}
        with_intervals.append(replace(result, intervals=intervals))
    return with_intervals


def _sorted_rows(sums: SequenceSums) -> Floats:
    """Return the rows ``(n, C)`` sorted by sequence id: strategies may see the sequences in different orders."""
    order = sorted(range(len(sums.names)), key=sums.names.__getitem__)
    return np.stack(sums.rows)[order]


def _figures(result: Result, table: Floats, once: int) -> dict[str, Floats]:
    """Return the figures of each draw, ``(bootstrap_draws,)`` float64 by name."""
    column = dict(zip(COLUMNS, table.T, strict=True))
    figures = {
        "hit_rate": _quotient(column["hits"], column["accesses"]),
        "bytes_ratio": _quotient(column["transfers"] + once, column["demanded"]),
    }
    if result.tokens_per_second is not None:
        figures["tokens_per_second"] = _quotient(column["tokens"], column["seconds"])
    return figures


def _quotient(numerator: Floats, denominator: Floats) -> Floats:
    """Divide; NaN for a zero denominator."""
    quotient = np.full(numerator.shape, np.nan)
    np.divide(numerator, denominator, out=quotient, where=denominator > 0)
    return quotient
