"""Limits of the machine end a command with one line."""

import contextlib
import errno
import os
import resource
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from _helpers.common import error_line, tiny_traces
from _helpers.killing import in_child

from moe_beyond.cli import inspect_traces
from moe_beyond.cli.limits import exceeded_limit
from moe_beyond.cli.main import main

MEMORY = "free some memory or raise its limit (ulimit -v), then run the same command again"
THREADS = "stop other processes or raise the limit (ulimit -u, ulimit -v), then run the same command again"
FILES = "raise the limit (ulimit -n) or use fewer workers, then run the same command again"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), f"not enough memory; {MEMORY}"),
        (MemoryError("Unable to allocate 3 GiB"), f"not enough memory (Unable to allocate 3 GiB); {MEMORY}"),
        (RuntimeError("x\nDefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory (Default"),
        (RuntimeError("std::bad_alloc"), f"not enough memory (std::bad_alloc); {MEMORY}"),
        (ImportError("a.so: failed to map segment from shared object"), "not enough memory (a.so: failed to map"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "not enough memory ("),
        (RuntimeError("can't start new thread"), f"too many threads or processes (can't start new thread); {THREADS}"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "too many threads or processes ("),
        (OSError(errno.EMFILE, "Too many open files", "a.txt"), f"too many open files (a.txt); {FILES}"),
        (RuntimeError("received 0 items of ancdata"), f"too many open files (received 0 items of ancdata); {FILES}"),
    ],
)
def test_a_limit_is_one_line(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> None:
        try:
            raise error
        except type(error) as cause:  # a library may hide it
            raise RuntimeError("failed") from cause

    monkeypatch.setattr(inspect_traces, "main", fail)
    assert line in error_line(capsys, ["inspect", "x"])


@pytest.mark.parametrize("error", [RuntimeError("a fault"), ValueError("malloc"), OSError(errno.EACCES, "no")])
def test_another_error_is_no_limit(error: Exception) -> None:
    assert exceeded_limit(error) is None


def ending(tmp_path: Path, limit: Callable[[], None], *words: str) -> tuple[int, str]:
    """Exit code and standard error of a command in a process with a limit."""
    errors = tmp_path / "errors"

    def work() -> None:
        with errors.open("w") as file, contextlib.redirect_stderr(file):
            limit()
            code = main(list(words))
        os._exit(code)

    signal.alarm(60)  # ends these tests if a child hangs
    code = in_child(work)
    signal.alarm(0)
    return code, errors.read_text()


@pytest.mark.parametrize("limit", [20, 32, 63])
def test_a_fit_whose_workers_lack_open_files_is_one_line(limit: int, tmp_path: Path) -> None:
    traces = tiny_traces(tmp_path / "traces")
    words = ("fit", "-c", "trainer/default", "-c", "model/popularity", "-c", "data/traces", "--data.traces")
    few_files = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (limit, limit))
    code, errors = ending(tmp_path, few_files, *words, traces.folder, "--data.num_workers", "2")
    assert code == 2
    assert errors == (
        f"moe-beyond: error: data.num_workers: 2 workers need 64 open files (got a limit of {limit}); "
        "raise it with `ulimit -n 64` or use fewer workers\n"
    )
    assert sorted(os.listdir(tmp_path)) == ["errors", "traces"]


def test_a_command_without_memory_or_files_is_one_line(tmp_path: Path) -> None:
    traces = tiny_traces(tmp_path / "traces", sequences=40)
    words = ("inspect", traces.folder, "--json", str(tmp_path / "found.json"), "--quiet")
    assert ending(tmp_path, lambda: None, *words)[0] == 0

    def few_files() -> None:
        first_free = os.dup(2)
        os.close(first_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (first_free, first_free))

    def full_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    for limit, line in ((few_files, "open files"), (full_disk, "found.json: cannot be written (File too large)")):
        code, errors = ending(tmp_path, limit, *words)
        assert code == 2
        assert errors.count("\n") == 1
        assert line in errors
    assert sorted(os.listdir(tmp_path)) == ["errors", "found.json", "traces"]
