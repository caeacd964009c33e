"""Tests of the copies into slots: on the CPU, and the order of operations on CUDA with a stand-in for `torch.cuda`."""

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moe_beyond.errors import UserError
from moe_beyond.runtime import load_offloaded, run
from moe_beyond.runtime.slab import Bytes, SlabLayout
from moe_beyond.runtime.slots import copies
from moe_beyond.runtime.slots.copies import CpuCopier, CudaCopier
from moe_beyond.runtime.slots.pool import SlotPool
from moe_beyond.runtime.storage.store import BytesBySource, HostStore, Part

LAYOUTS = {0: SlabLayout.of({"weight": ((40,), torch.int32), "bias": ((3,), torch.int32)})}
STRIDE = LAYOUTS[0].stride


class Store:
    """A store whose experts are their own numbers, repeated."""

    layouts = LAYOUTS
    nbytes = 0

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def read(self, expert: int, slab: Bytes) -> BytesBySource:
        self.log.append(f"read {expert}")
        slab[:] = expert
        return BytesBySource(disk=len(slab))

    def describe(self, expert: int) -> str:
        return f"expert {expert}"

    def close(self) -> None:
        pass


def new_pool() -> SlotPool:
    pool = SlotPool(3, LAYOUTS, torch.device("cpu"))
    pool.memory.zero_()
    return pool


def test_a_copy_on_the_cpu_changes_one_slot() -> None:
    pool = new_pool()
    read_s, copy_s, source = CpuCopier(pool).transfer(Store([]), 7, 1)
    assert pool.memory.unique(dim=1).tolist() == [[0], [7], [0]]
    assert read_s > 0
    assert (copy_s, source) == (0.0, BytesBySource(disk=STRIDE))


def raised(function: Callable[[], object]) -> str:
    """Return the message of an error."""
    with pytest.raises(UserError) as caught:
        function()
    return str(caught.value)


def is_mapped(address: int) -> bool:
    """Whether an address belongs to a mapping of this process."""
    ranges = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
    return any(int(begin, 16) <= address < int(end, 16) for begin, end in ranges)


class StandIn:
    """A stand-in for `torch.cuda`: the calls in their order, and the memory that is pinned."""

    def __init__(self) -> None:
        calls = self.calls = []
        pinned = self.pinned = {}
        default, current = SimpleNamespace(name="compute"), threading.local()

        class Event:
            def __init__(self, *, blocking: bool = False, enable_timing: bool = False) -> None:
                self.kind = "ended" if blocking else "begun" if enable_timing else "released"

            def record(self, stream: Any) -> None:
                calls.append(f"{stream.name} records {self.kind}")

            def synchronize(self) -> None:
                calls.append(f"host waits for {self.kind}")

            def elapsed_time(self, end: Any) -> float:
                assert (self.kind, end.kind) == ("begun", "ended")
                return 2.0

        class Stream:
            name = "copy"

            def __init__(self, device: torch.device) -> None:
                pass

            def wait_event(self, event: Event) -> None:
                calls.append(f"copy waits for {event.kind}")

            def synchronize(self) -> None:
                calls.append("host waits for copy")

        def set_stream(stream: Any) -> None:
            assert threading.current_thread() is not threading.main_thread(), "the model would run on another stream"
            current.stream = stream

        def register(address: int, size: int, flags: int) -> int:
            assert address not in pinned
            calls.append(f"pin {size}")
            pinned[address] = size
            return 0

        def unregister(address: int) -> int:
            assert is_mapped(address), "the memory was freed before it was unpinned"
            del pinned[address]
            calls.append("unpin")
            return 0

        def check_error(code: int) -> None:
            if code:
                raise RuntimeError("CUDA error")

        self.Event, self.Stream, self.set_stream, self.check_error = Event, Stream, set_stream, check_error
        self.runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
        self.current_stream = lambda device: getattr(current, "stream", default)

    def device(self, device: torch.device) -> Any:
        return nullcontext()

    def synchronize(self, device: torch.device) -> None:
        self.calls.append("host waits for the device")

    def cudart(self) -> Any:
        return self.runtime


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """A stand-in for `torch.cuda` in the copier."""
    stand_in = StandIn()
    monkeypatch.setattr(copies, "cuda", stand_in)
    return stand_in


def in_a_thread(function: Callable[[], object]) -> Any:
    """Return the result of a function that runs in a reader's place."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_a_copy_to_cuda_waits_for_the_kernels_that_read_its_slot(cuda: StandIn) -> None:
    pool = new_pool()
    copier, store = CudaCopier(pool), Store(cuda.calls)
    with ThreadPoolExecutor(1) as reader:
        assert reader.submit(copier.transfer, store, 7, 1).result()[1:] == (0.002, BytesBySource(disk=STRIDE))
        copier.after_compute([1, 2])
        reader.submit(copier.transfer, store, 8, 0).result()
        reader.submit(copier.transfer, store, 9, 1).result()
    assert pool.memory.unique(dim=1).tolist() == [[8], [9], [0]]
    copier.close()
    copier.close()
    assert in_a_thread(lambda: raised(lambda: copier.transfer(store, 1, 0))) == (
        "offloaded model: its run is closed; call it within the run"
    )
    copied = ["copy records begun", "copy records ended", "host waits for ended"]
    assert cuda.calls == [
        "host waits for the device",
        f"pin {STRIDE}",
        "read 7",
        *copied,
        "compute records released",
        "read 8",
        *copied,
        "read 9",
        "copy waits for released",
        *copied,
        "host waits for copy",
        "unpin",
        "host waits for copy",
    ]


def test_a_copy_to_cuda_begins_in_the_memory_of_a_store_there(cuda: StandIn) -> None:
    pool = new_pool()
    store = host_store()
    copier = CudaCopier(pool, store)
    assert in_a_thread(lambda: copier.transfer(store, 1, 2))[2] == BytesBySource(host=172)
    expected = np.zeros(STRIDE, np.uint8)
    store.read(1, expected)
    assert (pool.slab(2) == expected).all()
    assert sorted(cuda.pinned.values()) == [24, 320]
    copier.close()
    assert not cuda.pinned


def host_store() -> HostStore:
    weight = np.arange(2 * 160, dtype=np.uint8).reshape(2, 160)
    bias = np.arange(2 * 12, dtype=np.uint8).reshape(2, 12)
    offset = LAYOUTS[0].fields[1].offset
    parts = [(Part(0, weight[expert]), Part(offset, bias[expert])) for expert in range(2)]
    return HostStore(LAYOUTS, parts, [weight, bias])


def test_memory_that_cannot_be_pinned_is_named(cuda: StandIn) -> None:
    cuda.runtime.cudaHostRegister = lambda address, size, flags: 2
    assert raised(lambda: CudaCopier(new_pool(), host_store())) == (
        "tier host: 344 bytes cannot be pinned (CUDA error); give tier disk"
    )


@pytest.mark.parametrize("tier", ["disk", "host"])
def test_a_whole_run_leaves_nothing_pinned(cuda: StandIn, tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        run, "make_copier", lambda pool, store: CudaCopier(pool, store if isinstance(store, HostStore) else None)
    )
    with load_offloaded("small-moe", budget=48, tier=tier) as offloaded, torch.inference_mode():
        offloaded.model(torch.tensor([[1, 2, 3]]))
        assert cuda.pinned
    assert not cuda.pinned
    dropped = load_offloaded("small-moe", budget=48, tier=tier)
    dropped.__enter__()
    with torch.inference_mode():
        dropped.model(torch.tensor([[1, 2, 3]]))
    assert cuda.pinned
    del dropped
    gc.collect()
    assert not cuda.pinned
