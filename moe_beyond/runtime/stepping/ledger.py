"""The ledger of a run: cache core, slots and arrivals, which the lock of the mover guards.

Every call of the core is an operation with a number. Prefetches and arrivals are recorded with the number of operations
before them, so that a run with prefetches can be repeated exactly.
"""

from collections.abc import Iterable, Iterator

from moe_beyond.cache.cache import Cache
from moe_beyond.geometry import Geometry
from moe_beyond.runtime.slots.mover import Transfer
from moe_beyond.runtime.slots.pool import SlotPool
from moe_beyond.runtime.stepping.telemetry import PrefetchRow, Telemetry, TransferRow
from moe_beyond.runtime.stepping.times import RunTimes, Times
from moe_beyond.runtime.strategy import RunStrategy

FIRST_TRANSFER_S = 1e-3
"""Seconds per transfer that prefetchers assume before the first one."""


class Ledger:
    """Experts that have slots, those in transit, and those that have arrived.

    Args:
        cache: Cache of the run, with transfers that take time.
        pool: Memory of the slots.
        telemetry: Sums and rows of the run.
        times: Times of the run.

    Attributes:
        cache: Cache of the run.
        pool: Memory of the slots.
        telemetry: Sums and rows of the run.
        times: Times of the run.
        operations: Number of operations of the core so far.
        events: Number of events that have begun.
    """

    def __init__(self, cache: Cache, pool: SlotPool, telemetry: Telemetry, times: RunTimes) -> None:
        self.cache, self.pool, self.telemetry, self.times = cache, pool, telemetry, times
        self.operations = self.events = 0
        self._prefetched: dict[int, tuple[int, int]] = {}  # events and operations before each prefetch in transit

    def begin_times(self, now: float) -> Times:
        """Give the core the times of a step or an event that begins, and return them.

        Args:
            now: Time in seconds of `time.perf_counter`.
        """
        times = self.times.begin(now)
        if times.transfer:
            self.cache.set_transfer_seconds(times.transfer)
        self.cache.set_computing(times.device, times.host, times.host_token)
        return times

    def next_prefetch(self, now: float | None = None) -> tuple[int, int] | None:
        """Start the next queued prefetch, for an idle reader.

        Args:
            now: Time since the begin of the run, in seconds (default: measured).

        Returns:
            Expert and slot; None if no prefetch is queued, or none has room.
        """
        now = self.times.now() if now is None else now
        started = self.cache.begin_prefetch(now)
        expert, slot = started or (-1, -1)
        self.telemetry.add_prefetch(PrefetchRow(self.operations, now, expert, slot))
        if started is not None:
            self.pool.give(slot, expert)
            self._prefetched[expert] = (self.events, self.operations)
        return started

    def arrived(self, transfer: Transfer) -> None:
        """Note the arrival of an expert."""
        self.pool.arrived(transfer.slot, transfer.expert)
        if self.cache.slot(transfer.expert) == transfer.slot:  # it may have been evicted in transit
            self.cache.arrived(transfer.expert)
        self.times.add_transfer(transfer.read_s + transfer.copy_s)
        event, operation = self._prefetched.pop(transfer.expert, (self.events, self.operations))
        host, page_cache, disk = transfer.source
        self.telemetry.add_transfer(
            TransferRow(
                transfer.expert, transfer.slot, transfer.prefetch, event, operation, self.operations,
                transfer.started - transfer.requested, transfer.read_s, transfer.copy_s, host, page_cache, disk,
            )
        )  # fmt: skip

    def give(self, jobs: Iterable[tuple[int, int]]) -> None:
        """Give slots to experts that are transferred next.

        Args:
            jobs: Experts and their slots.
        """
        for expert, slot in jobs:
            self.pool.give(slot, expert)

    def end_interrupted_event(self) -> list[tuple[int, int]]:
        """End the running event; return the experts to transfer again, each with its slot.

        They have a slot, but an interrupted transfer may never arrive there.
        """
        self.pool.end_wave()
        while self.cache.next_wave(self.times.last.now) is not None:
            pass
        experts = range(self.cache.state.experts.shape[1])
        slots = [(expert, slot) for expert in experts if (slot := self.cache.slot(expert)) >= 0]
        absent = [(expert, slot) for expert, slot in slots if self.pool.content[slot] != expert]
        self.give(absent)
        return absent


def make_ledger(
    geometry: Geometry,
    strategy: RunStrategy,
    pool: SlotPool,
    telemetry: Telemetry,
    recorded: Iterator[Times] | None = None,
) -> Ledger:
    """Make the ledger of a strategy, with a cold cache.

    Args:
        geometry: Geometry of the model.
        strategy: Strategy of the run.
        pool: Memory of the slots.
        telemetry: Sums and rows of the run.
        recorded: Times of the steps and events of a recorded run (default: None, measured ones).
    """
    settings = strategy.settings
    cache = Cache(
        geometry, settings.slots, settings.policy, settings.scope, profile=strategy.profile,
        prefetch=settings.prefetch_settings(geometry), transfer_seconds=FIRST_TRANSFER_S,
        misses=settings.misses,
    )  # fmt: skip
    return Ledger(cache, pool, telemetry, RunTimes(recorded))
