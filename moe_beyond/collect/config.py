"""What is to be collected, and by which process."""

import math
import os
from dataclasses import dataclass, field
from typing import Any

from moe_beyond.collect.prompts import Prompt
from moe_beyond.errors import UserError
from moe_beyond.fields import shown
from moe_beyond.traces.splits import parse_blocks
from moe_beyond.traces.steering import Steering

COLDEST = 0.001
"""Least temperature to draw at; colder, numbers overflow."""
LEAST = {"generate": 0, "batch_size": 1, "max_tokens": 1, "shard_tokens": 1}
"""Least value of each whole number of a `Collection`."""
KINDS: dict[str, tuple[Any, str]] = {
    "temperature": (int | float, "a number"),
    "seed": (int, "a whole number"),
    "val_blocks": (str | None, "text such as '20:10', or None"),
    "gate_weights": (bool, "True or False"),
    "hidden_states": (bool, "True or False"),
    "steering": (
        Steering | None,
        "a Steering, or None; Steering.from_json({'off': [[1, 0]]}, source='mine') makes one",
    ),
}
"""Type of each other field of a `Collection`, and its name in error messages."""

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

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            UserError: A value is of another type, or a number is out of range.
        """
        for name, (kind, words) in KINDS.items():
            if not isinstance(value := getattr(self, name), kind) or (isinstance(value, bool) and kind is not bool):
                raise UserError(f"{name}: is {words} (got {shown(value)})")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if name == "max_tokens" and value is None:
                continue
            option = f"--{name.replace('_', '-')}"
            if isinstance(value, bool) or not isinstance(value, int):
                raise UserError(f"{option} {value!r} is no whole number; give {least} or more")
            if value < least:
                raise UserError(f"{option} {value} is less than {least}")
        if self.temperature and not COLDEST <= self.temperature < math.inf:
            raise UserError(
                f"--temperature {self.temperature} is neither 0, for the most probable, nor {COLDEST} or more"
            )
        if self.temperature and not self.generate:
            raise UserError("--temperature draws what --generate N writes; give it as well")
        if self.val_blocks is not None:
            parse_blocks(self.val_blocks)


@dataclass
class Rank:
    """Which of several processes this is."""

    number: int = field(default_factory=lambda: int(os.environ.get("RANK", 0)))
    count: int = field(default_factory=lambda: int(os.environ.get("WORLD_SIZE", 1)))
