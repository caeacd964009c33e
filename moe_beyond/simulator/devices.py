"""Devices of the timing model: the interconnect that experts cross, and the memory that computing reads."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from moe_beyond.errors import UserError, unknown
from moe_beyond.files import read_json
from moe_beyond.geometry import Geometry
from moe_beyond.safe_text import shown

PINNED_US = 20.0
"""Microseconds to start a copy from pinned host memory: 10 to 30."""
FLASH_US = 100.0
"""Microseconds to start a read from flash (an assumption)."""

EFFICIENCY = 0.8
"""Share of the nominal memory bandwidth that the presets reach: 0.7 to 0.9 (an assumption)."""
REACHED_FLOPS = 0.6
"""Share of the nominal FLOPs that the presets reach on large chunks (an assumption)."""
GPU_LAYER_US, CPU_LAYER_US = 55.0, 20.0
"""Microseconds per layer in addition: about 22 kernels of 2.5 us in a graph, or barriers of threads (assumptions)."""
HOST_TFLOPS = 0.5
"""FLOPs per second, in units of 1e12, of the presets' hosts: half of 8 cores with AVX2 at 4 GHz (an assumption)."""
_ASSUMED = f"{EFFICIENCY:.0%} of the memory bandwidth and the fixed cost per layer: assumptions"

RESERVED_SHARE = Fraction(1, 8)
"""Share of a device's memory that is reserved for parts outside the geometry: KV cache, context of the runtime,
embeddings, dense layers and head (an assumption)."""

LEAST, MOST = 1e-9, 1e12
"""Bounds of a device's numbers, far beyond any machine, within which no time overflows."""
_TEXTS = ("name", "source")
_FROM_ZERO = (
    "link_latency_us",
    "prefetch_us",
    "flash_latency_us",
    "layer_us",
    "token_ms",
    "other_ms",
    "expert_ms",
    "overlap",
)


@dataclass(frozen=True)
class Device:
    """A machine whose memory is too small for all experts; 1 GB is 1e9 bytes.

    Attributes:
        name: Name in results.
        link_gb_per_s: Bandwidth of the interconnect that an expert crosses in GB/s: PCIe from host memory to a discrete
            GPU, or the flash of a device with unified memory.
        link_latency_us: Microseconds before the first byte of a transfer moves.
        memory_gb: GPU or unified memory in GB; larger budgets are marked, and `moe-beyond plan` stays within it.
        memory_gb_per_s: Nominal bandwidth of the memory that computing reads, in GB/s.
        host_memory_gb: Host memory for experts in GB; the other experts are on flash. It starts with as many experts as
            fit, the same number of each layer, and then keeps those transferred last (default: None, one tier: every
            expert is in host memory).
        flash_gb_per_s: Bandwidth from flash to host memory in GB/s (default: None, one tier).
        flash_latency_us: Microseconds before the first byte of a flash read moves (default: 0).
        prefetch_us: Microseconds that a prefetch takes in addition to a transfer on demand: it comes singly, and while
            computing reads the same memory (default: 0).
        efficiency: Share of the nominal memory bandwidth that computing reaches (default: 1).
        layer_us: Microseconds that every MoE layer takes in addition, such as kernel launches (default: 0).
        token_ms: Milliseconds that every step takes in addition, such as sampling; a step of decode is a token
            (default: 0).
        tflops: Floating-point operations per second that computing reaches, in units of 1e12 (default: None, no limit).
        host_gb_per_s: Bandwidth at which the host's processor reads experts that it computes, in GB/s (default: None,
            unknown).
        host_tflops: Floating-point operations per second that the host's processor reaches, in units of 1e12 (default:
            None, no limit).
        other_ms: Measured milliseconds of a layer without its routed experts at an empty context. It replaces the read
            of these weights, and ``efficiency`` does not apply to it (default: None, an estimate).
        overlap: Share of an expert's computing that can begin before all experts of its event have arrived: 1 if
            experts compute one after another, 0 if one kernel waits for all of them (default: 1).
        expert_ms: Measured milliseconds of one routed expert for one token. It replaces the read of its weights, and
            ``efficiency`` does not apply to it (default: None, an estimate).
        source: Sources of the numbers.
    """

    name: str
    link_gb_per_s: float
    link_latency_us: float
    memory_gb: float
    memory_gb_per_s: float
    host_memory_gb: float | None = None
    flash_gb_per_s: float | None = None
    flash_latency_us: float = 0.0
    prefetch_us: float = 0.0
    efficiency: float = 1.0
    layer_us: float = 0.0
    token_ms: float = 0.0
    tflops: float | None = None
    host_gb_per_s: float | None = None
    host_tflops: float | None = None
    overlap: float = 1.0
    other_ms: float | None = None
    expert_ms: float | None = None
    source: str = ""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            UserError: A value is not a finite positive number, or only one of host memory and flash is given.
        """
        for name in _TEXTS:
            if not isinstance(getattr(self, name), str):
                raise UserError(f"device: {name} must be text (got {shown(getattr(self, name))})")
        if not self.name:
            raise UserError("device: name is empty")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _TEXTS or (value is None and field.default is None):
                continue
            if not _is_number(value) or value < 0 or (value == 0 and field.name not in _FROM_ZERO):
                minimum = "from 0" if field.name in _FROM_ZERO else "above 0"
                raise UserError(
                    f"device {shown(self.name)}: {field.name} must be a finite number {minimum} (got {shown(value)})"
                )
            if value > MOST or (value < LEAST and field.name not in _FROM_ZERO):
                raise UserError(
                    f"device {shown(self.name)}: {field.name} must be within {LEAST:g}..{MOST:g} (got {value!r})"
                )
        if self.efficiency > 1:
            raise UserError(
                f"device {shown(self.name)}: efficiency must be above 0 and at most 1 (got {self.efficiency!r}); "
                "memory_gb_per_s is the nominal bandwidth"
            )
        if self.overlap > 1:
            raise UserError(f"device {shown(self.name)}: overlap must be from 0 to 1 (got {self.overlap!r})")
        if (self.host_memory_gb is None) != (self.flash_gb_per_s is None):
            given, missing = "host_memory_gb", "flash_gb_per_s"
            if self.host_memory_gb is None:
                given, missing = missing, given
            raise UserError(f"device {shown(self.name)}: {given} is given without {missing}; give both or none")
        if self.flash_gb_per_s is not None and self.prefetch_us:
            raise UserError(
                f"device {shown(self.name)}: prefetch_us is not known together with flash_gb_per_s; leave one out"
            )
        if self.flash_gb_per_s is None and self.flash_latency_us:
            raise UserError(f"device {shown(self.name)}: flash_latency_us needs host_memory_gb and flash_gb_per_s")

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary of plain values, as `load_device` reads it from a file."""
        return asdict(self)


def _is_number(value: object) -> bool:
    """Return whether a value is a finite number; ``True`` and integers beyond the range of floats are not."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _behind_pcie(name: str, link: float, memory: float, bandwidth: float, tflops: float, source: str) -> Device:
    """Return a discrete GPU with enough pinned host memory; ``tflops`` is nominal."""
    return Device(
        name,
        link, PINNED_US, memory, bandwidth,
        efficiency=EFFICIENCY,
        layer_us=GPU_LAYER_US,
        tflops=round(tflops * REACHED_FLOPS, 1),
        source=f"{source}; latency: pinned copies, 10-30 us; {_ASSUMED}; FLOPs: {REACHED_FLOPS:.0%} of {tflops:g} "
        "tera nominal (16-bit tensor cores, general knowledge), an assumption",
    )  # fmt: skip


def _with_host(device: Device, host_gb_per_s: float, source: str) -> Device:
    """Return a device whose host computes experts."""
    source = f"{device.source}; host computing: {source}; {HOST_TFLOPS:g} TFLOPS, an assumption"
    return replace(device, host_gb_per_s=host_gb_per_s, host_tflops=HOST_TFLOPS, source=source)


def _on_flash(
    name: str, flash: float, memory: float, bandwidth: float, source: str, layer_us: float = GPU_LAYER_US
) -> Device:
    """Return a device with unified memory, whose transfers are flash reads; without a limit by FLOPs."""
    source = f"{source}; latency: an assumption; {_ASSUMED}"
    return Device(name, flash, FLASH_US, memory, bandwidth, efficiency=EFFICIENCY, layer_us=layer_us, source=source)


def _with_flash(device: Device, host_memory_gb: float, flash_gb_per_s: float, source: str) -> Device:
    """Return a device with host memory for some experts, and flash for the others."""
    return replace(
        device,
        host_memory_gb=host_memory_gb,
        flash_gb_per_s=flash_gb_per_s,
        flash_latency_us=FLASH_US,
        source=f"{device.source}; {source}",
    )


_PCIE3 = "link: PCIe 3.0 x16, 15.75 raw, 12-13 pinned (hpc-notes.pages.dev/reference/pcie)"
_PCIE4 = "link: PCIe 4.0 x16, 31.5 raw, 25.6-26 measured (tinygrad/open-gpu-kernel-modules#6), 20.9 (clpeak#106)"
_PCIE4_X8 = "link: PCIe 4.0 x8 (general knowledge), 15.75 raw, 12-13 pinned"
_PCIE5 = "link: PCIe 5.0 x16, 63 raw, about 50 measured (colibri#537)"
_FREETOKEN = "memory bandwidth of the processor, measured by FreeToken (FlashML-org/FreeToken, table 1)"
_RTX4060_LAPTOP = f"{_PCIE4_X8}; memory: data-check.eu, alldbin"
_RTX4090 = "memory: notebookcheck (general knowledge)"
_NVIDIA = "memory: NVIDIA's brief (general knowledge)"

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _with_host(
            _behind_pcie("rtx3060", 25, 12, 360, 25, f"{_PCIE4}; memory: rtechsl.com"), 56.7, f"{_FREETOKEN}, of a 3090"
        ),
        _with_host(_behind_pcie("rtx4060-laptop", 12, 8, 256, 30, _RTX4060_LAPTOP), 47.5, _FREETOKEN),
        _with_flash(
            _behind_pcie("rtx4060-laptop-16gb", 12, 8, 256, 30, _RTX4060_LAPTOP),
            12.0,
            6.0,
            "host: 16 GB less 4 for the system, an assumption; flash: NVMe Gen4, 6-7 nominal; latency: an assumption",
        ),
        _behind_pcie("rtx4060", 12, 8, 272, 30, f"{_PCIE4_X8}; memory: general knowledge"),
        _with_host(_behind_pcie("rtx4090", 25, 24, 1008, 165, f"{_PCIE4}; {_RTX4090}"), 63.2, _FREETOKEN),
        _behind_pcie("rtx4090-laptop", 25, 16, 576, 66, f"{_PCIE4}; {_RTX4090}"),
        _behind_pcie(
            "pcie3-desktop", 12, 24, 1008, 165, f"{_PCIE3}; memory and FLOPs: those of rtx4090, whatever the card"
        ),
        _with_host(
            _behind_pcie(
                "pcie5-desktop", 50, 24, 1008, 165, f"{_PCIE5}; memory and FLOPs: those of rtx4090, whatever the card"
            ),
            53.8,
            f"{_FREETOKEN}, of a 5090",
        ),
        _on_flash(
            "jetson-orin-nano",
            2.5, 8, 68,
            "flash: NVMe on PCIe 3.0 x4, about 2.5-3; memory: NVIDIA's Orin Nano datasheet",
        ),
        _on_flash(
            "jetson-orin-nano-super",
            2.5, 8, 102,
            "flash: NVMe on PCIe 3.0 x4, about 2.5-3; memory: datasheet of December 2024 (brojogopalsapui.com)",
        ),
        _on_flash("jetson-orin-nx", 3, 16, 102.4, f"flash: NVMe, as jetson-agx-orin; {_NVIDIA}"),
        _on_flash(
            "jetson-agx-orin",
            3, 32, 204.8,
            f"flash: an SSD of 7 nominal, about 3 measured (HOBBIT, arXiv 2411.01433); {_NVIDIA}",
        ),
        _on_flash(
            "raspberry-pi-5",
            0.84, 8, 17,
            "flash: NVMe on PCIe 3.0 x1, 0.837 measured (evezone.evetech.co.za); memory: general knowledge",
            CPU_LAYER_US,
        ),
        _on_flash(
            "raspberry-pi-5-microsd",
            0.085, 8, 17,
            "flash: microSD, 0.04-0.085 (iambillmeyer.com); memory: general knowledge",
            CPU_LAYER_US,
        ),
        _on_flash(
            "phone-ufs3",
            2.1, 8, 51.2,
            "flash: UFS 3.1, sequential, Samsung's specification; memory: 64 bits of LPDDR5-6400 (general knowledge)",
            CPU_LAYER_US,
        ),
        _on_flash(
            "phone-ufs4",
            4, 16, 76.8,
            "flash: UFS 4.0 of a Snapdragon 8 Gen 3, sequential, measured (PowerInfer-2; 3.5 at random in 512 KB); "
            "memory: 64 bits of LPDDR5X-9600 (general knowledge)",
            CPU_LAYER_US,
        ),
        _on_flash(
            "macbook-air-m1",
            2.7, 8, 68,
            "flash: 2.7-3.0 (macrumors 2020-11-16, eggfreckles.net); memory: general knowledge",
        ),
        _on_flash(
            "macbook-air-m3", 3, 16, 100, "flash: 2.9-3.0 (Ars Technica 2024-03-12); memory: general knowledge"
        ),
        _on_flash("m1-pro", 5.3, 16, 200, "flash: 5.3-5.8 (webinfobuzz.com); memory: general knowledge"),
        _on_flash("m4-max", 7, 48, 546, "flash: about 7 (bytebuys.com, a weak source); memory: general knowledge"),
        _on_flash(
            "rk3588-emmc",
            0.3, 16, 34,
            "flash: eMMC, about 0.3 (arXiv 2609.04238); memory: 64 bits of LPDDR4X-4267 (forum.radxa.com/t/19293)",
            CPU_LAYER_US,
        ),
    )
}  # fmt: skip
"""Device presets by name."""

_FIELDS = {field.name: field for field in fields(Device)}


def load_device(text: str) -> Device:
    """Return a preset, or the device of a file, with changed fields.

    Args:
        text: Key of `DEVICES`, or path of a ``.json`` file with the fields of `Device`. The file may have a ``base``, a
            key of `DEVICES` that gives the missing fields. ``,FIELD=VALUE`` may follow any number of times.

    Returns:
        Device; changed fields appear in its name and source, unless these are given too.

    Raises:
        UserError: No device or field has that name, or a value is not valid.

    Example:
        >>> load_device("rtx3060").link_gb_per_s
        25
        >>> load_device("rtx3060,link_gb_per_s=12.5").name
        'rtx3060,link_gb_per_s=12.5'
    """
    start, *changes = text.split(",")
    device = _read(start) if start.endswith(".json") else _preset(start)
    given: dict[str, str] = {}
    for change in changes:
        field, equals, value = (part.strip() for part in change.partition("="))
        if not equals:
            raise UserError(f"device {shown(text)}: {shown(change)} cannot be parsed; write FIELD=VALUE")
        _check_field(field)
        if field in given:
            raise UserError(f"device {shown(text)}: {field} is given twice")
        given[field] = value
    changed = ",".join(f"{field}={value}" for field, value in given.items() if field not in _TEXTS)
    if changed:
        device = replace(device, name=f"{device.name},{changed}", source=_append(device.source, f"{changed} by hand"))
    values: dict[str, Any] = {
        field: value if field in _TEXTS else _number(text, field, value) for field, value in given.items()
    }
    return replace(device, **values)


def _preset(name: str) -> Device:
    if name not in DEVICES:
        raise unknown("device", name, DEVICES)
    return DEVICES[name]


def _check_field(name: str) -> None:
    if name not in _FIELDS:
        raise unknown("device field", name, _FIELDS)


def _number(text: str, field: str, value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise UserError(f"device {shown(text)}: {field} must be a number (got {shown(value)})") from error


def _append(source: str, text: str) -> str:
    return f"{source}; {text}" if source else text


def _read(path: str) -> Device:
    """Read a device from a JSON file."""
    content = read_json(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: is not a JSON object with the fields of a device")
    given = {**content}
    base = given.pop("base", None)
    try:
        for field in given:
            _check_field(field)
        if base is not None and not isinstance(base, str):
            raise UserError(f"base must be the name of a device (got {shown(base)})")
        start = {} if base is None else _preset(base).to_json()
        source = _append(start.get("source", ""), f"from {Path(path).name}")
        values = {**start, "name": Path(path).stem, "source": source, **given}
        if missing := [name for name, field in _FIELDS.items() if field.default is MISSING and name not in values]:
            raise UserError(f'has no {", ".join(missing)}; add them, or the name of a device as "base"')
        return Device(**values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def transfer_seconds(device: Device, expert_bytes: float) -> float:
    """Return the seconds that one expert takes across the interconnect."""
    return device.link_latency_us * 1e-6 + expert_bytes / (device.link_gb_per_s * 1e9)


def flash_seconds(device: Device, expert_bytes: float) -> float:
    """Return the seconds that one expert takes from flash to host memory; 0 with one tier."""
    if device.flash_gb_per_s is None:
        return 0.0
    return device.flash_latency_us * 1e-6 + expert_bytes / (device.flash_gb_per_s * 1e9)


def host_slots(device: Device, geometry: Geometry, bits: float) -> int:
    """Return the number of experts of mean size that fit into host memory; all of them with one tier."""
    return host_units(device, geometry, bits) * geometry.total_experts // geometry.total_units


def host_units(device: Device, geometry: Geometry, bits: float) -> int:
    """Return the units of experts that fit into host memory (`Geometry.expert_units`); all of them with one tier."""
    if device.host_memory_gb is None:
        return geometry.total_units
    capacity = Fraction(str(device.host_memory_gb)) * 10**9
    return min(geometry.total_units, math.floor(capacity / geometry.unit_bytes(bits)))


def device_slots(device: Device, geometry: Geometry, bits: float) -> int:
    """Return the number of experts of mean size that fit into the device's memory, from 0 to L * E.

    `RESERVED_SHARE` and the MoE layers' other weights are subtracted from the memory.
    """
    capacity = Fraction(str(device.memory_gb)) * 10**9 * (1 - RESERVED_SHARE)
    other = geometry.num_layers * geometry.mean_other_bytes(bits)
    slots = math.floor((capacity - other) / geometry.mean_expert_bytes(bits))
    return min(geometry.total_experts, max(0, slots))
