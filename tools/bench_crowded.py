"""Slow-down of a fit next to busy processes, compared with the share of the processors that it got.

    python tools/bench_crowded.py [--busy 2] [--repeats 3] [--json FILE]

Fits the quickstart's predictor to the quickstart's traces, undisturbed and next to processes that count. A fit runs
with idle threads that sleep (`OMP_WAIT_POLICY=passive`, as `moe-beyond` sets it), or that spin (active).
Other processes of the machine count as busy, too. So the tool prints the processors that each fit got: its processor
time divided by its duration. The slow-down that this share explains is the share of the undisturbed fit, divided by the
share next to busy processes. The rest is waiting that no other process explains.
"""

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moe_beyond.files import write_json

POLICIES = {"passive": "as moe-beyond sets it", "active": "before"}
FIT = """
import os, sys, time
import moe_beyond.quickstart as quickstart
from moe_beyond.traces.reader import TraceSet
from rich.console import Console
import io, logging, warnings
warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
quickstart.EPOCHS = int(sys.argv[3])
from pathlib import Path
began, used = time.perf_counter(), time.process_time()
quickstart.fit(TraceSet(sys.argv[1]), Path(sys.argv[2]), Console(file=io.StringIO()))
print(time.perf_counter() - began, time.process_time() - used)
"""


def count() -> None:
    """Use one processor."""
    while True:
        pass


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Run processes that use one processor each."""
    processes = [multiprocessing.Process(target=count, daemon=True) for _ in range(number)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def fit(traces: Path, policy: str, epochs: int) -> tuple[float, float]:
    """Fit in a process of its own; return its duration and its processor time, in seconds."""
    with tempfile.TemporaryDirectory() as out:
        done = subprocess.run(
            [sys.executable, "-c", FIT, str(traces), out, str(epochs)],
            env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
            | {"OMP_WAIT_POLICY": policy},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    seconds, used = map(float, done.stdout.split()[-2:])
    return seconds, used


def main() -> None:
    """Parse the options, measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, default=2, help="busy processes (default: 2)")
    parser.add_argument("--repeats", type=int, default=3, help="fits of each kind (default: 3)")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of a fit (default: 4)")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES), help="OMP_WAIT_POLICY")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    spans: dict[tuple[str, int], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        from moe_beyond.quickstart import record_small_model

        traces = Path(name) / "traces"
        record_small_model(traces)
        for _ in range(args.repeats):
            for policy in args.policies:
                for busy in (0, args.busy):
                    with busy_processes(busy):
                        spans.setdefault((policy, busy), []).append(fit(traces, policy, args.epochs))
                    time.sleep(0.5)
    rows = [row(policy, args.busy, spans[policy, 0], spans[policy, args.busy]) for policy in args.policies]
    table = Table(
        title=f"the quickstart's fit, {args.epochs} epochs, undisturbed and next to {args.busy} busy processes"
    )
    for head in (
        "idle threads",
        "undisturbed",
        "processors",
        "crowded",
        "processors",
        "slow-down",
        "explained",
        "rest",
    ):
        table.add_column(head, justify="right")
    for figures in rows:
        table.add_row(
            f"{figures['policy']} ({POLICIES[str(figures['policy'])]})",
            f"{figures['undisturbed_s']:.1f} s", f"{figures['undisturbed_processors']:.2f}",
            f"{figures['crowded_s']:.1f} s", f"{figures['crowded_processors']:.2f}",
            f"{figures['slowdown']:.2f}", f"{figures['explained']:.2f}", f"{figures['rest']:.2f}",
        )  # fmt: skip
    Console(width=120).print(table)
    if args.json:
        write_json(args.json, rows)


def row(
    policy: str, busy: int, undisturbed: list[tuple[float, float]], crowded: list[tuple[float, float]]
) -> dict[str, float | str | int]:
    """Compare undisturbed fits with fits next to busy processes, by the fits of median duration."""
    (undisturbed_s, undisturbed_used), (crowded_s, crowded_used) = (
        sorted(spans)[len(spans) // 2] for spans in (undisturbed, crowded)
    )
    before, after = undisturbed_used / undisturbed_s, crowded_used / crowded_s
    slowdown, explained = crowded_s / undisturbed_s, before / after
    return {
        "policy": policy, "busy": busy, "undisturbed_s": undisturbed_s, "undisturbed_processors": before,
        "crowded_s": crowded_s, "crowded_processors": after,
        "slowdown": slowdown, "explained": explained, "rest": slowdown / explained,
    }  # fmt: skip


if __name__ == "__main__":
    main()
