"""Commands that need no deep-learning library do not import one."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from _helpers.common import QUICK_POLICIES, tiny_traces

from moe_beyond.cli.main import COMMANDS

HEAVY = {"torch", "lightning", "transformers"}
FEW_POLICIES = f"from moe_beyond.evaluation import search\nsearch.POLICIES = {QUICK_POLICIES!r}\n"
"""Start of a script in which tuning tries the policies of the quick tests only."""


def imported(lines: Sequence[Sequence[str]], folder: Path, start: str = "") -> dict[str, set[str]]:
    """Run command lines one after another in one process; return the heavy packages imported so far after each."""
    code = start + (
        "import contextlib, io, json, sys\nfrom moe_beyond.cli.main import main\nfound = {}\n"
        f"for words in {[list(words) for words in lines]!r}:\n"
        "    with contextlib.redirect_stdout(io.StringIO()):\n        assert main(words) == 0, words\n"
        f"    found[words[0]] = sorted({HEAVY!r} & {{name.partition('.')[0] for name in sys.modules}})\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {command: set(names) for command, names in json.loads(done.stdout).items()}


def test_help_imports_no_deep_learning_library(tmp_path: Path) -> None:
    found = imported([(command, "--help") for command in COMMANDS], tmp_path)
    assert found == {command: set() for command in COMMANDS}


def test_commands_without_a_predictor_import_no_deep_learning_library(tmp_path: Path) -> None:
    traces = tiny_traces(tmp_path / "traces").folder
    lines = [
        ("completion", "bash"),
        ("list",),
        ("devices",),
        ("inspect", traces),
        ("replay", "--traces", traces),
        ("plan", "--traces", traces, "--target", "50%"),
        ("tune", "--traces", traces),
    ]
    assert imported(lines, tmp_path, FEW_POLICIES) == {words[0]: set() for words in lines}
