"""Names of the ways to handle a miss; `moe_beyond.cache.host_choice` has their rules."""

from enum import IntEnum


class Handling(IntEnum):
    """Ways to handle a miss; the names in lower case are the values of ``--misses``."""

    MOVE = 0
    CPU = 1
    BEST = 2


MISSES = tuple(handling.name.lower() for handling in Handling)
"""Values of ``--misses``."""
MOVE = MISSES[Handling.MOVE]
"""Default of ``--misses``: every missing expert is transferred."""
