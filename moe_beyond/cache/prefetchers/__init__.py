"""Prefetchers: the rules that select experts to transfer before they are demanded, one file each.

To add a prefetcher, write its file with a compiled ``select(cache, settings, future, layer)``, add its entry to
`PREFETCHERS`, and call it in ``_dispatch.py``. The parser, its error message, the help, the completion and the checks
of the settings read the table.
"""

from moe_beyond.cache.prefetchers.registry import (
    NO_THRESHOLD,
    PREFETCHERS,
    SYNTAX,
    Prefetch,
    Prefetcher,
    PrefetcherId,
    parse_prefetch,
)

__all__ = ["NO_THRESHOLD", "PREFETCHERS", "SYNTAX", "Prefetch", "Prefetcher", "PrefetcherId", "parse_prefetch"]
