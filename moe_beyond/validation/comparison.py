"""A recording next to its replay: hits, bytes and times, in total and by event."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_beyond.runtime.records.as_run import ReplayAsRun
from moe_beyond.simulator.devices import Device
from moe_beyond.validation.forecast import Forecast
from moe_beyond.validation.measured import COMPUTING, LINK, TRANSFERS, Floats, Ints, Measured

COUNTED = ("hits", "late hits", "misses")
STEADY = 2.0
"""Largest time of a steady token besides its transfers, divided by the median."""


@dataclass(frozen=True)
class Pair:
    """A figure of the recording and of the replay.

    Attributes:
        recorded: Figure of the recording.
        replayed: Figure of the replay.
    """

    recorded: float
    replayed: float

    @property
    def difference(self) -> float:
        """Figure of the replay less that of the recording."""
        return self.replayed - self.recorded

    @property
    def error(self) -> float | None:
        """Difference divided by the recorded figure; None if that is 0."""
        return self.difference / self.recorded if self.recorded else None

    def to_json(self) -> dict[str, float | None]:
        """Return plain values."""
        return {"recorded": self.recorded, "replayed": self.replayed, "error": self.error}


@dataclass(frozen=True)
class Times:
    """Times of the judged tokens.

    Attributes:
        tokens: Number of tokens.
        token_ms: Mean milliseconds per token.
        tokens_per_second: Tokens per second.
        parts: Part of the time -> mean milliseconds per token.
        r2: Share of the variance of the tokens' times that the forecast explains; None if all have the same time.
        steady: Number of steady tokens, and the squared correlation of their recorded and forecast times; None if one
            has no variance. A page fault, for example, makes a token unsteady.
        given_computing: Tokens per second and ``r2`` if the forecast takes the recorded computing of each token; None
            if the recording has the computing of experts.
    """

    tokens: int
    token_ms: Pair
    tokens_per_second: Pair
    parts: Mapping[str, Pair]
    r2: float | None
    steady: tuple[int, float | None]
    given_computing: tuple[Pair, float | None] | None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        content: dict[str, Any] = {
            "tokens": self.tokens,
            "token_ms": self.token_ms.to_json(),
            "tokens_per_second": self.tokens_per_second.to_json(),
            "parts_ms": {name: pair.to_json() for name, pair in self.parts.items()},
            "r2": self.r2,
            "steady": dict(zip(("tokens", "squared_correlation"), self.steady, strict=True)),
        }
        if self.given_computing is not None:
            speed, r2 = self.given_computing
            content["given_computing"] = {"tokens_per_second": speed.to_json(), "r2": r2}
        return content


@dataclass(frozen=True)
class Validation:
    """A recording, its replay, and their differences.

    Attributes:
        measured: Measurements of the recording.
        forecast: Replay of the recording on the device.
        device: Device of the clock.
        fitted_on: Number of generated tokens that the device was fitted on; 0 for a given device.
        as_run: Comparison of every event with the recorded moments of prefetches; None for a foreign engine.
        counts: Count or bytes -> figures of all steps.
        times: Times of the judged tokens.
        judged: Steps of the judged tokens, ``(n,)`` int64.
    """

    measured: Measured
    forecast: Forecast
    device: Device
    fitted_on: int
    as_run: ReplayAsRun | None
    counts: Mapping[str, Pair]
    times: Times
    judged: Ints

    def to_json(self) -> dict[str, Any]:
        """Return plain values: totals, and one row per event and per generated token."""
        measured, found = self.measured, self.forecast
        settings = measured.settings
        return {
            "recording": measured.name,
            "policy": settings.policy,
            "prefetch": settings.prefetch,
            "budget_slots": settings.slots,
            "device": self.device.to_json(),
            "fitted_on_tokens": self.fitted_on,
            "events_as_run": None if self.as_run is None else vars(self.as_run),
            "totals": {name.replace(" ", "_"): pair.to_json() for name, pair in self.counts.items()},
            "times": self.times.to_json(),
            "tokens": [
                {
                    "step": int(step),
                    "judged": bool(step in self.judged),
                    "recorded_ms": 1e3 * float(measured.seconds[step]),
                    "forecast_ms": 1e3 * float(found.seconds[step]),
                }
                for step in measured.tokens
            ],
            "events": [
                {
                    "step": step,
                    "layer": layer,
                    "recorded": dict(zip(("hits", "late_hits", "misses"), recorded, strict=True)),
                    "replayed": dict(zip(("hits", "late_hits", "misses"), replayed, strict=True)),
                    "stall_ms": 1e3 * stall,
                }
                for step, rows in enumerate(
                    zip(measured.counts.tolist(), found.counts.tolist(), found.stalls.tolist(), strict=True)
                )
                for layer, (recorded, replayed, stall) in enumerate(zip(*rows, strict=True))
            ],
        }


def compare_counts(measured: Measured, found: Forecast) -> dict[str, Pair]:
    """Return hits, late hits, misses and bytes of all steps."""
    recorded, replayed = measured.counts.sum((0, 1)).tolist(), found.counts.sum((0, 1)).tolist()
    pairs = {name: Pair(*each) for name, *each in zip(COUNTED, recorded, replayed, strict=True)}
    return {**pairs, "bytes": Pair(float(measured.read_bytes.sum()), found.read_bytes)}


def compare_times(measured: Measured, found: Forecast, judged: Ints) -> Times:
    """Compare the times of tokens.

    Args:
        measured: Measurements of a recording.
        found: Replay of the recording.
        judged: Steps of the tokens, ``(n,)`` int64.
    """
    recorded, replayed = measured.seconds[judged], found.seconds[judged]
    given = None
    if COMPUTING in measured.parts:
        known = replayed - found.parts[COMPUTING][judged] + measured.parts[COMPUTING][judged]
        given = _speed(recorded, known), _r2(recorded, known)
    transfers = measured.parts[TRANSFERS if LINK not in measured.parts else LINK][judged]
    steady = recorded - transfers <= STEADY * np.median(recorded - transfers)
    return Times(
        tokens=len(judged),
        token_ms=_milliseconds(recorded, replayed),
        tokens_per_second=_speed(recorded, replayed),
        parts={
            name: _milliseconds(seconds[judged], found.parts[name][judged]) for name, seconds in measured.parts.items()
        },
        r2=_r2(recorded, replayed),
        steady=(int(steady.sum()), _squared_correlation(recorded[steady], replayed[steady])),
        given_computing=given,
    )


def _milliseconds(recorded: Floats, replayed: Floats) -> Pair:
    return Pair(1e3 * float(recorded.mean()), 1e3 * float(replayed.mean()))


def _speed(recorded: Floats, replayed: Floats) -> Pair:
    return Pair(len(recorded) / float(recorded.sum()), len(replayed) / float(replayed.sum()))


def _r2(recorded: Floats, replayed: Floats) -> float | None:
    """Return the share of the variance that a forecast explains; below 0 if the mean explains more."""
    spread = float(((recorded - recorded.mean()) ** 2).sum())
    return 1 - float(((recorded - replayed) ** 2).sum()) / spread if spread else None


def _squared_correlation(recorded: Floats, replayed: Floats) -> float | None:
    """Return the squared correlation of times, which a wrong mean does not change; None without variance."""
    if not (np.ptp(recorded) and np.ptp(replayed)):
        return None
    return float(np.corrcoef(recorded, replayed)[0, 1] ** 2)
