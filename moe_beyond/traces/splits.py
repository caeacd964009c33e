"""Splitting numbered prompts into training and validation by blocks of consecutive numbers.

Consecutive prompts often belong to one conversation, so a random split would leak. A few prompts hold most of the
tokens, so taking every n-th block would leave validation with any share of them.
"""

import re
from collections.abc import Mapping

from moe_beyond.errors import UserError


def parse_blocks(text: str) -> tuple[int, int]:
    """Read ``SIZE:EVERY``: blocks of SIZE numbers, one in EVERY of them (and of the tokens) for validation.

    Raises:
        UserError: It is not two whole numbers, SIZE at least 1 and EVERY at least 2.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text, re.ASCII)
    if match is None or int(match[1]) < 1 or int(match[2]) < 2:
        raise UserError(f"--val-blocks {text!r}: write SIZE:EVERY, such as 20:10, with SIZE >= 1 and EVERY >= 2")
    return int(match[1]), int(match[2])


def validation_numbers(tokens: Mapping[int, int], size: int, every: int) -> set[int]:
    """Choose the prompt numbers that go to validation, deterministically.

    Blocks are ranked by their tokens and cut into groups of ``every`` alike ones; from each group goes the block that
    keeps validation's share of the tokens seen so far nearest to one in ``every``.

    Args:
        tokens: Prompt number -> tokens.
        size: Consecutive numbers in a block; number n is in block n // size.
        every: One block in this many goes to validation; a last, smaller group gives none.

    Raises:
        UserError: There are fewer than ``every`` blocks.
    """
    blocks: dict[int, int] = {}
    for number, count in tokens.items():
        blocks[number // size] = blocks.get(number // size, 0) + count
    if len(blocks) < every:
        raise UserError(f"--val-blocks {size}:{every}: only {len(blocks)} blocks, validation would be empty")
    ranked = sorted(blocks, key=lambda block: (-blocks[block], block))
    chosen: set[int] = set()
    seen = held = 0
    for start in range(0, len(ranked) - every + 1, every):
        group = ranked[start : start + every]
        seen += sum(blocks[block] for block in group)
        best = min(group, key=lambda block: (abs((held + blocks[block]) * every - seen), block))
        held += blocks[best]
        chosen.add(best)
    return {number for number in tokens if number // size in chosen}
