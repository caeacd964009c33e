"""Two halves of a trace set's conversations: one to choose a strategy by, and one to judge it by.

Consecutive sequences often belong together, so blocks of consecutive conversations take turns. Large trace sets are
sampled: the sequences of both halves, and their scores, are in memory at once.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from moe_beyond.errors import UserError
from moe_beyond.evaluation.sources import ScoreSource
from moe_beyond.simulator.sequence import ReplaySequence
from moe_beyond.traces.copies import text_digest
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.trace import Trace

HALF_TOKENS = 4096
"""Number of tokens of a half above which a trace set is sampled."""
SEQUENCE_TOKENS = 2048
"""Number of tokens of a sequence that are replayed; the others are cut off."""
MAX_BLOCK = 20
"""Largest number of consecutive conversations in a block."""
BLOCKS = 10
"""Number of blocks that a small trace set is divided into."""
MIN_CONVERSATIONS = 4
"""Least number of conversations: the spread of a half needs two."""
MIN_PROMPT = 4
"""Number of tokens above which an equal beginning is no mere start token."""


@dataclass(frozen=True)
class Halves:
    """Sequences of both halves, with their scores if there is a source.

    Attributes:
        tuning: Sequences to choose a strategy by.
        held_out: Sequences to judge the choice by; none is a copy of a sequence of ``tuning``.
        sampled: Whether conversations were left out, or sequences were cut.
    """

    tuning: list[ReplaySequence]
    held_out: list[ReplaySequence]
    sampled: bool

    def __str__(self) -> str:
        """Return one line."""
        sizes = [f"{len(half):,} sequences ({sum(map(len, half)):,} tokens)" for half in (self.tuning, self.held_out)]
        line = f"tuned on {sizes[0]}, judged on {sizes[1]} of other conversations"
        if not self.sampled:
            return line
        return f"{line}; a sample, with at most {SEQUENCE_TOKENS:,} tokens of each sequence"


@dataclass(frozen=True)
class _Text:
    """A sequence without its routing.

    Attributes:
        name: Id of the sequence.
        tokens: Number of tokens that are replayed.
        digest: Hash of the text.
    """

    name: str
    tokens: int
    digest: bytes


def halve(
    traces: TraceSet, split: str | None, source: ScoreSource | None, warmup_tokens: int = 0, *, in_order: bool = False
) -> Halves:
    """Divide the conversations of a trace set into two halves, and score them.

    Args:
        traces: Trace set to divide.
        split: Name of a split; None for all splits.
        source: Source of scores; None without scores.
        warmup_tokens: Number of tokens up to which a sequence is too short to count (default: 0).
        in_order: Whether sequences keep their order in the trace set (default: False).

    Raises:
        UserError: There are fewer than `MIN_CONVERSATIONS` conversations that count.
    """
    cut = False
    conversations: list[list[_Text]] = []
    for texts in _conversations(traces.traces(split), traces.manifest.has_token_ids):
        cut = cut or any(len(trace) > SEQUENCE_TOKENS for trace in texts)
        counted = [_text(trace, traces.manifest.has_token_ids) for trace in texts if len(trace) > warmup_tokens]
        if counted:
            conversations.append(counted)
    if len(conversations) < MIN_CONVERSATIONS:
        raise UserError(
            f"{traces.folder}: tuning needs at least {MIN_CONVERSATIONS} conversations that are longer than the "
            f"warm-up, two to choose by and two to judge by (got {len(conversations)}); record more"
        )
    blocks, sampled = _sampled_blocks(conversations)
    tuning, held_out = ([text for block in blocks[first::2] for text in block] for first in (0, 1))
    digests = {text.digest for text in tuning}
    names = ({text.name for text in tuning}, {text.name for text in held_out if text.digest not in digests})
    if not names[1]:
        raise UserError(f"{traces.folder}: every conversation to judge by is a copy of one to choose by; record others")
    halves: list[list[ReplaySequence]] = [[], []]
    scored = ((trace, None) for trace in traces.traces(split)) if source is None else source.sequences(
        traces, split, in_order
    )  # fmt: skip
    for trace, scores in scored:
        for half, members in zip(halves, names, strict=True):
            if trace.sequence_id in members:
                half.append(
                    ReplaySequence(
                        traces.geometry, trace.experts[:SEQUENCE_TOKENS],
                        None if scores is None else np.array(scores[:SEQUENCE_TOKENS]),
                        min(trace.decode_start, SEQUENCE_TOKENS), trace.sequence_id,
                    )
                )  # fmt: skip
    return Halves(halves[0], halves[1], sampled=sampled or cut)


def _text(trace: Trace, has_token_ids: bool) -> _Text:
    content = trace.token_ids if has_token_ids else trace.experts
    return _Text(trace.sequence_id, min(len(trace), SEQUENCE_TOKENS), text_digest(content))


def _conversations(traces: Iterable[Trace], has_token_ids: bool) -> Iterator[list[Trace]]:
    """Group consecutive sequences of one conversation: each begins with the whole prompt of its predecessor."""
    conversation: list[Trace] = []
    for trace in traces:
        if conversation and not (has_token_ids and _continues(conversation[-1], trace)):
            yield conversation
            conversation = []
        conversation.append(trace)
    if conversation:
        yield conversation


def _continues(earlier: Trace, later: Trace) -> bool:
    prompt = earlier.token_ids[: earlier.decode_start or len(earlier)]
    return len(prompt) >= MIN_PROMPT and np.array_equal(later.token_ids[: len(prompt)], prompt)


def _sampled_blocks(conversations: list[list[_Text]]) -> tuple[list[list[_Text]], bool]:
    """Join consecutive conversations into blocks, each with the first few of its conversations if there are too many.

    Returns:
        Sequences of each block, and whether some were left out.
    """
    size = min(MAX_BLOCK, max(1, len(conversations) // BLOCKS))
    tokens = sum(text.tokens for conversation in conversations for text in conversation)
    kept = max(1, math.floor(size * min(1, 2 * HALF_TOKENS / tokens)))
    starts = range(0, len(conversations), size)
    parts = (conversations[start : start + min(size, kept)] for start in starts)
    return [[text for conversation in part for text in conversation] for part in parts], kept < size
