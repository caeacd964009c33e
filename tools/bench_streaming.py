"""Speed and memory of streaming a trace set through the data module.

    python tools/bench_streaming.py --data TRACES [--epochs 3] [--json FILE]

Reads whole epochs of shuffled training batches in one process without workers, so that entries/s are those of one
core; torch and Arrow use one thread. Peak memory is relative to the same process before it opens the set.
`tools/permute_traces.py` makes a set of the paper's size.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table

from moe_beyond.datamodules import TraceDataModule


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise SystemExit("peak memory is read from /proc/self/status, which only Linux has")


def main() -> None:
    """Parse the options, stream and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="trace set with a train split")
    parser.add_argument("--epochs", type=int, default=3, help="number of epochs (default: 3)")
    parser.add_argument("--token-budget", type=int, default=2048, help="tokens per batch (default: 2048)")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    empty = psutil.Process().memory_info().rss

    data = TraceDataModule(args.data, val_split=None, token_budget=args.token_budget)
    layers = data.geometry.num_layers
    runs = []
    for epoch in range(args.epochs):
        began, processor = time.perf_counter(), time.process_time()
        tokens = batches = padded = 0
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            tokens += int(batch.lengths.sum())
            padded += batch.token_ids.numel()
            batches += 1
        seconds, worked = time.perf_counter() - began, time.process_time() - processor
        runs.append({"entries": tokens * layers, "batches": batches, "padding": 1 - tokens / padded,
                     "seconds": seconds, "processor_seconds": worked})  # fmt: skip
    peak = peak_bytes() - empty
    speeds = [run["entries"] / run["processor_seconds"] for run in runs]
    figures = {
        "entries": runs[0]["entries"],
        "batches": runs[0]["batches"],
        "padding": runs[0]["padding"],
        "entries_per_second_per_core": statistics.median(speeds),
        "entries_per_second_wall": statistics.median(run["entries"] / run["seconds"] for run in runs),
        "peak_bytes_over_empty": peak,
        "runs": runs,
    }
    table = Table(title=f"streaming {args.data}: median of {args.epochs} epochs, one process")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_row("entries per epoch", f"{figures['entries']:,}")
    table.add_row("batches (padding)", f"{figures['batches']:,} ({figures['padding']:.1%})")
    table.add_row("entries/s/core (processor time)", f"{figures['entries_per_second_per_core'] / 1e6:.1f} M")
    table.add_row("  slowest .. fastest epoch", f"{min(speeds) / 1e6:.1f} .. {max(speeds) / 1e6:.1f} M")
    table.add_row("entries/s (wall clock)", f"{figures['entries_per_second_wall'] / 1e6:.1f} M")
    table.add_row("peak memory over the empty process", f"{peak / 1e9:.2f} GB")
    Console().print(table)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
