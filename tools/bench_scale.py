"""Memory and time of every command over trace sets of growing size, and the speed-up of worker processes.

    python tools/bench_scale.py SET [SET ...] [--steps 50] [--workers 2] [--repeats 3] [--json FILE]
    python tools/bench_scale.py --project FILE [--entries 66e9]

Every job is a process of its own on one core, start included. Memory is the largest of its processes. Time is processor
time, which other processes on the machine change little; --workers also measures wall-clock time on as many cores, on
the largest set. `tools/sample_traces.py` makes the sets.

--project prints what a set of another size costs, from the figures of the largest set in FILE.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from moe_beyond.traces.reader import TraceSet

COMMAND = (sys.executable, "-m", "moe_beyond")
CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = ("--model.width=64", "--model.heads=4", "--model.depth=1", "--model.window=64")
CORES_PER_MACHINE, HOURS = 64, 24
"""Cores of a machine, and the hours in which a job ends, of a projection."""


@dataclass(frozen=True)
class Cost:
    """Cost of a job.

    Attributes:
        entries: Number of (token, layer) entries that it read.
        seconds: Wall-clock seconds of the job.
        processor_seconds: Processor seconds of all its processes.
        peak_bytes: Largest resident memory of one of its processes.
    """

    entries: int
    seconds: float
    processor_seconds: float
    peak_bytes: int


def run(words: Sequence[str], entries: int, folder: Path, cores: int = 1) -> Cost:
    """Run a job in a process.

    Args:
        words: Command line of the job.
        entries: Number of entries that it reads.
        folder: Working folder of the job.
        cores: Number of cores that it may use (default: 1).
    """
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    with tempfile.TemporaryFile("w+") as messages:
        began = time.perf_counter()
        process = subprocess.Popen(
            words,
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=messages,
            env=environment,
            preexec_fn=lambda: os.sched_setaffinity(0, allowed),
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            messages.seek(0)
            raise SystemExit(f"{' '.join(words)}: exit code {process.returncode}\n{messages.read()[-2000:]}")
    return Cost(entries, seconds, usage.ru_utime + usage.ru_stime, 1024 * usage.ru_maxrss)


def fit(traces: str, model: str, *words: str) -> list[str]:
    """Return the command line of a fit."""
    trainer = "trainer/counting" if model == "popularity" else "trainer/default"
    configs = [word for name in (trainer, f"model/{model}", "data/traces") for word in ("-c", f"{CONFIGS / name}.yaml")]
    return [*COMMAND, "fit", *configs, f"--data.traces={traces}", "--quiet", *words]


def jobs(traces: str, steps: int) -> dict[str, list[str]]:
    """Return the jobs by name.

    Args:
        traces: Folder of the trace set.
        steps: Optimiser steps of the fit of ``cross_layer``.
    """
    few = ("--trainer.limit_val_batches=10", f"--trainer.max_steps={steps}", "--trainer.callbacks=null")
    return {
        "stream": [
            sys.executable,
            str(Path(__file__).parent / "bench_streaming.py"),
            "--data",
            traces,
            "--epochs",
            "1",
        ],
        "inspect": [*COMMAND, "inspect", traces, "--quiet"],
        "replay": replay(traces),
        "fit popularity": fit(traces, "popularity"),
        f"fit cross_layer, {steps} steps": fit(traces, "cross_layer", *SMALL, *few),
        "evaluate popularity": [*COMMAND, "evaluate", "fitted", "--traces", traces, "--split", "validation", "--quiet"],
    }


def replay(traces: str, workers: int = 1) -> list[str]:
    """Return the command line of a replay of LRU with its baselines."""
    words = ["--budget", "10%", "--policy", "lru", "--workers", str(workers), "--json", f"{workers}.json", "--quiet"]
    return [*COMMAND, "replay", "--traces", traces, *words]


def measure(
    sets: Sequence[str], names: Sequence[str] | None, steps: int, workers: int, repeats: int, report: Console
) -> dict[str, object]:
    """Run jobs on all sets.

    Args:
        sets: Trace sets in ascending size.
        names: Names of the jobs; None for all.
        steps: Optimiser steps of the fit of ``cross_layer``.
        workers: Number of worker processes.
        repeats: Number of replays with workers, and as many without.
        report: Console for progress.
    """
    costs: dict[str, list[dict[str, object]]] = {}
    figures: dict[str, object] = {"sets": sets, "workers": workers, "costs": costs}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for traces in map(os.path.abspath, sets):
            opened = TraceSet(traces)
            manifest, layers = opened.manifest, opened.geometry.num_layers
            for name, words in jobs(traces, steps).items():
                if names is not None and name not in names:
                    continue
                splits = {"evaluate popularity": ["validation"], "stream": ["train"]}.get(name, manifest.splits)
                entries = layers * sum(manifest.counts()[split]["tokens"] for split in splits)
                cost = run(words, entries, folder)
                report.print(f"{traces}: {name}: {cost}")
                costs.setdefault(name, []).append(asdict(cost))
                if name == "fit popularity":
                    fitted = max(folder.glob("runs/*/*/predictor"), key=lambda path: path.stat().st_mtime)
                    (folder / "fitted").unlink(missing_ok=True)
                    (folder / "fitted").symlink_to(fitted, target_is_directory=True)
        entries, speed_ups = layers * manifest.tokens, []
        for _ in range(repeats):
            one, several = (run(replay(traces, number), entries, folder, number) for number in (1, workers))
            report.print(f"{traces}: replay, {workers} workers: {several}; one: {one}")
            speed_ups.append(one.seconds / several.seconds)
        figures["speed_ups"] = speed_ups
        figures["same_json"] = (folder / "1.json").read_bytes() == (folder / f"{workers}.json").read_bytes()
        figures["bytes_per_entry"] = sum(shard.bytes for shard in manifest.shards) / entries
    return figures


def table(figures: dict[str, object]) -> Table:
    """Return memory and time of each job, one pair of columns per set."""
    costs = figures["costs"]
    entries = [f"{row['entries'] / 1e6:.0f} M" for row in next(iter(costs.values()))]
    shown = Table(title=f"one core; {', '.join(entries)} entries")
    for column in ("job", "peak memory, MB", "processor seconds", "µs per entry", "memory, largest / smallest"):
        shown.add_column(column, justify="left" if column == "job" else "right")
    for name, rows in costs.items():
        shown.add_row(
            name,
            " / ".join(f"{row['peak_bytes'] / 1e6:.0f}" for row in rows),
            " / ".join(f"{row['processor_seconds']:.0f}" for row in rows),
            " / ".join(f"{1e6 * row['processor_seconds'] / row['entries']:.2f}" for row in rows),
            f"{rows[-1]['peak_bytes'] / rows[0]['peak_bytes']:.2f}",
        )
    return shown


def project(figures: dict[str, object], entries: float) -> list[str]:
    """Return a Markdown table of the cost of a set of another size.

    The rate of a job is the difference between the largest and the smallest set, so its start does not count.

    Args:
        figures: Content of the JSON file.
        entries: Number of entries.
    """
    size = entries * figures["bytes_per_entry"]
    lines = [
        f"{entries:,.0f} entries are {size / 1e12:.2f} TB ({figures['bytes_per_entry']:.2f} bytes per entry).",
        "",
        f"| job | million entries per second and core | hours on one core | machines of {CORES_PER_MACHINE} cores for "
        f"{HOURS} hours |",
        "|---|---|---|---|",
    ]
    for name, rows in figures["costs"].items():
        first, last = rows[0], rows[-1]
        if "steps" in name or last["entries"] == first["entries"]:
            continue
        rate = (last["entries"] - first["entries"]) / (last["processor_seconds"] - first["processor_seconds"])
        hours = entries / rate / 3600
        lines.append(f"| {name} | {rate / 1e6:.2f} | {hours:,.0f} | {hours / HOURS / CORES_PER_MACHINE:.2f} |")
    return lines


def main() -> None:
    """Parse the options, measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", help="trace sets in ascending size, with a train and a validation split")
    parser.add_argument("--jobs", nargs="*", metavar="JOB", help="jobs to run; none: only the speed-up (default: all)")
    parser.add_argument("--steps", type=int, default=50, help="optimiser steps of cross_layer (default: 50)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default: 2)")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of the speed-up (default: 3)")
    parser.add_argument("--json", help="file for the figures (default: none)")
    parser.add_argument("--project", metavar="FILE", help="figures of an earlier run to project")
    parser.add_argument("--entries", type=float, default=66e9, help="entries of the projection (default: 66e9)")
    args = parser.parse_args()
    console = Console()
    if args.project:
        print("\n".join(project(json.loads(Path(args.project).read_text()), args.entries)))
        return
    figures = measure(args.sets, args.jobs, args.steps, args.workers, args.repeats, console)
    if figures["costs"]:
        console.print(table(figures))
    speed_ups = figures["speed_ups"]
    console.print(
        f"replay, {args.workers} workers: {median(speed_ups):.2f} times as fast as one (median of {args.repeats}, "
        f"{min(speed_ups):.2f} to {max(speed_ups):.2f}); same JSON: {figures['same_json']}"
    )
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
