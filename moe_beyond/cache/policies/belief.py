"""belief: evict the expert with the lowest expected hits per event that it holds a slot.

An expert's layer runs again in d events and uses the expert then with probability p, and with probability q at each
later run. If it is kept for the next run only, it gives p hits in d events. If it is kept until its next use, it gives
one hit in about d + L (1 - p) / q events. The better of the two is its hit density (Beckmann, Chen and Cidon 2018,
"LHD"); the resident with the lowest density is evicted. The code compares the inverse: the events per hit.

The probability p is the predictor's score if one is available, otherwise the history's probability. The probability q
is the history's probability, but at least the score of lookahead ``next`` that the layer's last run made available. An
expert that was likely then and is not now may be used soon.

The history's probability is calibrated. It is looked up in a table, counted on training text, by the number of tokens
since the expert's last use in this sequence and by its rate of use (`moe_beyond.usage_profile`). Without a profile all
experts are equally popular, and a default table of the same shape is used. A prefetch that would be the worst resident
is not admitted.
"""

from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.compiler import jit
from moe_beyond.cache.core import (
    CacheState,
    Clock,
    Expert,
    Floats,
    Ints,
    PolicyHooks,
    ignore_expert,
    is_pinned,
    unsigned,
)
from moe_beyond.cache.policies._scan import events_ahead, goes_before, layers_ahead
from moe_beyond.cache.policy_inputs import PolicyInputs
from moe_beyond.usage_profile import AGE_EDGES, DECAY, PRIOR, RATE_EDGES, default_hazard

NEEDS: tuple[str, ...] = ()
OFFERS_SCORES = False

MIN_PROBABILITY = 1e-9
MEMORY_RUNS = 2048  # runs after which the weight of a use is negligible


class History(IntEnum):
    """Columns of `BeliefState.history`.

    ``PRIOR_USES`` is the popularity in training times its weight. ``USES`` is the decayed number of uses in this
    sequence at the last use. ``NEXT_SCORE`` is the score of the next run that was available right after the last run, 0
    if there was none.
    """

    PRIOR_USES = 0
    USES = 1
    NEXT_SCORE = 2


class Place(IntEnum):
    """Columns of `BeliefState.places`: last run of the layer that used the expert, 0 for none; index in `members`."""

    LAST_RUN = 0
    INDEX = 1


class Belief(IntEnum):
    """Rows of `BeliefState.beliefs`: the history's probability, 1 / p, and the events beyond d until the next use."""

    HAZARD = 0
    INVERSE = 1
    WAIT = 2


class Layer(IntEnum):
    """Rows of `BeliefState.layers`.

    ``WEIGHT`` is the decayed number of runs plus the weight of training. ``MAX_INVERSE`` and ``MAX_WAIT`` are the
    largest values of the layer's residents. ``BOUND`` is work space.
    """

    WEIGHT = 0
    MAX_INVERSE = 1
    MAX_WAIT = 2
    BOUND = 3


class LayerCount(IntEnum):
    """Rows of `BeliefState.counts`: the number of runs and of residents of each layer."""

    RUNS = 0
    MEMBERS = 1


class BeliefState(NamedTuple):
    """Beliefs about every expert.

    Values that change with every run are computed for residents only: residents are few, and the values of other
    experts are rarely needed.

    Attributes:
        history: Uses of each expert, ``(L*E, 3)`` float64, columns `History`.
        places: Last run and index of each expert, ``(L*E, 2)`` int64, columns `Place`.
        layers: Values of each layer, ``(4, L)`` float64, rows `Layer`.
        counts: Counts of each layer, ``(2, L)`` int64, rows `LayerCount`.
        members: Residents of each layer in no order, ``(L, E)`` int32.
        beliefs: Values of each resident, ``(3, L, E)`` float64, rows `Belief`, in the order of ``members``.
        hazard: History's probability by age and bucket of the rate, ``(ages, rates)`` float64; the last row covers all
            greater ages.
        edges: Lower edges of the buckets of rates, ``(rates - 1,)`` float64.
        fades: Weight of a use after n runs, ``(MEMORY_RUNS,)`` float64.
        prior: Weight of training.
    """

    history: Floats
    places: Ints
    layers: Floats
    counts: Ints
    members: npt.NDArray[np.int32]
    beliefs: Floats
    hazard: Floats
    edges: Floats
    fades: Floats
    prior: float


def init(inputs: PolicyInputs) -> BeliefState:
    """Return the beliefs after training, before the first token."""
    layers, total = inputs.geometry.num_layers, inputs.num_ids
    hazard = default_hazard() if inputs.profile is None else np.asarray(inputs.profile.hazard, np.float64)
    hazard = hazard[np.searchsorted(AGE_EDGES, np.arange(AGE_EDGES[-1] + 1), side="right")]
    history = np.zeros((total, len(History)))
    history[:, History.PRIOR_USES] = PRIOR * inputs.popularity()
    layer_values = np.zeros((len(Layer), layers))
    layer_values[Layer.WEIGHT] = PRIOR
    return BeliefState(
        history=history,
        places=np.zeros((total, len(Place)), np.int64),
        layers=layer_values,
        counts=np.zeros((len(LayerCount), layers), np.int64),
        members=np.zeros(inputs.geometry.shape()[:2], np.int32),
        beliefs=np.zeros((len(Belief), *inputs.geometry.shape()[:2])),
        hazard=np.ascontiguousarray(hazard),
        edges=np.array(RATE_EDGES),
        fades=np.power(DECAY, np.arange(MEMORY_RUNS), dtype=np.float64),
        prior=PRIOR,
    )


@jit
def _hazard(policy: BeliefState, layer: int, expert: int) -> float:
    """Return the history's probability of an expert."""
    last = policy.places[expert, Place.LAST_RUN]
    since = policy.counts[LayerCount.RUNS, layer] - last
    uses = policy.history[expert, History.USES] * policy.fades[unsigned(min(since, len(policy.fades) - 1))]
    rate = (policy.history[expert, History.PRIOR_USES] + uses) / policy.layers[Layer.WEIGHT, layer]
    bucket = 0
    for edge in policy.edges:  # no early exit: no branch to mispredict
        bucket += rate >= edge
    age = min(since + 1, len(policy.hazard) - 1) if last > 0 else 0
    return policy.hazard[unsigned(age), unsigned(bucket)]


@jit
def _belief(policy: BeliefState, cache: CacheState, expert: int) -> tuple[float, float, float]:
    """Return the values of `Belief` for any expert."""
    hazard = _hazard(policy, unsigned(cache.experts[Expert.LAYER, expert]), expert)
    return _belief_given(policy, cache, expert, hazard)


@jit
def _belief_given(policy: BeliefState, cache: CacheState, expert: int, hazard: float) -> tuple[float, float, float]:
    """Return the values of `Belief`, given the history's probability."""
    score = cache.scores[expert]
    p, q = hazard if np.isnan(score) else score, max(hazard, policy.history[expert, History.NEXT_SCORE])
    return hazard, 1.0 / max(p, MIN_PROBABILITY), len(cache.counters) * (1.0 - p) / q


@jit
def _store(policy: BeliefState, layer: int, index: int, belief: tuple[float, float, float]) -> None:
    """Store the values of a layer's resident."""
    hazard, inverse, wait = belief
    policy.beliefs[Belief.HAZARD, layer, index] = hazard
    policy.beliefs[Belief.INVERSE, layer, index] = inverse
    policy.beliefs[Belief.WAIT, layer, index] = wait
    policy.layers[Layer.MAX_INVERSE, layer] = max(policy.layers[Layer.MAX_INVERSE, layer], inverse)
    policy.layers[Layer.MAX_WAIT, layer] = max(policy.layers[Layer.MAX_WAIT, layer], wait)


@jit
def on_admit(policy: BeliefState, cache: CacheState, expert: int) -> None:
    """Add an expert to its layer's residents."""
    expert, layer = unsigned(expert), unsigned(cache.experts[Expert.LAYER, expert])
    index = unsigned(policy.counts[LayerCount.MEMBERS, layer])
    policy.members[layer, index] = expert
    policy.places[expert, Place.INDEX] = index
    policy.counts[LayerCount.MEMBERS, layer] += 1
    _store(policy, layer, index, _belief(policy, cache, expert))


@jit
def on_evict(policy: BeliefState, cache: CacheState, expert: int) -> None:
    """Remove an expert from its layer's residents."""
    expert, layer = unsigned(expert), unsigned(cache.experts[Expert.LAYER, expert])
    policy.counts[LayerCount.MEMBERS, layer] -= 1
    left, index = unsigned(policy.counts[LayerCount.MEMBERS, layer]), unsigned(policy.places[expert, Place.INDEX])
    moved = unsigned(policy.members[layer, left])
    policy.members[layer, index], policy.places[moved, Place.INDEX] = moved, index
    for row in range(3):
        policy.beliefs[row, layer, index] = policy.beliefs[row, layer, left]
    max_inverse = max_wait = 0.0
    for i in range(left):
        max_inverse = max(max_inverse, policy.beliefs[Belief.INVERSE, layer, unsigned(i)])
        max_wait = max(max_wait, policy.beliefs[Belief.WAIT, layer, unsigned(i)])
    policy.layers[Layer.MAX_INVERSE, layer], policy.layers[Layer.MAX_WAIT, layer] = max_inverse, max_wait


@jit
def on_demand(policy: BeliefState, cache: CacheState, experts: Ints, tokens: Ints) -> None:
    """Update the history of the layer's experts."""
    layer = unsigned(cache.clock[Clock.LAYER])
    policy.counts[LayerCount.RUNS, layer] += 1
    runs, weight = policy.counts[LayerCount.RUNS, layer], policy.layers[Layer.WEIGHT, layer]
    policy.layers[Layer.WEIGHT, layer] = policy.prior + policy.fades[1] * (weight - policy.prior) + 1
    size = unsigned(cache.experts.shape[1] // len(cache.counters))
    for i in range(size):
        policy.history[layer * size + unsigned(i), History.NEXT_SCORE] = 0.0  # the score was for this run
    for number in experts:
        expert = unsigned(number)
        since = unsigned(min(runs - policy.places[expert, Place.LAST_RUN], len(policy.fades) - 1))
        policy.history[expert, History.USES] = policy.history[expert, History.USES] * policy.fades[since] + 1
        policy.places[expert, Place.LAST_RUN] = runs
    policy.layers[Layer.MAX_INVERSE, layer] = policy.layers[Layer.MAX_WAIT, layer] = 0.0
    for i in range(policy.counts[LayerCount.MEMBERS, layer]):
        index = unsigned(i)
        _store(policy, layer, index, _belief(policy, cache, unsigned(policy.members[layer, index])))


@jit
def on_scores(policy: BeliefState, cache: CacheState, layer: int) -> None:
    """Update the beliefs with scores of a layer's next run."""
    layer = unsigned(layer)
    if cache.clock[Clock.LAYER] == layer:  # the layer has just run
        size = unsigned(cache.experts.shape[1] // len(cache.counters))
        for i in range(size):
            expert = layer * size + unsigned(i)
            policy.history[expert, History.NEXT_SCORE] = cache.scores[expert]
    policy.layers[Layer.MAX_INVERSE, layer] = policy.layers[Layer.MAX_WAIT, layer] = 0.0
    for i in range(policy.counts[LayerCount.MEMBERS, layer]):
        index = unsigned(i)
        expert = unsigned(policy.members[layer, index])
        belief = _belief_given(policy, cache, expert, policy.beliefs[Belief.HAZARD, layer, index])
        _store(policy, layer, index, belief)


@jit
def victim(policy: BeliefState, cache: CacheState, pool: int) -> int:
    """Return the resident with the most events per hit.

    Layers are searched by falling upper bound of their residents' events per hit, until no other layer can have more.
    """
    first, beyond = (0, len(cache.counters)) if len(cache.pools) == 1 else (pool, pool + 1)
    bound = policy.layers[Layer.BOUND, first:beyond]
    for i in range(len(bound)):
        ahead = float(layers_ahead(cache, first + i))
        layer = unsigned(first + i)
        bound[i] = min(ahead * policy.layers[Layer.MAX_INVERSE, layer], ahead + policy.layers[Layer.MAX_WAIT, layer])
    bits = bound.view(np.int64)  # the bits of non-negative floats have the same order, and their comparison vectorises
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
        for i in range(policy.counts[LayerCount.MEMBERS, layer]):
            index = unsigned(i)
            takes = min(
                ahead * policy.beliefs[Belief.INVERSE, layer, index], ahead + policy.beliefs[Belief.WAIT, layer, index]
            )
            if takes >= most:
                expert = unsigned(policy.members[layer, index])
                if not is_pinned(cache, expert) and (best < 0 or takes > most or goes_before(cache, expert, best)):
                    best, most = int(expert), takes
    return best


@jit
def admit(policy: BeliefState, cache: CacheState, expert: int, victim: int) -> bool:
    """Admit an expert with fewer events per hit than the victim."""
    ahead, other = float(events_ahead(cache, expert)), float(events_ahead(cache, victim))
    _, inverse, wait = _belief(policy, cache, unsigned(expert))
    layer, index = cache.experts[Expert.LAYER, victim], policy.places[victim, Place.INDEX]
    takes = min(other * policy.beliefs[Belief.INVERSE, layer, index], other + policy.beliefs[Belief.WAIT, layer, index])
    return min(ahead * inverse, ahead + wait) < takes


HOOKS = PolicyHooks(ignore_expert, on_admit, on_evict, victim, on_demand, on_scores, admit)
