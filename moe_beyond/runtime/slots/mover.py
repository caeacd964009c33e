"""The mover: transfers of experts from the store into slots, by a few threads.

Demands go first, in their order. A prefetch starts only when no other transfer is queued or in transit, and the
cache core chooses it at that moment. Transfers into the same slot never overlap: an expert can be evicted in transit.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from weakref import WeakSet

from moe_beyond.errors import UserError
from moe_beyond.runtime.slots.copies import Copier
from moe_beyond.runtime.storage.store import BytesBySource, ExpertStore

HANDOVER_BYTES = 1024 * 1024
"""Size of an expert whose copy in memory takes ten times as long as waking a thread for it."""
CLOSING_S = 1.0
"""Seconds after which `Mover.close` gives up on reads that do not return."""


@dataclass(frozen=True)
class Transfer:
    """A finished transfer; times are those of `time.perf_counter`.

    Attributes:
        expert: Expert ``layer * E + expert``.
        slot: Number of the slot.
        prefetch: Whether it was a prefetch.
        requested: Time of its request in seconds; that of its start for a prefetch.
        started: Time of its start in seconds.
        ended: Time of its end in seconds.
        read_s: Seconds of reading from the store.
        copy_s: Seconds of copying to the device; 0 where the store reads into the slot.
        source: Bytes by the place they came from.
    """

    expert: int
    slot: int
    prefetch: bool
    requested: float
    started: float
    ended: float
    read_s: float
    copy_s: float
    source: BytesBySource


@dataclass(eq=False, slots=True)
class _Job:
    """A transfer that is queued or in transit.

    Attributes:
        earlier: Unfinished job that writes to the same slot before, or None.
        done: Whether the expert is in its slot.
    """

    expert: int
    slot: int
    prefetch: bool
    requested: float
    earlier: "_Job | None"
    done: bool = False


class Mover:
    """Moves experts into slots.

    A thread that waits for experts in host memory copies them itself if the copier allows it, because handing a small
    copy over takes longer. It never reads a file itself: such a read can hang, and a thread cannot be stopped.

    After the first failure of a transfer every call raises its error, and nothing is transferred any more.

    Args:
        store: Source of the experts.
        copier: Way from the store into the slots.
        readers: Number of threads (default: 4).
        next_prefetch: Function that gives the first queued prefetch a slot and returns (expert, slot), or None if no
            prefetch can start; called with the lock.
        arrived: Function that receives every finished transfer, also of an expert that was evicted in transit; called
            with the lock.
        timeout_s: Seconds without any finished transfer after which a wait fails (default: 60).

    Attributes:
        lock: Lock of the mover, which also guards the cache core.
    """

    def __init__(
        self,
        store: ExpertStore,
        copier: Copier,
        *,
        readers: int = 4,
        next_prefetch: Callable[[], tuple[int, int] | None],
        arrived: Callable[[Transfer], None],
        timeout_s: float = 60.0,
    ) -> None:
        self._store, self._copier = store, copier
        self._next_prefetch, self._arrived = next_prefetch, arrived
        self._timeout_s = timeout_s
        self._waiting_transfers = store.in_memory and copier.any_thread
        self._large = max(layout.stride for layout in store.layouts.values()) >= HANDOVER_BYTES
        self._demands: deque[_Job] = deque()
        self._running: set[_Job] = set()
        # The latest unfinished job of each expert and of each slot.
        self._by_expert: dict[int, _Job] = {}
        self._by_slot: dict[int, _Job] = {}
        self._has_prefetches = False
        self._last_end = perf_counter()
        self._error: BaseException | None = None
        self._create_locks()
        _movers.add(self)
        self._threads: list[threading.Thread] = []
        try:
            for number in range(readers):
                # Daemons, so that a read that hangs does not keep the process alive.
                thread = threading.Thread(target=self._serve, name=f"moe-beyond reader {number}", daemon=True)
                thread.start()
                self._threads.append(thread)
        except BaseException:
            self.close()
            raise

    def demand(self, jobs: Sequence[tuple[int, int]]) -> None:
        """Queue transfers before all prefetches; the caller holds the lock, and calls `wait` without it afterwards.

        Args:
            jobs: Experts and the slots they were given, the most urgent first.

        Raises:
            UserError: The mover is closed, or a transfer has failed with this error.
        """
        self._check()
        if not jobs:
            return
        now = perf_counter()
        for expert, slot in jobs:
            job = _Job(int(expert), int(slot), False, now, self._by_slot.get(slot))
            # An interrupt comes after a call. So there is none between the index and the queue.
            self._by_expert[job.expert] = self._by_slot[job.slot] = job
            self._demands.append(job)
        if not self._waiting_transfers:
            self._work.notify(len(jobs))
        elif self._large and len(jobs) > 1:
            self._work.notify(len(jobs) - 1)  # `wait` runs one of them

    def wait(self, experts: Sequence[int]) -> None:
        """Return when experts are in their slots; the caller does not hold the lock.

        Args:
            experts: Experts, resident or in transit.

        Raises:
            UserError: The mover is closed, no transfer has ended for ``timeout_s``, or a transfer has failed with
                this error. Other errors of a transfer are raised as they are.
        """
        began = 0.0
        while True:
            job: _Job | None = None
            try:
                with self.lock:
                    self._check()
                    awaited = [self._by_expert[expert] for expert in experts if expert in self._by_expert]
                    if not awaited:
                        if began:
                            self._wake_for_prefetches()
                        return
                    began = began or perf_counter()
                    job = self._first_demand() if self._waiting_transfers else None
                    if job is None:
                        self._work.notify(len(self._demands))
                        rest, ended = self._rest(began, awaited), threading.Lock()
                        ended.acquire()
                        self._waits.append(ended)
                    else:
                        self._begin(job)
                if job is None:
                    ended.acquire(timeout=rest)  # `_wake_waits` releases it
                else:
                    self._run(job)
            except BaseException:  # also Ctrl-C
                if job is not None:
                    with self.lock:
                        self._give_back(job)
                raise

    def wake(self) -> None:
        """Note that the cache core has queued prefetches, or has room for queued ones; with or without the lock.

        Raises:
            UserError: The mover is closed, or a transfer has failed with this error.
        """
        with self.lock:
            self._check()
            self._has_prefetches = True
            self._wake_for_prefetches()

    def close(self) -> None:
        """Stop all threads; queued transfers are dropped. Reads that hang are given up after `CLOSING_S` seconds."""
        with self.lock:
            self._stop(UserError("offloaded model: its run is closed; call it within the run"))
        deadline = perf_counter() + CLOSING_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - perf_counter()))

    def disable(self) -> None:
        """Make every call raise, in a fork of the process that has none of the threads and perhaps a held lock."""
        self._create_locks()
        self._threads = []
        self._error = UserError("offloaded model: was opened before a fork; open it in the process that runs it")

    def _serve(self) -> None:
        """Run transfers until the mover is closed or has failed: the work of a reader thread."""
        try:
            while (job := self._next_job()) is not None:
                self._run(job)
        except Exception as error:  # the threads that wait raise it
            with self.lock:
                self._stop(error)

    def _next_job(self) -> _Job | None:
        """Wait for a transfer; return None when the mover has stopped."""
        with self.lock:
            while self._error is None:
                job = self._first_demand() or self._new_prefetch()
                if job is not None:
                    self._begin(job)
                    return job
                self._work.wait()
        return None

    def _run(self, job: _Job) -> None:
        """Transfer an expert in this thread."""
        try:
            started = perf_counter()
            read_s, copy_s, source = self._copier.transfer(self._store, job.expert, job.slot)
            ended = perf_counter()
            times = (job.requested, started, ended, read_s, copy_s)
            with self.lock:
                self._arrived(Transfer(job.expert, job.slot, job.prefetch, *times, source))
                self._last_end = ended
                self._finish(job)
        except Exception as error:
            error.add_note(f"Transfer of {self._store.describe(job.expert)}")
            with self.lock:
                self._stop(error)
            raise

    def _first_demand(self) -> _Job | None:
        """Return the first queued demand whose slot no other transfer is writing."""
        return next((job for job in self._demands if job.earlier is None or job.earlier.done), None)

    def _new_prefetch(self) -> _Job | None:
        """Return a prefetch to begin, if the interconnect is idle and no demand is queued."""
        if self._running or not self._has_prefetches:
            return None
        prefetch = self._next_prefetch()
        if prefetch is None:
            self._has_prefetches = False
            return None
        expert, slot = prefetch
        job = _Job(int(expert), int(slot), True, perf_counter(), self._by_slot.get(slot))
        self._by_expert[job.expert] = self._by_slot[job.slot] = job
        return job

    def _begin(self, job: _Job) -> None:
        """Take a job that is going to run out of the queue."""
        self._running.add(job)
        job.earlier = None
        if not job.prefetch:
            self._demands.remove(job)

    def _finish(self, job: _Job) -> None:
        """Remove a job that is done; may be called again if it was interrupted."""
        job.done = True
        self._running.discard(job)
        if self._by_expert.get(job.expert) is job:
            del self._by_expert[job.expert]
        if self._by_slot.get(job.slot) is job:
            del self._by_slot[job.slot]
        self._wake_waits()

    def _give_back(self, job: _Job) -> None:
        """Queue a demand of the thread that waits, so that a reader completes it, unless it is done."""
        if job.done:
            self._finish(job)
            return
        self._running.discard(job)
        if job not in self._demands:
            self._demands.appendleft(job)
        self._work.notify()

    def _wake_for_prefetches(self) -> None:
        """Wake a reader for prefetches if the interconnect is idle; otherwise the last thread to use it comes back."""
        if self._has_prefetches and not self._demands and not self._running:
            self._work.notify()

    def _rest(self, began: float, awaited: list[_Job]) -> float:
        """Return the seconds until a wait fails because no transfer has ended for too long; stop the mover at 0."""
        rest = max(began, self._last_end) + self._timeout_s - perf_counter()
        if rest > 0:
            return rest
        late = next((job for job in awaited if job in self._running), awaited[0])
        self._stop(
            UserError(
                f"{self._store.describe(late.expert)}: was not read within {self._timeout_s:g} s; "
                "check the disk, then run the model again"
            )
        )
        return 0.0

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _stop(self, error: BaseException) -> None:
        """Keep the first error, and end all threads and waits."""
        if self._error is None:
            self._error = error
        self._work.notify_all()
        self._wake_waits()

    def _wake_waits(self) -> None:
        """Wake all threads that wait."""
        while self._waits:
            self._waits.pop().release()

    def _create_locks(self) -> None:
        # Locks whose methods Python code implements can be interrupted between locking and the block. So the thread
        # that waits uses no `Condition`.
        self.lock = threading.RLock()
        self._work = threading.Condition(self.lock)  # notified when readers have work
        self._waits: list[threading.Lock] = []  # held locks, which are released when a transfer ends


_movers: WeakSet[Mover] = WeakSet()


def _disable_all() -> None:
    for mover in _movers:
        mover.disable()


os.register_at_fork(after_in_child=_disable_all)
