"""belief: evict what is believed to be used again last.

An expert whose layer runs again in d events, then uses it with probability p, and with q each time after that, is next
used in about d + L (1 - p) / q events. p is the predictor's score where one is known, else the history's; q is the
history's, but never below p: a low score tells of one run only, a high one of more.

The history's probability is calibrated: it is looked up in a table, counted on training text, by how many tokens ago
the expert was last used in this sequence and by how often it is used (`moe_beyond.profile`). Without a profile all
experts count as equally popular, and a table of the same shape stands in. A prefetch that would be the worst resident
is not made.
"""

from typing import NamedTuple

import numpy as np

from moe_beyond.cache.core import IN_LAYER, LAST, LAYER, PLACE, CacheState, Floats, Ints, Verbs, is_held
from moe_beyond.cache.inputs import PolicyInputs
from moe_beyond.cache.jit import jit
from moe_beyond.cache.policies.scan import events_ahead
from moe_beyond.profile import AGE_EDGES, DECAY, PRIOR, RATE_EDGES, default_hazard

NEEDS: tuple[str, ...] = ()
OFFERS_SCORES = False


OLDEST = int(AGE_EDGES[-1])


class BeliefState(NamedTuple):
    """What is believed of every expert, ``(L*E,)`` each, and of every layer.

    Attributes:
        age: Runs of its layer since the expert was used; 0 for never.
        uses: How often it was, faded.
        prior: How often in training, times its weight.
        hazard: The probability that the next run uses it, by its history.
        wait: Events beyond d until its next use.
        runs: ``(L,)``, how often each layer ran, faded.
        table: ``(ages, rates)``, the hazard by buckets.
        waits: ``(ages, rates)``, the events beyond d that it makes.
        buckets: ``(OLDEST + 1,)``, the bucket of each age.
        edges: ``(rates - 1,)``, where the buckets of rates begin.
        worst: ``(L,)``, of every layer the resident with the longest wait, of those not fresh; -1 for none.
        stale: ``(L,)``, whether that has to be found anew.
        fresh: ``(L*E,)``, experts that were shielded when they were last looked at, which may not go.
        is_fresh: ``(L*E,)``, whether an expert is among those.
        pending: ``(1,)``, how many those are.
    """

    age: Ints
    uses: Floats
    prior: Floats
    hazard: Floats
    wait: Floats
    runs: Floats
    table: Floats
    waits: Floats
    buckets: Ints
    edges: Floats
    worst: Ints
    stale: Ints
    fresh: Ints
    is_fresh: Ints
    pending: Ints


def state(inputs: PolicyInputs) -> BeliefState:
    """Believe what training tells."""
    layers, total = inputs.geometry.num_layers, inputs.num_ids
    table = default_hazard() if inputs.profile is None else np.ascontiguousarray(inputs.profile.hazard, np.float64)
    popularity = inputs.popularity()
    edges = np.array(RATE_EDGES)
    hazard = table[0, np.searchsorted(edges, popularity, side="right")]
    return BeliefState(
        age=np.zeros(total, np.int64),
        uses=np.zeros(total),
        prior=PRIOR * popularity,
        hazard=hazard,
        wait=layers * (1 - hazard) / hazard,
        runs=np.zeros(layers),
        table=table,
        waits=layers * (1 - table) / table,
        buckets=np.searchsorted(AGE_EDGES, np.arange(OLDEST + 1), side="right"),
        edges=edges,
        worst=np.full(layers, -1),
        stale=np.ones(layers, np.int64),
        fresh=np.zeros(total, np.int64),
        is_fresh=np.zeros(total, np.int64),
        pending=np.zeros(1, np.int64),
    )


@jit
def touch(policy: BeliefState, cache: CacheState, expert: int) -> None:
    """Note that an expert is resident and shielded."""
    evict(policy, cache, expert)
    if policy.is_fresh[expert] == 0:
        policy.is_fresh[expert] = 1
        policy.fresh[policy.pending[0]] = expert
        policy.pending[0] += 1


@jit
def evict(policy: BeliefState, cache: CacheState, expert: int) -> None:
    """Note that an expert may not go any more."""
    layer = cache.experts[IN_LAYER, expert]
    if policy.worst[layer] == expert:
        policy.stale[layer] = 1


@jit
def routed(policy: BeliefState, cache: CacheState, experts: Ints, tokens: Ints) -> None:
    """Bring the history of the layer's experts up to date."""
    size, layer = cache.experts.shape[1] // len(cache.counters), cache.now[LAYER]
    first = layer * size
    age, uses = policy.age[first : first + size], policy.uses[first : first + size]
    prior, hazard = policy.prior[first : first + size], policy.hazard[first : first + size]
    wait = policy.wait[first : first + size]
    policy.stale[layer] = 1
    policy.runs[layer] = DECAY * policy.runs[layer] + 1
    for i in range(size):
        uses[i] *= DECAY
        age[i] = min(age[i] + 1, OLDEST) if age[i] > 0 else 0
    for expert in experts:
        uses[expert - first] += 1
        age[expert - first] = 1
    weight = PRIOR + policy.runs[layer]
    for i in range(size):
        rate, bucket = (prior[i] + uses[i]) / weight, 0
        for edge in policy.edges:  # to the end: no branch to guess wrong
            bucket += 1 if rate >= edge else 0
        row = policy.buckets[age[i]]
        hazard[i], wait[i] = policy.table[row, bucket], policy.waits[row, bucket]


@jit
def learned(policy: BeliefState, cache: CacheState, layer: int) -> None:
    """Take in the scores of a layer's next run."""
    layers = float(len(cache.counters))
    size = cache.experts.shape[1] // len(cache.counters)
    first = layer * size
    policy.stale[layer] = 1
    known, hazard = cache.known[first : first + size], policy.hazard[first : first + size]
    wait = policy.wait[first : first + size]
    for i in range(size):
        wait[i] = layers * (1.0 - known[i]) / max(known[i], hazard[i])


@jit
def worth(policy: BeliefState, cache: CacheState, expert: int) -> float:
    """Return minus the events until the next use."""
    return -(events_ahead(cache, expert) + policy.wait[expert])


@jit
def _find_worst(policy: BeliefState, cache: CacheState, layer: int) -> None:
    """Find the resident of a layer with the longest wait, of those not fresh."""
    size = cache.experts.shape[1] // len(cache.counters)
    first, worst = layer * size, -1
    place, fresh = cache.experts[PLACE, first : first + size], policy.is_fresh[first : first + size]
    for i in range(size):
        if place[i] >= 0 and fresh[i] == 0:
            expert = first + i
            if worst < 0 or _goes_before(policy.wait[expert], policy.wait[worst], cache, expert, worst):
                worst = expert
    policy.worst[layer], policy.stale[layer] = worst, 0


@jit
def _settle(policy: BeliefState, cache: CacheState) -> None:
    """Let those be considered whose shield is gone."""
    kept = 0
    for i in range(policy.pending[0]):
        expert = policy.fresh[i]
        if cache.experts[PLACE, expert] >= 0 and is_held(cache, expert):
            policy.fresh[kept] = expert
            kept += 1
            continue
        policy.is_fresh[expert] = 0
        layer = cache.experts[IN_LAYER, expert]
        if cache.experts[PLACE, expert] >= 0 and policy.stale[layer] == 0:
            worst = policy.worst[layer]
            if worst < 0 or _goes_before(policy.wait[expert], policy.wait[worst], cache, expert, worst):
                policy.worst[layer] = expert
    policy.pending[0] = kept


@jit
def _goes_before(wait: float, other_wait: float, cache: CacheState, expert: int, other: int) -> bool:
    """Compare two by what they wait; ties by recency, then by the lower id."""
    if wait != other_wait:
        return wait > other_wait
    last, other_last = cache.experts[LAST, expert], cache.experts[LAST, other]
    return last < other_last or (last == other_last and expert < other)


@jit
def victim(policy: BeliefState, cache: CacheState, pool: int) -> int:
    """Return the one that is used again last."""
    _settle(policy, cache)
    layers = len(cache.counters)
    first, beyond = (0, layers) if len(cache.pools) == 1 else (pool, pool + 1)
    best, longest = -1, 0.0
    for layer in range(first, beyond):
        if policy.stale[layer] == 1:
            _find_worst(policy, cache, layer)
        worst = policy.worst[layer]
        if worst >= 0:
            until = events_ahead(cache, worst) + policy.wait[worst]
            if best < 0 or _goes_before(until, longest, cache, worst, best):
                best, longest = worst, until
    return best


@jit
def admits(policy: BeliefState, cache: CacheState, expert: int, victim: int) -> bool:
    """Let in what is used again sooner."""
    return worth(policy, cache, expert) > worth(policy, cache, victim)


VERBS = Verbs(touch, touch, evict, victim, routed, learned, admits)
