"""The packages of the report export their public names, and tables need no plotting or deep-learning library."""

import subprocess
import sys
from importlib import import_module

import pytest

TABLES_ONLY = """
import sys
import moe_beyond.report.tables as tables
tables.results_table, tables.sizing_table, tables.devices_tables, tables.inspection_tables
print(*(name for name in ("matplotlib", "torch", "lightning", "transformers") if name in sys.modules))
"""


@pytest.mark.parametrize("room", ["report.tables", "report.plots", "report.html", "hub"])
def test_every_public_name_can_be_imported(room: str) -> None:
    module = import_module(f"moe_beyond.{room}")
    assert all(getattr(module, name).__name__ == name for name in module.__all__ if not name.isupper())
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_tables_import_no_heavy_library() -> None:
    done = subprocess.run([sys.executable, "-c", TABLES_ONLY], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
