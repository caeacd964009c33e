"""Damage files of every kind, and try each with all commands and functions that read it.

    python tools/damage.py [--cases 1200] [--seed 0] [--only KIND ...] [--json FILE]

Accidents leave hashes as they are: flipped bits, cut, emptied, swapped and missing files. Edits recompute the hashes:
wrong types, counts and geometries, ids out of range, numbers that are not finite, and other versions. Every case is a
fresh copy in an empty folder. A forked process reads it, with limits of time and memory.

A case has one outcome, the worst of all readers. Three are right. `named`: one line that names the file, with exit code
2. `harmless`: the output of the undamaged file. `other`: another output, because of an edit that the author of the file
may make: a valid value in a file that people write by hand, another text that only people read, or none.

The others are faults. `unnamed`: an error of several lines, or without the file. `silent`: another output without an
error. `half-written`: new files next to an error. Then `traceback`, `memory`, `hang` and `crash`. The exit code is 1 if
there is a fault.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from parts.damage_cases import KINDS, Case
from parts.damage_originals import Original
from rich.console import Console
from rich.table import Table

from moe_beyond.cli.main import main as command_line
from moe_beyond.errors import UserError
from moe_beyond.files import write_json
from moe_beyond.pretrained import CARD_FILE

SECONDS = 60.0
"""Time limit of a case."""
POLL = 0.005
"""Seconds between two looks at a process."""
MEMORY = 2**31
"""Bytes that a case may take in addition to those of the tool."""
OUTCOMES = (
    "named", "harmless", "other", "unnamed", "silent", "half-written", "traceback", "memory", "hang", "crash",
)  # fmt: skip
FAULTS = OUTCOMES[3:]
FREE = re.compile(
    r"[ .](source|split|revision|model|model_id|name|command|tool_version|precision|strategy|predictor|fingerprint): "
    r'"\.\./x" for "|[ .](revision|generation|steering|routers_sha256|projected_from|projection_sha256|'
    r"shards\.\d+|figures\.\d+(\.\w+\.\d+)?|training\.[\w .]+): missing$"
)
"""Edits that a file's author may make: another text that only people read, no value in a field that may be absent, and
fewer shards."""
ERROR = "moe-beyond: error: "


def read_with(reader: Any, here: Path) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error of a command line or a function.

    Args:
        reader: Words of a command line, or function of the working folder.
        here: Working folder of this process.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        if isinstance(reader, tuple):
            code = command_line(list(reader))
        else:
            try:
                code, _ = 0, print(reader(here))
            except UserError as error:
                code, _ = 2, print(f"{ERROR}{error}", file=sys.stderr)
    return code, out.getvalue(), err.getvalue()


def names_below(folder: Path) -> set[str]:
    """Return the relative names of all files and folders."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def judge(case: Case, name: str, here: Path, expected: dict[str, Any]) -> tuple[str, str]:
    """Read a damaged copy and return the outcome, with a detail.

    Args:
        case: Case, whose copy is damaged.
        name: Name of the reader.
        here: Working folder, which holds the copy.
        expected: Name of each reader -> its output for the undamaged copy.
    """
    original = case.original
    before = names_below(here)
    try:
        code, out, err = read_with(original.readers[name], here)
    except MemoryError:
        return "memory", traceback.format_exc(limit=-3)
    except BaseException as error:
        lines = traceback.format_exception(error)
        kind = "memory" if "can't allocate memory" in lines[-1] or "bad_alloc" in lines[-1] else "traceback"
        return kind, "".join(lines[-3:])
    written = sorted(names_below(here) - before)
    if [file for file in written if code or "/." in f"/{file}"]:
        return "half-written", ", ".join(written)
    if code == 0:
        by_hand = not original.has_hashes or case.name.startswith(CARD_FILE) or FREE.search(case.name)
        return ("harmless", "") if out == expected[name] else ("other" if by_hand else "silent", out[-300:])
    *_, last = err.splitlines() or [""]
    named = (
        code == 2
        and last.startswith(ERROR)
        and err.count(ERROR) == 1
        and any(word in last for word in (original.path, *original.also))
    )
    return "named" if named else "unnamed", err[-600:] or f"exit code {code}"


def in_child(work: Path, seconds: float, act: Any) -> list[list[str]]:
    """Run a function in a forked process, and return the entries that it has reported.

    Args:
        work: Folder for the report.
        seconds: Time limit of the process.
        act: Function of a function that reports one entry.
    """
    report = work / "report.jsonl"
    report.write_text("")
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.setsid()
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.dup2(os.open(work / "descriptors.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            with report.open("a") as file:
                act(lambda *entry: print(json.dumps(entry), file=file, flush=True))
        os._exit(0)
    waits, status = int(seconds / POLL), None  # counted, so that a stopped machine is no hang
    while status is None and waits > 0:
        pid, found = os.waitpid(child, os.WNOHANG)
        status = found if pid else None
        waits -= 1
        time.sleep(0 if pid else POLL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    entries = [json.loads(line) for line in report.read_text().splitlines()]
    if status is None:
        os.waitpid(child, 0)
        return [*entries, ["", "hang", f"over {seconds:g} s"]]
    if os.WIFSIGNALED(status):
        return [*entries, ["", "crash", signal.Signals(os.WTERMSIG(status)).name]]
    return entries


def fresh_copy(original: Original, work: Path) -> Path:
    """Copy an original into an empty folder, and return that folder."""
    here = work / "case"
    shutil.rmtree(here, ignore_errors=True)
    target = here / original.path
    target.parent.mkdir(parents=True)
    if original.source.is_dir():
        shutil.copytree(original.source, target)
    else:
        shutil.copy(original.source, target)
    return here


def expected_outputs(original: Original, work: Path) -> dict[str, Any]:
    """Read an undamaged copy twice with every reader, and return the outputs.

    Raises:
        SystemExit: A reader fails, or its output differs between the two.
    """
    found: list[dict[str, Any]] = []
    for _ in range(2):
        here = fresh_copy(original, work)

        def act(report: Any, here: Path = here) -> None:
            os.chdir(here)
            for name, reader in original.readers.items():
                report(name, *read_with(reader, here))

        entries = in_child(work, 10 * SECONDS, act)
        for name, code, *texts in entries:
            if code != 0:
                raise SystemExit(f"{original.path}: {name} fails on the undamaged file: {code} {texts}")
        found.append({name: out for name, _, out, _ in entries})
    if found[0] != found[1] or found[0].keys() != original.readers.keys():
        raise SystemExit(
            f"{original.path}: its readers differ: {[n for n in found[0] if found[0][n] != found[1].get(n)]}"
        )
    return found[0]


def try_case(case: Case, expected: dict[str, Any], work: Path) -> tuple[str, str, str]:
    """Return outcome, reader and detail of a case: those of the worst reader."""
    here = fresh_copy(case.original, work)
    case.damage(here / case.original.path)

    def act(report: Any) -> None:
        os.chdir(here)
        for name in case.original.readers:
            report(name, *judge(case, name, here, expected))

    entries = in_child(work, SECONDS, act)
    rank = {"harmless": -1}
    worst = max(entries, key=lambda entry: rank.get(entry[1], OUTCOMES.index(entry[1])))
    return worst[1], worst[0], worst[2]


def main() -> None:
    """Parse the options, try all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1200, help="cases of all kinds together (default: 1200)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--json", type=Path, help="file for the figures and the faults")
    args = parser.parse_args()
    total = sum(kind.weight for name, kind in KINDS.items() if name in args.only)
    rows: dict[str, Counter[str]] = {}
    faults = []
    with tempfile.TemporaryDirectory() as name, contextlib.suppress(KeyboardInterrupt):  # Ctrl-C: the table so far
        work = Path(name)
        for kind in args.only:
            chance = random.Random(f"{args.seed} {kind}")
            count = -(-args.cases * KINDS[kind].weight // total)
            cases = list(KINDS[kind].cases(work / "originals", chance, count))
            expected = {
                id(each): expected_outputs(each, work) for each in {id(c.original): c.original for c in cases}.values()
            }
            rows[kind] = Counter()
            for case in cases:
                outcome, reader, detail = try_case(case, expected[id(case.original)], work)
                rows[kind][outcome] += 1
                if outcome in FAULTS:
                    faults.append({"kind": kind, "case": case.name, "outcome": outcome, "by": reader, "detail": detail})
                    print(f"{kind}: {case.name}: {outcome} ({reader})\n{detail}", file=sys.stderr, flush=True)
            print(f"{kind}: {dict(rows[kind])}", file=sys.stderr, flush=True)
    table = Table(title=f"damaged files, seed {args.seed}")
    table.add_column("kind")
    shown = [outcome for outcome in OUTCOMES if outcome not in FAULTS or any(row[outcome] for row in rows.values())]
    for head in ("cases", *shown, "faults"):
        table.add_column(head, justify="right")
    for kind, row in [*rows.items(), ("all", sum(rows.values(), Counter()))]:
        cells = [row.total(), *(row[outcome] for outcome in shown), sum(row[fault] for fault in FAULTS)]
        table.add_row(kind, *map(str, cells))
    Console(width=140).print(table)
    if args.json:
        write_json(args.json, {"seed": args.seed, "rows": rows, "faults": faults})
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
