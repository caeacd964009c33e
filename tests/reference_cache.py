"""The rules of the cache in plain Python, written from DESIGN.md and the docstrings, to check the package against.

An expert is a pair (layer, expert). Nothing here is shared with the package, and nothing is fast.
"""

from collections import defaultdict
from collections.abc import Iterator

COUNTERS = (
    "accesses",
    "hits",
    "late_hits",
    "misses",
    "demand_transfers",
    "prefetch_transfers",
    "useful_prefetches",
    "wasted_prefetches",
)

Expert = tuple[int, int]


def split_slots(slots: int, layers: int, scope: str) -> list[int]:
    """Slots of every pool: one pool, or one a layer with the remainder in the first layers."""
    if scope == "global":
        return [slots]
    pools = [slots // layers] * layers
    for layer in range(slots % layers):
        pools[layer] += 1
    return pools


def moments(
    length: int, layers: int, prefetching: bool, distance: int, first_layers: bool
) -> Iterator[tuple[str, int, int]]:
    """List what happens in a sequence, in order: ("token" | "prefetch" | "event", token, layer)."""
    for token in range(length):
        yield "token", token, -1
        if prefetching and first_layers:
            for layer in range(layers):
                if layer < distance:
                    yield "prefetch", token, layer
        for layer in range(layers):
            if prefetching and distance == 0 and (first_layers or layer > 0):
                yield "token", token, -1  # asked between two events: nothing computes
                yield "prefetch", token, layer
            yield "event", token, layer
            if prefetching and distance > 0 and layer + distance < layers:
                yield "prefetch", token, layer + distance


def best(scores: list[float], m: int) -> list[int]:
    """Name the m best-scored experts, best first, ties by the lower id."""
    return sorted(range(len(scores)), key=lambda expert: (-scores[expert], expert))[:m]


class ReferenceCache:
    """A cold cache.

    Args:
        pools: Slots of every pool, from `split_slots`.
        policy: "lru", "lfu" or "belady".
        future: The sequence, [token][layer] -> experts, for Belady.
    """

    def __init__(self, pools: list[int], policy: str, future: list[list[list[int]]]) -> None:
        self.pools, self.policy = pools, policy
        self.resident: list[set[Expert]] = [set() for _ in pools]
        self.held: set[Expert] = set()  # no victims: computing now, or asked for since that began
        self.open: set[Expert] = set()  # counted prefetches not demanded yet
        self.event = 0  # number of the last event
        self.moment = 0  # number of the last event or prefetch
        self.uses: dict[Expert, int] = defaultdict(int)
        self.last_event: dict[Expert, int] = {}
        self.last_moment: dict[Expert, int] = {}
        self.counts = defaultdict(lambda: dict.fromkeys(COUNTERS, 0))
        self.events_of: dict[Expert, list[int]] = defaultdict(list)
        number = 0
        for token in future:
            for layer, experts in enumerate(token):
                number += 1
                for expert in experts:
                    self.events_of[layer, expert].append(number)

    def everyone(self) -> set[Expert]:
        return set().union(*self.resident)

    def start_token(self) -> None:
        self.held = set()

    def demand(self, layer: int, experts: list[int], counted: bool) -> int:
        self.moment += 1
        self.event += 1
        asked = {(layer, expert) for expert in experts}
        before = self.everyone()
        self.held = set(asked)
        self._bring(layer, asked - before)
        for expert in asked:
            self._use(expert)
            if expert in self.open:
                self.open.remove(expert)
                self.counts[layer]["useful_prefetches"] += 1
        if counted:
            row = self.counts[layer]
            row["accesses"] += len(asked)
            row["hits"] += len(asked & before)
            row["misses"] += len(asked - before)
            row["demand_transfers"] += len(asked - before)
        return len(asked & before)

    def prefetch(self, layer: int, ranked: list[int], counted: bool) -> int:
        self.moment += 1
        named = [(layer, expert) for expert in ranked]
        pool = self._pool(layer)
        here = self.resident[pool] & set(named)
        self.held |= here
        room = self.pools[pool] - len(self.resident[pool] & self.held)
        coming = set([expert for expert in named if expert not in here][:room])
        self.held |= coming
        self._bring(layer, coming)
        for expert in here | coming:
            self._use(expert)
        if counted:
            self.open |= coming
            self.counts[layer]["prefetch_transfers"] += len(coming)
        return len(coming)

    def finish(self) -> None:
        for layer, _ in self.open:
            self.counts[layer]["wasted_prefetches"] += 1

    def _pool(self, layer: int) -> int:
        return 0 if len(self.pools) == 1 else layer

    def _bring(self, layer: int, coming: set[Expert]) -> None:
        """Let experts in; for those that find no free slot, the residents that the policy values least leave."""
        pool = self._pool(layer)
        leaving = len(self.resident[pool]) + len(coming) - self.pools[pool]
        for expert in sorted(self.resident[pool] - self.held, key=self._worth)[: max(leaving, 0)]:
            self.resident[pool].remove(expert)
            if expert in self.open:
                self.open.remove(expert)
                self.counts[expert[0]]["wasted_prefetches"] += 1
        self.resident[pool] |= coming
        assert len(self.resident[pool]) <= self.pools[pool]

    def _use(self, expert: Expert) -> None:
        self.uses[expert] += 1
        self.last_event[expert] = self.event
        self.last_moment[expert] = self.moment

    def _worth(self, expert: Expert) -> tuple:
        """What leaves first sorts first; ties leave by the lowest (layer, expert)."""
        if self.policy == "lru":
            return self.last_moment[expert], expert
        if self.policy == "lfu":  # a prefetch has the recency of the last event before it, see lfu.LfuState.last
            return self.uses[expert], self.last_event[expert], expert
        if self.policy == "belady":
            later = [event for event in self.events_of[expert] if event > self.event]
            return -min(later, default=float("inf")), expert
        raise ValueError(f"the reference does not know the policy {self.policy!r}")
