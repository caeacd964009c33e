"""When a score is known."""

from typing import Literal

from moe_beyond.errors import UserError

Lookahead = int | Literal["token", "next"]
"""``h >= 1`` layers ahead, before the token's first layer (``"token"``), or as soon as the layer ran (``"next"``).

``h`` means: after layer l-h of the same token was routed. Where l < h there is no such layer, and the score uses the
token's id and everything before the token, and exists when the token starts. ``0`` reads the router's own input; no
predictor of this package has it, but imported scores may. ``"next"`` is known once layer l of the token before was
routed, or, for a sequence's first token, when that starts; the token's id has no part in it.
"""


def parse_lookahead(text: str | int) -> Lookahead:
    """Read a lookahead as options and JSON write it.

    Raises:
        UserError: It is neither ``token``, ``next`` nor a whole number from 0.

    Example:
        >>> parse_lookahead("2"), parse_lookahead("token")
        (2, 'token')
    """
    if text == "token":
        return "token"
    if text == "next":
        return "next"
    if str(text).isascii() and str(text).isdigit():
        return int(text)
    raise UserError(f"lookahead {text!r} is neither 'token', 'next' nor a number of layers (0, 1, 2, ...)")


def format_lookahead(lookahead: Lookahead | None) -> str:
    """Write a lookahead as options, tables and cards show it; None, a strategy that reads all scores, is ``all``."""
    return "all" if lookahead is None else str(lookahead)
