"""Kill fits at random moments, resume them, and compare the results with undisturbed fits.

    python tools/kill_fit.py [--kills 12] [--times 2] [--seed 0] [--only NAME ...] [--json FILE]

Each kill is SIGKILL to a real process, with all its ranks or one of them, at a random moment. A moment is an event of
the fit, an event at the end of an epoch or in a validation, a place within the saving of a checkpoint, or a time. The
fit is then resumed from its newest checkpoint with another seed, so that anything drawn outside a step differs. With
`--times 2` the resumed fit is killed, too, and resumed again. All fits use the shipped dropout. Temporary files are on
another file system (/dev/shm), if there is one.

The tool compares the batches, the loss and the learning rate of every step, the weights, the exported predictor, the
figures of every validation, and the numbers of planned and made steps. The exit code is 1 if anything differs, if a
batch is lost or repeated, if a checkpoint cannot be read, or if a resumed run keeps hidden files.
"""

import argparse
import contextlib
import io
import logging
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from parts.watched_fits import CONFIGURATIONS, OTHER_DISK, Configuration, Kill, Notes, choose_kill, fit, in_processes
from rich.console import Console
from rich.table import Table

from moe_beyond.cli.resuming import newest_checkpoint
from moe_beyond.files import write_json
from moe_beyond.geometry import Geometry
from moe_beyond.run_folder import checkpoints_of
from moe_beyond.traces.manifest import Manifest, Tokenizer
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.writer import open_writer
from moe_beyond.unfinished import UNFINISHED, remove_leftovers

GEOMETRY = Geometry("tiny", (1, 2, 3, 4), num_experts=8, top_k=2, params_per_expert=1000, other_params_per_layer=5000)
VOCAB = 32
COLUMNS = {
    "kills": "kills", "resumes": "resumes", "saving": "in a save", "loss": "loss differs by",
    "weights": "weights", "exported": "exported", "recalls": "recalls", "rates": "rates", "steps": "steps",
    "lost": "entries lost", "repeated": "repeated", "unreadable": "unreadable", "left": "hidden files",
}  # fmt: skip
"""Figure -> head of its column."""
FAULTS = ("loss", "weights", "exported", "recalls", "rates", "steps", "lost", "repeated", "unreadable", "left")


class Chain:
    """A fit that is killed and resumed until it ends.

    Args:
        chosen: Kind of fit.
        traces: Folder of the trace set.
        folder: Folder of all its processes.
        temporary: Folder for their temporary files.
    """

    def __init__(self, chosen: Configuration, traces: Path, folder: Path, temporary: Path) -> None:
        self._chosen, self._traces, self.folder, self._temporary = chosen, traces, folder, temporary
        self._parts: list[Path] = []
        self.unreadable = 0

    def run(self, kill: Kill | None, *, one: bool = False) -> bool:
        """Fit from the newest checkpoint, if there is one; return whether the fit ended."""
        part = self.folder / str(len(self._parts))
        part.mkdir(parents=True)
        resume = self.newest()
        self._parts.append(part)
        seconds = None if kill is None else kill.seconds
        return in_processes(
            self._chosen.ranks, self._temporary, lambda: fit(self._chosen, self._traces, part, kill, resume), seconds,
            one,
        )  # fmt: skip

    def newest(self) -> Path | None:
        """Return the newest checkpoint of all processes so far; count those that cannot be read."""
        if not checkpoints_of(self.folder):
            return None
        with contextlib.redirect_stderr(io.StringIO()) as warnings:
            newest = newest_checkpoint(self.folder)
        self.unreadable += warnings.getvalue().count("cannot be resumed")
        return newest

    def result(self, rank: int) -> dict[str, Any]:
        """Return the result of the last process."""
        found: dict[str, Any] = torch.load(self._parts[-1] / f"result-{rank}.pt", weights_only=True)
        return found

    def notes(self, rank: int) -> list[Notes]:
        """Return the notes of all processes, in order; a process that was killed early has none."""
        notes = []
        for part in self._parts:
            result, killed = part / f"result-{rank}.pt", part / f"notes-{rank}.pt"
            if result.exists():
                notes.append(Notes(**torch.load(result, weights_only=True)["notes"]))
            elif killed.exists():
                notes.append(Notes(**torch.load(killed, weights_only=True)))
        return notes


def run(name: str, traces: Path, work: Path, temporary: Path, kills: int, times: int, chance: random.Random) -> Counter:
    """Fit once undisturbed; then kill, resume and compare."""
    chosen, began = CONFIGURATIONS[name], time.monotonic()
    undisturbed = Chain(chosen, traces, work / name / "undisturbed", temporary)
    if not undisturbed.run(None):
        raise SystemExit(f"{name}: the undisturbed fit failed")
    duration = time.monotonic() - began
    (notes,) = undisturbed.notes(0)
    found, number = Counter(dict.fromkeys(COLUMNS, 0)), 0
    while found["kills"] < kills:
        chain = Chain(chosen, traces, work / name / str(number), temporary)
        number += 1
        for _ in range(min(times, kills - found["kills"])):
            kill = choose_kill(notes.events, notes.saves, duration, chance)
            if chain.run(kill, one=chance.random() < 0.5):
                break
            found.update(kills=1, saving=kill.save is not None, resumes=chain.newest() is not None)
        else:
            if not chain.run(None):
                raise SystemExit(f"{name}: a resumed fit failed after {kill}")
        compare(undisturbed, chain, chosen.ranks, found)
        shutil.rmtree(chain.folder)
    return found


def compare(undisturbed: Chain, chain: Chain, ranks: int, found: Counter) -> None:
    """Add the differences of a chain from the undisturbed fit."""
    for rank in range(ranks):
        (expected,) = undisturbed.notes(rank)
        parts = chain.notes(rank)
        lineage = made_batches(parts)
        lost, repeated = Counter(expected.batches.values()), Counter(lineage)
        found["lost"] += sum(entries * count for (_, entries), count in (lost - repeated).items())
        found["repeated"] += sum(entries * count for (_, entries), count in (repeated - lost).items())
        for name in ("losses", "recalls", "rates"):
            latest = {key: value for notes in parts for key, value in getattr(notes, name).items()}
            wanted = getattr(expected, name)
            found["steps"] += latest.keys() != wanted.keys()
            differs = max((abs(latest[key] - wanted[key]) for key in latest.keys() & wanted.keys()), default=0.0)
            key = "loss" if name == "losses" else name
            found[key] = max(found[key], differs)
    one, other = undisturbed.result(0), chain.result(0)
    for kind in ("weights", "exported"):
        found[kind] = max(found[kind], difference(one[kind], other[kind]))
    found["steps"] += (one["planned"], one["steps"]) != (other["planned"], other["steps"])
    found["unreadable"] += chain.unreadable
    for folder in {path.parent for path in chain.folder.rglob("*") if UNFINISHED.fullmatch(path.name)}:
        remove_leftovers(folder)
    found["left"] += sum(UNFINISHED.fullmatch(path.name) is not None for path in chain.folder.rglob("*"))


def made_batches(parts: list[Notes]) -> list[tuple[str, int]]:
    """Return the batches in the final weights: those of each process before the place where the next one continued."""
    made: dict[tuple[int, int], tuple[str, int]] = {}
    for notes in parts:
        if notes.batches:
            first = min(notes.batches)
            made = {place: batch for place, batch in made.items() if place < first}
        made |= notes.batches
    return list(made.values())


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of two sets of weights."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one if one[name].numel())


def write_traces(folder: Path) -> None:
    """Write random traces in more shards than are mixed."""
    random_numbers = np.random.default_rng(0)
    manifest = Manifest(GEOMETRY, Tokenizer("tools", VOCAB), "tiny", 16.0, "dataset", "tools", "0")
    with open_writer(folder, manifest, shard_tokens=64) as writer:
        for number in range(24):
            length = int(random_numbers.integers(1, 21))
            experts = np.argsort(random_numbers.random((length, *GEOMETRY.shape()[:2])))[..., : GEOMETRY.top_k]
            token_ids = random_numbers.integers(0, VOCAB, length).astype(np.int32)
            trace = Trace(f"s{number}", "tools", token_ids, experts.astype(np.uint8), length)
            writer.write(trace, "validation" if number % 4 == 3 else "train")


def main() -> None:
    """Parse the options, kill, compare and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12, help="kills per configuration (default: 12)")
    parser.add_argument("--times", type=int, default=2, help="kills of one fit before it may end (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS), metavar="NAME")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    chance, console = random.Random(args.seed), Console(width=160)
    torch.set_num_threads(1)
    for name in ("lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows: dict[str, Counter] = {}
    with (
        tempfile.TemporaryDirectory() as name,
        tempfile.TemporaryDirectory(dir=OTHER_DISK if OTHER_DISK.is_dir() else None) as temporary,
    ):
        write_traces(Path(name) / "traces")
        for chosen in args.only:
            rows[chosen] = run(
                chosen, Path(name) / "traces", Path(name), Path(temporary), args.kills, args.times, chance
            )
            print(chosen, dict(rows[chosen]), file=sys.stderr, flush=True)
        left = sum(path.stat().st_size for path in Path(temporary).rglob("*") if path.is_file())
    table = Table(title="fits that were killed and resumed, compared with undisturbed fits")
    table.add_column("configuration")
    for head in COLUMNS.values():
        table.add_column(head, justify="right")
    for chosen, row in rows.items():
        table.add_row(chosen, *(f"{row[key]:g}" for key in COLUMNS))
    totals = [max if key in ("loss", "weights", "exported", "recalls", "rates") else sum for key in COLUMNS]
    table.add_row(
        "all", *(f"{total(row[key] for row in rows.values()):g}" for key, total in zip(COLUMNS, totals, strict=True))
    )
    table.caption = f"{left / 1e6:.1f} MB of temporary files left on another file system"
    console.print(table)
    if args.json:
        write_json(args.json, {"configurations": rows, "temporary_bytes": left})
    sys.exit(any(row[key] for row in rows.values() for key in FAULTS))


if __name__ == "__main__":
    main()
