"""Tables of results need no plotting or deep-learning library."""

import subprocess
import sys

TABLES_ONLY = """
import sys
import moe_beyond.report.tables as tables
tables.results_table, tables.sizing_table, tables.devices_tables, tables.inspection_tables
print(*(name for name in ("matplotlib", "torch", "lightning", "transformers") if name in sys.modules))
"""


def test_tables_import_no_heavy_library() -> None:
    done = subprocess.run([sys.executable, "-c", TABLES_ONLY], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
