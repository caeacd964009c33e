"""Settings of a collection, and the process that works on it."""

import math
import os
from dataclasses import dataclass, field
from typing import Any, Literal

from moe_beyond.collect.prompts import Prompt
from moe_beyond.errors import UserError, unknown
from moe_beyond.safe_text import shown
from moe_beyond.traces.hidden_states import DTYPES as STATE_DTYPES
from moe_beyond.traces.splits import parse_blocks
from moe_beyond.traces.steering import Steering

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Types to compute in; ``auto`` is the type of the stored weights."""
MIN_TEMPERATURE = 0.001
"""Smallest temperature above 0; below it, logits overflow."""
MINIMUMS = {"generate": 0, "batch_size": 1, "max_tokens": 1, "shard_tokens": 1, "state_width": 1}
"""Smallest value of each whole number of a `CollectConfig`."""
OPTIONAL = ("max_tokens", "state_width")
"""Whole numbers of a `CollectConfig` that may be None."""
STATE_OPTIONS = {"state_dtype": "float16", "state_layers": "all", "state_width": None}
"""Settings of a `CollectConfig` that need hidden states, and their defaults."""
TYPES: dict[str, tuple[Any, str]] = {
    "temperature": (int | float, "a number"),
    "seed": (int, "a whole number"),
    "val_blocks": (str | None, "text such as '20:10', or None"),
    "test_blocks": (str | None, "text such as '20:10', or None"),
    "tokens": (bool, "True or False"),
    "gate_weights": (bool | None, "True or False"),
    "hidden_states": (bool, "True or False"),
    "state_dtype": (str, "text such as 'int8'"),
    "steering": (
        Steering | None,
        "a Steering, or None; Steering.from_json({'off': [[1, 0]]}, source='mine') makes one",
    ),
}
"""Type of each other field of a `CollectConfig`, and its description in error messages."""

StateLayers = int | tuple[int, ...] | Literal["all"]
"""MoE layers whose hidden states are recorded: all, their number, or a list of them."""
TokenizedPrompt = tuple[Prompt, list[int]]
"""A prompt and its token ids."""


@dataclass(frozen=True)
class CollectConfig:
    """Settings of a collection.

    Attributes:
        generate: Number of tokens that the model generates after each prompt (default: 0, only prefill).
        temperature: Sampling temperature (default: 0, greedy).
        seed: Random seed for sampling (default: 0); results also depend on the batch size.
        val_blocks: ``SIZE:EVERY`` assigns blocks of consecutive prompts to a ``validation`` split (default: None).
        test_blocks: ``SIZE:EVERY`` assigns blocks to a ``test`` split, before those of validation (default: None).
        tokens: Whether token ids, the tokenizer and the names of the prompts are recorded; without them, the set holds
            expert ids, lengths and splits, from which no text can be read (default: True).
        gate_weights: Whether gate weights are recorded (default: as ``tokens``).
        batch_size: Prompts per batch (default: 8).
        max_tokens: Number of tokens to which longer prompts are truncated (default: None, no truncation). A prompt
            that exceeds the model's positions is an error.
        shard_tokens: Number of tokens after which a shard of the trace set is closed (default: 65,536).
        hidden_states: Whether the inputs of routers and layers are recorded, a hundred to a thousand times the bytes of
            the entries; router weights are recorded with them, if they are found (default: False).
        state_dtype: Type of the stored hidden states, ``"float16"`` or ``"int8"`` (default: float16).
        state_layers: MoE layers whose hidden states are recorded: ``"all"``, their number, evenly spaced from the first
            on, or a tuple of layers as numbered by the model (default: all).
        state_width: Width to which hidden states are projected (default: None, the model's).
        steering: Experts that are forced on or off in prefill and decode (default: None).
    """

    generate: int = 0
    temperature: float = 0.0
    seed: int = 0
    val_blocks: str | None = None
    test_blocks: str | None = None
    tokens: bool = True
    gate_weights: bool | None = None
    batch_size: int = 8
    max_tokens: int | None = None
    shard_tokens: int = 65536
    hidden_states: bool = False
    steering: Steering | None = None
    state_dtype: str = "float16"
    state_layers: StateLayers = "all"
    state_width: int | None = None

    def __post_init__(self) -> None:
        """Check types and ranges.

        Raises:
            UserError: A value has the wrong type, or a number is out of range.
        """
        for name, (kind, description) in TYPES.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, bool | None)):
                raise UserError(f"{name}: must be {description} (got {shown(value)})")
        for name, least in MINIMUMS.items():
            value = getattr(self, name)
            if name in OPTIONAL and value is None:
                continue
            option = f"--{name.replace('_', '-')}"
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"{option}: must be a whole number from {least} (got {shown(value)})")
        if self.temperature and not MIN_TEMPERATURE <= self.temperature < math.inf:
            raise UserError(
                f"--temperature: must be 0 (greedy) or at least {MIN_TEMPERATURE} (got {shown(self.temperature)})"
            )
        if self.temperature and not self.generate:
            raise UserError(f"--temperature: needs --generate N (got {shown(self.temperature)}); add --generate")
        if not self.tokens and (self.gate_weights or self.hidden_states):
            raise UserError("--no-tokens: keeps only expert ids; leave gate weights and hidden states out of --record")
        self._check_states()
        if self.gate_weights is None:
            object.__setattr__(self, "gate_weights", self.tokens)
        for option, blocks in self.blocks().values():
            parse_blocks(blocks, option)

    def blocks(self) -> dict[str, tuple[str, str]]:
        """Return the held-out splits in the order in which they are chosen: name -> option and its ``SIZE:EVERY``."""
        options = {"test": ("--test-blocks", self.test_blocks), "validation": ("--val-blocks", self.val_blocks)}
        return {split: (option, blocks) for split, (option, blocks) in options.items() if blocks is not None}

    def _check_states(self) -> None:
        """Check the options of hidden states."""
        if self.state_dtype not in STATE_DTYPES:
            raise unknown("--state-dtype", self.state_dtype, STATE_DTYPES)
        if isinstance(self.state_layers, list):
            object.__setattr__(self, "state_layers", tuple(self.state_layers))
        layers = self.state_layers
        numbers, least = (layers, 0) if isinstance(layers, tuple) else ((layers,), 1)
        if layers != "all" and not (numbers and all(type(each) is int and each >= least for each in numbers)):
            raise UserError(
                "--state-layers: must be all, a number of layers, or a list of layers such as 1,5,9 (got "
                f"{shown(layers)})"
            )
        given = [name for name, default in STATE_OPTIONS.items() if getattr(self, name) != default]
        if given and not self.hidden_states:
            option = f"--{given[0].replace('_', '-')}"
            raise UserError(f"{option}: needs hidden states; add hidden_states to --record")


@dataclass
class ProcessRank:
    """Number of this process among the processes of a collection, as torchrun sets them.

    Attributes:
        number: ProcessRank, from 0 (default: the environment's ``RANK``, otherwise 0).
        count: Number of processes (default: the environment's ``WORLD_SIZE``, otherwise 1).
    """

    number: int = field(default_factory=lambda: int(os.environ.get("RANK", 0)))
    count: int = field(default_factory=lambda: int(os.environ.get("WORLD_SIZE", 1)))
