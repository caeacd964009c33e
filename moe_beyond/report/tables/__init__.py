"""Tables for the terminal."""

from typing import TYPE_CHECKING

from moe_beyond.exports import lazy_exports

if TYPE_CHECKING:
    from moe_beyond.report.tables.conditions import format_conditions as format_conditions
    from moe_beyond.report.tables.devices import device_rows as device_rows
    from moe_beyond.report.tables.devices import devices_tables as devices_tables
    from moe_beyond.report.tables.inspection import inspection_tables as inspection_tables
    from moe_beyond.report.tables.intervals import intervals_tables as intervals_tables
    from moe_beyond.report.tables.pretrained import pretrained_tables as pretrained_tables
    from moe_beyond.report.tables.results import checkpoints_table as checkpoints_table
    from moe_beyond.report.tables.results import metrics_table as metrics_table
    from moe_beyond.report.tables.results import results_table as results_table
    from moe_beyond.report.tables.results import unavailable_lines as unavailable_lines
    from moe_beyond.report.tables.sizing import sizing_table as sizing_table

__all__ = [
    "checkpoints_table",
    "device_rows",
    "devices_tables",
    "format_conditions",
    "inspection_tables",
    "intervals_tables",
    "metrics_table",
    "pretrained_tables",
    "results_table",
    "sizing_table",
    "unavailable_lines",
]

_MODULES = {
    "checkpoints_table": "results",
    "device_rows": "devices",
    "devices_tables": "devices",
    "format_conditions": "conditions",
    "inspection_tables": "inspection",
    "intervals_tables": "intervals",
    "metrics_table": "results",
    "pretrained_tables": "pretrained",
    "results_table": "results",
    "sizing_table": "sizing",
    "unavailable_lines": "results",
}

__getattr__, __dir__ = lazy_exports(__name__, _MODULES)
