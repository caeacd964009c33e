"""The metrics per token of a BigMoeOnEdge run: CSV with one row per generated token, and a line of figures at the end.

Columns are found by name. ``step`` counts the tokens of a turn from 1, and ``steps`` is their number. The other columns
are kept under their names. ``# summary`` ends a turn with figures such as ``n_prompt``, the number of prompt tokens.
"""

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe_beyond.errors import UserError
from moe_beyond.safe_text import brief, shown

COUNTERS = ("turn", "step", "steps")
"""Columns that number the rows, and are no metrics."""
SUMMARY, PROMPT_TOKENS = "# summary", "n_prompt"


@dataclass
class TurnMetrics:
    """Metrics of one turn.

    Attributes:
        rows: Numbers of each generated token, in the order of the columns.
        summary: Figures of the turn by name; empty without a summary.
    """

    rows: list[list[float]] = field(default_factory=list)
    summary: dict[str, float] = field(default_factory=dict)


def read_metrics(
    path: Path, lengths: Sequence[tuple[int, int]]
) -> list[tuple[dict[str, npt.NDArray[np.float64]], dict[str, float]]]:
    """Read the metrics of every turn of a recording.

    Args:
        path: Path of the metrics.
        lengths: Prompt tokens and generated tokens of each turn of the recording.

    Returns:
        For every turn: name -> numbers of every token, ``(T,)`` float64, NaN for prompt tokens; and name -> figure of
        the turn.

    Raises:
        UserError: The file has no metrics, or those of another run.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({brief(error)}); give the metrics of the run") from error
    names = lines[0].split(",") if lines else []
    if "step" not in names or len(set(names)) != len(names):
        raise UserError(f"{path}: line 1: must name the columns, with step (got {shown(lines[0] if lines else '')})")
    turns = _turns(path, lines, names)
    found = [len(turn.rows) for turn in turns]
    if found != (expected := [generated for _, generated in lengths]):
        raise UserError(
            f"{path}: belongs to another run: the recording generated {_listed(expected)} tokens (got metrics of "
            f"{_listed(found)}); give the metrics of this recording"
        )
    for turn, (prompt, _) in zip(turns, lengths, strict=True):
        if turn.summary.get(PROMPT_TOKENS, prompt) != prompt:
            raise UserError(
                f"{path}: belongs to another run: the recording has a prompt of {prompt} tokens (got metrics of "
                f"{turn.summary[PROMPT_TOKENS]:g}); give the metrics of this recording"
            )
    kept = [(column, name) for column, name in enumerate(names) if name not in COUNTERS]
    return [
        (
            {
                name: np.array([*[np.nan] * prompt, *(row[column] for row in turn.rows)], np.float64)
                for column, name in kept
            },
            turn.summary,
        )
        for turn, (prompt, _) in zip(turns, lengths, strict=True)
    ]


def _turns(path: Path, lines: Sequence[str], names: Sequence[str]) -> list[TurnMetrics]:
    """Divide the lines after the names into turns, whose steps count from 1."""
    turns: list[TurnMetrics] = []
    for number, line in enumerate(lines[1:], 2):
        if line.startswith(SUMMARY):
            if turns:
                found = re.findall(r"(\S+)=(-?\d+(?:\.\d+)?)(?=\s|$)", line, re.ASCII)
                turns[-1].summary = {name: float(value) for name, value in found}
            continue
        if not line.strip() or line.startswith("#"):
            continue
        row = _numbers(f"{path}: line {number}", line, names)
        step = row[names.index("step")]
        if step == 1:
            turns.append(TurnMetrics())
        expected = len(turns[-1].rows) + 1 if turns else 1
        if step != expected:
            raise UserError(f"{path}: line {number}: step must be {expected} (got {step:g}); record the run again")
        turns[-1].rows.append(row)
    return turns


def _numbers(location: str, line: str, names: Sequence[str]) -> list[float]:
    """Read one row of finite numbers."""
    cells = next(csv.reader([line]))
    if len(cells) != len(names):
        raise UserError(f"{location}: must have {len(names)} columns (got {len(cells)}); record the run again")
    try:
        row = [float(cell) for cell in cells]
    except ValueError as error:
        raise UserError(f"{location}: must hold numbers ({brief(error)}); record the run again") from error
    if not all(math.isfinite(number) for number in row):
        raise UserError(f"{location}: must hold finite numbers; record the run again")
    return row


def _listed(counts: Sequence[int]) -> str:
    return ", ".join(map(str, counts)) or "no"
