"""The program as a whole: help, version, commands and exit codes."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from _helpers.common import error_line

import moe_beyond
from moe_beyond.cli.main import COMMANDS, main


@pytest.mark.parametrize("words", ["import moe_beyond", "from moe_beyond.cli.main import main; main(['--help'])"])
def test_import_and_help_load_no_library(words: str) -> None:
    """Both are instant, since nothing is loaded that a bare interpreter does not load or the package does not hold."""
    loaded = "import sys; print(*{name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names)"

    def libraries(code: str) -> set[str]:
        done = subprocess.run([sys.executable, "-c", f"{code}; {loaded}"], capture_output=True, text=True, check=True)
        return set(done.stdout.splitlines()[-1].split())

    assert libraries(words) - libraries("pass") == {"moe_beyond"}


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(f"  {command} " in usage for command in COMMANDS)
    assert main([]) == 2
    assert capsys.readouterr() == ("", usage)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "usage: " in text
    assert all(f"  {option}" in text or f", {option}" in text for option in ("--json", "--quiet"))
    [example] = re.findall(r"^example:\n  (.*)\n(?:\n|$)", text, re.MULTILINE)  # one line, to be copied
    assert f"moe-beyond {command} " in f"{example} "


def test_a_near_miss_of_an_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    said = error_line(capsys, ["replay", "--traces", "x", "--polcy", "lru"])
    assert said == "unrecognized arguments: --polcy lru; did you mean --policy?"
    assert "--help lists the options" in error_line(capsys, ["replay", "--traces", "x", "--nothing-like-it", "1"])


def test_nothing_is_printed_when_quiet(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["devices", "--quiet", "--json", str(tmp_path / "d.json")]) == 0
    assert capsys.readouterr() == ("", "")
    assert json.loads((tmp_path / "d.json").read_text())["devices"]
    assert "unknown" in error_line(capsys, ["devices", "--quiet", "--device", "none"])


def test_tables_in_a_pipe_are_plain_and_on_a_terminal_are_coloured_unless_told_not_to() -> None:
    command = [sys.executable, "-m", "moe_beyond", "list"]
    piped = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "\x1b" not in piped.stdout
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    seen = on_a_terminal(command, environment)
    assert "\x1b[" in seen
    told = on_a_terminal(command, environment | {"NO_COLOR": "1"})
    assert not re.search(r"\x1b\[[\d;]*3[0-8]", told)  # bold and italics are no colours


def on_a_terminal(command: list[str], environment: dict[str, str]) -> str:
    """What a command writes to a terminal."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as running:
        os.close(theirs)
        seen = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            seen += part
    os.close(ours)
    assert running.returncode == 0
    return seen.decode()


@pytest.mark.parametrize(("given", "expected"), [(None, "passive"), ("active", "active")])
def test_idle_threads_sleep_unless_told_otherwise(given: str | None, expected: str, monkeypatch) -> None:
    """OpenMP reads it when torch is imported, which `main` has not done yet."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    assert main(["--version"]) == 0
    assert os.environ["OMP_WAIT_POLICY"] == expected


def test_the_module_is_the_command() -> None:
    words = [sys.executable, "-m", "moe_beyond"]
    done = subprocess.run([*words, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"moe-beyond {moe_beyond.__version__}\n"
    done = subprocess.run([*words, "inspekt"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "moe-beyond: error: unknown command 'inspekt'; did you mean 'inspect'?\n",
    )


@pytest.mark.parametrize("words", [["version"], ["-V"], ["--version"]])
def test_the_version_is_printed_however_it_is_wanted(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert capsys.readouterr() == (f"moe-beyond {moe_beyond.__version__}\n", "")


def test_help_takes_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for words in (["help", "list"], ["list", "--help"], ["help"], ["--help"]):
        assert main(words) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert said[2] == said[3]
    assert "unknown command 'lst'; did you mean 'list'?" in error_line(capsys, ["help", "lst"])


def test_what_native_libraries_do_at_their_end_changes_no_exit_code() -> None:
    # Let the C library abort when the process ends by exit(), as a native thread of Arrow or torch can make it do.
    aborting = "import ctypes; libc = ctypes.CDLL(None); libc.__cxa_atexit(libc.abort, None, None)"
    done = subprocess.run([sys.executable, "-c", aborting], check=False)
    assert done.returncode < 0
    leaving = (
        f"import atexit, sys; {aborting}; atexit.register(print, 'cleaned up'); sys.argv = ['moe-beyond', 'inspekt']; "
        "from moe_beyond.cli.main import console; console()"
    )
    done = subprocess.run([sys.executable, "-c", leaving], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "cleaned up\n")
    assert done.stderr == "moe-beyond: error: unknown command 'inspekt'; did you mean 'inspect'?\n"


def test_ctrl_c_after_the_work_leaves_no_temporary_file() -> None:
    """It ends the wait for other threads, and the folder for temporary files is removed as at any other end."""
    leaving = (
        "import sys, threading, time; sys.argv = ['moe-beyond', '--version']; "
        "threading.Thread(target=time.sleep, args=(60,)).start(); from moe_beyond.cli.main import console; console()"
    )
    command = [sys.executable, "-u", "-c", leaving]
    with tempfile.TemporaryDirectory() as folder:  # a short path: sockets must have room in it
        with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": folder}) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == f"moe-beyond {moe_beyond.__version__}\n".encode()
            assert len(os.listdir(folder)) == 1
            time.sleep(0.5)  # until it waits
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=20) == 0
        assert os.listdir(folder) == []


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_are_no_mistake(closed: str) -> None:
    done = subprocess.run(
        ["sh", "-c", f'"$0" -m moe_beyond --version {closed}', sys.executable], capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
