"""Compare the cache core with the plain reference of the tests, on random replays.

    python tools/compare_core.py [--events 1000000] [--seed 0] [--only POLICY ...] [--json FILE]

The replays are those of `tests/_helpers/cache_cases.py`, with every policy and prefetcher. Chunks, batches and windows
have events that are larger than the cache and run in waves. Layers may differ in bytes, host memory may be in front of
flash, and the host may compute missing experts. All counts by layer and all times by step must be equal.

A replay that differs is shrunk and printed by hypothesis, and the exit code is 1.
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from rich.console import Console
from rich.table import Table

from moe_beyond.cache.misses import MISSES, MOVE
from moe_beyond.cache.policies import POLICIES, load_policy
from moe_beyond.files import write_json

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from _helpers.cache_cases import Case, cases

REPLAYS = 200
"""Replays of one random seed; hypothesis remembers those that it has tried."""
LONGEST = 30
"""Tokens of the longest sequence; the reference looks through the whole history of an expert."""
COLUMNS = ("replays", "events", "prefetching", "larger than the cache", "bytes", "host computes", "flash")


def counted(case: Case) -> Counter[str]:
    """Count the events of a replay, also by the parts of the core that they exercise."""
    settings_, geometry = case.settings, case.geometry
    demanded = np.diff(case.stream().offsets).reshape(-1, geometry.num_layers) * np.array(geometry.expert_units)
    events = demanded.size
    exercised = {
        "events": True,
        "prefetching": settings_.prefetch != "none",
        "bytes": not geometry.has_one_size,
        "host computes": settings_.misses != MOVE,
        "flash": case.ticks[3] > 0,
    }
    found = Counter({name: events for name, holds in exercised.items() if holds})
    found["larger than the cache"] = int((demanded > np.array(case.pools())).sum())
    found["replays"] = 1
    return found


def compare(policy: str, events: int, first_seed: int) -> Counter[str]:
    """Compare replays of a policy until they have a number of events.

    Args:
        policy: Name of the policy.
        events: Number of events.
        first_seed: Random seed of the first replays; the next ones have the next seeds.

    Returns:
        Counts of `counted`, summed over all replays.
    """
    found: Counter[str] = Counter()
    drawn = cases(policies=(policy,), handlings=MISSES, longest=LONGEST)
    if not load_policy(policy).HOOKS.bypass:  # it counts experts
        drawn |= cases(policies=(policy,), handlings=MISSES, longest=LONGEST, mixed=True)
    number = first_seed
    while found["events"] < events:

        @seed(number)
        @settings(
            max_examples=REPLAYS, deadline=None, database=None, phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(drawn)
        def equal(case: Case) -> None:
            assert case.outcome() == case.reference()
            found.update(counted(case))

        equal()
        number += 1
    return found


def main() -> None:
    """Parse the options, compare and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=10**6, help="number of events of all policies (default: 1000000)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument(
        "--only", nargs="+", choices=list(POLICIES), default=list(POLICIES), help="policies (default: all)"
    )
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    began = time.monotonic()
    table = Table("policy", title=f"events of the cache core equal to the reference, seed {args.seed}")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    figures: dict[str, dict[str, int]] = {}
    for policy in args.only:
        found = compare(policy, -(-args.events // len(args.only)), args.seed)
        figures[policy] = {column: found[column] for column in COLUMNS}
        table.add_row(policy, *(f"{count:,}" for count in figures[policy].values()))
    totals = {column: sum(row[column] for row in figures.values()) for column in COLUMNS}
    table.add_section()
    table.add_row("all", *(f"{count:,}" for count in totals.values()))
    console = Console(width=140)
    console.print(table)
    console.print(f"{totals['events']:,} events equal, in {time.monotonic() - began:.0f} s")
    if args.json:
        write_json(args.json, {"seed": args.seed, "policies": figures, "all": totals})


if __name__ == "__main__":
    main()
