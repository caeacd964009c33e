"""Interrupt every command at random moments, and look for remaining processes and files.

    python tools/interrupt_commands.py [--tries 3] [--seed 0] [--only NAME ...] [--json FILE]

Each try starts a real command in a session of its own, and sends SIGINT to the session at a random moment of the time
that the undisturbed command takes, as Ctrl-C in a terminal does. Then the exit code must be 130, or 0 if the command
had ended. The last line on standard error must name a way to continue, and no line a traceback. No process of the
session may remain. The folder for temporary files must be empty, and the folder of results may hold only whole
results, and the part files from which `collect` resumes. The interpreter's own start is not interrupted. The exit code
is 1 if a try failed.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from moe_beyond.files import write_json
from moe_beyond.geometry import Geometry
from moe_beyond.traces.manifest import Manifest, Tokenizer
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.writer import open_writer

GEOMETRY = Geometry("tiny", (1, 2, 3, 4), num_experts=8, top_k=2, params_per_expert=1000, other_params_per_layer=5000)
VOCAB = 32
FIT = (
    "fit -c trainer/default -c model/cross_layer -c data/traces --data.traces traces --data.token_budget 64 "
    "--data.max_tokens 16 --data.window 1 --trainer.max_epochs 6 --model.width 16 --model.heads 2 --model.depth 1 "
    "--model.window 8 --model.layer_width 16"
)
COMMANDS = {
    "quickstart": "quickstart --out out/demo",
    "collect": "collect --model small-moe --prompts prompts.txt --out out/set --generate 4",
    "import": "import jsonl recording.jsonl --out out/set --model geometry.json",
    "export": "export vllm traces out/arrays",
    "inspect": "inspect traces --json out/inspect.json --plots out/plots",
    "fit": FIT,
    "fit with workers": f"{FIT} --data.num_workers 2",
    "test": "test -c run/config.yaml --ckpt_path run/checkpoints/last.ckpt --trainer.logger false",
    "predict": "predict -c run/config.yaml --ckpt_path run/checkpoints/last.ckpt",
    "package": "package run --out out/predictor",
    "evaluate": "evaluate run/predictor --traces traces --json out/figures.json",
    "evaluate a run": "evaluate run --json out/figures.json",
    "replay": "replay --traces traces --predictor run/predictor --budget 20% --json out/replay.json",
    "report": "report run --traces traces --out out/page.html",
    "plan": "plan --traces traces --target 50% --json out/plan.json",
    "tune": "tune --traces traces --budget 20% --out out/strategy.yaml",
    "run": "run --model small-moe --budget 25% --prompts prompts.txt --max-new-tokens 8 --trace out/set",
    "pack": "pack small-moe out/packed",
}
"""Name -> command line, in a folder with a trace set, a run, prompts and a recording."""
START = 0.3
"""Seconds of the interpreter's start, before the program can handle a signal."""
PATIENCE = 120.0
"""Seconds after the signal within which a command must end."""
CACHES = ("torchinductor_",)
"""Beginnings of the names of caches, which libraries keep in the folder for temporary files."""
KEPT = (".collecting", ".lock")
"""Endings of hidden names that are kept for resuming."""


@dataclass
class Row:
    """Results of the tries of one command.

    Attributes:
        seconds: Time of the undisturbed command.
        interrupted: Tries that ended with 130.
        finished: Tries that had ended before the signal.
        failures: Reasons of failed tries.
    """

    seconds: float
    interrupted: int = 0
    finished: int = 0
    failures: list[str] = field(default_factory=list)


class Place:
    """A folder in which commands run.

    Args:
        folder: Folder with the inputs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.temporary = folder, folder / "tmp"
        self.clear()

    def clear(self) -> None:
        """Remove what a command wrote."""
        for name in ("out", "tmp", "runs"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / "out").mkdir()
        self.temporary.mkdir()

    def start(self, command: str) -> "subprocess.Popen[str]":
        """Start a command in a session of its own."""
        variables = {"TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
        return subprocess.Popen(
            [sys.executable, "-m", "moe_beyond", *command.split()], cwd=self.folder, start_new_session=True, text=True,
            env={**os.environ, **variables}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    def leftovers(self) -> list[str]:
        """Return temporary and hidden files."""
        hidden = [path for name in ("out", "runs") for path in (self.folder / name).rglob(".*")]
        hidden = [path for path in hidden if not path.name.endswith(KEPT) and not _is_part(path)]
        temporary = [path for path in self.temporary.iterdir() if not path.name.startswith(CACHES)]
        return [str(path.relative_to(self.folder)) for path in (*hidden, *temporary)]


def _is_part(path: Path) -> bool:
    return any(parent.name.endswith(KEPT) for parent in path.parents)


def interrupt(place: Place, command: str, moment: float) -> tuple[str, str]:
    """Run a command, and interrupt it at a moment in seconds.

    Returns:
        ``("interrupted", "")``, ``("finished", "")``, or ``("failed", reason)``.
    """
    process = place.start(command)
    time.sleep(moment)
    try:
        os.killpg(process.pid, signal.SIGINT)
        errors = process.communicate(timeout=PATIENCE)[1]
    except ProcessLookupError:
        errors = process.communicate()[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return "failed", f"did not end within {PATIENCE:.0f} s"
    lines = errors.strip().splitlines()
    if "Traceback" in errors:
        return "failed", f"traceback: {lines[-1]}"
    if process.returncode not in (0, 130):
        return "failed", f"exit code {process.returncode}: {lines[-1:]}"
    if process.returncode == 130 and not (lines and ("again" in lines[-1] or "go on with" in lines[-1])):
        return "failed", f"last line {lines[-1:]}"
    if alive := remaining(process.pid):
        return "failed", f"processes remain: {', '.join(alive)}"
    if files := place.leftovers():
        return "failed", f"files remain: {', '.join(files[:4])}"
    return ("finished" if process.returncode == 0 else "interrupted"), ""


def remaining(session: int) -> list[str]:
    """Return the command lines of processes of a session that live longer than two seconds."""
    for _ in range(20):
        alive = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(" ".join(process.cmdline())[:80])
            except (ProcessLookupError, psutil.Error):
                continue
        if not alive:
            break
        time.sleep(0.1)
    return alive


def prepare(folder: Path) -> None:
    """Write a trace set, prompts and a recording, and fit a predictor."""
    random_numbers = np.random.default_rng(0)
    manifest = Manifest(GEOMETRY, Tokenizer("tools", VOCAB), "tiny", 16.0, "dataset", "tools", "0")
    with open_writer(folder / "traces", manifest, shard_tokens=64) as writer:
        for number in range(40):
            length = int(random_numbers.integers(12, 21))
            experts = np.argsort(random_numbers.random((length, *GEOMETRY.shape()[:2])))[..., : GEOMETRY.top_k]
            token_ids = random_numbers.integers(0, VOCAB, length).astype(np.int32)
            trace = Trace(f"s{number}", "tools", token_ids, experts.astype(np.uint8), length // 2)
            writer.write(trace, "validation" if number % 4 == 3 else "train")
    (folder / "prompts.txt").write_text("".join(f"The router of layer {number} is\n" for number in range(12)))
    write_json(folder / "geometry.json", GEOMETRY.to_json())
    entry = '{"token_idx": %d, "layer_idx": %d, "selected_ids": [%d, %d]}\n'
    rows = [entry % (token, layer, token % 7, 7) for token in range(2000) for layer in GEOMETRY.moe_layers]
    (folder / "recording.jsonl").write_text("".join(rows))
    words = [sys.executable, "-m", "moe_beyond", *FIT.split(), "--quiet"]
    subprocess.run(words, cwd=folder, check=True, env={**os.environ, "WANDB_MODE": "disabled"})
    shutil.move(folder / "runs/predictor/version_0", folder / "run")


def main() -> None:
    """Parse the options, interrupt, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=3, help="tries per command (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS), metavar="NAME")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    chance, rows = random.Random(args.seed), dict[str, Row]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        place = Place(folder)
        for command in args.only:
            began = time.monotonic()
            undisturbed = place.start(COMMANDS[command])
            errors = undisturbed.communicate()[1]
            if undisturbed.returncode:
                raise SystemExit(f"{command}: ended with {undisturbed.returncode}: {errors}")
            row = rows[command] = Row(time.monotonic() - began)
            for _ in range(args.tries):
                place.clear()
                kind, reason = interrupt(place, COMMANDS[command], chance.uniform(START, row.seconds))
                row.interrupted += kind == "interrupted"
                row.finished += kind == "finished"
                row.failures += [reason] if reason else []
            place.clear()
            print(command, row, file=sys.stderr, flush=True)
    table = Table(title="commands that were interrupted at random moments")
    for heading in ("command", "seconds", "interrupted", "had ended", "failed"):
        table.add_column(heading, justify="left" if heading == "command" else "right")
    for command, row in rows.items():
        table.add_row(command, f"{row.seconds:.1f}", str(row.interrupted), str(row.finished), str(len(row.failures)))
    Console(width=120).print(table)
    if args.json:
        write_json(args.json, {name: vars(row) for name, row in rows.items()})
    sys.exit(any(row.failures for row in rows.values()))


if __name__ == "__main__":
    main()
