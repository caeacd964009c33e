"""Lookaheads: when a score becomes available."""

import re
from typing import Literal

from moe_beyond.errors import UserError
from moe_beyond.safe_text import shown

Lookahead = int | Literal["computed", "token", "next"]
"""``"token"``: before the token's first MoE layer, for all layers. ``h >= 1``: once layer l - h of the same token is
routed; for l < h the score uses the token id and earlier tokens only, and is available when the token starts.
``"computed"``: once layer l - 1 of the same token is computed; for the first layer, when the token starts.
``"next"``: for layer l's next run, once the layer has run for the current token (for a sequence's first token: when the
token starts); the next token's id is not used. ``0``: the score reads the router's own input; no predictor of this
package has it, but imported scores may. The order, from the latest score to the earliest, is 0, ``"computed"``, 1, 2,
..., ``"token"``, ``"next"``. If several scores of a layer are available, the first of them in this order is used."""

NAMED_LOOKAHEADS: tuple[Literal["computed", "token", "next"], ...] = ("computed", "token", "next")
"""Lookaheads that are no numbers, in their order."""


def parse_lookahead(text: str | int) -> Lookahead:
    """Parse a lookahead of an option or of a JSON file.

    Args:
        text: ``"computed"``, ``"token"``, ``"next"`` or a number of layers.

    Raises:
        UserError: The text is not a lookahead.

    Example:
        >>> parse_lookahead("2"), parse_lookahead("token")
        (2, 'token')
    """
    for name in NAMED_LOOKAHEADS:
        if text == name:
            return name
    if re.fullmatch(r"\d{1,9}", str(text), re.ASCII):
        return int(text)
    raise UserError(
        f"lookahead {shown(text)} is neither 'computed', 'token', 'next' nor a number of layers (0, 1, 2, ...)"
    )


def format_lookahead(lookahead: Lookahead | None) -> str:
    """Write a lookahead as options, tables and cards show it; None, a strategy that reads all scores, is ``all``."""
    return "all" if lookahead is None else str(lookahead)


def moments(num_layers: int) -> list[tuple[int, bool]]:
    """Return the moments of a token at which scores may become available, in order.

    Args:
        num_layers: Number of layers, L.

    Returns:
        Layer, and whether it is computed instead of routed; layer -1 is the token's start.

    Example:
        >>> moments(2)
        [(-1, False), (0, False), (0, True), (1, False), (1, True)]
    """
    return [(-1, False), *((layer, computed) for layer in range(num_layers) for computed in (False, True))]


def reaches(lookahead: Lookahead, layer: int, routed: int, *, computed: bool) -> bool:
    """Return whether the score of a layer of the same token is available.

    Args:
        lookahead: Lookahead of the score.
        layer: Layer of the score, which is not routed yet.
        routed: Last routed layer; -1 at the token's start.
        computed: Whether that layer is computed, too.
    """
    if lookahead == "computed":
        return layer == 0 or (computed and layer - 1 == routed)
    return isinstance(lookahead, str) or layer - lookahead <= routed
