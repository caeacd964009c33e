"""Contract tests of an eviction policy, for this package and for packages that add policies."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.cache import core
from moe_beyond.cache.core import CacheState, Clock, Expert, Origin, PolicyHooks, Pool
from moe_beyond.cache.counters import Counter
from moe_beyond.cache.engine import run_events
from moe_beyond.cache.events import demand, transfer_wave
from moe_beyond.cache.policies import NEEDS, POLICIES, Policy
from moe_beyond.cache.policy_inputs import PolicyInputs, Stream
from moe_beyond.cache.pools import pool_capacities
from moe_beyond.cache.prefetch_queue import advance, enqueue_prefetch
from moe_beyond.cache.prefetchers import NO_THRESHOLD, PrefetcherId
from moe_beyond.cache.prefetchers._inputs import FutureView, PrefetchSettings
from moe_beyond.cache.steps import EventRecord, StepArrays, in_layers, no_computing
from moe_beyond.geometry import Geometry
from moe_beyond.usage_profile import UsageProfile, default_hazard

Ints = npt.NDArray[np.int64]
HOOKS = ("on_hit", "on_admit", "on_evict", "victim", "on_demand", "on_scores", "admit")


def check_policy(policy: str | Policy, *, examples: int = 24, seed: int = 0) -> None:
    """Check that a policy keeps the contract of the cache core.

    Random small caches are stepped by a plain-Python reference that calls the policy's hooks one by one, and by the
    compiled core. The policy must have all attributes. It must name only residents of the right pool that are not
    pinned as victims, and must not change the cache. Both runs must count the same and keep the same residents. Two
    runs must be equal, and the policy must not have more hits than the optimum.

    Args:
        policy: Name of a registered policy, or the policy.
        examples: Number of random caches (default: 24).
        seed: Seed of the random caches (default: 0).

    Raises:
        AssertionError: The policy breaks the contract; the message has one line.
    """
    name = policy if isinstance(policy, str) else getattr(policy, "__name__", type(policy).__name__)
    implementation = POLICIES[policy] if isinstance(policy, str) else policy
    _check_attributes(name, implementation)
    for example in range(examples):
        case = _draw(np.random.default_rng((seed, example)), implementation, example)
        location = f"policy {name}, example {example} (seed {seed})"
        expected = _Reference(location, case, implementation).run()
        first, second = (_stepped(location, case, implementation) for _ in range(2))
        _check(first.equals(second), f"{location}: two runs differ; init must return new arrays and no random numbers")
        _check(first.equals(expected), f"{location}: the compiled core counts or keeps other experts than plain Python")
        if not case.prefetches:
            hits, steps = _replayed(case, implementation), int(expected.rows[-1][0][:, Counter.HITS].sum())
            _check(hits == steps, f"{location}: a replay counts {hits} hits, single steps {steps}")
            bypass = implementation.HOOKS.bypass or case.has_waves  # Belady is no optimum of events in waves
            optimum = _replayed(case, POLICIES["belady_bypass" if bypass else "belady"])
            _check(hits <= optimum, f"{location}: has {hits} hits, more than the optimum of {optimum}")


def _check(holds: object, message: str) -> None:
    """Raise an AssertionError, also under ``python -O``."""
    if not holds:
        raise AssertionError(message)


def _check_attributes(name: str, policy: Any) -> None:
    """Check the attributes of a policy and the types of its hooks."""
    for attribute in ("init", "HOOKS", "NEEDS", "OFFERS_SCORES"):
        _check(hasattr(policy, attribute), f"policy {name}: has no {attribute}")
    _check(isinstance(policy.HOOKS, PolicyHooks), f"policy {name}: HOOKS must be a PolicyHooks (got {policy.HOOKS!r})")
    for hook in HOOKS:
        compiled = hasattr(getattr(policy.HOOKS, hook), "py_func")
        _check(compiled, f"policy {name}: hook {hook} is not compiled; decorate it with jit of moe_beyond.cache")
    _check(
        isinstance(policy.NEEDS, tuple) and set(policy.NEEDS) <= set(NEEDS),
        f"policy {name}: NEEDS must be a tuple of some of {', '.join(NEEDS)} (got {policy.NEEDS!r})",
    )
    _check(isinstance(policy.OFFERS_SCORES, bool), f"policy {name}: OFFERS_SCORES must be a bool")
    if "scores" in policy.NEEDS:
        _check(policy.HOOKS.reads_scores, f"policy {name}: NEEDS names scores, but there is no hook on_scores")


@dataclass(frozen=True)
class _Case:
    """A random cache and its steps.

    Attributes:
        geometry: Geometry of the model.
        pools: Slots of each pool.
        inputs: Inputs of the policy.
        events: Demanded experts of each event, ascending, and the number of tokens that demand each.
        scores: Scores of a layer's next run that become available with each event, ``(E,)``, or None.
        prefetches: Event -> experts to prefetch after it.
    """

    geometry: Geometry
    pools: Ints
    inputs: PolicyInputs
    events: list[tuple[Ints, Ints]]
    scores: list[npt.NDArray[np.float32] | None]
    prefetches: dict[int, Ints]

    @property
    def has_waves(self) -> bool:
        """Whether an event may demand more experts than its pool has slots."""
        return max(len(ids) for ids, _ in self.events) > int(self.pools.min())

    def steps(self) -> Iterator[tuple[int, int]]:
        """Yield the number and the layer of every event."""
        for number in range(len(self.events)):
            yield number, number % self.geometry.num_layers

    def experts_of(self, layer: int) -> slice:
        """Return the range of a layer's experts."""
        return slice(layer * self.geometry.num_experts, (layer + 1) * self.geometry.num_experts)


def _draw(rng: np.random.Generator, policy: Policy, example: int) -> _Case:
    """Draw a case; even examples have no prefetches, and in every third one events may be larger than their pool."""
    layers, experts = int(rng.integers(1, 4)), int(rng.integers(3, 8))
    top_k = int(rng.integers(1, 3))
    geometry = Geometry("random", tuple(range(layers)), experts, top_k, params_per_expert=1, other_params_per_layer=1)
    bias = rng.gumbel(size=(layers, experts))
    events, largest = [], top_k
    for number in range(layers * int(rng.integers(4, 16))):
        together = int(rng.integers(1, 3))  # tokens of the step
        keys = rng.gumbel(size=(together, experts)) + bias[number % layers]
        ids, tokens = np.unique(np.argsort(-keys, axis=1)[:, :top_k], return_counts=True)
        largest = max(largest, len(ids))
        events.append((ids + number % layers * experts, tokens))
    scope = ("global", "per-layer")[int(rng.integers(2))]
    smallest = (largest if example % 3 else top_k) * (layers if scope == "per-layer" else 1)
    pools = pool_capacities(geometry, int(rng.integers(smallest, geometry.total_experts + 1)), scope)
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in events])])
    stream = Stream(np.concatenate([ids for ids, _ in events]), offsets)
    profile = UsageProfile(rng.dirichlet(np.ones(experts), layers) * top_k, default_hazard())
    inputs = PolicyInputs(
        geometry,
        pools,
        stream if "future" in policy.NEEDS else None,
        profile if "profile" in policy.NEEDS or example % 3 == 0 else None,
    )
    scored = "scores" in policy.NEEDS or example % 4 > 1
    levels = rng.integers(0, 5, (len(events), experts)) / 4
    last = len(events) - layers  # first event of the last step: no run follows that reads its scores
    scores = [row.astype(np.float32) if scored and i < last else None for i, row in enumerate(levels)]
    prefetches = {}
    for number in range(len(events) if example % 2 else 0):
        if (later := number % layers + 1) < layers:
            prefetches[number] = rng.permutation(experts)[: int(rng.integers(1, 4))] + later * experts
    return _Case(geometry, pools, inputs, events, scores, prefetches)


Row = tuple[npt.NDArray[Any], npt.NDArray[Any]]


@dataclass(frozen=True, eq=False)
class _Record:
    """Counters and residents after every event; two records are equal if all arrays are."""

    rows: list[Row]

    def equals(self, other: "_Record") -> bool:
        """Return whether all arrays are equal."""
        pairs = zip(self.rows, other.rows, strict=True)
        return all(np.array_equal(a, b) for row, other_row in pairs for a, b in zip(row, other_row, strict=True))


def _init(location: str, case: _Case, policy: Policy) -> Any:
    """Return the policy's arrays."""
    try:
        return policy.init(case.inputs)
    except Exception as error:
        given = [name for name in ("future", "profile") if getattr(case.inputs, name) is not None]
        inputs = f"with {' and '.join(given)}" if given else "without future and profile"
        raise AssertionError(f"{location}: init fails {inputs} ({type(error).__name__}: {error})") from error


def _cache(case: _Case) -> CacheState:
    return core.empty_cache(case.geometry.num_layers, case.geometry.num_experts, case.pools)


def _row(cache: CacheState) -> Row:
    return cache.counters.copy(), cache.experts[Expert.PLACE] >= 0


def _stepped(location: str, case: _Case, policy: Policy) -> _Record:
    """Step the compiled core event by event."""
    cache, arrays, hooks = _cache(case), _init(location, case, policy), policy.HOOKS
    rows = []
    for number, layer in case.steps():
        ids, tokens = case.events[number]
        if layer == 0:
            core.start_step(cache, True)
        ready = demand(cache, arrays, hooks, layer, ids, tokens)
        scores = case.scores[number]
        if scores is not None:
            cache.scores[case.experts_of(layer)] = scores
            hooks.on_scores(arrays, cache, layer)
        last = False
        while not last:
            ready = transfer_wave(cache, arrays, hooks, ready)
            last = bool(cache.clock[Clock.MOVED] == cache.clock[Clock.MISSING])
            if last and number in case.prefetches:
                enqueue_prefetch(cache, arrays, hooks, case.prefetches[number])
            core.unpin(cache, ids)
        advance(cache, arrays, hooks, 0.0)
        rows.append(_row(cache))
    return _Record(rows)


def _replayed(case: _Case, policy: Policy) -> int:
    """Replay the events in one compiled loop, without prefetches; return the hits."""
    layers, experts = case.geometry.num_layers, case.geometry.num_experts
    stream = Stream(
        np.concatenate([ids for ids, _ in case.events]),
        np.concatenate([[0], np.cumsum([len(ids) for ids, _ in case.events])]),
    )
    inputs = PolicyInputs(case.geometry, case.pools, stream, case.inputs.profile)
    count = len(case.events) // layers
    scores = np.full((count, 1, layers, experts), np.nan, np.float32)
    for number, layer in case.steps():
        row = case.scores[number]
        if row is not None and number // layers + 1 < count:
            scores[number // layers + 1, 0, layer] = row
    cache, hooks, top_k = _cache(case), policy.HOOKS, case.geometry.top_k
    run_events(
        cache,
        policy.init(inputs if "future" in policy.NEEDS else case.inputs),
        hooks,
        PrefetchSettings(PrefetcherId.NONE.value, experts, NO_THRESHOLD, 1, True, top_k, False, False, False),
        StepArrays(
            stream.ids,
            stream.offsets,
            np.concatenate([tokens for _, tokens in case.events]),
            scores,
            in_layers(["next"], layers),  # available after the layer's last run
            np.ones(count, np.bool_),
        ),
        no_computing(count),
        FutureView(np.zeros(layers), stream.ids, stream.offsets, np.zeros(1, np.int64)),
        np.zeros((count, 2)),
        np.zeros((0, len(EventRecord))),
    )
    return int(cache.counters[:, Counter.HITS].sum())


class _Reference:
    """Steps a cache in plain Python and checks every call of a hook.

    Args:
        location: Start of error messages.
        case: Cache and its steps.
        policy: Policy to check.
    """

    def __init__(self, location: str, case: _Case, policy: Policy) -> None:
        self.location, self.case, self.policy = location, case, policy
        self.cache, self.arrays = _cache(case), _init(location, case, policy)
        self.pinned: set[int] = set()
        self.queue: list[int] = []

    def run(self) -> _Record:
        """Step all events."""
        return _Record([self._event(number, layer) for number, layer in self.case.steps()])

    def _event(self, number: int, layer: int) -> Row:
        cache, clock = self.cache, self.cache.clock
        ids, tokens = self.case.events[number]
        if layer == 0:
            clock[Clock.STEP] += 1
            clock[Clock.LAYER] = -1
            self._unpin_all()
        clock[Clock.EVENT] += 1
        clock[Clock.TIME] += 1
        clock[Clock.LAYER] = layer
        self._unpin_all()
        missing = []
        for expert in ids.tolist():
            cache.counters[layer, Counter.ACCESSES] += 1
            if not self._is_resident(expert):
                missing.append(expert)
                continue
            cache.counters[layer, Counter.HITS] += 1
            if cache.experts[Expert.ORIGIN, expert] == Origin.PREFETCHED:
                cache.counters[layer, Counter.USEFUL_PREFETCHES] += 1
            cache.experts[Expert.ORIGIN, expert] = Origin.DEMANDED
            self._use(expert)
        cache.scores[self.case.experts_of(layer)] = np.nan
        self._call("on_demand", ids, tokens, writes_scores=True)
        scores = self.case.scores[number]
        if scores is not None:
            cache.scores[self.case.experts_of(layer)] = scores
            self._call("on_scores", layer)
        row = cache.counters[layer]
        for expert in missing:
            queued = expert in self.queue
            row[Counter.LATE_HITS if queued else Counter.MISSES] += 1
            row[Counter.PREFETCH_TRANSFERS if queued else Counter.DEMAND_TRANSFERS] += 1
        self.queue = [expert for expert in self.queue if cache.experts[Expert.LAYER, expert] != layer]
        waves = self._waves(ids, missing)
        for wave in waves:
            self._transfer(wave)
            if wave is waves[-1] and number in self.case.prefetches:
                self._prefetch(self.case.prefetches[number].tolist())
            self._unpin(ids.tolist())
        self._advance()
        return _row(cache)

    def _waves(self, ids: Ints, missing: list[int]) -> list[list[int]]:
        """Divide the missing experts: those that fit next to the demanded residents, then as many as the pool holds."""
        if self.policy.HOOKS.bypass or not missing:
            return [missing]
        slots = int(self.cache.pools[self.cache.experts[Expert.POOL, missing[0]], Pool.CAPACITY])
        first = slots - (len(ids) - len(missing))
        return [missing[:first], *(missing[begin : begin + slots] for begin in range(first, len(missing), slots))]

    def _transfer(self, missing: Sequence[int]) -> None:
        """Admit the missing experts of a wave."""
        bypass = self.policy.HOOKS.bypass
        if bypass and missing:
            self._unpin_all()
        for expert in missing:
            if not self._is_full(expert):
                self._enter(expert, Origin.DEMANDED)
            else:
                victim = self._victim(expert)
                if bypass and not self._call("admit", expert, victim):
                    continue
                self._replace(victim, expert, Origin.DEMANDED)
            if not bypass:
                self._pin(expert)

    def _prefetch(self, experts: Sequence[int]) -> None:
        self.cache.clock[Clock.TIME] += 1
        for expert in experts:
            if self._is_resident(expert):
                self._use(expert)
            elif expert not in self.queue:
                self.queue.append(expert)
        self._advance()

    def _advance(self) -> None:
        """Admit queued prefetches that find a slot."""
        for expert in list(self.queue):
            full = self._is_full(expert)
            if full and self.pinned >= set(self._residents(int(self.cache.experts[Expert.POOL, expert]))):
                continue
            self.queue.remove(expert)
            if full:
                victim = self._victim(expert)
                if not self._call("admit", expert, victim):
                    continue
                self._replace(victim, expert, Origin.PREFETCHED)
            else:
                self._enter(expert, Origin.PREFETCHED)
            self._pin(expert)
            self.cache.counters[self.cache.experts[Expert.LAYER, expert], Counter.PREFETCH_TRANSFERS] += 1

    def _victim(self, expert: int) -> int:
        """Return the policy's victim for an expert, after all checks."""
        pool = int(self.cache.experts[Expert.POOL, expert])
        victim = self._call("victim", pool)
        start = f"{self.location}: victim returns {victim}"
        _check(isinstance(victim, int | np.integer), f"{start}, which is not an integer")
        _check(0 <= victim < self.case.geometry.total_experts, f"{start}, which is not an expert")
        _check(self._is_resident(victim), f"{start}, which is not resident")
        _check(self.cache.experts[Expert.POOL, victim] == pool, f"{start}, which is not in pool {pool}")
        _check(victim not in self.pinned, f"{start}, which is pinned")
        return int(victim)

    def _call(self, hook: str, *arguments: Any, writes_scores: bool = False) -> Any:
        """Call a hook, and check that it does not change the cache."""
        before = [array.copy() for array in self._arrays()]
        function: Callable[..., Any] = getattr(self.policy.HOOKS, hook)
        result = function(self.arrays, self.cache, *arguments)
        for name, old, new in zip(_ARRAYS, before, self._arrays(), strict=True):
            if name == "scores" and writes_scores and self.policy.OFFERS_SCORES:
                continue
            reason = " although OFFERS_SCORES is False" if name == "scores" and writes_scores else ""
            same = np.array_equal(old, new, equal_nan=name == "scores")
            _check(same, f"{self.location}: hook {hook} changes cache.{name}{reason}")
        return result

    def _arrays(self) -> list[npt.NDArray[Any]]:
        return [getattr(self.cache, name) for name in _ARRAYS]

    def _is_resident(self, expert: int) -> bool:
        return bool(self.cache.experts[Expert.PLACE, expert] >= 0)

    def _residents(self, pool: int) -> list[int]:
        used = self.cache.pools[pool, Pool.USED]
        return [int(expert) for expert in self.cache.residents[pool, :used]]

    def _is_full(self, expert: int) -> bool:
        pool = self.cache.pools[self.cache.experts[Expert.POOL, expert]]
        return bool(pool[Pool.USED] == pool[Pool.CAPACITY])

    def _use(self, expert: int) -> None:
        self.cache.experts[Expert.LAST_USE, expert] = self.cache.clock[Clock.TIME]
        self._pin(expert)
        self._call("on_hit", expert)

    def _enter(self, expert: int, origin: Origin) -> None:
        pool = self.cache.experts[Expert.POOL, expert]
        self._settle(expert, int(self.cache.pools[pool, Pool.USED]), origin)
        self.cache.pools[pool, Pool.USED] += 1
        self.cache.pools[pool, Pool.FREE] -= 1

    def _replace(self, victim: int, expert: int, origin: Origin) -> None:
        place = int(self.cache.experts[Expert.PLACE, victim])
        self.cache.experts[Expert.PLACE, victim] = -1
        if self.cache.experts[Expert.ORIGIN, victim] == Origin.PREFETCHED:
            self.cache.counters[self.cache.experts[Expert.LAYER, victim], Counter.WASTED_PREFETCHES] += 1
        self._call("on_evict", victim)
        self._settle(expert, place, origin)

    def _settle(self, expert: int, place: int, origin: Origin) -> None:
        self.cache.residents[self.cache.experts[Expert.POOL, expert], place] = expert
        self.cache.experts[Expert.PLACE, expert] = place
        self.cache.experts[Expert.ORIGIN, expert] = origin
        self.cache.experts[Expert.LAST_USE, expert] = self.cache.clock[Clock.TIME]
        self._call("on_admit", expert)

    def _pin(self, expert: int) -> None:
        if expert not in self.pinned:
            self.pinned.add(expert)
            self.cache.experts[Expert.PIN_EPOCH, expert] = self.cache.clock[Clock.PIN_EPOCH]
            self.cache.pools[self.cache.experts[Expert.POOL, expert], Pool.PINNED] += 1

    def _unpin(self, experts: Sequence[int]) -> None:
        for expert in self.pinned.intersection(experts):
            self.pinned.remove(expert)
            self.cache.experts[Expert.PIN_EPOCH, expert] = 0
            self.cache.pools[self.cache.experts[Expert.POOL, expert], Pool.PINNED] -= 1

    def _unpin_all(self) -> None:
        self.pinned.clear()
        self.cache.clock[Clock.PIN_EPOCH] += 1
        self.cache.pools[:, Pool.PINNED] = 0


_ARRAYS = ("experts", "pools", "residents", "scores", "clock", "counters")
"""Arrays of the cache that a hook must not change."""
