"""Memory of many simultaneous replays: `python tools/bench_at_once.py --data TRACES [--processes 100] [--json FILE]`.

Every process replays the set under the same budget, prints its result, and waits. When all wait, the tool reads their
memory from /proc. The resident memory of a process (RSS) counts shared pages in full. Its proportional memory (PSS)
divides each page by the number of processes that share it. Its own memory (USS) has only pages that no other process
shares. The sum of PSS is the memory that all of them take. The exit code is 1 if two results differ.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moe_beyond.files import write_json

REPLAY = """
import os, sys
from moe_beyond.cli.main import main
out = os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
code = main(["replay", "--traces", sys.argv[1], "--budget", sys.argv[2], "--json", sys.argv[3], "--quiet"])
os.write(out, f"{code}\\n".encode())
sys.stdin.read()
"""
FIELDS = {"Rss": "rss", "Pss": "pss", "Private_Clean": "uss", "Private_Dirty": "uss"}
"""Field of ``smaps_rollup`` -> figure."""


def memory_of(process: int) -> dict[str, float]:
    """Return the memory of a process in MB."""
    found = dict.fromkeys(FIELDS.values(), 0.0)
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]:
        name, kilobytes = line.split()[:2]
        if name.rstrip(":") in FIELDS:
            found[FIELDS[name.rstrip(":")]] += int(kilobytes) * 1024 / 1e6
    return found


def main() -> None:
    """Parse the options, replay, measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="trace set")
    parser.add_argument("--budget", default="10%", help="budget (default: 10%%)")
    parser.add_argument("--processes", type=int, default=100, help="number of replays (default: 100)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    rows = [measure(args.data, args.budget, count) for count in dict.fromkeys((1, args.processes))]
    table = Table(title=f"simultaneous replays of {args.data}, memory in MB")
    for head in ("processes", "RSS each", "PSS each", "USS each", "RSS in all", "PSS in all", "seconds"):
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(
            f"{row['processes']:.0f}", *(f"{row[name]:,.0f}" for name in ("rss", "pss", "uss", "all_rss", "all_pss")),
            f"{row['seconds']:.0f}",
        )  # fmt: skip
    Console(width=120).print(table)
    if args.json:
        write_json(args.json, rows)


def measure(data: str, budget: str, count: int) -> dict[str, float]:
    """Replay in several processes at once; return medians per process, sums, and the duration.

    Raises:
        SystemExit: A replay failed, or two results differ.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / f"{number}.json" for number in range(count)]
        replays = [
            subprocess.Popen(
                [sys.executable, "-c", REPLAY, data, budget, str(result)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for result in results
        ]  # fmt: skip
        try:
            codes = {replay.stdout.readline() for replay in replays if replay.stdout is not None}
            seconds = time.monotonic() - began
            if codes != {"0\n"} or len({result.read_bytes() for result in results}) != 1:
                raise SystemExit(f"{data}: a replay failed or differs (exit codes {codes})")
            found = [memory_of(replay.pid) for replay in replays]
        finally:
            for replay in replays:
                replay.communicate()
    figures = {name: statistics.median(each[name] for each in found) for name in ("rss", "pss", "uss")}
    sums = {f"all_{name}": sum(each[name] for each in found) for name in ("rss", "pss")}
    return {"processes": count, **figures, **sums, "seconds": seconds}


if __name__ == "__main__":
    main()
