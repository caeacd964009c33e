"""Commands that need no deep-learning library do not import one."""

import subprocess
import sys
from pathlib import Path

import pytest
from _helpers.common import tiny_traces

from moe_beyond.cli.main import COMMANDS

HEAVY = {"torch", "lightning", "transformers"}


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_traces(tmp_path_factory.mktemp("startup") / "traces").folder


def imported(arguments: list[str], folder: Path) -> set[str]:
    """Run a command line in its own process and return the top-level packages that it imported."""
    code = (
        f"import sys\nfrom moe_beyond.cli.main import main\ncode = main({arguments!r})\n"
        "print(*{name.partition('.')[0] for name in sys.modules})\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_no_deep_learning_library(command: str, tmp_path: Path) -> None:
    assert imported([command, "--help"], tmp_path) & HEAVY == set()


@pytest.mark.parametrize(
    "arguments",
    [
        ["completion", "bash"],
        ["list"],
        ["devices"],
        ["inspect", "TRACES"],
        ["replay", "--traces", "TRACES"],
        ["plan", "--traces", "TRACES", "--target", "50%"],
        ["tune", "--traces", "TRACES"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_without_a_predictor_import_no_deep_learning_library(
    arguments: list[str], traces: str, tmp_path: Path
) -> None:
    assert imported([argument.replace("TRACES", traces) for argument in arguments], tmp_path) & HEAVY == set()
