"""The values that the arguments of predictors may have, by the argument's name."""

import math
from collections.abc import Mapping
from typing import Any

from moe_beyond.fields import FLAG, Kind, check_kinds


def _whole(least: int) -> Kind:
    return Kind(f"a whole number, at least {least}", lambda value: type(value) is int and value >= least)


def _number(words: str, least: float, most: float) -> Kind:
    """Finite numbers within bounds, the bounds included."""
    return Kind(
        words,
        lambda value: (
            isinstance(value, int | float)
            and type(value) is not bool
            and math.isfinite(value)
            and least <= value <= most
        ),
    )


LEAST_ABOVE_0, MOST_BELOW_1 = math.nextafter(0.0, 1.0), math.nextafter(1.0, 0.0)
COUNT, COUNT_OR_NONE = _whole(1), _whole(0)
FINITE = _number("a finite number", -math.inf, math.inf)
NOT_NEGATIVE = _number("a finite number, at least 0", 0, math.inf)
POSITIVE = _number("a finite number above 0", LEAST_ABOVE_0, math.inf)
SHARE = _number("a number within 0..1", 0, 1)
DROPPED = _number("a number from 0 to below 1", 0, MOST_BELOW_1)

ARGUMENTS: dict[str, Kind] = {
    # sizes
    "width": COUNT,
    "depth": COUNT,
    "heads": COUNT,
    "window": COUNT,
    "layer_width": COUNT,
    "token_width": COUNT,
    "feedforward": COUNT,
    "context_tokens": COUNT,
    "hidden_size": COUNT,
    "capacity": COUNT,
    # distances in layers
    "lookaheads": COUNT,
    "sources": COUNT,
    "stride": COUNT,
    "ahead": COUNT_OR_NONE,
    # vocabulary
    "min_count": COUNT,
    "known_tokens": COUNT_OR_NONE,
    "memory_tokens": COUNT_OR_NONE,
    "ngram_buckets": COUNT_OR_NONE,
    # copying from earlier tokens
    "copy_heads": COUNT_OR_NONE,
    "layer_copy_heads": COUNT_OR_NONE,
    # training
    "dropout": DROPPED,
    "token_dropout": DROPPED,
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
"""Argument -> its values; an argument means the same in all architectures."""
OPTIMIZATION: dict[str, Kind] = {"lr": POSITIVE, "weight_decay": NOT_NEGATIVE, "warmup": SHARE}
"""Argument of gradient descent -> its values."""


def check_arguments(architecture: str, values: Mapping[str, Any]) -> None:
    """Refuse arguments that are not within their limits.

    Args:
        architecture: Name of the predictor, for the message.
        values: Arguments by name; those without a limit are not looked at.

    Raises:
        UserError: An argument is out of its limits.
    """
    check_kinds({name: kind for name, kind in ARGUMENTS.items() if name in values}, values, f"{architecture}: ")
