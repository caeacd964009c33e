"""The git revision of the working folder, read without running programs that the repository's configuration names.

A repository may come from a stranger, and its ``.git/config`` can name programs: a file-system monitor, hooks, filters
of contents, and transports that fetch missing objects.
"""

import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

HARMLESS = {"core.fsmonitor": "false", "core.hooksPath": os.devnull}
"""Configuration without monitor and hooks."""
FILTERS = r"^filter\..*\.(clean|smudge|process|required)$"
"""Regular expression of settings that name a filter of contents."""
NO_TRANSPORT = {"GIT_ALLOW_PROTOCOL": "none", "GIT_NO_LAZY_FETCH": "1", "GIT_TERMINAL_PROMPT": "0"}
"""Environment without fetches."""


def git_revision() -> dict[str, Any] | None:
    """Return the commit of the working folder, and whether tracked files differ from it.

    Returns:
        ``{"commit": ..., "dirty": ...}``; None outside a repository, or without git.
    """
    try:
        commit = _git("rev-parse", "HEAD")
        filters = _git("config", "--null", "--name-only", "--get-regexp", FILTERS, accepted=(0, 1))
        unfiltered = dict.fromkeys(filter(None, filters.split("\0")), "")
        changes = _git(
            "status", "--porcelain", "--untracked-files=no", "--ignore-submodules=dirty", settings=unfiltered
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit.strip(), "dirty": bool(changes)}


def _git(*arguments: str, accepted: Sequence[int] = (0,), settings: Mapping[str, str] | None = None) -> str:
    """Run git and return its output.

    Args:
        *arguments: Arguments after ``git``.
        accepted: Exit codes of success (default: 0).
        settings: Configuration in addition to `HARMLESS`, by name (default: none).

    Raises:
        subprocess.CalledProcessError: The exit code is another one.
    """
    configuration = HARMLESS | dict(settings or {})
    variables = {"GIT_CONFIG_COUNT": str(len(configuration))}
    for number, (name, value) in enumerate(configuration.items()):
        variables |= {f"GIT_CONFIG_KEY_{number}": name, f"GIT_CONFIG_VALUE_{number}": value}
    ended = subprocess.run(  # nosec B603, B607 # constant arguments, and the user's git
        ["git", *arguments],
        capture_output=True,
        text=True,
        errors="replace",
        env=os.environ | NO_TRANSPORT | variables,
    )
    if ended.returncode not in accepted:
        raise subprocess.CalledProcessError(ended.returncode, arguments)
    return ended.stdout
