"""The table of a plan."""

from collections.abc import Sequence

from rich.table import Table

from moe_beyond.evaluation.sizing import SizingResult, Target
from moe_beyond.geometry import Geometry
from moe_beyond.report.tables.conditions import conditions
from moe_beyond.report.tables.fitted import FittedTable


def plan_table(
    answers: Sequence[SizingResult],
    target: Target,
    geometry: Geometry,
    bytes_per_expert: float,
) -> Table:
    """Lay out a plan, a line a strategy, the smallest budget first.

    Args:
        answers: What each needs.
        target: For what.
        geometry: The model.
        bytes_per_expert: Of memory.
    """
    first = answers[0].result
    device = first.device
    room = "" if device is None else f" ({first.device_slots:,} slots at most)"
    table = FittedTable(title=f"smallest budget for {target.text}{f' on {device}' if device else ''}{room}")
    for name in ("strategy", "slots (share)", "GB", "reaches", "bytes"):
        table.add_column(name, justify="left" if name == "strategy" else "right")
    table.add_column("bottleneck", overflow="fold")
    for answer in sorted(answers, key=lambda answer: (answer.bottleneck is not None, answer.result.budget_slots)):
        result = answer.result
        slots = "none" if answer.bottleneck else f"{result.budget_slots:,} ({result.budget_share:.1%})"
        size = "-" if answer.bottleneck else f"{result.budget_slots * bytes_per_expert / 1e9:.2f}"
        reaches = f"{'at best ' if answer.bottleneck else ''}{target.words(result)}"
        table.add_row(answer.strategy, slots, size, reaches, f"{result.bytes_ratio:.2f}", answer.bottleneck or "")
    table.caption = (
        f"{geometry.describe_shape()}; bytes: all transfers over accesses; GB: 1e9 bytes, experts only\n"
        f"conditions: {conditions([answer.result for answer in answers])}"
    )
    return table
