"""Counts and times of a strategy over sequences; the totals of parts of a trace set add up to those of the whole."""

from dataclasses import dataclass, field
from math import fsum

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.counters import Counter
from moe_beyond.geometry import Geometry
from moe_beyond.simulator.sequence import Group
from moe_beyond.simulator.sums import SequenceSums


@dataclass
class StepTimes:
    """Times and demand of counted steps; arrays and seconds are kept for a device only.

    Attributes:
        timed: Whether there is a device (default: True).
        stall_compute: Seconds of stall and of computing of each step, ``(S, 2)`` float64, one array per group.
        tokens: Number of tokens of each step, ``(S,)`` int64, one array per group.
        in_turn: Number of consecutive tokens of each step, ``(S,)`` int64, one array per group.
        decoding: Whether each step is decoded, ``(S,)`` bool, one array per group.
        link_seconds: Seconds for which the interconnect was busy, counted or not, in the order of their addition.
        counted_tokens: Number of tokens of the counted steps.
        all_tokens: Number of tokens of all steps, counted or not.
        demanded: Number of experts that the counted steps demanded, token by token.
        units: Size of each expert, ``(L*E,)`` int64; None if all experts have the same size.
        demanded_units: Sum of the sizes of the demanded experts; not used without ``units``.
    """

    timed: bool = True
    stall_compute: list[npt.NDArray[np.float64]] = field(default_factory=list)
    tokens: list[npt.NDArray[np.int64]] = field(default_factory=list)
    in_turn: list[npt.NDArray[np.int64]] = field(default_factory=list)
    decoding: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    link_seconds: list[float] = field(default_factory=list)
    counted_tokens: int = 0
    all_tokens: int = 0
    demanded: int = 0
    units: npt.NDArray[np.int64] | None = None
    demanded_units: int = 0

    @property
    def busy(self) -> float:
        """Seconds for which the interconnect was busy."""
        return fsum(self.link_seconds)

    def add_busy(self, seconds: float) -> None:
        """Add seconds for which the interconnect was busy."""
        if self.timed:
            self.link_seconds.append(seconds)

    def add(
        self, group: Group, stall_compute: npt.NDArray[np.float64], counted: npt.NDArray[np.bool_]
    ) -> tuple[int, int, float]:
        """Add the steps of a group.

        Args:
            group: Sequences that were stepped together.
            stall_compute: Seconds of stall and of computing of each step, ``(S, 2)`` float64.
            counted: Whether each step counts, ``(S,)`` bool.

        Returns:
            Units that the counted steps demand, token by token (experts if all have the same size); number of counted
            tokens of decode; and seconds of decoding them.
        """
        spent, tokens, decoding = stall_compute[counted], group.size[counted], group.decoding[counted]
        if self.timed:
            self.stall_compute.append(spent)
            self.tokens.append(tokens)
            self.in_turn.append(group.in_turn[counted])
            self.decoding.append(decoding)
        self.counted_tokens += int(tokens.sum())
        self.all_tokens += int(group.size.sum())
        demanded = int(group.demanded[counted].sum())
        self.demanded += demanded
        if self.units is not None:
            demanded = int(group.demanded_units(self.units)[counted].sum())
            self.demanded_units += demanded
        return demanded, int(tokens[decoding].sum()), float(spent[decoding].sum())

    def extend(self, later: "StepTimes") -> None:
        """Add the times of later sequences."""
        for name in ("stall_compute", "tokens", "in_turn", "decoding", "link_seconds"):
            getattr(self, name).extend(getattr(later, name))
        for name in ("counted_tokens", "all_tokens", "demanded", "demanded_units"):
            setattr(self, name, getattr(self, name) + getattr(later, name))


@dataclass
class Totals:
    """Counts and times of one strategy over sequences.

    Attributes:
        counts: Counts of each layer, ``(L, 9)`` int64, columns `Counter`.
        times: Times and demand of the steps.
        sums: Contributions of each sequence, for intervals.
        sequences: Number of counted sequences (default: 0).
        too_short: Number of sequences that are no longer than the warm-up (default: 0).
    """

    counts: npt.NDArray[np.int64]
    times: StepTimes
    sums: SequenceSums
    sequences: int = 0
    too_short: int = 0

    @classmethod
    def of(cls, geometry: Geometry, *, timed: bool) -> "Totals":
        """Return empty totals.

        Args:
            geometry: Geometry of the model.
            timed: Whether there is a device.
        """
        units = None if geometry.has_one_size else np.repeat(geometry.expert_units, geometry.num_experts)
        counts = np.zeros((geometry.num_layers, len(Counter)), np.int64)
        return cls(counts, StepTimes(timed, units=units), SequenceSums(units=np.array(geometry.expert_units)))

    def extend(self, later: "Totals") -> None:
        """Add the totals of later sequences."""
        self.counts += later.counts
        self.times.extend(later.times)
        self.sums.extend(later.sums)
        self.sequences += later.sequences
        self.too_short += later.too_short
