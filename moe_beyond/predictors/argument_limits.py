"""Permitted values of predictor arguments, by name."""

import math
from collections.abc import Mapping
from typing import Any

from moe_beyond.json_fields import FINITE, FLAG, FieldRule, check_fields, optional, whole
from moe_beyond.model_config import MOST_LAYERS


def _number(description: str, minimum: float, maximum: float) -> FieldRule:
    """Return the kind of finite numbers within inclusive bounds."""
    return FieldRule(description, lambda value: FINITE.accepts(value) and minimum <= value <= maximum)


LEAST_ABOVE_0, MOST_BELOW_1 = math.nextafter(0.0, 1.0), math.nextafter(1.0, 0.0)
MOST = 2**24
"""Bound on sizes and vocabularies."""
COUNT, COUNT_OR_NONE = whole(1, MOST), whole(0, MOST)
LAYERS, LAYERS_OR_NONE = whole(1, MOST_LAYERS), whole(0, MOST_LAYERS)
NOT_NEGATIVE = _number("a finite number, at least 0", 0, math.inf)
POSITIVE = _number("a finite number above 0", LEAST_ABOVE_0, math.inf)
SHARE = _number("a number within 0..1", 0, 1)
DROPOUT = _number("a number from 0 to below 1", 0, MOST_BELOW_1)

ARGUMENTS: dict[str, FieldRule] = {
    # sizes
    "width": COUNT,
    "depth": whole(1, 1024),
    "heads": whole(1, 1024),
    "window": whole(1, 2**16),
    "layer_width": COUNT,
    "state_width": COUNT,
    "token_width": COUNT,
    "feedforward": COUNT,
    "context_tokens": COUNT,
    "hidden_size": COUNT,
    "projected_from": optional(COUNT),
    "capacity": COUNT,
    # distances in layers
    "lookaheads": LAYERS,
    "sources": LAYERS,
    "stride": LAYERS,
    "ahead": LAYERS_OR_NONE,
    # vocabulary
    "min_count": COUNT,
    "known_tokens": COUNT_OR_NONE,
    "memory_tokens": COUNT_OR_NONE,
    "memory_prefixes": COUNT_OR_NONE,
    "ngram_buckets": COUNT_OR_NONE,
    # copy attention
    "copy_heads": whole(0, 1024),
    "layer_copy_heads": whole(0, 1024),
    # training
    "dropout": DROPOUT,
    "token_dropout": DROPOUT,
    "state_dropout": DROPOUT,
    # counting
    "backoff": NOT_NEGATIVE,
    "smoothing": POSITIVE,
    "token": FINITE,
    "history": FINITE,
    "layers": FINITE,
    # parts
    "bidirectional": FLAG,
    "next_token_head": FLAG,
}
"""Argument -> permitted values; an argument has the same meaning in all architectures."""
OPTIMIZATION: dict[str, FieldRule] = {"lr": POSITIVE, "weight_decay": NOT_NEGATIVE, "warmup": SHARE}
"""Argument of the optimiser -> permitted values."""


def check_arguments(architecture: str, values: Mapping[str, Any]) -> None:
    """Check arguments against `ARGUMENTS`.

    Args:
        architecture: Name of the architecture, for error messages.
        values: Arguments by name; names without an entry in `ARGUMENTS` are ignored.

    Raises:
        UserError: An argument has a value that is not permitted.
    """
    check_fields({name: rule for name, rule in ARGUMENTS.items() if name in values}, values, f"{architecture}: ")
