"""Times that the cache core reads: measured during a run, or those of a recorded run."""

import time
from collections.abc import Iterator
from typing import NamedTuple

SMOOTHING = 0.1
"""Weight of a new duration in the estimates that prefetchers with deadlines read."""


class Times(NamedTuple):
    """Times that the core reads, in seconds.

    Attributes:
        now: Time since the begin of the run.
        transfer: Estimate of the duration of a transfer; 0 before the first one.
        layer: Estimate of the time from one layer's routing to the next without stall; 0 before the first one.
    """

    now: float
    transfer: float
    layer: float


class RunTimes:
    """Times of the steps and events of a run.

    Args:
        recorded: Times of the steps and events of a recorded run, in place of measured ones (default: None).

    Attributes:
        last: Times of the step or event that began last.
    """

    def __init__(self, recorded: Iterator[Times] | None = None) -> None:
        self._recorded, self.last = recorded, Times(0.0, 0.0, 0.0)
        self._began = time.perf_counter()
        self._transfer_s = self._layer_s = 0.0

    def begin(self, now: float) -> Times:
        """Return the times of a step or an event that begins.

        Args:
            now: Time in seconds of `time.perf_counter`.
        """
        measured = Times(now - self._began, self._transfer_s, self._layer_s)
        self.last = measured if self._recorded is None else next(self._recorded)
        return self.last

    def now(self) -> float:
        """Return the time since the begin of the run, in seconds."""
        return time.perf_counter() - self._began

    def add_transfer(self, seconds: float) -> None:
        """Add the duration of a transfer to its estimate."""
        self._transfer_s = _smoothed(self._transfer_s, seconds)

    def add_layer(self, seconds: float) -> None:
        """Add the time from one layer's routing to the next to its estimate."""
        self._layer_s = _smoothed(self._layer_s, seconds)


def _smoothed(estimate: float, duration: float) -> float:
    return duration if estimate == 0 else (1 - SMOOTHING) * estimate + SMOOTHING * duration
