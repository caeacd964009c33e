"""Every reader of user input accepts a changed valid input with sane values, or refuses it in one line that names it.

`tools/fuzz.py` tries a million inputs; a few of each target are tried here, and the inputs that it once found.
"""

import os
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from _helpers.tools import TOOLS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.append(str(TOOLS))
import fuzz
from parts.fuzz_seeds import SETTINGS

LONG = "9" * 5000
"""Digits of a number that Python refuses to read, and that fill a terminal."""


@pytest.mark.parametrize("name", fuzz.ALL)
@settings(max_examples=15, derandomize=True, suppress_health_check=list(HealthCheck))  # the tool draws other cases
@given(chance=st.randoms(use_true_random=False))
@pytest.mark.filterwarnings("ignore::RuntimeWarning:fuzz")
def test_an_input_is_accepted_or_refused(name: str, chance: Random) -> None:
    target = fuzz.ALL[name]
    with tempfile.TemporaryDirectory() as folder:
        outcome, detail = fuzz.try_input(target, target.make(chance, Path(folder)), Path(folder))
    assert outcome in (fuzz.ACCEPTED, fuzz.REFUSED), f"{outcome}: {detail}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prefetchers", f"top{LONG}"),
        ("prefetchers", f"top1@{LONG}"),
        ("prefetchers", f"p>{LONG}"),
        ("lookaheads", LONG),
        ("blocks of validation", f"{LONG}:2"),
        ("devices", LONG),
        ("devices", f"rtx3060,link_gb_per_s={'x' * 5000}"),
        ("budgets", (LONG, fuzz.TARGETS["budgets"].make(Random(0), Path())[1])),
        ("settings", {**SETTINGS[0], "policy": "lru", "budget": "8", "strategy": "fiddler", "scope": LONG}),
        ("names on the Hub", f"hf:org/repo@{LONG} "),
        ("names on the Hub", "hf:org/repo\n@v1"),
        ("names on the Hub", "hf:org/repo@\u202ev1"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_an_input_that_was_once_no_line_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    assert fuzz.try_input(fuzz.ALL[name], value, tmp_path)[0] == fuzz.REFUSED


def test_the_tool_counts_and_names_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(number: int) -> str | None:
        if number == 3:
            raise fuzz.UserError("it is wrong (got 3)")
        if number == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return {0: None, 1: "one"}[number]

    target = fuzz.Target(lambda chance, folder: 0, read, ("number",))
    outcomes = [fuzz.try_input(target, number, tmp_path)[0].partition(",")[0] for number in range(4)]
    assert outcomes == ["accepted", "nonsense", "KeyError", "message without its source"]
    monkeypatch.setitem(fuzz.ALL, "numbers", replace(target, make=lambda chance, folder: chance.choice((0, 0, 4))))
    found = fuzz.fuzz("numbers", range(7), 3, tmp_path)
    assert found.counts == {"accepted": 5}
    assert found.faults == {"process ended by SIGKILL": 2}
    assert list(tmp_path.iterdir()) == []
