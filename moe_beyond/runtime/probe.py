"""Measuring a machine before any run: interconnect, disk, memory, and computing at the sizes of a model."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from moe_beyond.errors import UserError
from moe_beyond.geometry import Preset
from moe_beyond.runtime.check import available_memory
from moe_beyond.runtime.slab import PAGE
from moe_beyond.runtime.storage.disk_speed import read_seconds
from moe_beyond.simulator.devices import Device

REPEATS = 7
"""Number of repeats of every measurement; figures are their medians."""
READERS = (1, 2, 4)
READS = 32
"""Number of reads from the disk per repeat."""
MOVED_BYTES = 2**28
"""Bytes per repeat of copies and of computing, more than processor caches hold."""
FILE_BYTES = 2**29
"""Size of the file that is read if there is no model."""
MOST_EXPERTS = 1024
"""Most experts of a repeat, if they are small."""
SMALL_BYTES = 4096
"""Size of a copy whose time is all latency."""
KERNELS = 22
"""Kernels of an MoE layer in a framework's graph: about 600 in the 27 layers of DeepSeek-V2-Lite."""
OPERATIONS = 100
DTYPE = torch.bfloat16
BITS = 8 * DTYPE.itemsize


@dataclass(frozen=True)
class Measured:
    """A measured time.

    Attributes:
        name: Description of the operation.
        seconds: Seconds of each repeat.
        nbytes: Bytes that the operation moves or reads (default: None).
    """

    name: str
    seconds: tuple[float, ...]
    nbytes: int | None = None

    @property
    def median(self) -> float:
        """Median of the repeats in seconds."""
        return statistics.median(self.seconds)

    @property
    def gb_per_s(self) -> float | None:
        """Bandwidth at the median in GB/s; None without bytes."""
        return None if self.nbytes is None else self.nbytes / self.median / 1e9


@dataclass(frozen=True)
class Probe:
    """The measured machine.

    Attributes:
        place: Name of the device that computes: ``"cpu"`` or that of a GPU.
        processor: Description of the device for the source of the numbers.
        expert_bytes: Size of an expert in bytes.
        copy: Copy of an expert to the device.
        latency: Copy of a few bytes to the device.
        memory: Read of the device's memory.
        disk: Reads of an expert, by the name of the source and the number of readers.
        operation: One operation on few numbers.
        expert: Computing of one expert for one token; None without a model.
        layer: Computing of an MoE layer without its routed experts; None without a model.
    """

    place: str
    processor: str
    expert_bytes: int
    copy: Measured
    latency: Measured
    memory: Measured
    disk: dict[tuple[str, int], Measured]
    operation: Measured
    expert: Measured | None = None
    layer: Measured | None = None

    def measurements(self) -> list[Measured]:
        """Return all measurements in the order of the table."""
        optional = [found for found in (self.expert, self.layer) if found is not None]
        return [self.copy, self.latency, *self.disk.values(), self.memory, self.operation, *optional]

    def device(self, name: str) -> Device:
        """Return the device of the timing model.

        The flash is the fastest direct read. There is one tier if direct reads are not possible.

        Args:
            name: Name of the device.
        """
        latency = min(self.latency.median, self.copy.median / 2)
        direct = [found for (source, _), found in self.disk.items() if source == "disk"]
        host = available_memory() if direct else None
        flash = min(direct, key=lambda found: found.median) if host else None
        bandwidth = self.memory.gb_per_s
        assert bandwidth is not None
        return Device(
            name,
            link_gb_per_s=self.expert_bytes / (self.copy.median - latency) / 1e9,
            link_latency_us=1e6 * latency,
            memory_gb=(_available(self.place) or MOVED_BYTES) / 1e9,
            memory_gb_per_s=bandwidth,
            host_memory_gb=host / 1e9 if host else None,
            flash_gb_per_s=flash.gb_per_s if flash else None,
            layer_us=1e6 * KERNELS * self.operation.median,
            other_ms=None if self.layer is None else 1e3 * self.layer.median,
            expert_ms=None if self.expert is None else 1e3 * self.expert.median,
            source=f"moe-beyond probe on {self.processor}: medians of {REPEATS} repeats at experts of "
            f"{self.expert_bytes / 1e6:.3g} MB; layer_us: {KERNELS} operations",
        )


def probe(
    place: str,
    expert_bytes: int,
    preset: Preset | None = None,
    folder: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Probe:
    """Measure this machine.

    Args:
        place: Device that computes, such as ``"cpu"`` or ``"cuda:0"``.
        expert_bytes: Size of an expert in bytes.
        preset: Model in 16 bits, whose computing is measured with random weights (default: None, no computing).
        folder: Folder on the disk to measure: its safetensors files are read if they are large enough, otherwise a
            temporary file in it (default: None, the folder for temporary files).
        progress: Function of the number of steps done and their total (default: none).

    Raises:
        UserError: The folder does not exist, or the disk or the memory is too small.
    """
    needed, available = 4 * expert_bytes + 4 * MOVED_BYTES, _available(place)
    if available is not None and needed > available:
        raise UserError(
            f"probe: {place} needs {needed / 1e9:,.1f} GB of memory (got {available / 1e9:,.1f} GB available); give a "
            "smaller --expert-bytes or --model"
        )
    steps = 4
    progress(0, steps)
    copy, latency = _copies(place, expert_bytes)
    progress(1, steps)
    memory, operation = _memory(place), _operations(place)
    progress(2, steps)
    disk = _disk(folder, expert_bytes)
    progress(3, steps)
    expert, layer = (None, None) if preset is None else _computing(place, preset)
    progress(steps, steps)
    return Probe(place, _processor(place), expert_bytes, copy, latency, memory, disk, operation, expert, layer)


def _timed(place: str, operation: Callable[[], object], count: int) -> tuple[float, ...]:
    """Return the seconds of one of ``count`` operations in each repeat, after one repeat that does not count."""
    found = []
    for _ in range(REPEATS + 1):
        _synchronise(place)
        began = time.perf_counter()
        operation()
        _synchronise(place)
        found.append((time.perf_counter() - began) / count)
    return tuple(found[1:])


def _synchronise(place: str) -> None:
    if place != "cpu":
        torch.cuda.synchronize(place)


def _copies(place: str, size: int) -> tuple[Measured, Measured]:
    """Measure copies of an expert and of a few bytes, from pinned memory to a GPU or within memory."""
    count = min(MOST_EXPERTS, max(2, MOVED_BYTES // size))
    pinned = place != "cpu"
    experts = torch.zeros(count, size, dtype=torch.uint8, pin_memory=pinned)
    slots = torch.zeros(count, size, dtype=torch.uint8, device=place)

    def copy() -> None:
        for expert, slot in zip(experts, slots, strict=True):
            slot.copy_(expert, non_blocking=True)

    def copy_few() -> None:
        for _ in range(OPERATIONS):
            slots[0, :SMALL_BYTES].copy_(experts[0, :SMALL_BYTES], non_blocking=True)
            _synchronise(place)

    way = "pinned memory to the GPU" if pinned else "memory to memory"
    return (
        Measured(f"copy of an expert, {way}", _timed(place, copy, count), size),
        Measured(f"copy of {SMALL_BYTES:,} bytes, {way}", _timed(place, copy_few, OPERATIONS)),
    )


def _memory(place: str) -> Measured:
    """Measure reads of the device's memory by a sum."""
    numbers = torch.ones(MOVED_BYTES // 4, device=place)
    return Measured("read of memory", _timed(place, numbers.sum, 1), numbers.nbytes)


def _operations(place: str) -> Measured:
    """Measure operations on few numbers, whose time is all fixed cost."""
    numbers = torch.zeros(1, 2048, dtype=DTYPE, device=place)

    def operate() -> None:
        for _ in range(OPERATIONS):
            numbers.add_(1)

    return Measured("operation on few numbers", _timed(place, operate, OPERATIONS))


def _disk(folder: Path | None, expert_bytes: int) -> dict[tuple[str, int], Measured]:
    """Measure reads from files, through the page cache and directly."""
    size = -(-expert_bytes // PAGE) * PAGE
    disk = {}
    with _files(folder, size) as files:
        for source, direct in (("page cache", False), ("disk", True)):
            for readers in READERS:
                seconds = read_seconds(files, size, readers=readers, reads=READS, repeats=REPEATS, direct=direct)
                if seconds is not None:
                    name = f"read of an expert from the {source}, {readers} reader{'s' * (readers > 1)}"
                    disk[source, readers] = Measured(name, tuple(seconds), size)
    return disk


@contextmanager
def _files(folder: Path | None, size: int) -> Iterator[Sequence[Path]]:
    """Yield the model's files that are large enough, or a temporary file."""
    if folder is not None and not folder.is_dir():
        raise UserError(f"{folder}: is no folder; name a folder on the disk to measure")
    files = [] if folder is None else [file for file in folder.glob("*.safetensors") if file.stat().st_size >= size]
    if files:
        yield files
        return
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            block = torch.randint(256, (size,), dtype=torch.uint8).numpy().tobytes()
            for _ in range(max(2, FILE_BYTES // size)):
                file.write(block)
            file.flush()
            yield [Path(file.name)]
    except OSError as error:
        raise UserError(
            f"{folder or tempfile.gettempdir()}: a file of {max(2 * size, FILE_BYTES) / 1e9:.2g} GB cannot be written "
            f"({error.strerror}); name another --folder"
        ) from error


def _computing(place: str, preset: Preset) -> tuple[Measured, Measured]:
    """Measure an expert, and a layer without experts, for one token on weights too large for a cache."""
    hidden, geometry = preset.hidden_size, preset.geometry
    assert hidden is not None
    width = max(1, geometry.params_per_expert // (3 * hidden))
    token = torch.randn(1, hidden, dtype=DTYPE, device=place)

    def weights(rows: int, columns: int) -> list[Tensor]:
        count = min(MOST_EXPERTS, max(2, MOVED_BYTES // (rows * columns * DTYPE.itemsize)))
        return list(torch.randn(count, rows, columns, dtype=DTYPE, device=place) / columns**0.5)

    gates, downs = weights(2 * width, hidden), weights(hidden, width)
    others = weights(max(1, geometry.other_params_per_layer // hidden), hidden)
    pairs = list(zip(gates, downs, strict=False))

    def expert() -> None:
        for gate_up, down in pairs:
            gate, up = functional.linear(token, gate_up).chunk(2, dim=-1)
            functional.linear(functional.silu(gate) * up, down)

    def layer() -> None:
        for weight in others:
            functional.linear(token, weight)

    size = gates[0].nbytes + downs[0].nbytes
    return (
        Measured("computing of an expert for one token", _timed(place, expert, len(pairs)), size),
        Measured("computing of a layer without experts", _timed(place, layer, len(others)), others[0].nbytes),
    )


def _available(place: str) -> int | None:
    """Return the bytes of memory that are available; None if unknown."""
    return available_memory() if place == "cpu" else int(torch.cuda.mem_get_info(place)[0])


def _processor(place: str) -> str:
    if place == "cpu":
        threads = torch.get_num_threads()
        return f"the CPU with {threads} thread{'s' * (threads > 1)}"
    return str(torch.cuda.get_device_name(place))
