"""Agreement of a predictor's scores with the routing of a run, next to a control with shuffled tokens.

The control compares the same predictions with the routing of another token of the same layer. A predictor that names
popular experts agrees with it, too.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer]
Floats = npt.NDArray[np.floating]


@dataclass(frozen=True)
class _Sums:
    """Sums over entries, which can be added."""

    @classmethod
    def total(cls, parts: Iterable[Self]) -> Self:
        """Return the sum of several."""
        rows = list(parts)
        return cls(*(sum(getattr(row, field.name) for row in rows) for field in fields(cls)))


@dataclass(frozen=True)
class Agreement(_Sums):
    """Agreement of the k best-scored experts with the routing, at one lookahead.

    Attributes:
        entries: Number of entries with a score.
        chosen: Number of experts that their router chose.
        found: Number of these that were predicted.
        mass: Sum over entries of the share of the gate weights on predicted experts.
        control_entries: Number of entries with a control; a single entry has none.
        control_chosen: Number of experts that the router chose for their controls.
        control_found: Number of these that were predicted.
        control_mass: Sum over controls of the share of the gate weights on predicted experts.
    """

    entries: int
    chosen: int
    found: int
    mass: float
    control_entries: int
    control_chosen: int
    control_found: int
    control_mass: float

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain values; None without entries."""
        return {
            "entries": self.entries,
            "recall_at_k": _ratio(self.found, self.chosen),
            "gate_mass_at_k": _ratio(self.mass, self.entries),
            "shuffled_recall_at_k": _ratio(self.control_found, self.control_chosen),
            "shuffled_gate_mass_at_k": _ratio(self.control_mass, self.control_entries),
        }


@dataclass(frozen=True)
class Prefetches(_Sums):
    """Bytes that prefetches would move.

    Attributes:
        moved_bytes: Bytes of selected experts without a slot.
        used_bytes: Bytes of these whose event demands them.
        shuffled_used_bytes: Bytes of these that the event of another token demands.
        missed_bytes: Bytes of the experts that the events demand and miss, without prefetches.
    """

    moved_bytes: int
    used_bytes: int
    shuffled_used_bytes: int
    missed_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def agreement(named: Ints, routed: Ints, weights: Floats, seed: int) -> Agreement:
    """Compare predictions of one layer with its routing.

    Args:
        named: Predicted experts of each token, ``(n, k)``; -1 for a token without a score.
        routed: Chosen experts of each token, ``(n, K)``.
        weights: Their gate weights, ``(n, K)``.
        seed: Random seed of the control.
    """
    scored = named[:, 0] >= 0
    named, routed, weights = named[scored], routed[scored], weights[scored].astype(np.float64)
    shares = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-12)
    found = _among(routed, named)
    other = partners(len(named), seed)
    control = _among(routed[other], named[: len(other)])
    return Agreement(
        len(named), found.size, int(found.sum()), float((shares * found).sum()),
        len(other), control.size, int(control.sum()), float((shares[other] * control).sum()),
    )  # fmt: skip


def prefetches(moved: npt.NDArray[np.bool_], routed: Ints, missed: Ints, expert_bytes: int, seed: int) -> Prefetches:
    """Sum up the prefetches of one layer.

    Args:
        moved: Whether each expert would be moved for each token, ``(n, E)``.
        routed: Chosen experts of each token, ``(n, K)``.
        missed: Number of misses of each token's event, ``(n,)``.
        expert_bytes: Size of an expert in bytes.
        seed: Random seed of the control.
    """
    other = partners(len(moved), seed)
    used = np.take_along_axis(moved, routed, 1).sum()
    control = np.take_along_axis(moved[: len(other)], routed[other], 1).sum()
    return Prefetches(*(expert_bytes * int(count) for count in (moved.sum(), used, control, missed.sum())))


def partners(count: int, seed: int) -> npt.NDArray[np.int64]:
    """Draw another token for each token, each token once.

    Args:
        count: Number of tokens.
        seed: Seed of the random numbers.

    Returns:
        Number of the other token, ``(count,)``; empty for fewer than two tokens.
    """
    if count < 2:
        return np.zeros(0, np.int64)
    order = np.random.default_rng(seed).permutation(count)
    other = np.empty(count, np.int64)
    other[order] = np.roll(order, 1)
    return other


def _among(routed: Ints, named: Ints) -> npt.NDArray[np.bool_]:
    """Return whether each chosen expert was predicted, ``(n, K)``."""
    found: npt.NDArray[np.bool_] = (routed[:, :, None] == named[:, None, :]).any(-1)
    return found


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
