"""Speed of the disk at reads of the size of an expert, without the page cache.

    python tools/bench_disk.py --model DIR [--json FILE]

Reads are at random places of the model's safetensors files, by 1, 2 and 4 threads; times are medians over
repeats.
"""

import argparse
import os
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_beyond.files import write_json
from moe_beyond.geometry import load_preset
from moe_beyond.runtime.slab import PAGE
from moe_beyond.runtime.storage.disk_speed import read_seconds

READS, REPEATS, READERS = 64, 3, (1, 2, 4)
"""Number of reads per repeat, number of repeats, and numbers of threads that read at once."""


def main() -> None:
    """Parse the options, measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="model folder")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    size = 2 * load_preset(str(args.model)).geometry.params_per_expert
    machine = describe_machine(args.model, size)
    table = Table(title=f"{machine['processor']}, {machine['cores']} cores: direct reads of {size / 1e6:.1f} MB")
    for column in ("readers", "ms per read", "GB/s"):
        table.add_column(column, justify="right")
    for readers, ms in machine["direct_read_ms"].items():
        table.add_row(readers, f"{ms:.2f}", f"{size / ms / 1e6:.2f}")
    Console(width=120).print(table)
    if args.json:
        write_json(args.json, machine)


def describe_machine(model: Path, size: int) -> dict[str, Any]:
    """Describe the processor, the memory and the disk of a model.

    Args:
        model: Folder of the model.
        size: Size of a read in bytes.

    Returns:
        Name of the processor, number of cores, memory in bytes, load of the last minute, the kernel's read-ahead in KB
        (None if unknown), and the time per direct read in milliseconds by number of readers.
    """
    name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    device = model.stat().st_dev
    ahead = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/queue/read_ahead_kb")
    return {
        "processor": name[1] if name else "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": os.getloadavg()[0],
        "read_ahead_kb": int(ahead.read_text()) if ahead.exists() else None,
        "direct_read_ms": direct_read_ms(model, -(-size // PAGE) * PAGE),
    }


def direct_read_ms(model: Path, size: int) -> dict[str, float]:
    """Measure direct reads at random places of a model's files.

    Args:
        model: Folder of the model.
        size: Size of a read in bytes, a multiple of `PAGE`.

    Returns:
        Number of readers -> time divided by the number of reads, in milliseconds.
    """
    files = [file for file in model.glob("*.safetensors") if file.stat().st_size >= size]
    found = {}
    for readers in READERS:
        seconds = read_seconds(files, size, readers=readers, reads=READS, repeats=REPEATS, direct=True)
        if seconds is None:
            sys.exit(f"{model}: its disk allows no direct reads")
        found[str(readers)] = 1e3 * statistics.median(seconds)
    return found


if __name__ == "__main__":
    main()
