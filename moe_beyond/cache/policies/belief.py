"""belief: evict what is believed to be worth least for the time that it holds a slot.

An expert's layer runs again in d events and uses it then with probability p, and with q each time after that. Kept for
that run alone it gives p hits in d events; kept until it is used, one in about d + L (1 - p) / q. The better of the two
is what a slot can get from it, hits by time (Beckmann, Chen and Cidon 2018, "LHD"); who gets least is evicted. Here
the inverse is compared: the events that a hit takes.

p is the predictor's score where one is known, else the history's. q is the history's too, but at least what was said of
the run when the run before it was over (lookahead ``next``): what was near to be used then and is not now may be soon.

The history's probability is calibrated: it is looked up in a table, counted on training text, by how many tokens ago
the expert was last used in this sequence and by how often it is used (`moe_beyond.usage_profile`). Without a profile
all experts count as equally popular, and a table of the same shape stands in. A prefetch that would be the worst
resident is not made.
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
from moe_beyond.cache.jit import jit
from moe_beyond.cache.policies.scan import events_ahead, layers_ahead
from moe_beyond.cache.policy_inputs import PolicyInputs
from moe_beyond.usage_profile import AGE_EDGES, DECAY, PRIOR, RATE_EDGES, default_hazard

NEEDS: tuple[str, ...] = ()
OFFERS_SCORES = False

LEAST = 1e-9  # of a probability
REMEMBERED = 2048  # runs after which nothing is left of a use that matters
# What `history` holds of each expert: how often training used it, times the weight of that; and how often this sequence
# had when it used it last, faded; and what was said of its next run when its layer had just run, 0 if nothing was.
PRIOR_USES, USES, SAID = range(3)
# What `places` holds of each expert: the run of its layer that used it last, 0 for none; and where among its layer's
# residents it is.
USED, INDEX = range(2)
# What `beliefs` holds of each resident: the history's probability; 1 / p; and the events beyond d until it is used, if
# it is kept so long.
HAZARD, INVERSE, WAIT = range(3)
# What `layers` holds of each: how often it ran, faded, and the weight of training; the highest `INVERSE` and `WAIT` of
# its residents; and room to work in.
WEIGHT, STEEPEST, LONGEST, BOUND = range(4)
# What `tally` holds of each layer: how often it ran; and how many residents it has.
RAN, MEMBERS = range(2)


class BeliefState(NamedTuple):
    """What is believed of every expert.

    What changes with every run is worked out for residents only: they are few, and others are seldom asked about.

    Attributes:
        history: ``(L*E, 3)``.
        places: ``(L*E, 2)``.
        layers: ``(4, L)``.
        tally: ``(2, L)``.
        members: ``(L, E)`` int32, the residents of each layer, in no order.
        beliefs: ``(3, L, E)``, in the same order.
        hazard: ``(ages, rates)``, the history's probability by age, the last for all above, and bucket of the rate.
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
    hazard: Floats
    edges: Floats
    fades: Floats
    start: float


def state(inputs: PolicyInputs) -> BeliefState:
    """Believe what training tells."""
    layers, total = inputs.geometry.num_layers, inputs.num_ids
    hazard = default_hazard() if inputs.profile is None else np.asarray(inputs.profile.hazard, np.float64)
    hazard = hazard[np.searchsorted(AGE_EDGES, np.arange(AGE_EDGES[-1] + 1), side="right")]
    history = np.zeros((total, 3))
    history[:, PRIOR_USES] = PRIOR * inputs.popularity()
    of_layers = np.zeros((4, layers))
    of_layers[WEIGHT] = PRIOR
    return BeliefState(
        history=history,
        places=np.zeros((total, 2), np.int64),
        layers=of_layers,
        tally=np.zeros((2, layers), np.int64),
        members=np.zeros(inputs.geometry.shape()[:2], np.int32),
        beliefs=np.zeros((3, *inputs.geometry.shape()[:2])),
        hazard=np.ascontiguousarray(hazard),
        edges=np.array(RATE_EDGES),
        fades=np.power(DECAY, np.arange(REMEMBERED), dtype=np.float64),
        start=PRIOR,
    )


@jit
def _hazard(policy: BeliefState, layer: int, expert: int) -> float:
    """Return the history's probability."""
    used = policy.places[expert, USED]
    since = policy.tally[RAN, layer] - used
    faded = policy.history[expert, USES] * policy.fades[unsigned(min(since, len(policy.fades) - 1))]
    rate, bucket = (policy.history[expert, PRIOR_USES] + faded) / policy.layers[WEIGHT, layer], 0
    for edge in policy.edges:  # to the end: no branch to guess wrong
        bucket += rate >= edge
    age = min(since + 1, len(policy.hazard) - 1) if used > 0 else 0
    return policy.hazard[unsigned(age), unsigned(bucket)]


@jit
def _believe(policy: BeliefState, cache: CacheState, expert: int) -> tuple[float, float, float]:
    """Return what `beliefs` holds, of any expert."""
    hazard = _hazard(policy, unsigned(cache.experts[IN_LAYER, expert]), expert)
    return _given(policy, cache, expert, hazard)


@jit
def _given(policy: BeliefState, cache: CacheState, expert: int, hazard: float) -> tuple[float, float, float]:
    """Return the same, given the history's probability."""
    score = cache.known[expert]
    p, q = hazard if np.isnan(score) else score, max(hazard, policy.history[expert, SAID])
    return hazard, 1.0 / max(p, LEAST), len(cache.counters) * (1.0 - p) / q


@jit
def _note(policy: BeliefState, layer: int, index: int, belief: tuple[float, float, float]) -> None:
    """Note what is believed of a layer's resident."""
    hazard, inverse, wait = belief
    policy.beliefs[HAZARD, layer, index] = hazard
    policy.beliefs[INVERSE, layer, index] = inverse
    policy.beliefs[WAIT, layer, index] = wait
    policy.layers[STEEPEST, layer] = max(policy.layers[STEEPEST, layer], inverse)
    policy.layers[LONGEST, layer] = max(policy.layers[LONGEST, layer], wait)


@jit
def insert(policy: BeliefState, cache: CacheState, expert: int) -> None:
    """Add to its layer's residents."""
    expert, layer = unsigned(expert), unsigned(cache.experts[IN_LAYER, expert])
    index = unsigned(policy.tally[MEMBERS, layer])
    policy.members[layer, index] = expert
    policy.places[expert, INDEX] = index
    policy.tally[MEMBERS, layer] += 1
    _note(policy, layer, index, _believe(policy, cache, expert))


@jit
def evict(policy: BeliefState, cache: CacheState, expert: int) -> None:
    """Take out of its layer's residents."""
    expert, layer = unsigned(expert), unsigned(cache.experts[IN_LAYER, expert])
    policy.tally[MEMBERS, layer] -= 1
    left, index = unsigned(policy.tally[MEMBERS, layer]), unsigned(policy.places[expert, INDEX])
    moved = unsigned(policy.members[layer, left])
    policy.members[layer, index], policy.places[moved, INDEX] = moved, index
    for row in range(3):
        policy.beliefs[row, layer, index] = policy.beliefs[row, layer, left]
    steepest = longest = 0.0
    for i in range(left):
        steepest = max(steepest, policy.beliefs[INVERSE, layer, unsigned(i)])
        longest = max(longest, policy.beliefs[WAIT, layer, unsigned(i)])
    policy.layers[STEEPEST, layer], policy.layers[LONGEST, layer] = steepest, longest


@jit
def routed(policy: BeliefState, cache: CacheState, experts: Ints, tokens: Ints) -> None:
    """Bring the history of the layer's experts up to date."""
    layer = unsigned(cache.now[LAYER])
    policy.tally[RAN, layer] += 1
    ran, weight = policy.tally[RAN, layer], policy.layers[WEIGHT, layer]
    policy.layers[WEIGHT, layer] = policy.start + policy.fades[1] * (weight - policy.start) + 1
    size = unsigned(cache.experts.shape[1] // len(cache.counters))
    for i in range(size):
        policy.history[layer * size + unsigned(i), SAID] = 0.0  # it was of this run
    for number in experts:
        expert = unsigned(number)
        since = unsigned(min(ran - policy.places[expert, USED], len(policy.fades) - 1))
        policy.history[expert, USES] = policy.history[expert, USES] * policy.fades[since] + 1
        policy.places[expert, USED] = ran
    policy.layers[STEEPEST, layer] = policy.layers[LONGEST, layer] = 0.0
    for i in range(policy.tally[MEMBERS, layer]):
        index = unsigned(i)
        _note(policy, layer, index, _believe(policy, cache, unsigned(policy.members[layer, index])))


@jit
def learned(policy: BeliefState, cache: CacheState, layer: int) -> None:
    """Take in the scores of a layer's next run."""
    layer = unsigned(layer)
    if cache.now[LAYER] == layer:  # it has just run
        size = unsigned(cache.experts.shape[1] // len(cache.counters))
        for i in range(size):
            expert = layer * size + unsigned(i)
            policy.history[expert, SAID] = cache.known[expert]
    policy.layers[STEEPEST, layer] = policy.layers[LONGEST, layer] = 0.0
    for i in range(policy.tally[MEMBERS, layer]):
        index = unsigned(i)
        expert = unsigned(policy.members[layer, index])
        _note(policy, layer, index, _given(policy, cache, expert, policy.beliefs[HAZARD, layer, index]))


@jit
def _goes_before(cache: CacheState, expert: int, other: int) -> bool:
    """Compare two that wait equally long: by recency, then by the lower id."""
    last, other_last = cache.experts[LAST, expert], cache.experts[LAST, other]
    return last < other_last or (last == other_last and expert < other)


@jit
def victim(policy: BeliefState, cache: CacheState, pool: int) -> int:
    """Return the one that takes most time for a hit.

    Layers are looked at in the order of what their residents take at most, until no other may have one that takes more.
    """
    first, beyond = (0, len(cache.counters)) if len(cache.pools) == 1 else (pool, pool + 1)
    bound = policy.layers[BOUND, first:beyond]
    for i in range(len(bound)):
        ahead = float(layers_ahead(cache, first + i))
        layer = unsigned(first + i)
        bound[i] = min(ahead * policy.layers[STEEPEST, layer], ahead + policy.layers[LONGEST, layer])
    bits = bound.view(np.int64)  # of numbers from 0 these are ordered alike, and the compiler compares several at once
    best, most = -1, 0.0
    for _ in range(len(bound)):
        highest = bits[0]
        for i in range(1, len(bits)):
            highest = max(highest, bits[unsigned(i)])
        place = 0
        while bits[unsigned(place)] != highest:
            place += 1
        if bound[unsigned(place)] < most:
            break
        bound[unsigned(place)] = 0.0
        layer, ahead = unsigned(first + place), float(layers_ahead(cache, first + place))
        for i in range(policy.tally[MEMBERS, layer]):
            index = unsigned(i)
            takes = min(ahead * policy.beliefs[INVERSE, layer, index], ahead + policy.beliefs[WAIT, layer, index])
            if takes >= most:
                expert = unsigned(policy.members[layer, index])
                if not is_held(cache, expert) and (best < 0 or takes > most or _goes_before(cache, expert, best)):
                    best, most = int(expert), takes
    return best


@jit
def admits(policy: BeliefState, cache: CacheState, expert: int, victim: int) -> bool:
    """Let in what takes less."""
    ahead, other = float(events_ahead(cache, expert)), float(events_ahead(cache, victim))
    _, inverse, wait = _believe(policy, cache, unsigned(expert))
    layer, index = cache.experts[IN_LAYER, victim], policy.places[victim, INDEX]
    takes = min(other * policy.beliefs[INVERSE, layer, index], other + policy.beliefs[WAIT, layer, index])
    return min(ahead * inverse, ahead + wait) < takes


VERBS = Verbs(ignore_expert, insert, evict, victim, routed, learned, admits)
