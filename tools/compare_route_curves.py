"""Compare replays of a BigMoeOnEdge recording with that project's own curves, and with the hits of its engine.

    python tools/compare_route_curves.py --route FILE --curve FILE [--metrics FILE] [--json FILE]

The curve file has the columns ``budget_mib,policy,hit_pct_cum,hit_pct_decode``. LRU, LFU and Belady are replayed at
every budget, in exact bytes, with the prompt as one step. Hit rates are in % of the distinct experts of each step: over
all steps, and over generated tokens. The metrics name the budget of the engine, whose policy is LRU. The last line is
the largest difference in points.
"""

import argparse
import csv
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from moe_beyond.cache.steps import EventRecord
from moe_beyond.errors import UserError
from moe_beyond.files import write_json
from moe_beyond.geometry import parse_budget
from moe_beyond.simulator import Replay, ReplaySettings
from moe_beyond.simulator.sequence import ReplaySequence
from moe_beyond.traces.formats.route_trace import import_route_trace
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.schema import expert_ids

POLICIES = ("lru", "lfu", "belady")
CURVE_COLUMNS = ("budget_mib", "policy", "hit_pct_cum", "hit_pct_decode")


def replayed(traces: TraceSet, policy: str, budget_mib: float) -> tuple[float, float]:
    """Return the hit rates in % of a policy, over all steps and over generated tokens."""
    geometry, counts = traces.geometry, np.zeros((2, 2))
    budget = parse_budget(f"{budget_mib:g}MiB", geometry)
    for trace in traces:
        settings = ReplaySettings(
            budget.slots, policy, prefill_chunk=max(trace.decode_start, 1), budget_bytes=budget.bytes
        )
        sequence = ReplaySequence(geometry, trace.experts, decode_start=trace.decode_start)
        events, _ = Replay(geometry, settings).watch(sequence)
        prompt = geometry.num_layers * (trace.decode_start > 0)
        for row, part in zip(counts, (events, events[prompt:]), strict=True):
            row += part[:, EventRecord.HITS].sum(), part[:, EventRecord.HITS : EventRecord.MISSES + 1].sum()
    cumulative, decode = 100 * counts[:, 0] / np.maximum(counts[:, 1], 1)
    return float(cumulative), float(decode)


def recorded(traces: TraceSet) -> tuple[float, float]:
    """Return the hit rates in % of the engine, over all steps and over generated tokens."""
    geometry, counts = traces.geometry, np.zeros((2, 2))
    for trace, log in zip(traces, traces.engine_logs(), strict=True):
        layers = np.arange(geometry.num_layers)[:, None]
        experts = expert_ids(trace.experts, geometry.num_experts)
        steps = np.maximum(np.arange(len(trace)) - trace.decode_start + 1, 0)[:, None, None]
        keys = (steps * geometry.num_layers + layers) * geometry.num_experts + experts
        present = experts < geometry.num_experts
        _, first = np.unique(keys[present], return_index=True)
        hits, generated = log.residency[present][first] > 0, np.broadcast_to(steps, keys.shape)[present][first] > 0
        counts += [[hits.sum(), len(hits)], [hits[generated].sum(), generated.sum()]]
    cumulative, decode = 100 * counts[:, 0] / np.maximum(counts[:, 1], 1)
    return float(cumulative), float(decode)


def read_curve(path: Path) -> list[tuple[float, str, float, float]]:
    """Return budget in MiB, policy and both hit rates of every row of `POLICIES`.

    Raises:
        UserError: The file has no such columns.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not all(rows[0].get(name) for name in CURVE_COLUMNS):
        raise UserError(f"{path}: must have the columns {', '.join(CURVE_COLUMNS)}")
    return [
        (float(row["budget_mib"]), row["policy"], float(row["hit_pct_cum"]), float(row["hit_pct_decode"]))
        for row in rows
        if row["policy"] in POLICIES
    ]


def main() -> None:
    """Parse the options, replay, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--route", type=Path, required=True, help="route trace")
    parser.add_argument("--curve", type=Path, required=True, help="curves of the project's own simulator")
    parser.add_argument("--metrics", type=Path, help="metrics of the same run, with its budget (default: none)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    console = Console(width=100)
    table = Table()
    for name in ("MiB", "policy", "all steps", "theirs", "points", "generated", "theirs", "points"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    rows: list[dict[str, Any]] = []

    def compare(budget: float, policy: str, ours: tuple[float, float], theirs: tuple[float, float]) -> None:
        difference = np.subtract(ours, theirs)
        rows.append({"budget_mib": budget, "policy": policy, "ours": ours, "theirs": theirs})
        pairs: list[npt.NDArray[np.float64]] = list(np.transpose([ours, theirs, difference]))
        table.add_row(f"{budget:g}", policy, *(f"{value:.3f}" for pair in pairs for value in pair))

    with tempfile.TemporaryDirectory() as folder:
        traces = import_route_trace(args.route, Path(folder) / "traces", metrics=args.metrics)
        for budget, policy, *theirs in read_curve(args.curve):
            compare(budget, policy, replayed(traces, policy, budget), (theirs[0], theirs[1]))
        budgets = {log.summary.get("cache_budget_MiB") for log in traces.engine_logs()}
        if len(budgets) == 1 and (engine := budgets.pop()) is not None:
            compare(engine, "lru; theirs: the engine", replayed(traces, "lru", engine), recorded(traces))
    table.title = f"hit rates in %: {traces.geometry.model}, {traces.geometry.describe_shape()}"
    console.print(table)
    largest = max(float(np.abs(np.subtract(row["ours"], row["theirs"])).max()) for row in rows)
    console.print(f"largest difference: {largest:.3f} points", highlight=False)
    if args.json:
        write_json(args.json, {"rows": rows, "largest_difference": largest})


if __name__ == "__main__":
    main()
