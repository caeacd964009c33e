"""The tables of ``moe-beyond devices``."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from moe_beyond.geometry import Geometry
from moe_beyond.report.labels import NO_VALUE
from moe_beyond.report.tables.conditions import format_left_out
from moe_beyond.report.tables.wrapping import WrappedTable
from moe_beyond.simulator.computing import left_out, resident_seconds
from moe_beyond.simulator.devices import Device, flash_seconds, host_slots, transfer_seconds


def device_rows(devices: Sequence[Device], geometry: Geometry, bits: float) -> list[dict[str, Any]]:
    """Return each device's fields, and its transfer times and speed for a model.

    Args:
        devices: Devices, one row each.
        geometry: Geometry of the model.
        bits: Bits per parameter.

    Returns:
        Fields of each device, with ``transfer_ms`` and ``flash_ms`` (milliseconds per expert), ``host_slots`` (experts
        that fit into host memory) and ``resident_tokens_per_second`` (all experts resident, empty context).
    """
    expert_bytes = float(geometry.mean_expert_bytes(bits))
    return [
        {
            **device.to_json(),
            "transfer_ms": transfer_seconds(device, expert_bytes) * 1e3,
            "flash_ms": flash_seconds(device, expert_bytes) * 1e3,
            "host_slots": host_slots(device, geometry, bits),
            "resident_tokens_per_second": 1 / resident_seconds(device, geometry, bits),
        }
        for device in devices
    ]


def devices_tables(rows: Sequence[dict[str, Any]], geometry: Geometry, bits: float) -> list[Table]:
    """Return the table of numbers and the table of their sources.

    Args:
        rows: Result of `device_rows`.
        geometry: Geometry of the model.
        bits: Bits per parameter.
    """
    numbers = WrappedTable(title=f"devices, with {geometry.model} at {bits:g} bits per parameter")
    numbers.add_column("device", min_width=22, overflow="fold")
    for heading in (
        "link\nGB/s",
        "latency\nus",
        "memory\nGB",
        "memory\nGB/s",
        "host\nGB",
        "flash\nGB/s",
        "expert over\nlink, ms",
        "from flash\nms",
        "tokens/s, all\nresident",
    ):
        numbers.add_column(heading, justify="right")
    sources = WrappedTable(title="sources of the numbers")
    sources.add_column("device", min_width=22, overflow="fold")
    sources.add_column("source")
    for row in rows:
        numbers.add_row(
            row["name"],
            f"{row['link_gb_per_s']:g}",
            f"{row['link_latency_us']:g}",
            f"{row['memory_gb']:g}",
            f"{row['memory_gb_per_s']:g}",
            *(NO_VALUE if row[name] is None else f"{row[name]:g}" for name in ("host_memory_gb", "flash_gb_per_s")),
            f"{row['transfer_ms']:.2f}",
            NO_VALUE if row["flash_gb_per_s"] is None else f"{row['flash_ms']:.2f}",
            f"{row['resident_tokens_per_second']:.1f}",
        )
        sources.add_row(row["name"], row["source"])
    numbers.caption = (
        "link: PCIe to host memory; on devices with unified memory, flash\n"
        "host: host memory in front of flash (-: all experts are directly behind the link)\n"
        f"GB = 1e9 bytes; tokens/s: with room for all experts, at an empty context{format_left_out(left_out(geometry))}"
    )
    return [numbers, sources]
