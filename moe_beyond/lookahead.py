"""When a score is known."""

from typing import Literal

from moe_beyond.errors import UserError

Lookahead = int | Literal["token"]
"""Before the token's first layer (``"token"``), or ``h >= 1`` layers ahead.

``h`` means: after layer l-h of the same token was routed. Where l < h there is no such layer, and the score uses the
token's id and everything before the token, and exists when the token starts. ``0`` reads the router's own input; no
predictor of this package has it, but imported scores may.
"""


def parse_lookahead(text: str | int) -> Lookahead:
    """Read a lookahead as options and JSON write it.

    Raises:
        UserError: It is neither ``token`` nor a whole number from 0.

    Example:
        >>> parse_lookahead("2"), parse_lookahead("token")
        (2, 'token')
    """
    if text == "token":
        return "token"
    if str(text).isascii() and str(text).isdigit():
        return int(text)
    raise UserError(f"lookahead {text!r} is neither 'token' nor a number of layers (0, 1, 2, ...)")
