"""Copies of experts from a store into slots, on the CPU and on CUDA.

The CUDA copier has not been run on a GPU. Its order of operations is tested with a stand-in for `torch.cuda`.
"""

import mmap
import os
import threading
from collections.abc import Iterable
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import torch

from moe_beyond.errors import UserError
from moe_beyond.runtime.slab import Bytes
from moe_beyond.runtime.slots.pool import SlotPool
from moe_beyond.runtime.storage.store import BytesBySource, ExpertStore, HostStore, Part

cuda: Any = torch.cuda  # its functions have no types


class Copier(Protocol):
    """Way of an expert from its store into a slot.

    Attributes:
        any_thread: Whether a thread that waits for an expert may transfer it itself; otherwise only readers do.
    """

    any_thread: bool

    def transfer(self, store: ExpertStore, expert: int, slot: int) -> tuple[float, float, BytesBySource]:
        """Write an expert into a slot; return when its bytes are there.

        Args:
            store: Source of the expert.
            expert: Expert ``layer * E + expert``.
            slot: Number of the slot.

        Returns:
            Seconds of reading, seconds of copying, and bytes by source.
        """

    def after_compute(self, slots: Iterable[int]) -> None:
        """Note that kernels on the current stream read slots; call it before the cache core may evict their experts.

        Args:
            slots: Numbers of the slots.
        """

    def close(self) -> None:
        """Free the copier's own memory, after all transfers have ended."""


def make_copier(pool: SlotPool, store: ExpertStore) -> Copier:
    """Return the copier for the device of a pool.

    Args:
        pool: Slots to copy into.
        store: Store to read from.

    Raises:
        UserError: There is no copier for the device.
    """
    kind = pool.memory.device.type
    if kind == "cpu":
        return CpuCopier(pool)
    if kind == "cuda":
        return CudaCopier(pool, store if isinstance(store, HostStore) else None)
    raise UserError(f"device {kind}: experts cannot be copied to such a device; choose cpu or cuda")


class CpuCopier:
    """Reads experts straight into the slots of a pool in host memory.

    Args:
        pool: Slots on the CPU.
    """

    any_thread = True

    def __init__(self, pool: SlotPool) -> None:
        self._slabs = [pool.slab(slot) for slot in range(pool.slots)]

    def transfer(self, store: ExpertStore, expert: int, slot: int) -> tuple[float, float, BytesBySource]:
        """Write an expert into a slot; see `Copier.transfer`."""
        began = perf_counter()
        source = store.read(expert, self._slabs[slot])
        return perf_counter() - began, 0.0, source

    def after_compute(self, slots: Iterable[int]) -> None:
        """Do nothing: a kernel on the CPU has ended when its call returns."""

    def close(self) -> None:
        """Forget the slots, whose memory the pool owns."""
        self._slabs = []


class CudaCopier:
    """Copies experts into the slots of a pool on a GPU, on a stream of its own.

    Every thread reads into a pinned staging buffer of its own, of exactly one slab: torch's allocator of pinned memory
    rounds sizes up to a power of two. From a store in host memory, the copies start there instead.

    A transfer waits on the host until its copy has ended. So arrival times are true, a prefetch cannot delay copies on
    demand by more than its own, a staging buffer can be reused, and kernels need not wait on the device. In the other
    direction, the copy stream waits for the kernels that read the slot last.

    Args:
        pool: Slots on the GPU.
        host: Store whose memory is pinned until `close`, and copied from directly (default: None, all stores read into
            staging buffers).

    Raises:
        UserError: The memory of the store cannot be pinned.
    """

    any_thread = False
    """A thread with the model must not change its stream: an interrupt could leave it on that of the copies."""

    def __init__(self, pool: SlotPool, host: HostStore | None = None) -> None:
        self._memory, self._host = pool.memory, host
        self._stream = cuda.Stream(pool.memory.device)
        # The memory of the pool may be in use by earlier kernels of the stream that allocated it.
        cuda.synchronize(pool.memory.device)
        self._released: dict[int, torch.cuda.Event] = {}
        self._local = threading.local()
        self._pinned: list[Bytes] = []
        self._lock = threading.Lock()  # guards the pinned memory, and copies that begin
        self._closed = False
        self._process = os.getpid()
        try:
            for memory in () if host is None else host.memory:
                self._pin(memory)
        except BaseException as error:
            self.close()
            if isinstance(error, RuntimeError):
                assert host is not None
                size = sum(memory.nbytes for memory in host.memory)
                raise UserError(f"tier host: {size:,} bytes cannot be pinned ({error}); give tier disk") from error
            raise

    def transfer(self, store: ExpertStore, expert: int, slot: int) -> tuple[float, float, BytesBySource]:
        """Write an expert into a slot; see `Copier.transfer`."""
        began = perf_counter()
        if self._host is None:
            slab = self._staging()
            source = store.read(expert, slab)
            parts: tuple[Part, ...] = (Part(0, slab),)
        else:
            parts = self._host.parts[expert]
            source = BytesBySource(host=sum(len(part.source) for part in parts))
        return perf_counter() - began, self._copy(parts, slot), source

    def after_compute(self, slots: Iterable[int]) -> None:
        """Let later copies into slots wait for the kernels of the current stream; see `Copier.after_compute`."""
        event = cuda.Event()
        event.record(cuda.current_stream(self._memory.device))
        self._released.update(dict.fromkeys(slots, event))

    def close(self) -> None:
        """Unpin the staging buffers and the memory of the store after the last copy, and forget the slots.

        Raises:
            RuntimeError: Memory cannot be unpinned; all other memory is unpinned.
        """
        if os.getpid() != self._process:  # a fork of the process must not call CUDA
            return
        with self._lock, cuda.device(self._memory.device):
            self._closed = True
            self._stream.synchronize()
            self._memory = self._memory.new_empty(0, self._memory.shape[1])
            errors = []
            while self._pinned:
                memory = self._pinned.pop()  # stays mapped until it is unpinned
                try:
                    cuda.check_error(cuda.cudart().cudaHostUnregister(memory.ctypes.data))
                except RuntimeError as error:
                    errors.append(error)
        if errors:
            raise errors[0]

    def _copy(self, parts: Iterable[Part], slot: int) -> float:
        """Copy an expert into a slot, in a reader thread; return the seconds of the copy, without those before it."""
        began = cuda.Event(enable_timing=True)
        ended = cuda.Event(enable_timing=True, blocking=True)  # a wait that does not spin, for the other threads' sake
        with self._lock:
            self._check_open()
            if not hasattr(self._local, "on_stream"):
                cuda.set_stream(self._stream)
                self._local.on_stream = True
            released = self._released.get(slot)
            if released is not None:
                self._stream.wait_event(released)
            began.record(self._stream)
            for offset, source in parts:
                self._memory[slot, offset : offset + len(source)].copy_(torch.from_numpy(source), non_blocking=True)
            ended.record(self._stream)
        ended.synchronize()
        return float(began.elapsed_time(ended)) * 1e-3

    def _staging(self) -> Bytes:
        """Return the staging buffer of this thread."""
        if not hasattr(self._local, "staging"):
            # Anonymous memory begins at a page, as direct I/O needs it.
            self._local.staging = np.frombuffer(mmap.mmap(-1, self._memory.shape[1]), np.uint8)
            self._pin(self._local.staging)
        staging: Bytes = self._local.staging
        return staging

    def _pin(self, memory: Bytes) -> None:
        with self._lock, cuda.device(self._memory.device):  # the calling thread may have another device
            self._check_open()
            cuda.check_error(cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, 0))
            self._pinned.append(memory)

    def _check_open(self) -> None:
        if self._closed:  # a read that hung has returned after the end of the run
            raise UserError("offloaded model: its run is closed; call it within the run")
