"""The controller, event by event, against a plain reference, with transfers that arrive in any order."""

import threading
from collections.abc import Iterable, Sequence
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from _helpers.cache_cases import small_geometry
from _helpers.reference_cache import COUNTERS, ReferenceCache, Rules, Step
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_beyond.cache.cache import Cache, available_layers
from moe_beyond.predictors.information import InformationSet
from moe_beyond.runtime.slab import SlabLayout
from moe_beyond.runtime.slots.mover import Transfer
from moe_beyond.runtime.slots.pool import SlotPool
from moe_beyond.runtime.stepping.controller import Controller
from moe_beyond.runtime.stepping.ledger import Ledger
from moe_beyond.runtime.stepping.observer import Observer
from moe_beyond.runtime.stepping.telemetry import Telemetry
from moe_beyond.runtime.stepping.times import RunTimes
from moe_beyond.runtime.storage.store import BytesBySource
from moe_beyond.simulator import ReplaySettings

NEVER = float("inf")
Expert = tuple[int, int]


class Reference(ReferenceCache):
    """The plain cache on an interconnect that a script drives."""

    def __init__(self, rules: Rules) -> None:
        super().__init__(rules, [])
        self.free = NEVER  # no prefetch begins because time passes

    def has_room(self, expert: Expert) -> bool:
        return self.room(self.pool_of(expert), self.pinned) > 0

    def begin_prefetch(self) -> Expert | None:
        for expert in list(self.queue):
            if not self.has_room(expert):
                continue
            self.queue.remove(expert)
            if self.is_full(expert):
                victim = self.victim(self.pool_of(expert))
                if not self.admit(expert, victim):
                    continue
                self.evict(victim)
            self.enter(expert)
            self.pinned.add(expert)
            self.arrives[expert] = NEVER
            self.open.add(expert)
            self.counts[expert[0]]["prefetch_transfers"] += 1
            return expert
        return None


class Script:
    """Stand-in for mover, copier and scorer that checks every request of the controller.

    Args:
        reference: Plain cache that does the same.
        ledger: Ledger of the controller.
        random: Source of the order in which transfers begin and arrive.
    """

    def __init__(self, reference: Reference, ledger: Ledger, random: Random) -> None:
        self.reference, self.ledger, self.random = reference, ledger, random
        self.scores: dict[Any, np.ndarray] = {}
        self.missing: list[Expert] = []
        self.computing: list[int] = []
        self.lock = threading.Condition()
        self.demands: list[tuple[int, int]] = []
        self.prefetch: tuple[int, int] | None = None
        self.content: dict[int, int] = {}
        self.woken = False
        self.later: list[Expert] = []  # missing experts of the waves to come
        self.step = Step([], {}, True, 1, 0, True)
        self.pending: int | None = None  # a computed layer that is not observed yet

    # The mover.

    def demand(self, jobs: Sequence[tuple[int, int]]) -> None:
        assert [divmod(expert, self.reference.rules.experts) for expert, _ in jobs] == self.missing
        self.demands += jobs

    def wait(self, experts: list[int]) -> None:
        while any(expert in experts for expert, _ in self.demands) or (self.prefetch and self.prefetch[0] in experts):
            writing = self.prefetch and self.prefetch[1]
            ready = [job for job in self.demands if job[1] != writing]
            if self.prefetch and (not ready or self.random.random() < 0.3):
                self.arrive(self.prefetch, prefetch=True)
            else:
                job = self.random.choice(ready)
                self.demands.remove(job)
                self.arrive(job, prefetch=False)
        self.idle()

    def wake(self) -> None:
        self.woken = True

    def arrive(self, job: tuple[int, int], *, prefetch: bool) -> None:
        if prefetch:
            self.prefetch = None
        self.content[job[1]] = job[0]
        self.reference.arrives[divmod(job[0], self.reference.rules.experts)] = -NEVER
        self.ledger.arrived(Transfer(*job, prefetch, 0, 1, 2, 1, 0, BytesBySource(host=1)))

    def idle(self) -> None:
        """Let prefetches begin and arrive, as far as the random numbers say."""
        while self.random.random() < 0.7:
            if self.prefetch:
                self.arrive(self.prefetch, prefetch=True)
            elif self.woken and not self.demands:
                expected, begun = self.reference.begin_prefetch(), self.ledger.next_prefetch()
                self.woken = begun is not None
                assert (begun and divmod(begun[0], self.reference.rules.experts)) == expected
                if begun:
                    assert self.ledger.cache.slot(begun[0]) == begun[1]
                    self.prefetch = begun
                    self.content.pop(begun[1], None)
            elif not self.demands:
                assert not any(map(self.reference.has_room, self.reference.queue)), "no reader was woken"

    # The copier.

    def after_compute(self, slots: Iterable[int]) -> None:
        assert [self.content[slot] for slot in slots] == self.computing
        layer = self.reference.layer
        self.reference.pinned -= {(layer, expert) for expert in self.step.demands[layer]}
        if self.later:
            self.begin_wave()

    @property
    def in_transit(self) -> set[Expert]:
        return {divmod(self.prefetch[0], self.reference.rules.experts)} if self.prefetch else set()

    def begin_wave(self) -> None:
        """Do in the reference what the controller does when it begins a wave."""
        self.missing = self.reference.wave(self.later)
        self.later = self.later[len(self.missing) :]
        self.reference.transfer(self.missing)
        for expert in self.missing:
            self.reference.arrives[expert] = -NEVER  # its event waits for it
        if not self.later and self.reference.rules.after_routing:
            self.reference.issue_prefetches(self.reference.layer)

    # The scorer.

    def start(self, token_ids: Any, past: int) -> np.ndarray | None:
        return self.rows(-1)

    def routed(self, layer: int, experts: Any, state: Any) -> np.ndarray | None:
        return self.rows(layer)

    def computed(self, layer: int, state: Any) -> np.ndarray | None:
        return self.rows(layer, computed=True)

    def rows(self, layer: int, *, computed: bool = False) -> np.ndarray | None:
        """Scores that become available once a layer is routed or computed, or at -1 at the step's start."""
        if not self.step.scores:
            return None
        rules = self.reference.rules
        behind = [{"token": rules.layers, "computed": 1}.get(ahead, ahead) for ahead in rules.lookaheads]
        rows = np.full((rules.layers, rules.experts), np.nan, np.float32)
        for later in available_layers(rules.lookaheads, layer, rules.layers, computed=computed).tolist():
            chosen = next(
                name
                for name, ahead in zip(rules.lookaheads, behind, strict=True)
                if (ahead > later if layer < 0 else ahead == later - layer and computed == (name == "computed"))
            )
            rows[later] = self.scores[chosen][later]
        return rows


def observe(script: Script) -> None:
    """Publish in the reference the scores that follow a computed layer, and the prefetches that follow from them."""
    layer, script.pending = script.pending, None
    if layer is not None and script.reference.rules.after_computing:
        script.reference.publish_scores(script.step, None, layer, computed=True)
        script.reference.issue_prefetches(layer, computed=True)


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**32 - 1),
    policy=st.sampled_from(["lru", "lfu", "belief"]),
    lookaheads=st.sampled_from(
        [(1,), (1, 2), ("token",), (2, "token"), ("computed",), ("computed", 1), ("computed", 2, "token")]
    ),
    second=st.booleans(),
    reads=st.booleans(),
    scope=st.sampled_from(["global", "per-layer"]),
    spare=st.integers(0, 6),
    most=st.integers(1, 4),
)
def test_events_follow_the_reference(
    seed: int, policy: str, lookaheads: tuple, second: bool, reads: bool, scope: str, spare: int, most: int
) -> None:
    """``second`` selects by the second lookahead, if there is one; ``reads`` is whether layer inputs are awaited."""
    random, numbers = Random(seed), np.random.default_rng(seed)  # hypothesis leans to monotonous lists
    layers, experts, top_k = 3, 6, 2
    geometry = small_geometry(layers, experts, top_k)
    slots = (top_k if scope == "global" else layers * top_k) + spare
    quotas = [slots] if scope == "global" else [slots // layers + (layer < slots % layers) for layer in range(layers)]
    selected = lookaheads[:2][-1] if second else lookaheads[0]
    prefetching = ReplaySettings(slots, scope=scope, prefetch=f"top{most}", lookahead=selected, lookaheads=lookaheads)
    rules = Rules(
        layers, experts, top_k, quotas, policy=policy, prefetch="scored", most=most, lookaheads=list(lookaheads),
        transfer=1, lookahead=selected,
        distance=1 if selected == "computed" else prefetching.prefetch_settings(geometry).distance,
    )  # fmt: skip
    if policy == "belief":
        from moe_beyond.usage_profile import AGE_EDGES, RATE_EDGES, default_hazard

        rules.age_edges, rules.rate_edges, rules.hazard = list(AGE_EDGES), list(RATE_EDGES), default_hazard().tolist()
    reference = Reference(rules)
    cache = Cache(
        geometry, slots, policy, scope, prefetch=prefetching.prefetch_settings(geometry), transfer_seconds=1e-3
    )
    pool = SlotPool(slots, {0: SlabLayout.of({"w": ((1,), torch.float32)})}, torch.device("cpu"))
    telemetry = Telemetry(keep_rows=True)
    ledger = Ledger(cache, pool, telemetry, RunTimes())
    script = Script(reference, ledger, random)
    information = InformationSet(lookaheads, hidden_states=("layer_inputs",) if reads else ())
    observer = Observer(script, information)  # type: ignore[arg-type]
    controller = Controller(geometry, ledger, script, script, observer, lookaheads, prefetches=True)  # type: ignore[arg-type]
    for number in range(random.randint(1, 6)):
        tokens = random.choice([1, 1, 1, 4])
        routed = numbers.random((layers, tokens, experts)).argsort(-1)[..., :top_k].astype(np.int64)
        script.scores = {name: numbers.integers(0, 5, (layers, experts)) / np.float32(4) for name in lookaheads}
        ids, counts = zip(*(np.unique(each, return_counts=True) for each in routed), strict=True)
        demands = [dict(zip(i.tolist(), n.tolist(), strict=True)) for i, n in zip(ids, counts, strict=True)]
        scores = {name: rows.tolist() for name, rows in script.scores.items()} if tokens == 1 else {}
        script.pending = None  # nothing follows the last layer
        script.step = Step(demands, scores, True, tokens, tokens, number == 0)
        reference.start_step(True)
        reference.publish_scores(script.step, None, -1)
        reference.issue_prefetches(-1)
        controller.begin_step(np.zeros(tokens, np.int64), number, (1, tokens), 0)
        for layer in range(layers):
            script.idle()
            if reads and tokens == 1 and layer:
                observe(script)
                controller.take_state("layer_inputs", layer, np.zeros(1, np.float16))
                script.idle()
            before = [dict(row) for row in reference.counts]
            reference.demand(layer, demands[layer])
            reference.publish_scores(script.step, None, layer)
            script.later = sorted({(layer, expert) for expert in demands[layer]} - reference.resident)
            script.begin_wave()
            computing: list[int] = []
            for wave in controller.event(layer, routed[layer]):
                script.computing = wave.experts.tolist()
                computing += script.computing
                absent = [divmod(expert, experts) for expert, _ in wave.transfers()]
                assert set(script.missing) <= set(absent) <= set(script.missing) | script.in_transit
            assert sorted(computing) == (ids[layer] + layer * experts).tolist()
            script.pending = layer
            if tokens > 1 or not reads:
                observe(script)
            event = telemetry.events[-1]
            for name in ("hits", "late_hits", "misses"):
                assert getattr(event, name) == reference.counts[layer][name] - before[layer][name]
            resident = {divmod(e, experts) for e in range(layers * experts) if cache.slot(e) >= 0}
            assert resident == reference.resident
        controller.end_step(1.0)
    reference.finish()
    cache.finish()
    assert cache.state.counters.tolist() == [[row[name] for name in COUNTERS] for row in reference.counts]
    assert telemetry.transferred + bool(script.prefetch) == cache.state.counters[:, 4:6].sum()


def test_transfers_of_one_slot_are_told_apart() -> None:
    """An expert that was evicted in transit has not arrived for its slot's next owner."""
    pool = SlotPool(2, {0: SlabLayout.of({"w": ((1,), torch.float32)})}, torch.device("cpu"))
    pool.give(0, 7)
    pool.give(0, 3)
    pool.arrived(0, 7)
    assert not pool.holds([0], [3])
    pool.arrived(0, 3)
    assert pool.holds([0], [3])
    pool.begin_wave([0])
    with pytest.raises(AssertionError, match="slot 0 of expert 3 is in use by the running wave"):
        pool.give(0, 5)
    pool.end_wave()
    pool.give(0, 5)
    assert not pool.holds([0], [3])
