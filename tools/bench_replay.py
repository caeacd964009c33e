"""Speed of the cache core next to libcachesim, and a check that both count the same.

    python tools/bench_replay.py --data TRACES [--predictor P] [--slots N] [--repeats N] [--sweeps N] [--json FILE]

All sequences of a trace set form one stream of experts. LRU, LFU and Belady are timed access by access in both, and
must agree on every hit. libcachesim has no LFU whose counts outlive evictions, so `lfu` is compared with its LFU in
time only. Then `belief` is timed event by event, with a predictor's scores and a top<K> prefetch. One run gives all
ratios: medians of several rounds, each of which times everything once, with all counters of a replay. Reading the
traces, sorting them into events, indexing Belady's future and computing the scores are not timed. The time of
libcachesim includes reading its trace file, not writing it. Sweeps of budgets and policies on all cores follow, with
reading the traces; the figures are medians.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import libcachesim
import numpy as np
from rich.console import Console
from rich.table import Table

from moe_beyond.cache.counters import Counter
from moe_beyond.evaluation.engine import evaluate
from moe_beyond.evaluation.sources import from_predictor_folder, pretrained_source
from moe_beyond.evaluation.strategies import grid
from moe_beyond.files import write_json
from moe_beyond.pretrained import find_predictor
from moe_beyond.simulator import Replay, ReplaySettings
from moe_beyond.simulator.sequence import ReplaySequence
from moe_beyond.traces.formats.libcachesim import write_oracle_general
from moe_beyond.traces.reader import TraceSet

SEQUENTIAL = {"lru": "LRU", "lfu": "LFU", "lfu_in_cache": "LFU", "belady": "Belady"}
LEAST = {"lru": 5.0, "lfu": 1.0, "lfu_in_cache": 1.0, "belady": 2.0, "belief": 0.4}
SWEEP_BUDGETS = [f"{share}%" for share in (5, 10, 15, 20, 25, 30, 40, 50, 60, 80)]
SWEEP_POLICIES = ("lru", "lfu", "lfru", "class_lru", "belief", "belady")


def time_libcachesim(name: str, path: Path, slots: int) -> tuple[float, float]:
    """Return the seconds and the share of misses."""
    reader = libcachesim.TraceReader(str(path), libcachesim.TraceType.ORACLE_GENERAL_TRACE)
    cache = getattr(libcachesim, name)(slots)
    began = time.perf_counter()
    misses, _ = cache.process_trace(reader)
    return time.perf_counter() - began, misses


def time_replay(settings: ReplaySettings, sequence: ReplaySequence) -> tuple[float, Replay]:
    """Return the seconds of the core and the replay."""
    replaying = Replay(sequence.geometry, settings)
    sequence.as_group(settings)  # sorted into steps before the timing
    replaying.prepare(sequence)
    began = time.perf_counter()
    replaying.add_sequence(sequence)
    return time.perf_counter() - began, replaying


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of a trace set")
    parser.add_argument(
        "--predictor", help="predictor of the scores for belief (default: the pretrained cross_layer of the model)"
    )
    parser.add_argument("--slots", type=int, default=166, help="budget in slots (default: 166)")
    parser.add_argument("--repeats", type=int, default=5, help="number of timed rounds (default: 5)")
    parser.add_argument("--sweeps", type=int, default=3, help="number of timed sweeps (default: 3)")
    parser.add_argument(
        "--scored-tokens", type=int, default=20_000, help="number of tokens on which belief is timed (default: 20000)"
    )
    parser.add_argument("--json", type=Path, help="file for the figures as JSON")
    args = parser.parse_args()
    if args.sweeps < 1:
        parser.error(f"--sweeps must be at least 1 (got {args.sweeps})")
    traces = TraceSet(args.data)
    geometry = traces.geometry
    console = Console(width=120)
    stream = ReplaySequence(geometry, np.concatenate([trace.experts for trace in traces.traces()]))
    accesses = stream.experts.size
    console.print(f"{traces.manifest.source}: {accesses:,} accesses, {args.slots} of {geometry.total_experts} slots")
    source = from_predictor_folder(find_predictor(args.predictor)) if args.predictor else None
    source = source or pretrained_source("cross_layer", traces)
    scored = _scored(traces, source, args.scored_tokens) if source is not None else None
    seconds: dict[str, list[float]] = {}
    hits: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stream.oracleGeneral"
        write_oracle_general(path, stream.ids.ravel())
        for _ in range(args.repeats + 1):  # the first compiles, and is dropped
            for name in dict.fromkeys(SEQUENTIAL.values()):
                took, misses = time_libcachesim(name, path, args.slots)
                seconds.setdefault(f"libcachesim {name}", []).append(took)
                hits[f"libcachesim {name}"] = round((1 - misses) * accesses)
            for policy in SEQUENTIAL:
                took, replaying = time_replay(ReplaySettings(args.slots, policy, sequential=True), stream)
                seconds.setdefault(policy, []).append(took)
                hits[policy] = int(replaying.counts()[:, Counter.HITS].sum())
            if scored is not None and source is not None:
                settings = ReplaySettings(
                    args.slots, "belief", prefetch=f"top{geometry.top_k}", lookahead=source.lookaheads[0],
                    lookaheads=source.lookaheads, predictor=source.name,
                )  # fmt: skip
                took, replaying = time_replay(settings, scored)
                seconds.setdefault("belief", []).append(took * accesses / scored.experts.size)
    speed = {name: accesses / statistics.median(times[1:]) / 1e6 for name, times in seconds.items()}
    table = Table(title=f"million accesses per second, medians of {args.repeats}")
    for name in ("policy", "here", "libcachesim", "ratio", "at least", "hits here / there"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    ratios = {}
    for policy, name in SEQUENTIAL.items():
        other = speed[f"libcachesim {name}"]
        ratios[policy] = speed[policy] / other
        theirs = "-" if policy == "lfu" else f"{hits[f'libcachesim {name}']:,}"
        table.add_row(
            f"{policy}, sequential", f"{speed[policy]:.1f}", f"{other:.1f}", f"{ratios[policy]:.2f}",
            f"{LEAST[policy]:.1f}", f"{hits[policy]:,} / {theirs}",
        )  # fmt: skip
    if "belief" in speed:
        ratios["belief"] = speed["belief"] / speed["libcachesim Belady"]
        table.add_row(
            "belief, event by event, with scores and prefetch", f"{speed['belief']:.1f}",
            f"{speed['libcachesim Belady']:.1f} (Belady)", f"{ratios['belief']:.2f}", f"{LEAST['belief']:.1f}", "-",
        )  # fmt: skip
    console.print(table)
    sweep = _sweep(traces, args.sweeps)
    console.print(
        f"sweep of {len(SWEEP_BUDGETS)} budgets x {len(SWEEP_POLICIES)} policies: {sweep['seconds']:.1f} s "
        f"(median of {args.sweeps}), {sweep['cpu_seconds']:.1f} s of processor time, "
        f"{sweep['busy_cores']:.2f} of {os.cpu_count()} cores busy",
        highlight=False,
    )
    if args.json:
        write_json(args.json, {"accesses": accesses, "speed": speed, "ratios": ratios, "hits": hits, "sweep": sweep})


def _scored(traces: TraceSet, source: Any, tokens: int) -> ReplaySequence:
    """Return the first sequences with that many tokens as one sequence, with their scores."""
    experts, scores = [], []
    for trace, sequence_scores in source.sequences(traces, None, True):
        experts.append(trace.experts)
        scores.append(sequence_scores)
        if sum(map(len, experts)) >= tokens:
            break
    return ReplaySequence(traces.geometry, np.concatenate(experts), np.concatenate(scores))


def _sweep(traces: TraceSet, sweeps: int) -> dict[str, float]:
    """Replay all budgets and policies; return medians of the seconds, of processor time and of the busy cores."""
    slots = [int(budget[:-1]) * traces.geometry.total_experts // 100 for budget in SWEEP_BUDGETS]
    lines = grid(ReplaySettings(traces.geometry.total_experts), slots, SWEEP_POLICIES)
    evaluate(traces, lines[: len(SWEEP_POLICIES)], traces.manifest.splits[-1])  # compiles
    figures = []
    for _ in range(sweeps):
        began, cpu = time.perf_counter(), time.process_time()
        evaluate(traces, lines)
        took, cpu = time.perf_counter() - began, time.process_time() - cpu
        figures.append((took, cpu, cpu / took))
    return dict(
        zip(("seconds", "cpu_seconds", "busy_cores"), map(statistics.median, zip(*figures, strict=True)), strict=True)
    )


if __name__ == "__main__":
    main()
