"""Lookaheads: when a score becomes available."""

import re
from typing import Literal

from moe_beyond.errors import UserError
from moe_beyond.safe_text import shown

Lookahead = int | Literal["token", "next"]
"""``"token"``: before the token's first MoE layer, for all layers. ``h >= 1``: once layer l - h of the same token is
routed; for l < h the score uses the token id and earlier tokens only, and is available when the token starts.
``"next"``: for layer l's next run, once the layer has run for the current token (for a sequence's first token: when the
token starts); the next token's id is not used. ``0``: the score reads the router's own input; no predictor of this
package has it, but imported scores may."""


def parse_lookahead(text: str | int) -> Lookahead:
    """Parse a lookahead of an option or of a JSON file.

    Args:
        text: ``"token"``, ``"next"`` or a number of layers.

    Raises:
        UserError: The text is not a lookahead.

    Example:
        >>> parse_lookahead("2"), parse_lookahead("token")
        (2, 'token')
    """
    if text == "token":
        return "token"
    if text == "next":
        return "next"
    if re.fullmatch(r"\d{1,9}", str(text), re.ASCII):
        return int(text)
    raise UserError(f"lookahead {shown(text)} is neither 'token', 'next' nor a number of layers (0, 1, 2, ...)")


def format_lookahead(lookahead: Lookahead | None) -> str:
    """Write a lookahead as options, tables and cards show it; None, a strategy that reads all scores, is ``all``."""
    return "all" if lookahead is None else str(lookahead)
