"""Fuzz every reader of user input: options, descriptions, configurations, prompts and recordings.

    python tools/fuzz.py [--cases 1000000] [--seed 0] [--only TARGET ...] [--first 0] [--json FILE]

A case is a valid input with up to three changes of its values, words, lines or bytes (`fuzz_mutations.py`). A reader
accepts it with sane values, or refuses it by a `UserError` that names the source. Everything else is a fault: another
exception, a warning about numbers, nonsense, another message, the end of the process, or more than two seconds or 4
GiB.

Case N of a target is the same in every run with the same seed. `--only TARGET --first N --cases 1` repeats and prints
it. The exit code is 1 if there is a fault.
"""

import argparse
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from huggingface_hub import constants
from parts.fuzz_files import FILE_TARGETS
from parts.fuzz_recordings import RECORDING_TARGETS
from parts.fuzz_targets import TARGETS, Target
from rich.console import Console
from rich.table import Table

from moe_beyond.errors import UserError
from moe_beyond.files import write_json
from moe_beyond.safe_text import brief

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

ALL = TARGETS | FILE_TARGETS | RECORDING_TARGETS
ACCEPTED, REFUSED = "accepted", "refused"
MAX_SECONDS = 2.0
MAX_BYTES = 2**32
AT_ONCE = 2000
"""Cases of one process."""


class TooSlowError(BaseException):
    """A case takes too long; a reader catches no such exception."""


@dataclass
class Found:
    """What became of the cases of a target.

    Attributes:
        counts: Number of cases that were accepted and refused.
        faults: Fault -> number of cases.
        examples: Fault -> number of its first case, and details.
        slowest: Seconds of the slowest case.
    """

    counts: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    examples: dict[str, tuple[int, str]] = field(default_factory=dict)
    slowest: float = 0.0

    def add(self, fault: str, number: int, detail: str) -> None:
        """Add the fault of a case."""
        self.faults[fault] += 1
        self.examples.setdefault(fault, (number, detail))

    def update(self, later: "Found") -> None:
        """Add the outcomes of later cases."""
        self.counts += later.counts
        self.faults += later.faults
        self.examples = {**later.examples, **self.examples}
        self.slowest = max(self.slowest, later.slowest)


def chance_of(seed: int, name: str, number: int) -> Random:
    """Return the random numbers of a case."""
    return Random(f"{seed} {name} {number}")


def try_input(target: Target, value: object, folder: Path) -> tuple[str, str]:
    """Read an input.

    Args:
        target: Reader of the input.
        value: Input that the target's ``make`` returned.
        folder: Folder of its files.

    Returns:
        `ACCEPTED`, `REFUSED` or a fault; and details of a fault.
    """
    try:
        nonsense = target.read(value)
    except UserError as error:
        message, names = str(error), target.names or (str(folder),)
        if not any(name in message for name in names):
            return f"message without its source, {_place(error)}", message
        return REFUSED, message
    except (Exception, TooSlowError) as error:
        return f"{type(error).__name__}, {_place(error)}", brief(error)
    return (ACCEPTED, "") if nonsense is None else ("nonsense", nonsense)


def _place(error: BaseException) -> str:
    """Return the last place in this package that an exception passed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "moe_beyond/" in frame.filename]
    return f"{frames[-1].filename.rpartition('moe_beyond/')[2]}:{frames[-1].lineno}" if frames else "in the tool"


@contextmanager
def limited() -> Iterator[None]:
    """Limit the memory of the process, and treat warnings about numbers as errors."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MAX_BYTES, before[1]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", RuntimeWarning)
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def timed() -> Iterator[None]:
    """Interrupt a case after `MAX_SECONDS` of processor time."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise TooSlowError(f"takes more than {MAX_SECONDS:g} s")

    signal.signal(signal.SIGPROF, interrupt)
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def fuzz(name: str, cases: range, seed: int, work: Path) -> Found:
    """Try the cases of a target, in processes of their own, because a library may end its process."""
    found, first = Found(), cases.start
    while first < cases.stop:
        part = range(first, min(first + AT_ONCE, cases.stop))
        ended, signal_number = _fuzz_apart(found, name, part, seed, work)
        if ended is not None:
            _fuzz_apart(found, name, range(first, ended), seed, work)
            found.add(f"process ended by {signal.Signals(signal_number).name}", ended, "see standard error")
        first = part.stop if ended is None else ended + 1
    return found


def _fuzz_apart(found: Found, name: str, cases: range, seed: int, work: Path) -> tuple[int | None, int]:
    """Add the outcomes of some cases, unless one ends the process: return that case, if any, and the signal."""
    shutil.rmtree(work / "case", ignore_errors=True)  # a process that ended leaves its files
    context = multiprocessing.get_context("fork")
    current, (receiver, sender) = context.Value("q", cases.start), context.Pipe(duplex=False)

    def work_off() -> None:
        sender.send(_fuzz_here(name, cases, seed, work, current))

    process = context.Process(target=work_off)
    process.start()
    sender.close()
    with suppress(EOFError), receiver:  # EOFError: the process ended
        found.update(receiver.recv())
    process.join()
    if process.exitcode is None or process.exitcode > 0:
        raise SystemExit(f"{name}: the tool failed in case {current.value}; see its traceback")
    return (current.value, -process.exitcode) if process.exitcode else (None, 0)


def _fuzz_here(name: str, cases: range, seed: int, work: Path, current: "Synchronized[int]") -> Found:
    """Try cases in this process, and tell which is the current one."""
    target, found, folder = ALL[name], Found(), work / "case"
    with _emptied(folder):  # imports modules, without limits
        try_input(target, target.make(chance_of(seed, name, -1), folder), folder)
    with limited():
        for number in cases:
            current.value = number
            with _emptied(folder):
                value = target.make(chance_of(seed, name, number), folder)
                began = time.process_time()
                with timed():
                    outcome, detail = try_input(target, value, folder)
                found.slowest = max(found.slowest, time.process_time() - began)
            if outcome in (ACCEPTED, REFUSED):
                found.counts[outcome] += 1
            else:
                found.add(outcome, number, detail)
    shutil.rmtree(folder, ignore_errors=True)
    return found


@contextmanager
def _emptied(folder: Path) -> Iterator[None]:
    """Provide an empty folder, which texts leave empty."""
    folder.mkdir(exist_ok=True)
    yield
    if any(os.scandir(folder)):
        shutil.rmtree(folder)


def show_case(name: str, number: int, seed: int, work: Path) -> None:
    """Print an input and its outcome."""
    folder = work / "shown"
    folder.mkdir()
    value = ALL[name].make(chance_of(seed, name, number), folder)
    print(repr(value))
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"{path.relative_to(folder)}: {path.read_bytes()[:3000]!r}")
    print(*try_input(ALL[name], value, folder), sep=": ")


def main() -> None:
    """Parse the options, try all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10**6, help="number of cases of all targets (default: 1000000)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--only", nargs="+", choices=ALL, default=list(ALL), help="targets (default: all)")
    parser.add_argument("--first", type=int, default=0, help="number of each target's first case (default: 0)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    constants.HF_HUB_OFFLINE = True
    total = sum(ALL[name].weight for name in args.only)
    table = Table("target", title=f"fuzzing, seed {args.seed}")
    for column in ("cases", "accepted", "refused", "faults", "slowest ms"):
        table.add_column(column, justify="right")
    figures: dict[str, dict[str, object]] = {}
    console = Console(width=160, highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tempfile.tempdir = folder  # files of targets are removed too
        for name in args.only:
            count = max(1, round(args.cases * ALL[name].weight / total))
            found = fuzz(name, range(args.first, args.first + count), args.seed, work)
            row = {"cases": count, ACCEPTED: found.counts[ACCEPTED], REFUSED: found.counts[REFUSED]}
            row |= {"faults": found.faults.total(), "slowest ms": round(found.slowest * 1e3)}
            table.add_row(name, *(f"{number:,}" for number in row.values()))
            figures[name] = {**row, "kinds": dict(found.faults)}
            for fault, number in found.faults.most_common():
                first, detail = found.examples[fault]
                console.print(f"{name}: {number:,} x {fault}; first case {first}: {detail}", markup=False)
        if args.cases == 1:
            for name in args.only:
                show_case(name, args.first, args.seed, work)
    totals = [
        sum(int(str(row[column])) for row in figures.values()) for column in ("cases", ACCEPTED, REFUSED, "faults")
    ]
    table.add_section()
    table.add_row("all", *(f"{number:,}" for number in totals))
    console.print(table)
    if args.json:
        write_json(args.json, {"seed": args.seed, "targets": figures})
    sys.exit(totals[-1] > 0)


if __name__ == "__main__":
    main()
