"""The git revision of the working folder; nothing that its configuration names runs."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from moe_beyond.callbacks.git_revision import git_revision


def git(*words: str) -> str:
    identity = ("-c", "user.name=tests", "-c", "user.email=tests@localhost")
    return subprocess.run(["git", *identity, *words], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    git("init", "-q")
    Path("file.txt").write_text("one\n")
    git("add", "file.txt")
    git("commit", "-q", "-m", "start")
    return tmp_path


def test_the_commit_and_changes_of_tracked_files(repository: Path) -> None:
    assert git_revision() == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    Path("new.txt").write_text("not tracked")
    assert git_revision() == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    Path("file.txt").write_text("two\n")
    assert git_revision() == {"commit": git("rev-parse", "HEAD"), "dirty": True}


def test_without_a_repository_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_revision() is None


def test_no_program_of_the_repository_runs(repository: Path) -> None:
    canary = f"{os.fspath(repository)}/PWNED"
    script = repository / "evil.sh"
    script.write_text(f"#!/bin/sh\ntouch {canary}\ncat\n")
    script.chmod(0o755)
    Path(".gitattributes").write_text("* filter=a=b.c\n* diff=evil\n")
    for name in ("core.fsmonitor", "filter.a=b.c.clean", "filter.a=b.c.process", "diff.evil.textconv", "core.pager"):
        git("config", name, str(script))
    git("config", "core.hooksPath", str(repository))
    (repository / "post-index-change").symlink_to(script)
    later = time.time() + 100
    os.utime("file.txt", (later, later))  # git has to read the file, and would filter it
    assert subprocess.run(["git", "status"], capture_output=True, check=False).returncode in (0, 128)
    assert Path(canary).exists()  # a plain call runs it
    Path(canary).unlink()
    os.utime("file.txt", (later + 1, later + 1))
    revision = git_revision()
    assert revision is not None
    assert revision["commit"] == git("rev-parse", "HEAD")
    assert not Path(canary).exists()
