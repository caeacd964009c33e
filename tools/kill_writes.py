"""Kill commands that write files at random moments, and check that their targets are whole.

    python tools/kill_writes.py [--kills 20] [--seed 0] [--json FILE]

Each kill is SIGKILL to a process that imports or exports a recording, converts a checkpoint, records figures, writes
scores, or saves a predictor over another one. Half of the kills hit a moment between the first and the last file.
Afterwards the target must be absent, the earlier one, or the new one, byte for byte. The same command must then write
the new one, and leave nothing else next to it. The exit code is 1 if anything is wrong.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "disabled"

import numpy as np
import torch
from kill_fit import GEOMETRY, VOCAB, write_traces
from rich.console import Console
from rich.table import Table

from moe_beyond.cli.main import main as moe_beyond
from moe_beyond.evaluation.score_store import writing_scores
from moe_beyond.files import write_json
from moe_beyond.predictors.io.folder import save_predictor
from moe_beyond.predictors.registry import create

TRAINING = {"fingerprint": "0", "split": "train", "source": "tools", "tokenizer": {"name": "tools", "sha256": None}}
COLUMNS = {
    "kills": "kills", "absent": "absent then", "old": "old", "new": "new", "broken": "half-written",
    "left": "left by kills", "failed": "failed again", "kept": "left by the next run",
}  # fmt: skip
"""Figure -> head of its column."""


@dataclass(frozen=True)
class Command:
    """A command that writes one target.

    Attributes:
        run: Function of the target that runs it.
        earlier: Function that makes the target that is replaced; None if the command refuses one.
    """

    run: Callable[[Path], object]
    earlier: Callable[[Path], object] | None = None


def words(*arguments: object) -> None:
    """Run a command line.

    Raises:
        SystemExit: It failed.
    """
    if code := moe_beyond([*map(str, arguments), "--quiet"]):
        raise SystemExit(code)


def predictor(path: Path, number: int) -> None:
    """Save a predictor whose counts are a number."""
    made = create("popularity", GEOMETRY, VOCAB)
    made.load_state_dict({name: torch.full_like(value, number) for name, value in made.state_dict().items()})
    save_predictor(made, path, TRAINING)


def scores(path: Path, value: float) -> None:
    """Write a scores folder of equal values."""
    with writing_scores(path, geometry=GEOMETRY, lookaheads=[1], predictor="tools", traces="0") as writer:
        for number in range(40):
            writer.write(str(number), np.full((30, 1, *GEOMETRY.shape()[:2]), value, np.float32))


def commands(work: Path) -> dict[str, Command]:
    """Make the inputs of all commands, and return them by name."""
    traces, chance = work / "traces", np.random.default_rng(0)
    write_traces(traces)
    recording = work / "recording"
    recording.mkdir()
    for number in range(40):
        experts = np.argsort(chance.random((20, *GEOMETRY.shape()[:2])))[..., : GEOMETRY.top_k]
        entries = [
            {"layer_idx": layer, "token_idx": token, "selected_ids": ids.tolist()}
            for token, layers in enumerate(experts)
            for layer, ids in zip(GEOMETRY.moe_layers, layers, strict=True)
        ]
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        (recording / f"s{number}.jsonl").write_text(text, encoding="utf-8")
    geometry = work / "geometry.json"
    write_json(geometry, GEOMETRY.to_json())

    def record(path: Path) -> None:
        words(
            "evaluate", path, "--traces", traces, "--split", "validation", "--budget", "50%", "--record-training-text"
        )

    return {
        "import jsonl": Command(lambda path: words("import", "jsonl", recording, "--out", path, "--model", geometry)),
        "export vllm": Command(lambda path: words("export", "vllm", traces, path)),
        "export llama-cpp": Command(lambda path: words("export", "llama-cpp", traces, path)),
        "evaluate --record": Command(record, lambda path: predictor(path, 1)),
        "inspect --json": Command(
            lambda path: words("inspect", traces, "--json", path), lambda path: path.write_text("old")
        ),
        "predictor": Command(lambda path: predictor(path, 2), lambda path: predictor(path, 1)),
        "scores": Command(lambda path: scores(path, 0.5), lambda path: scores(path, 0.25)),
        "trace set": Command(write_traces),
    }


def digest(target: Path) -> str | None:
    """Return a hash of a file, or of all files in a folder; None if it is absent."""
    if not target.exists():
        return None
    content = hashlib.sha256()
    for path in [target] if target.is_file() else sorted(path for path in target.rglob("*") if path.is_file()):
        content.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return content.hexdigest()


def in_process(act: Callable[[], object], seconds: float | None = None) -> tuple[int, float]:
    """Run a function in a process, and kill it after some time; return its exit code and its duration."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                act()
            code = 0
        finally:
            os._exit(code)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        elapsed = time.monotonic() - began
        if done:
            return os.waitstatus_to_exitcode(status), elapsed
        if seconds is not None and elapsed >= seconds:
            os.kill(child, signal.SIGKILL)
            seconds = None
        time.sleep(0.0002)


def run(command: Command, work: Path, kills: int, chance: random.Random) -> Counter:
    """Run a command undisturbed; then kill it, look at its target, and run it again."""
    undisturbed = work / "undisturbed" / "target"
    undisturbed.parent.mkdir(parents=True)
    old = None
    if command.earlier is not None:
        command.earlier(undisturbed)
        old = digest(undisturbed)
    code, duration = in_process(lambda: command.run(undisturbed))
    if code:
        raise SystemExit(f"the undisturbed command ended with {code}")
    new, first = digest(undisturbed), duration
    found = Counter(dict.fromkeys(COLUMNS, 0))
    while found["kills"] < kills:
        target = work / str(found["kills"]) / "target"
        target.parent.mkdir(exist_ok=True)
        if command.earlier is not None:
            command.earlier(target)
        writes = chance.random() < 0.5
        code, _ = in_process(
            lambda target=target: command.run(target), chance.uniform(first * 0.9 if writes else 0, duration)
        )  # type: ignore[misc]
        if code != -signal.SIGKILL:
            shutil.rmtree(target.parent)
            continue
        found["kills"] += 1
        state = digest(target)
        found["absent" if state is None else {new: "new", old: "old"}.get(state, "broken")] += 1
        left = len(os.listdir(target.parent)) - (state is not None)
        found["left"] += left > 0
        if state is None or command.earlier is not None:
            code, _ = in_process(lambda target=target: command.run(target))  # type: ignore[misc]
            found["failed"] += code != 0 or digest(target) != new
            found["kept"] += len(os.listdir(target.parent)) - 1
        shutil.rmtree(target.parent)
    return found


def main() -> None:
    """Parse the options, kill, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills per command (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    chance, rows = random.Random(args.seed), {}
    with tempfile.TemporaryDirectory() as name:
        for number, (title, command) in enumerate(commands(Path(name)).items()):
            rows[title] = run(command, Path(name) / str(number), args.kills, chance)
            print(title, dict(rows[title]), file=sys.stderr, flush=True)
    table = Table(title="commands that were killed, and run again")
    table.add_column("command")
    for head in COLUMNS.values():
        table.add_column(head, justify="right")
    for title, row in rows.items():
        table.add_row(title, *(str(row[key]) for key in COLUMNS))
    table.add_row("all", *(str(sum(row[key] for row in rows.values())) for key in COLUMNS))
    Console(width=120).print(table)
    if args.json:
        write_json(args.json, rows)
    sys.exit(any(row[key] for row in rows.values() for key in ("broken", "failed", "kept")))


if __name__ == "__main__":
    main()
