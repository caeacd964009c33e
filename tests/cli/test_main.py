"""The command as a whole: help, version, verbs, and how fast it is there."""

import subprocess
import sys

import pytest

import moe_beyond
from moe_beyond.cli.main import VERBS, main


@pytest.mark.parametrize("words", ["import moe_beyond", "from moe_beyond.cli.main import main; main(['--help'])"])
def test_nothing_heavy_is_imported_for_help(words: str) -> None:
    check = "import sys; print([m for m in ('torch', 'lightning', 'transformers', 'numba') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", f"{words}; {check}"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {verb} " in said for verb in VERBS)
    assert main([]) == 2


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    said = capsys.readouterr().out
    assert "usage: " in said
    if VERBS[verb][0] != "lightning":
        assert f"Example: moe-beyond {verb}" in " ".join(said.split())


def test_the_module_is_the_command() -> None:
    words = [sys.executable, "-m", "moe_beyond"]
    done = subprocess.run([*words, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"moe-beyond {moe_beyond.__version__}\n"
    done = subprocess.run([*words, "inspekt"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "moe-beyond: error: unknown verb 'inspekt'; did you mean 'inspect'?\n")
