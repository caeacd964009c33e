"""Tests of the copies into slots: on the CPU, and the order of operations on CUDA with a stand-in for `torch.cuda`."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moe_beyond.errors import UserError
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


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of a stand-in for `torch.cuda`, in their order."""
    calls: list[str] = []

    class Event:
        def __init__(self, *, blocking: bool = False) -> None:
            self.kind = "ended" if blocking else "released"

        def record(self, stream: Any) -> None:
            calls.append(f"{stream.name} records {self.kind}")

        def synchronize(self) -> None:
            calls.append(f"host waits for {self.kind}")

    class Stream:
        def __init__(self, device: torch.device, name: str = "copy") -> None:
            self.name = name

        def wait_stream(self, stream: Any) -> None:
            calls.append(f"{self.name} waits for {stream.name}")

        def wait_event(self, event: Event) -> None:
            calls.append(f"{self.name} waits for {event.kind}")

        def synchronize(self) -> None:
            calls.append(f"host waits for {self.name}")

    def register(address: int, size: int, flags: int) -> int:
        calls.append(f"pin {size}")
        return 0

    def unregister(address: int) -> int:
        assert is_mapped(address), "the memory was freed before it was unpinned"
        calls.append("unpin")
        return 0

    def check_error(code: int) -> None:
        assert code == 0

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    stand_in = SimpleNamespace(
        Event=Event,
        Stream=Stream,
        device=lambda device: nullcontext(),
        stream=lambda stream: nullcontext(),
        current_stream=lambda device: Stream(device, "compute"),
        cudart=lambda: runtime,
        check_error=check_error,
    )
    monkeypatch.setattr(copies, "cuda", stand_in)
    return calls


def test_a_copy_to_cuda_waits_for_the_kernels_that_read_its_slot(log: list[str]) -> None:
    pool = new_pool()
    copier, store = CudaCopier(pool), Store(log)
    assert copier.transfer(store, 7, 1)[2] == BytesBySource(disk=STRIDE)
    copier.after_compute([1, 2])
    copier.transfer(store, 8, 0)
    copier.transfer(store, 9, 1)
    assert pool.memory.unique(dim=1).tolist() == [[8], [9], [0]]
    copier.close()
    copier.close()
    late = []
    thread = threading.Thread(target=lambda: late.append(raised(lambda: copier.transfer(store, 1, 0))))
    thread.start()
    thread.join()
    assert late == ["offloaded model: its run is closed; call it within the run"]
    copied = ["copy records ended", "host waits for ended"]
    assert log == [
        "copy waits for compute",
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


def test_a_copy_to_cuda_begins_in_the_memory_of_a_store_there(log: list[str]) -> None:
    pool = new_pool()
    weight = np.arange(2 * 160, dtype=np.uint8).reshape(2, 160)
    bias = np.arange(2 * 12, dtype=np.uint8).reshape(2, 12)
    offset = LAYOUTS[0].fields[1].offset
    parts = [(Part(0, weight[expert]), Part(offset, bias[expert])) for expert in range(2)]
    store = HostStore(LAYOUTS, parts, [weight, bias])
    copier = CudaCopier(pool, store)
    assert copier.transfer(store, 1, 2)[2] == BytesBySource(host=172)
    expected = np.zeros(STRIDE, np.uint8)
    store.read(1, expected)
    assert (pool.slab(2) == expected).all()
    copier.close()
    assert log == [
        "copy waits for compute",
        "pin 320",
        "pin 24",
        "copy records ended",
        "host waits for ended",
        "host waits for copy",
        "unpin",
        "unpin",
    ]
