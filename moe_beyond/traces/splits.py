"""Splits of numbered sequences into training and held-out text, by blocks of consecutive numbers.

Consecutive prompts often belong to one conversation, so a random split would leak. A few prompts hold most of the
tokens, so every n-th block could give a held-out split almost any share of them.
"""

import re
from collections.abc import Collection, Hashable, Mapping

from moe_beyond.errors import UserError
from moe_beyond.safe_text import shown

VALIDATION_OPTION = "--val-blocks"


def parse_blocks(text: str, option: str = VALIDATION_OPTION) -> tuple[int, int]:
    """Parse ``SIZE:EVERY``: blocks of SIZE numbers, one in EVERY of which is held out.

    Args:
        text: Value of the option.
        option: Option for error messages (default: ``--val-blocks``).

    Raises:
        UserError: It is not two whole numbers, SIZE at least 1 and EVERY at least 2.
    """
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text, re.ASCII)
    if match is None or int(match[1]) < 1 or int(match[2]) < 2:
        raise UserError(f"{option} {shown(text)}: write SIZE:EVERY, such as 20:10, with SIZE >= 1 and EVERY >= 2")
    return int(match[1]), int(match[2])


def held_out_numbers(tokens: Mapping[int, int], size: int, every: int, option: str = VALIDATION_OPTION) -> set[int]:
    """Choose the sequences of a held-out split, deterministically.

    Blocks are sorted by their tokens and cut into groups of ``every``. Each group gives the block that brings
    the split's share of all tokens so far nearest to 1 / ``every``.

    Args:
        tokens: Number of the sequence -> its tokens.
        size: Consecutive numbers in a block; number n is in block n // size.
        every: Number of blocks of which one is held out; a smaller last group gives none.
        option: Option for error messages (default: ``--val-blocks``).

    Raises:
        UserError: There are fewer than ``every`` blocks.
    """
    blocks: dict[int, int] = {}
    for number, count in tokens.items():
        blocks[number // size] = blocks.get(number // size, 0) + count
    if len(blocks) < every:
        raise UserError(
            f"{option} {size}:{every}: only {len(blocks)} blocks, so the split would be empty; "
            "choose a smaller EVERY or SIZE"
        )
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


def without_copies(
    held_out: Collection[int], texts: Mapping[int, Hashable], option: str = VALIDATION_OPTION
) -> set[int]:
    """Remove from a held-out split the sequences that are also elsewhere.

    Copies that are all in the split stay there.

    Args:
        held_out: Numbers of the sequences chosen for the split.
        texts: Number -> text of all sequences; equal for copies.
        option: Option for error messages (default: ``--val-blocks``).

    Returns:
        The numbers of ``held_out`` that stay in the split.

    Raises:
        UserError: None stays.
    """
    others = {text for number, text in texts.items() if number not in held_out}
    kept = {number for number in held_out if texts[number] not in others}
    if held_out and not kept:
        raise UserError(
            f"{option}: every sequence chosen for the split is a copy of one outside it; choose other blocks"
        )
    return kept
