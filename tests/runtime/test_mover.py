"""Tests of the mover: order, errors, interrupts and threads, with stores that are slow, blocked or broken."""

import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_beyond.errors import UserError
from moe_beyond.runtime.slab import Bytes, SlabLayout
from moe_beyond.runtime.slots import mover
from moe_beyond.runtime.slots.copies import CpuCopier
from moe_beyond.runtime.slots.mover import CLOSING_S, HANDOVER_BYTES, Mover, Transfer
from moe_beyond.runtime.slots.pool import SlotPool
from moe_beyond.runtime.storage.store import BytesBySource

SMALL, LARGE = 64, HANDOVER_BYTES
SOURCES = {"memory": BytesBySource(host=1), "page cache": BytesBySource(page_cache=1), "disk": BytesBySource(disk=1)}
PATIENCE = 10.0
"""Seconds after which a test that should not hang fails."""


class Store:
    """A store whose experts are their own numbers, repeated; reads into one slab never overlap.

    Args:
        size: Bytes of an expert.
        source: Key of `SOURCES`.
        delay: Function from an expert to the seconds of its read.
    """

    def __init__(
        self, size: int = SMALL, source: str = "disk", delay: Callable[[int], float] = lambda expert: 0.0
    ) -> None:
        self.layouts = {0: SlabLayout.of({"weight": ((size // 4,), torch.int32)})}
        self.nbytes = 0
        self.in_memory = source == "memory"
        self.source, self.delay = SOURCES[source], delay
        self.gates: dict[int, threading.Event] = {}
        self.errors: dict[int, Exception] = {}
        self.begun: list[int] = []
        self.threads: set[str] = set()
        self._written: set[int] = set()
        self._changed = threading.Condition()

    def block(self, expert: int) -> threading.Event:
        """Let the read of an expert wait for the event that is returned."""
        return self.gates.setdefault(expert, threading.Event())

    def until_begun(self, count: int) -> None:
        """Wait until this number of reads has begun."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.begun) >= count, PATIENCE), self.begun

    def read(self, expert: int, slab: Bytes) -> BytesBySource:
        address = slab.ctypes.data
        with self._changed:
            assert address not in self._written, "two transfers write to one slot"
            self._written.add(address)
            self.begun.append(expert)
            gate = self.gates.get(expert)
            self.threads.add(threading.current_thread().name)
            self._changed.notify_all()
        try:
            values = slab.view(np.int32)
            values[::2] = expert
            time.sleep(self.delay(expert))
            assert gate is None or gate.wait(PATIENCE)
            if expert in self.errors:
                raise self.errors[expert]
            values[1::2] = expert
            return self.source
        finally:
            with self._changed:
                self._written.remove(address)

    def describe(self, expert: int) -> str:
        return f"expert {expert} in a test"

    def close(self) -> None:
        pass


class Core:
    """A stand-in for the cache core: random victims, a queue of prefetches, and a check of every rule of the mover.

    Args:
        store: Source of the experts.
        slots: Number of slots.
        seed: Seed of the choice of victims.
        **options: Options of the mover.
    """

    def __init__(self, store: Store, slots: int, seed: int = 0, **options: float) -> None:
        self.store, self.pool = store, SlotPool(slots, store.layouts, torch.device("cpu"))
        self.slot_of: dict[int, int] = {}
        self.queue: list[int] = []
        self.pinned: set[int] = set()
        self.requested: list[tuple[int, int, bool]] = []
        self.transfers: list[Transfer] = []
        self._random = random.Random(seed)
        self.mover = Mover(
            store, CpuCopier(self.pool), next_prefetch=self._next_prefetch, arrived=self._arrived, **options
        )

    def demand(self, *experts: int, slot: int | None = None) -> list[int]:
        """Give slots to missing experts and demand them; return the numbers of the transfers."""
        with self.mover.lock:
            self.pinned = set(experts)
            missing = [expert for expert in experts if expert not in self.slot_of]
            jobs = [(expert, self._give(expert, slot)) for expert in missing]
            self.requested += [(*job, False) for job in jobs]
            self.mover.demand(jobs)
        return missing

    def prefetch(self, *experts: int) -> None:
        """Queue prefetches."""
        with self.mover.lock:
            self.queue += experts
        self.mover.wake()

    def event(self, *experts: int) -> None:
        """Demand experts, wait for them, and check the bytes of their slots."""
        self.demand(*experts)
        self.mover.wait(experts)
        self.check(*experts)
        with self.mover.lock:
            self.pinned = set()

    def check(self, *experts: int) -> None:
        """Check the bytes of experts in their slots."""
        for expert in experts:
            assert (self.pool.slab(self.slot_of[expert]).view(np.int32) == expert).all(), expert

    def settle(self) -> None:
        """Wait until all transfers have ended, and queued prefetches too."""
        deadline = time.monotonic() + PATIENCE
        while len(self.transfers) < len(self.requested) or self.queue:
            assert time.monotonic() < deadline, (self.requested, self.transfers, self.queue)
            time.sleep(0.0005)

    def _give(self, expert: int, slot: int | None = None) -> int:
        free = sorted(set(range(self.pool.slots)) - set(self.slot_of.values()))
        if slot is None and free:
            slot = free[0]
        elif slot is None:
            slot = self.slot_of[self._random.choice(sorted(set(self.slot_of) - self.pinned))]
        for other in [other for other, place in self.slot_of.items() if place == slot]:
            del self.slot_of[other]
        self.slot_of[expert] = slot
        return slot

    def _next_prefetch(self) -> tuple[int, int] | None:
        assert len(self.requested) == len(self.transfers), "a prefetch was requested while the link was busy"
        while self.queue:
            expert = self.queue.pop(0)
            if expert not in self.slot_of and len(self.pinned) < self.pool.slots:
                slot = self._give(expert)
                self.requested.append((expert, slot, True))
                return expert, slot
        return None

    def _arrived(self, transfer: Transfer) -> None:
        assert transfer.requested <= transfer.started <= transfer.ended
        self.transfers.append(transfer)


@contextmanager
def running(store: Store, slots: int = 4, seed: int = 0, **options: float) -> Iterator[Core]:
    """Yield a core with its mover; close the mover, and let all blocked reads end."""
    core = Core(store, slots, seed, **options)
    try:
        yield core
    finally:
        for gate in store.gates.values():
            gate.set()
        core.mover.close()
        for thread in threading.enumerate():
            if thread.name.startswith("moe-beyond reader"):
                thread.join(PATIENCE)
                assert not thread.is_alive(), thread


@contextmanager
def in_thread(function: Callable[[], object]) -> Iterator[list[BaseException]]:
    """Run a function in another thread, which must end with the block; yield the list of its errors."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield errors
    thread.join(PATIENCE)
    assert not thread.is_alive()


EVENTS = st.lists(
    st.tuples(st.sets(st.integers(0, 11), min_size=1, max_size=4), st.lists(st.integers(0, 11), max_size=4)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60)
@given(EVENTS, st.sampled_from(list(SOURCES)), st.sampled_from([SMALL, LARGE]), st.integers(1, 4), st.integers(0, 99))
def test_any_schedule_keeps_the_rules(
    events: list[tuple[set[int], list[int]]], source: str, size: int, readers: int, seed: int
) -> None:
    delays = random.Random(seed)
    store = Store(size, source, lambda expert: delays.choice([0.0, 0.0, 0.0003, 0.001]))
    with running(store, 4, seed, readers=readers) as core:
        for demanded, prefetched in events:
            core.event(*sorted(demanded))
            core.prefetch(*prefetched)
        core.settle()
        core.check(*core.slot_of)
    done = [(transfer.expert, transfer.slot, transfer.prefetch) for transfer in core.transfers]
    assert Counter(done) == Counter(core.requested)  # each job once
    for prefetch in (transfer for transfer in core.transfers if transfer.prefetch):
        others = [other for other in core.transfers if other is not prefetch]
        assert all(
            other.requested >= prefetch.requested or other.ended <= prefetch.started for other in others
        )  # it began on an idle link
    for slot in range(4):
        spans = sorted((item.started, item.ended) for item in core.transfers if item.slot == slot)
        assert all(first[1] <= second[0] for first, second in pairwise(spans))


@pytest.mark.parametrize("source", SOURCES)
def test_demands_are_read_in_their_order_and_before_prefetches(source: str) -> None:
    store = Store(source=source)
    with running(store, 8, readers=1) as core:
        core.event(0)
        gate = store.block(1)
        core.prefetch(1, 2)
        store.until_begun(2)
        with in_thread(lambda: core.event(7, 3, 5)):
            time.sleep(0.01)
            gate.set()
        core.settle()
    assert store.begun == [0, 1, 7, 3, 5, 2]
    assert [transfer.prefetch for transfer in core.transfers if transfer.expert in (1, 2)] == [True, True]


def test_one_prefetch_is_in_transit_at_a_time() -> None:
    store = Store()
    with running(store, 8, readers=2) as core:
        gate = store.block(1)
        core.prefetch(1, 2, 3)
        store.until_begun(1)
        core.event(4)
        core.event(5)  # by the reader that has looked for work after expert 4
        assert (store.begun, core.queue) == ([1, 4, 5], [2, 3])
        gate.set()
        core.settle()
        assert store.begun == [1, 4, 5, 2, 3]


def test_a_prefetch_does_not_begin_between_a_demand_and_its_end() -> None:
    store = Store()
    with running(store, 8, readers=2) as core:
        gate = store.block(1)
        core.demand(1)
        core.prefetch(2)
        store.until_begun(1)
        core.event(4)
        core.event(5)  # by the reader that has looked for work after expert 4
        assert (store.begun, core.queue) == ([1, 4, 5], [2])
        gate.set()
        core.settle()
        assert store.begun == [1, 4, 5, 2]


@pytest.mark.parametrize("source", SOURCES)
def test_prefetches_that_are_queued_during_demands_follow_them(source: str) -> None:
    store = Store(source=source)
    with running(store) as core:
        core.event(0)
        core.demand(1)
        core.prefetch(2)
        core.event(1)
        core.settle()
        assert store.begun == [0, 1, 2]


@pytest.mark.parametrize("source", SOURCES)
def test_a_late_hit_is_awaited_and_not_read_again(source: str) -> None:
    store = Store(source=source)
    with running(store) as core:
        core.event(0)
        gate = store.block(1)
        core.prefetch(1)
        store.until_begun(2)
        with in_thread(lambda: core.event(1)) as errors:
            time.sleep(0.01)
            assert not core.transfers[1:]
            gate.set()
        assert (errors, store.begun) == ([], [0, 1])


@pytest.mark.parametrize("source", SOURCES)
def test_a_slot_is_written_again_only_after_its_expert_in_transit(source: str) -> None:
    store = Store(source=source)
    with running(store) as core:
        core.event(0)
        gate = store.block(1)
        core.prefetch(1)
        store.until_begun(2)
        slot = core.slot_of[1]
        core.demand(2, slot=slot)  # evicts expert 1 in transit
        core.demand(3)
        core.mover.wait([3])  # another slot does not wait
        assert store.begun == [0, 1, 3]
        second = store.block(2)
        gate.set()
        store.until_begun(4)
        core.demand(4, slot=slot)  # evicts expert 2 in transit
        with in_thread(lambda: core.mover.wait([2, 4])) as errors:
            time.sleep(0.01)
            second.set()
        assert (errors, store.begun) == ([], [0, 1, 3, 2, 4])
        core.check(3, 4)
        assert [transfer.expert for transfer in core.transfers if transfer.slot == slot] == [1, 2, 4]


def test_an_expert_evicted_in_transit_is_read_again_into_its_new_slot() -> None:
    store = Store()
    with running(store) as core:
        first = store.block(1)
        core.prefetch(1)
        store.until_begun(1)
        second = store.gates[1] = threading.Event()
        core.demand(2, slot=core.slot_of[1])
        core.demand(1, slot=3)
        first.set()
        core.mover.wait([2])
        store.until_begun(3)
        with in_thread(lambda: core.event(1, 2)) as errors:
            time.sleep(0.01)
            assert 3 not in [transfer.slot for transfer in core.transfers]
            second.set()
        assert not errors
        assert Counter(store.begun) == {1: 2, 2: 1}


def test_a_wait_for_resident_experts_returns_during_other_transfers() -> None:
    store = Store()
    with running(store) as core:
        core.event(0, 1)
        store.block(2)
        core.prefetch(2)
        store.until_begun(3)
        core.event(0, 1)


def test_demands_are_read_while_the_caller_computes() -> None:
    store = Store()
    with running(store) as core:
        core.demand(0, 1, 2)
        core.settle()


@pytest.mark.parametrize(("size", "source"), [(SMALL, "memory"), (LARGE, "memory"), (SMALL, "page cache")])
def test_small_experts_in_memory_are_copied_by_the_waiting_thread(size: int, source: str) -> None:
    store = Store(size, source)
    with running(store) as core:
        core.event(0)
        store.delay, store.threads = lambda expert: 0.002, set()
        core.event(1, 2, 3)
    readers = {name for name in store.threads if name.startswith("moe-beyond reader")}
    here = threading.current_thread().name in store.threads
    assert (here, bool(readers)) == {"page cache": (False, True)}.get(source, (True, size == LARGE))


def test_a_failed_demand_raises_in_its_wait_and_in_every_later_call() -> None:
    store = Store()
    store.errors[1] = OSError(5, "Input/output error")
    with running(store) as core:
        core.demand(0, 1)
        with pytest.raises(OSError, match="Input/output error") as raised:
            core.mover.wait([0, 1])
        assert raised.value.__notes__ == ["Transfer of expert 1 in a test"]
        for call in (lambda: core.mover.wait([0]), lambda: core.demand(0), core.mover.wake):
            with pytest.raises(OSError, match="Input/output error") as again:
                call()
            assert again.value is raised.value
        core.mover.close()
        with pytest.raises(OSError, match="Input/output error"):
            core.mover.wait([])


def test_a_failed_copy_in_the_waiting_thread_raises_there() -> None:
    store = Store(source="memory")
    with running(store) as core:
        core.event(0)
        store.errors[1] = UserError("expert 1: is damaged; download it again")
        core.demand(1)
        for _ in range(2):
            with pytest.raises(UserError, match="expert 1: is damaged"):
                core.mover.wait([1])


def test_a_failed_prefetch_raises_in_the_next_wait() -> None:
    store = Store()
    with running(store) as core:
        core.event(0)
        store.errors[1] = UserError("expert 1: is damaged; download it again")
        core.prefetch(1)
        with pytest.raises(UserError, match="expert 1: is damaged"):
            wait_again_and_again(core, 0)


def test_a_failure_of_the_core_in_a_reader_raises_in_the_next_wait() -> None:
    with running(Store()) as core:
        core.event(0)
        core.requested.append((1, 1, True))  # as if this transfer were in transit, which `_next_prefetch` refuses
        core.prefetch(2)
        with pytest.raises(AssertionError, match="while the link was busy"):
            wait_again_and_again(core, 0)


def wait_again_and_again(core: Core, expert: int) -> None:
    """Wait for a resident expert until that raises."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        core.mover.wait([expert])
        time.sleep(0.0005)


def test_a_read_that_hangs_fails_with_its_name_and_closes_quickly() -> None:
    store = Store()
    with running(store, readers=1, timeout_s=0.2) as core:
        core.event(0)
        store.block(1)
        core.demand(1, 2)  # expert 2 is queued behind expert 1
        expected = "expert 1 in a test: was not read within 0.2 s; check the disk, then run the model again"
        for _ in range(2):
            with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
                core.mover.wait([2, 1])
        began = time.monotonic()
        core.mover.close()
        assert time.monotonic() - began < CLOSING_S + 1


def test_slow_reads_that_end_one_by_one_do_not_fail() -> None:
    store = Store(delay=lambda expert: 0.15)
    with running(store, readers=1, timeout_s=0.3) as core:
        core.event(0, 1, 2, 3)


@pytest.mark.parametrize("source", SOURCES)
def test_closing_ends_a_wait_of_another_thread(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mover, "CLOSING_S", 0.1)
    store = Store(source=source)
    with running(store) as core:
        core.event(0)
        store.block(1)
        core.prefetch(1)
        store.until_begun(2)
        with in_thread(lambda: core.event(1)) as errors:
            time.sleep(0.02)
            core.mover.close()
            core.mover.close()
        assert [str(error) for error in errors] == ["offloaded model: its run is closed; call it within the run"]
        for call in (lambda: core.mover.wait([]), lambda: core.demand(), core.mover.wake):
            with pytest.raises(UserError, match="its run is closed"):
                call()


def test_closing_drops_queued_demands() -> None:
    store = Store()
    with running(store, readers=1) as core:
        gate = store.block(0)
        core.demand(0, 1, 2)
        store.until_begun(1)
        with in_thread(core.mover.close):
            time.sleep(0.02)
            gate.set()
        assert store.begun == [0]


@pytest.mark.parametrize(("source", "size"), [("memory", SMALL), ("memory", LARGE), ("disk", SMALL)])
def test_ten_thousand_jobs_are_read_once_each(source: str, size: int) -> None:
    count = 10_000 if size == SMALL else 300
    store = Store(size, source)
    choice = random.Random(1)
    with running(store, 16) as core:
        while len(core.requested) < count:
            core.event(*sorted(choice.sample(range(64), 6)))
            core.prefetch(*choice.sample(range(64), 2))
        core.settle()
    assert Counter((item.expert, item.slot, item.prefetch) for item in core.transfers) == Counter(core.requested)


def test_no_reader_survives_if_another_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = threading.Thread.start, []

    def fail(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        Core(Store(), 4)
    assert [thread.is_alive() for thread in started] == [False, False]


def test_two_movers_are_independent() -> None:
    with running(Store()) as broken, running(Store(source="memory")) as other:
        broken.store.errors[0] = UserError("expert 0: is damaged; download it again")
        broken.demand(0)
        with pytest.raises(UserError):
            broken.mover.wait([0])
        broken.mover.close()
        other.event(0, 1, 2)


SCRIPT = """
import importlib.util, os, signal, sys, threading

spec = importlib.util.spec_from_file_location("here", sys.argv[1])
here = sys.modules["here"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(here)

for source in here.SOURCES:
    store = here.Store(source=source)
    with here.running(store) as core:
        core.event(0)
        store.delay = lambda expert: 0.3
        core.demand(1, 2)
        threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        try:
            core.mover.wait([1, 2])
        except KeyboardInterrupt:
            print(source, "was interrupted")
        core.mover.wait([1, 2])
        core.check(1, 2)
        core.event(3)
    print(threading.active_count(), "thread")

store = here.Store()
with here.running(store) as core:
    core.event(0)
    gate = store.block(1)
    core.demand(1)
    store.until_begun(2)
    held, release = threading.Event(), threading.Event()

    def hold():
        with core.mover.lock:
            held.set()
            release.wait()

    threading.Thread(target=hold).start()
    held.wait()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            core.mover.wait([0])
        except here.UserError as error:
            print(error, flush=True)
        core.mover.close()
        os._exit(0)
    release.set()
    assert os.waitpid(child, 0)[1] == 0
    gate.set()
    core.event(1, 2)
    print("the parent continues")

store = here.Store()
core = here.Core(store, 4)
store.block(1)
core.demand(1)
store.until_begun(1)
print("the process ends while a read hangs")
"""


def test_interrupts_forks_and_exits_of_a_process() -> None:
    words = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SCRIPT, __file__]
    result = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "memory was interrupted",
        "1 thread",
        "page cache was interrupted",
        "1 thread",
        "disk was interrupted",
        "1 thread",
        "offloaded model: was opened before a fork; open it in the process that runs it",
        "the parent continues",
        "the process ends while a read hangs",
    ]
