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
import numpy.typing as npt

from moe_beyond.cache.core import (
    IN_LAYER,
    LAST,
    LAYER,
    CacheState,
    Floats,
    Ints,
    Verbs,
    ignore_expert,
    is_held,
    unsigned,
)
from moe_beyond.cache.inputs import PolicyInputs
from moe_beyond.cache.jit import jit
from moe_beyond.cache.policies.scan import events_ahead, layers_ahead
from moe_beyond.profile import AGE_EDGES, DECAY, PRIOR, RATE_EDGES, default_hazard

NEEDS: tuple[str, ...] = ()
OFFERS_SCORES = False

REMEMBERED = 2048  # runs after which nothing is left of a use that matters
# What `history` holds of each expert: how often training used it, times the weight of that; and how often this sequence
# had when it used it last, faded.
PRIOR_USES, USES = range(2)
# What `places` holds of each expert: the run of its layer that used it last, 0 for none; and where among its layer's
# residents it is.
USED, INDEX = range(2)
# What `beliefs` holds of each resident, and `table` of each history: the probability that the next run of the expert's
# layer uses it, by its history; and the events beyond d until its next use.
HAZARD, WAIT = range(2)
# What `layers` holds of each: how often it ran, faded, and the weight of training; how long the one of its residents
# waits that waits longest; and room to work in, for the longest that is not shielded and the events until its use.
WEIGHT, LONGEST, FREE, UNTIL = range(4)
# What `tally` holds of each layer: how often it ran; and how many residents it has.
RAN, MEMBERS = range(2)


class BeliefState(NamedTuple):
    """What is believed of every expert.

    What changes with every run is worked out for residents only: they are few, and others are seldom asked about.

    Attributes:
        history: ``(L*E, 2)``.
        places: ``(L*E, 2)``.
        layers: ``(4, L)``.
        tally: ``(2, L)``.
        members: ``(L, E)`` int32, the residents of each layer, in no order.
        beliefs: ``(2, L, E)``, in the same order.
        table: ``(2, ages, rates)``, by age, the last for all above, and bucket of the rate.
        edges: ``(rates - 1,)``, where the buckets of rates begin.
        fades: ``(REMEMBERED,)``, what is left of a use after so many runs.
        start: The weight of training.
    """

    history: Floats
    places: Ints
    layers: Floats
    tally: Ints
    members: npt.NDArray[np.int32]
    beliefs: Floats
    table: Floats
    edges: Floats
    fades: Floats
    start: float


def state(inputs: PolicyInputs) -> BeliefState:
    """Believe what training tells."""
    layers, total = inputs.geometry.num_layers, inputs.num_ids
    hazard = default_hazard() if inputs.profile is None else np.asarray(inputs.profile.hazard, np.float64)
    hazard = hazard[np.searchsorted(AGE_EDGES, np.arange(AGE_EDGES[-1] + 1), side="right")]
    history = np.zeros((total, 2))
    history[:, PRIOR_USES] = PRIOR * inputs.popularity()
    of_layers = np.zeros((4, layers))
    of_layers[WEIGHT] = PRIOR
    return BeliefState(
        history=history,
        places=np.zeros((total, 2), np.int64),
        layers=of_layers,
        tally=np.zeros((2, layers), np.int64),
        members=np.zeros(inputs.geometry.shape()[:2], np.int32),
        beliefs=np.zeros((2, *inputs.geometry.shape()[:2])),
        table=np.stack([hazard, layers * (1 - hazard) / hazard]),
        edges=np.array(RATE_EDGES),
        fades=np.power(DECAY, np.arange(REMEMBERED), dtype=np.float64),
        start=PRIOR,
    )


@jit
def _history(policy: BeliefState, layer: int, expert: int) -> tuple[int, int]:
    """Return an expert's age, and the bucket of its rate."""
    used = policy.places[expert, USED]
    since = policy.tally[RAN, layer] - used
    faded = policy.history[expert, USES] * policy.fades[unsigned(min(since, len(policy.fades) - 1))]
    rate, bucket = (policy.history[expert, PRIOR_USES] + faded) / policy.layers[WEIGHT, layer], 0
    for edge in policy.edges:  # to the end: no branch to guess wrong
        bucket += rate >= edge
    return unsigned(min(since + 1, policy.table.shape[1] - 1) if used > 0 else 0), unsigned(bucket)


@jit
def _scored_wait(cache: CacheState, score: float, hazard: float) -> float:
    return len(cache.counters) * (1.0 - score) / max(score, hazard)


@jit
def _wait(policy: BeliefState, cache: CacheState, expert: int, age: int, rate: int) -> float:
    """Return the events beyond d until an expert's next use."""
    score = cache.known[expert]
    return (
        policy.table[WAIT, age, rate]
        if np.isnan(score)
        else _scored_wait(cache, score, policy.table[HAZARD, age, rate])
    )


@jit
def insert(policy: BeliefState, cache: CacheState, expert: int) -> None:
    """Add to its layer's residents."""
    expert, layer = unsigned(expert), unsigned(cache.experts[IN_LAYER, expert])
    age, rate = _history(policy, layer, expert)
    wait = _wait(policy, cache, expert, age, rate)
    policy.layers[LONGEST, layer] = max(policy.layers[LONGEST, layer], wait)
    index = unsigned(policy.tally[MEMBERS, layer])
    policy.members[layer, index] = expert
    policy.beliefs[HAZARD, layer, index], policy.beliefs[WAIT, layer, index] = policy.table[HAZARD, age, rate], wait
    policy.places[expert, INDEX] = index
    policy.tally[MEMBERS, layer] += 1


@jit
def evict(policy: BeliefState, cache: CacheState, expert: int) -> None:
    """Take out of its layer's residents."""
    expert, layer = unsigned(expert), unsigned(cache.experts[IN_LAYER, expert])
    policy.tally[MEMBERS, layer] -= 1
    left, index = unsigned(policy.tally[MEMBERS, layer]), unsigned(policy.places[expert, INDEX])
    moved = unsigned(policy.members[layer, left])
    policy.members[layer, index], policy.places[moved, INDEX] = moved, index
    for row in range(2):
        policy.beliefs[row, layer, index] = policy.beliefs[row, layer, left]
    longest = 0.0
    for wait in policy.beliefs[WAIT, layer, :left]:
        longest = max(longest, wait)
    policy.layers[LONGEST, layer] = longest


@jit
def routed(policy: BeliefState, cache: CacheState, experts: Ints, tokens: Ints) -> None:
    """Bring the history of the layer's experts up to date."""
    layer = unsigned(cache.now[LAYER])
    policy.tally[RAN, layer] += 1
    ran, weight = policy.tally[RAN, layer], policy.layers[WEIGHT, layer]
    policy.layers[WEIGHT, layer] = policy.start + policy.fades[1] * (weight - policy.start) + 1
    for number in experts:
        expert = unsigned(number)
        since = unsigned(min(ran - policy.places[expert, USED], len(policy.fades) - 1))
        policy.history[expert, USES] = policy.history[expert, USES] * policy.fades[since] + 1
        policy.places[expert, USED] = ran
    longest = 0.0
    for i in range(policy.tally[MEMBERS, layer]):
        index = unsigned(i)
        age, rate = _history(policy, layer, unsigned(policy.members[layer, index]))
        wait = policy.table[WAIT, age, rate]
        policy.beliefs[HAZARD, layer, index], policy.beliefs[WAIT, layer, index] = policy.table[HAZARD, age, rate], wait
        longest = max(longest, wait)
    policy.layers[LONGEST, layer] = longest


@jit
def learned(policy: BeliefState, cache: CacheState, layer: int) -> None:
    """Take in the scores of a layer's next run."""
    longest, layer = 0.0, unsigned(layer)
    for i in range(policy.tally[MEMBERS, layer]):
        index = unsigned(i)
        score = cache.known[unsigned(policy.members[layer, index])]
        wait = _scored_wait(cache, score, policy.beliefs[HAZARD, layer, index])
        policy.beliefs[WAIT, layer, index] = wait
        longest = max(longest, wait)
    policy.layers[LONGEST, layer] = longest


@jit
def _goes_before(cache: CacheState, expert: int, other: int) -> bool:
    """Compare two that wait equally long: by recency, then by the lower id."""
    last, other_last = cache.experts[LAST, expert], cache.experts[LAST, other]
    return last < other_last or (last == other_last and expert < other)


@jit
def _who_waits(policy: BeliefState, cache: CacheState, layer: int, wait: float) -> int:
    """Return the resident of a layer that waits so long and is not shielded, -1 for none."""
    worst, waits = -1, policy.beliefs[WAIT, layer]
    for i in range(policy.tally[MEMBERS, layer]):
        if waits[unsigned(i)] == wait:
            expert = unsigned(policy.members[layer, unsigned(i)])
            if not is_held(cache, expert) and (worst < 0 or _goes_before(cache, expert, worst)):
                worst = int(expert)
    return worst


@jit
def _longest_free(policy: BeliefState, cache: CacheState, layer: int) -> float:
    """Return how long a resident of a layer waits at most that is not shielded; all are: minus infinity."""
    longest, waits = -np.inf, policy.beliefs[WAIT, layer]
    for i in range(policy.tally[MEMBERS, layer]):
        if not is_held(cache, unsigned(policy.members[layer, unsigned(i)])):
            longest = max(longest, waits[unsigned(i)])
    return longest


@jit
def victim(policy: BeliefState, cache: CacheState, pool: int) -> int:
    """Return the one that is used again last.

    The layer where one waits longest is looked at first; only if that one is shielded others are.
    """
    first, beyond = (0, len(cache.counters)) if len(cache.pools) == 1 else (pool, pool + 1)
    until, free = policy.layers[UNTIL, first:beyond], policy.layers[FREE, first:beyond]
    longest = policy.layers[LONGEST, first:beyond]
    for i in range(len(until)):
        free[i] = longest[i]
        until[i] = longest[i] + layers_ahead(cache, first + i)
    bits = until.view(np.int64)  # of numbers from 0 these are ordered alike, and the compiler compares several at once
    while True:
        last = bits[0]
        for i in range(1, len(bits)):
            last = max(last, bits[unsigned(i)])
        best = -1
        for i in range(len(bits)):
            if bits[unsigned(i)] == last:
                layer = unsigned(first + i)
                worst = _who_waits(policy, cache, layer, free[i])
                if worst < 0:
                    free[i] = _longest_free(policy, cache, layer)
                    until[i] = free[i] + layers_ahead(cache, first + i)
                elif best < 0 or _goes_before(cache, worst, best):
                    best = worst
        if best >= 0:
            return best


@jit
def admits(policy: BeliefState, cache: CacheState, expert: int, victim: int) -> bool:
    """Let in what is used again sooner."""
    age, rate = _history(policy, unsigned(cache.experts[IN_LAYER, expert]), unsigned(expert))
    until = events_ahead(cache, expert) + _wait(policy, cache, unsigned(expert), age, rate)
    other = policy.beliefs[WAIT, cache.experts[IN_LAYER, victim], policy.places[victim, INDEX]]
    return until < events_ahead(cache, victim) + other


VERBS = Verbs(ignore_expert, insert, evict, victim, routed, learned, admits)
