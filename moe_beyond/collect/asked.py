"""What is to be collected, and by which process."""

import os
from dataclasses import dataclass, field

from moe_beyond.collect.prompts import Prompt
from moe_beyond.traces.steering import Steering

Row = tuple[Prompt, list[int]]
"""A prompt and its token ids."""


@dataclass(frozen=True)
class Collection:
    """What is to be collected.

    Attributes:
        generate: Tokens that the model writes after each prompt; 0 lets it read alone.
        temperature: Of the distribution that it draws them from; 0 takes the most probable.
        seed: Of the drawing. What is drawn depends on the batch as well.
        val_blocks: ``SIZE:EVERY`` sends blocks of consecutive prompts to a ``validation`` split.
        gate_weights: Whether these are kept.
        batch_size: Prompts at once.
        max_tokens: What is longer is cut to this many; what the model has no positions for all the same is refused.
        shard_tokens: A shard of the trace set is closed once it holds this many.
        hidden_states: Whether what routers and layers read is kept, some hundred times as much as the entries; and the
            routers, where they are found.
        steering: Experts that are forced on or off in all that the model reads and writes; None lets it be.
    """

    generate: int = 0
    temperature: float = 0.0
    seed: int = 0
    val_blocks: str | None = None
    gate_weights: bool = True
    batch_size: int = 8
    max_tokens: int | None = None
    shard_tokens: int = 65536
    hidden_states: bool = False
    steering: Steering | None = None


@dataclass
class Rank:
    """Which of several processes this is."""

    number: int = field(default_factory=lambda: int(os.environ.get("RANK", 0)))
    count: int = field(default_factory=lambda: int(os.environ.get("WORLD_SIZE", 1)))
