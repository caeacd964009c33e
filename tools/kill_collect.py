"""Kill collections at random moments, resume them, and compare the results with an undisturbed collection.

    python tools/kill_collect.py [--kills 100] [--ranks 1] [--seed 0] [--prompts 24] [--json FILE]

Each kill is SIGKILL to a real `moe-beyond collect` of the small model at a random moment: while it loads, in its
batches, while it writes a part file, while it merges the parts, or while it moves the set. The same command is
repeated until it ends. The set must then equal the undisturbed one byte for byte, and its folder must contain nothing
else. Collections are repeated until the number of kills is reached. The remaining files show which moment a kill hit.

With several ranks (processes with RANK and WORLD_SIZE, as torchrun starts them), a kill hits one rank or all ranks. A
single rank is restarted while the others continue; all ranks are killed when torchrun sees one fail. The exit code is
1 if an entry was lost, repeated or changed, or if a command failed.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from moe_beyond.files import write_json
from moe_beyond.pretrained import shipped_folder
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.trace import Trace

PHASES = ("loading", "in a batch", "writing a part file", "putting the set together", "moving it out", "after the end")
SMALL = shipped_folder("small-moe")
AIMS = {"loading": 3, "in a batch": 4, "writing a part file": 3, "putting the set together": 2, "moving it out": 1}
"""Phase -> weight as a target; the last phases are short, and a late kill hits the next phase."""
PATIENCE = 120.0
"""Seconds after which a collection counts as hanging."""
POLL = 0.0001


@dataclass(frozen=True)
class Times:
    """Times of an undisturbed collection, in seconds since its start: begin of its first batch, and its end."""

    first_batch: float
    end: float


class Collection:
    """A collection, all its ranks, and the files in its folder.

    Args:
        words: Arguments of the command, without the output folder.
        out: Trace set to write, in its own folder.
        ranks: Number of processes.
    """

    def __init__(self, words: list[str], out: Path, ranks: int) -> None:
        out.parent.mkdir()
        self.out, self.pieces = out, out.parent / f".{out.name}.collecting"
        self._words = [sys.executable, "-m", "moe_beyond", "collect", *words, "--out", str(out), "--quiet"]
        self._ranks = ranks
        self.running: dict[int, subprocess.Popen[str]] = {}
        self._done: set[int] = set()

    def start(self) -> None:
        """Start every rank that is neither running nor finished."""
        for rank in range(self._ranks):
            if rank not in self.running and rank not in self._done:
                variables = {"RANK": str(rank), "WORLD_SIZE": str(self._ranks), "OMP_NUM_THREADS": "1"}
                self.running[rank] = subprocess.Popen(
                    self._words, env={**os.environ, **variables}, stderr=subprocess.PIPE, text=True
                )

    def look(self) -> None:
        """Update which ranks have ended.

        Raises:
            SystemExit: A rank failed.
        """
        for rank, process in list(self.running.items()):
            if process.poll() is not None:
                errors = process.communicate()[1]
                if process.returncode:
                    raise SystemExit(f"rank {rank} ended with {process.returncode}: {errors}")
                del self.running[rank]
                self._done.add(rank)

    def kill(self, ranks: list[int]) -> None:
        """Kill ranks at once; with more than one, finished ranks restart too, as under torchrun."""
        for rank in ranks:
            self.running[rank].kill()
        for rank in ranks:
            self.running.pop(rank).communicate()
        if len(ranks) > 1:
            self._done.clear()

    def files(self) -> set[str]:
        """Return the names in the folder of part files."""
        try:
            return set(os.listdir(self.pieces))
        except FileNotFoundError:
            return set()

    def is_whole(self) -> bool:
        """Check whether the set exists and nothing is left to do."""
        return self.out.is_dir() and not self.pieces.exists()

    def wait(self, until: Callable[[], bool]) -> bool:
        """Wait for a condition; return whether it held before the end.

        Raises:
            SystemExit: A rank failed, or the collection hangs.
        """
        began = time.monotonic()
        while not until():
            self.look()
            if not self.running:
                return False
            if time.monotonic() - began > PATIENCE:
                raise SystemExit(f"{self.out}: no rank ended within {PATIENCE:.0f} s; ranks {list(self.running)} wait")
            time.sleep(POLL)
        return True


def phase(before: set[str], after: set[str], out: Path, elapsed: float, batches: int, times: Times) -> str:
    """Return the phase that a kill hit, from the part files before the start and after the kill."""
    new = after - before
    if out.is_dir():
        return "moving it out" if after else "after the end"
    if "set" in after:
        return "moving it out"
    if any(name.startswith(".set.") for name in new):
        return "putting the set together"
    if any(name.startswith(".0") for name in new):
        return "writing a part file"
    if any(name[0].isdigit() for name in new) or elapsed > times.first_batch:
        whole = sum(name[0].isdigit() for name in after) == batches
        return "putting the set together" if whole else "in a batch"
    return "loading"


def moment(collection: Collection, batches: int, times: Times, chance: random.Random) -> bool:
    """Start, and wait for the moment of a kill; return whether it came before the end."""
    before = collection.files()
    to_come = batches - sum(name[0].isdigit() for name in before)
    aims = {
        name: weight for name, weight in AIMS.items() if to_come or ("batch" not in name and "part file" not in name)
    }
    (aim,) = chance.choices(list(aims), list(aims.values()))
    collection.start()
    began = time.monotonic()
    spread = {"writing a part file": 0.0015, "putting the set together": 0.04, "moving it out": 0.0005}
    if aim == "loading":
        delay = chance.uniform(0, times.first_batch)
    elif aim == "in a batch":
        delay = times.first_batch + chance.uniform(0, to_come / batches) * (times.end - times.first_batch)
    else:
        mark = {"writing a part file": ".0", "putting the set together": ".set.", "moving it out": "set"}[aim]

        def there() -> bool:
            return any(name.startswith(mark) for name in collection.files() - before) or collection.out.is_dir()

        skipped = chance.randrange(min(3, to_come)) if aim == "writing a part file" else 0
        for _ in range(skipped):  # not always the first part file
            if not collection.wait(there) or not collection.wait(lambda: not there()):
                return False
        if not collection.wait(there):
            return False
        began, delay = time.monotonic(), chance.uniform(0, spread[aim])
    return collection.wait(lambda: time.monotonic() - began >= delay) and not collection.is_whole()


def differences(expected: TraceSet, found: TraceSet) -> dict[str, int]:
    """Count entries (token, layer) that were lost, repeated or changed, and files that differ."""
    layers = expected.geometry.num_layers
    ours, theirs = ({trace.sequence_id: trace for trace in traces.traces()} for traces in (expected, found))
    times = Counter(trace.sequence_id for trace in found.traces())
    lost = sum(len(trace) for name, trace in ours.items() if name not in theirs)
    repeated = sum((count - 1) * len(theirs[name]) for name, count in times.items())
    changed = sum(len(trace) for name, trace in theirs.items() if name not in ours or not same(trace, ours[name]))
    names = [{path.name: path.read_bytes() for path in Path(traces.folder).iterdir()} for traces in (expected, found)]
    other = sum(names[0].get(name) != names[1].get(name) for name in {*names[0], *names[1]})
    other += expected.manifest.fingerprint != found.manifest.fingerprint
    return {"lost": lost * layers, "repeated": repeated * layers, "changed": changed * layers, "other files": other}


def same(one: Trace, other: Trace) -> bool:
    """Check whether two traces are equal, gate weights to the last bit."""
    return (
        (one.source, one.decode_start) == (other.source, other.decode_start)
        and np.array_equal(one.token_ids, other.token_ids)
        and np.array_equal(one.experts, other.experts)
        and np.array_equal(one.gate_weights, other.gate_weights)
    )


def main() -> None:
    """Parse the options, kill, compare and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="number of kills (default: 100)")
    parser.add_argument("--ranks", type=int, default=1, help="number of ranks (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--prompts", type=int, default=24, help="prompts per collection (default: 24)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    chance, began = random.Random(args.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        found = run(Path(work), args, chance)
    figures = {"kills": args.kills, "ranks": args.ranks, "seconds": time.monotonic() - began, **found}
    of = "one process" if args.ranks == 1 else f"{args.ranks} ranks"
    table = Table(title=f"{args.kills} kills, {of}")
    table.add_column("killed while")
    table.add_column("kills", justify="right")
    for name in PHASES:
        table.add_row(name, str(found["phases"][name]))
    console = Console(width=120)
    console.print(table)
    if args.ranks > 1:
        console.print(f"{found['single rank']} of them hit one rank, which was restarted while the others continued")
    console.print(
        f"{found['collections']} collections of {found['entries']:,} entries each in {figures['seconds']:.0f} s: "
        + ", ".join(f"{count:,} {what}" for what, count in found["differences"].items())
    )
    if args.json:
        write_json(args.json, figures)
    sys.exit(any(found["differences"].values()))


def run(work: Path, args: argparse.Namespace, chance: random.Random) -> dict[str, object]:
    """Collect once undisturbed, then kill collections until the number of kills is reached."""
    rows = [json.loads(line) for line in (SMALL / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    prompts = work / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows[: args.prompts]), encoding="utf-8")
    words = ["--model", str(SMALL), "--prompts", str(prompts), "--generate", "4", "--batch-size", "2"]
    words += ["--max-tokens", "24", "--shard-tokens", "200"]
    batches = -(-args.prompts // 2)
    undisturbed = Collection(words, work / "undisturbed" / "traces", 1)
    begun = time.monotonic()
    undisturbed.start()
    undisturbed.wait(lambda: "key.json" in undisturbed.files())
    first_batch = time.monotonic() - begun
    undisturbed.wait(lambda: False)
    times = Times(first_batch, time.monotonic() - begun)
    expected = TraceSet(str(undisturbed.out))

    phases, differ = Counter({name: 0 for name in PHASES}), Counter()
    collections = single = 0
    while sum(phases.values()) < args.kills or not collections:
        collection = Collection(words, work / f"killed-{collections}" / "traces", args.ranks)
        while not collection.is_whole() or collection.running:
            before, began = collection.files(), time.monotonic()
            if sum(phases.values()) == args.kills:
                collection.start()
                collection.wait(lambda: False)
                continue
            if not moment(collection, batches, times, chance):
                continue
            victims = sorted(collection.running)
            if len(victims) > 1 and chance.random() < 0.5:
                victims = [chance.choice(victims)]
            single += len(victims) == 1 and args.ranks > 1
            collection.kill(victims)
            elapsed = time.monotonic() - began
            phases[phase(before, collection.files(), collection.out, elapsed, batches, times)] += 1
        left = sorted(path.name for path in collection.out.parent.iterdir())
        differ.update(differences(expected, TraceSet(str(collection.out))))
        differ["left over"] += len(left) - 1
        collections += 1
    return {
        "phases": dict(phases),
        "single rank": single,
        "collections": collections,
        "entries": expected.manifest.tokens * expected.geometry.num_layers,
        "differences": dict(differ),
    }


if __name__ == "__main__":
    main()
