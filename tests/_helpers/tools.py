"""Runs a tool of maintainers as a process."""

import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).parents[2] / "tools"


def run(name: str, *arguments: str) -> str:
    """The standard output of a tool, which must succeed."""
    done = subprocess.run([sys.executable, str(TOOLS / name), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
