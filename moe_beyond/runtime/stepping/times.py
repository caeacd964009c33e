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
        device: Estimate of the time of one expert on the device; 0 before the first one (default: 0).
        host: Estimate of the time of one expert on the host for one token; 0 before the first one (default: 0).
        host_token: Estimate of the time of each token of an expert on the host that several tokens demand; 0 before the
            first one (default: 0).
    """

    now: float
    transfer: float
    layer: float
    device: float = 0.0
    host: float = 0.0
    host_token: float = 0.0


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
        self._transfer_s = self._layer_s = self._device_s = self._host_s = self._host_token_s = 0.0

    def begin(self, now: float) -> Times:
        """Return the times of a step or an event that begins.

        Args:
            now: Time in seconds of `time.perf_counter`.
        """
        measured = Times(
            now - self._began, self._transfer_s, self._layer_s, self._device_s, self._host_s, self._host_token_s
        )
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

    def add_computing(self, seconds: float, experts: int) -> None:
        """Add the time of experts on the device to its estimate."""
        if experts:
            self._device_s = _smoothed(self._device_s, seconds / experts)

    def add_host(self, seconds: float, experts: int, routes: int) -> None:
        """Add the time of an event's experts on the host to its estimates.

        Args:
            seconds: Duration in seconds.
            experts: Number of experts.
            routes: Number of tokens that demand each of them, summed.
        """
        if routes > experts:
            self._host_token_s = _smoothed(self._host_token_s, seconds / routes)
        elif experts:
            self._host_s = _smoothed(self._host_s, seconds / experts)


def _smoothed(estimate: float, duration: float) -> float:
    return duration if estimate == 0 else (1 - SMOOTHING) * estimate + SMOOTHING * duration
