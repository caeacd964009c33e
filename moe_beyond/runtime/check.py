"""Comparison of a run with the unmodified model: tokens, and logits bit by bit."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_beyond.errors import UserError
from moe_beyond.runtime.memory import HOST, Memory

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Comparison:
    """Tokens and logits of a model next to those of the unmodified one.

    Logits are compared up to the first token that differs, because later ones follow other text.

    Attributes:
        tokens: Number of tokens of the unmodified model.
        equal_tokens: Number of equal tokens before the first that differs.
        equal_logits: Number of tokens with bitwise equal logits before the first with others.
        sequence: Number of the sequence with the first difference; None without one.
        position: Position of the first difference among the sequence's generated tokens; None without one.
        token_ids: Token id at that position, and that of the unmodified model; -1 after the end of a text.
        largest_difference: Largest absolute difference of compared logits.
    """

    tokens: int
    equal_tokens: int
    equal_logits: int
    sequence: int | None
    position: int | None
    token_ids: tuple[int, int] | None
    largest_difference: float

    @property
    def identical(self) -> bool:
        """Whether all tokens are equal, and all logits bitwise."""
        return self.position is None

    def __str__(self) -> str:
        """Return one line."""
        equal = f"{self.equal_tokens:,} of {self.tokens:,} tokens"
        if self.position is None or self.sequence is None or self.token_ids is None:
            return f"identical: {equal}, logits bitwise"
        place = f"sequence {self.sequence + 1}, generated token {self.position + 1}"
        difference = f"largest difference of logits {self.largest_difference:.3g}"
        got, expected = self.token_ids
        if got == expected:
            return f"different: {equal} equal, logits differ from {place} on; {difference}"
        return f"different: {equal} equal; {place} is id {got}, unmodified {expected}; {difference}"

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"identical": self.identical, **asdict(self)}


def compare(
    tokens: Sequence[Sequence[int]],
    expected_tokens: Sequence[Sequence[int]],
    logits: Sequence[Tensor],
    expected_logits: Sequence[Tensor],
) -> Comparison:
    """Compare generated sequences with those of the unmodified model.

    Args:
        tokens: Generated token ids of each sequence, without prompts.
        expected_tokens: Token ids of the unmodified model.
        logits: Logits of each generated token, ``(n, V)`` per sequence.
        expected_logits: Logits of the unmodified model.
    """
    total, equal_tokens, equal_logits, largest = sum(map(len, expected_tokens)), 0, 0, 0.0
    first: tuple[int, int, tuple[int, int]] | None = None
    same_tokens = True
    rows = zip(tokens, expected_tokens, logits, expected_logits, strict=True)
    for number, (got, expected, got_logits, expected_rows) in enumerate(rows):
        diverged = False
        for position in range(max(len(got), len(expected))):
            pair = tuple(ids[position] if position < len(ids) else -1 for ids in (got, expected))
            bitwise = -1 not in pair and _bitwise_equal(got_logits[position], expected_rows[position])
            if -1 not in pair:
                largest = max(largest, _difference(got_logits[position], expected_rows[position]))
            diverged = pair[0] != pair[1]
            if first is None and (diverged or not bitwise):
                first = (number, position, (pair[0], pair[1]))
            same_tokens &= not diverged
            equal_tokens += same_tokens
            equal_logits += first is None
            if diverged:
                break
    sequence, place, ids = first or (None, None, None)
    return Comparison(total, equal_tokens, equal_logits, sequence, place, ids, largest)


def check_fits_memory(nbytes: int, memory: Memory) -> None:
    """Refuse to load a model whole, next to a run, that the memory of its device cannot hold.

    A GPU's model is read into host memory first. The slots of a run on a GPU are free by then.

    Args:
        nbytes: Size of its weights in bytes.
        memory: Memory of the run.

    Raises:
        UserError: Less memory is available.
    """
    available = {HOST: available_memory()}
    if memory.place != HOST:
        available[memory.place] = torch.cuda.mem_get_info(memory.place)[0] + memory.slots_bytes
    for place, size in available.items():
        if size is not None and nbytes > size:
            raise UserError(
                f"--check: loads the whole model, {nbytes / 1e9:,.1f} GB, which is too large (got {size / 1e9:,.1f} GB "
                f"available in the memory of {place}); leave --check out, or use a larger machine"
            )


def available_memory() -> int | None:
    """Return the host memory that this process can still use in bytes, within its control group; None if unknown."""
    amounts = []
    if MEMINFO.is_file():
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        amounts.append(1024 * int(fields["MemAvailable"].split()[0]))
    limit, used = (_amount(CGROUP / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        amounts.append(limit - used + int(statistics.get("inactive_file", 0)))  # the page cache can shrink
    return min(amounts, default=None)


def _amount(path: Path) -> int | None:
    text = path.read_text().strip() if path.is_file() else "max"
    return None if text == "max" else int(text)


def _bitwise_equal(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def _difference(first: Tensor, second: Tensor) -> float:
    """Return the largest absolute difference; values that are equal, also infinite ones, differ by 0."""
    difference = (first.double() - second.double()).abs()
    return float(difference.masked_fill(first == second, 0.0).max())
