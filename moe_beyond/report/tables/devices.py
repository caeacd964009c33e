"""What `moe-beyond devices` shows."""

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from moe_beyond.geometry import Geometry
from moe_beyond.report.tables.fitted import FittedTable
from moe_beyond.simulator.devices import Device, flash_seconds, host_slots, resident_seconds, transfer_seconds


def device_rows(devices: Sequence[Device], geometry: Geometry, bits: float) -> list[dict[str, Any]]:
    """Return each device's fields and what they mean for a model at ``bits`` per parameter.

    ``transfer_ms`` and ``flash_ms`` are those of one expert; ``resident_tokens_per_second`` is of the MoE layers alone.
    """
    expert_bytes = geometry.params_per_expert * bits / 8
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
    """Lay out what `device_rows` returned: the numbers, then where they come from."""
    numbers = FittedTable(title=f"devices, and {escape(geometry.model)} at {bits:g} bits on them")
    numbers.add_column("device", min_width=22, overflow="fold")
    for name in (
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
        numbers.add_column(name, justify="right")
    sources = FittedTable(title="sources")
    sources.add_column("device", min_width=22, overflow="fold")
    sources.add_column("numbers from")
    for row in rows:
        numbers.add_row(
            escape(row["name"]),
            f"{row['link_gb_per_s']:g}",
            f"{row['link_latency_us']:g}",
            f"{row['memory_gb']:g}",
            f"{row['memory_gb_per_s']:g}",
            *("-" if row[name] is None else f"{row[name]:g}" for name in ("host_memory_gb", "flash_gb_per_s")),
            f"{row['transfer_ms']:.2f}",
            "-" if row["flash_gb_per_s"] is None else f"{row['flash_ms']:.2f}",
            f"{row['resident_tokens_per_second']:.1f}",
        )
        sources.add_row(escape(row["name"]), escape(row["source"]))
    numbers.caption = (
        "GB: 1e9 bytes; without host memory experts wait right behind the link (unified memory: on flash, which is the "
        "link); tokens/s: MoE layers alone, were there room for all experts: an upper bound"
    )
    return [numbers, sources]
