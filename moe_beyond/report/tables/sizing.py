"""The table of ``moe-beyond plan``: the smallest budget that meets a target."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from moe_beyond.geometry import Geometry
from moe_beyond.report.labels import BYTES_DEFINITION, NO_VALUE
from moe_beyond.report.tables.conditions import format_conditions
from moe_beyond.report.tables.wrapping import WrappedTable

if TYPE_CHECKING:
    from moe_beyond.evaluation.sizing import SizingResult, Target


def sizing_table(
    sizings: Sequence["SizingResult"],
    target: "Target",
    geometry: Geometry,
    bytes_per_expert: float,
) -> Table:
    """Return the table of smallest budgets, one row per strategy, the smallest budget first.

    Args:
        sizings: Smallest budget of each strategy, or its bottleneck; at least one.
        target: Hit rate or speed to reach.
        geometry: Geometry of the model.
        bytes_per_expert: Memory of one expert, in bytes.
    """
    device = sizings[0].result.device
    limit = "" if device is None else f" (at most {sizings[0].result.device_slots:,} slots)"
    unit, decimal = ("GB", "1e9") if geometry.total_experts * bytes_per_expert >= 1e9 else ("MB", "1e6")
    table = WrappedTable(title=f"smallest budget for {target.text}{f' on {device}' if device else ''}{limit}")
    for heading in ("strategy", "slots (share)", unit, "reaches", "bytes"):
        table.add_column(heading, justify="left" if heading == "strategy" else "right")
    table.add_column("bottleneck", overflow="fold")
    for sizing in sorted(sizings, key=lambda sizing: (sizing.bottleneck is not None, sizing.result.budget_slots)):
        result = sizing.result
        slots = "none" if sizing.bottleneck else f"{result.budget_slots:,} ({result.budget_share:.1%})"
        memory = NO_VALUE if sizing.bottleneck else f"{result.budget_slots * bytes_per_expert / float(decimal):.2f}"
        reached = f"{'at best ' if sizing.bottleneck else ''}{target.format(result)}"
        table.add_row(sizing.strategy, slots, memory, reached, f"{result.bytes_ratio:.2f}", sizing.bottleneck or "")
    table.caption = "\n".join(
        [
            BYTES_DEFINITION,
            f"{unit} = {decimal} bytes, experts only",
            geometry.describe_shape(),
            f"conditions: {format_conditions([sizing.result for sizing in sizings])}",
        ]
    )
    return table
