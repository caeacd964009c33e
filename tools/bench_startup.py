"""CPU time of ``--help`` for every command: `python tools/bench_startup.py [--runs N] [--json FILE]`.

Each figure is the median of several processes, user and system time together, less that of `python -c pass`.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from moe_beyond.cli.main import COMMANDS
from moe_beyond.files import write_json

PROGRAM = 0.25
"""Limit of ``moe-beyond --help``, in seconds."""
COMMAND = 0.6
"""Limit of a command's ``--help``, in seconds."""


def cpu_seconds(arguments: list[str], runs: int) -> float:
    """Return the median CPU time of a Python process.

    Args:
        arguments: Arguments of the interpreter.
        runs: Number of processes.
    """
    seconds = []
    for _ in range(runs):
        process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, arguments
        seconds.append(usage.ru_utime + usage.ru_stime)
    return statistics.median(seconds)


def main() -> None:
    """Print the table; exit with code 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="processes per command (default: 5)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    bare, found = cpu_seconds(["-c", "pass"], args.runs), dict[str, float]()
    print(f"python -c pass: {bare:.2f} s\n\n| command | CPU seconds more | limit |\n|---|---|---|")
    exceeded = False
    for arguments in (["--help"], *([command, "--help"] for command in COMMANDS), ["completion", "bash"]):
        limit = PROGRAM if arguments == ["--help"] else COMMAND if arguments[-1] == "--help" else None
        more = found[" ".join(arguments)] = cpu_seconds(["-m", "moe_beyond", *arguments], args.runs) - bare
        exceeded |= limit is not None and more > limit
        print(f"| {' '.join(arguments)} | {more:.2f} | {'' if limit is None else limit} |", flush=True)
    if args.json:
        write_json(args.json, {"python -c pass": bare, "more": found})
    sys.exit(exceeded)


if __name__ == "__main__":
    main()
