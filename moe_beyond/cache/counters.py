"""Counters of a replay."""

from enum import IntEnum


class Counter(IntEnum):
    """Columns of `CacheState.counters`; the names in lower case are the keys of a result."""

    ACCESSES = 0
    HITS = 1
    LATE_HITS = 2
    MISSES = 3
    DEMAND_TRANSFERS = 4
    PREFETCH_TRANSFERS = 5
    USEFUL_PREFETCHES = 6
    WASTED_PREFETCHES = 7
    ON_HOST = 8


COUNTERS = tuple(counter.name.lower() for counter in Counter)
"""Names of the counters, in the order of their columns."""
