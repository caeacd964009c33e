"""Replaying sequences through the cache core."""

from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.cache import core
from moe_beyond.cache import interconnect as link
from moe_beyond.cache.engine import Timing, run, run_accesses
from moe_beyond.cache.policies import load_policy
from moe_beyond.cache.policy_inputs import PolicyInputs, Stream
from moe_beyond.cache.pools import most_used, pool_slots
from moe_beyond.cache.prefetchers.settings import Outlook
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.simulator import devices
from moe_beyond.simulator.interconnects import idle_link
from moe_beyond.simulator.result import Clock, Result, make_result
from moe_beyond.simulator.sequence import Group, Grouping, ReplaySequence
from moe_beyond.simulator.settings import ReplaySettings
from moe_beyond.simulator.sums import SequenceSums
from moe_beyond.usage_profile import UsageProfile

NO_SPANS = np.zeros((0, 3))
LOGGED_PER_EVENT = 64


class Replay:
    """Accumulates one strategy's counts, and its time, over sequences.

    Args:
        geometry: The model.
        settings: The strategy and its budget.
        profile: What is known of training text.
        stream: All demands of the sequences to come, where the cache is carried over and the policy knows the future.

    Raises:
        UserError: The strategy does not fit the model, or what it needs is missing.
    """

    def __init__(
        self,
        geometry: Geometry,
        settings: ReplaySettings,
        profile: UsageProfile | None = None,
        stream: Stream | None = None,
    ) -> None:
        self.geometry, self.settings = geometry, settings
        self._profile, self._stream = profile, stream
        self._pools = pool_slots(geometry, settings.slots, settings.scope, settings.quotas)
        self._policy = load_policy(settings.policy)
        self._plan = settings.plan(geometry)
        if "profile" in settings.needs and profile is None:
            what = "a warm start" if settings.warm_start else f"policy {settings.policy}"
            raise UserError(f"{what} needs to know what was popular in training text; give --profile")
        if profile is not None and profile.popularity.shape != geometry.shape()[:2]:
            raise UserError(f"the profile is of {profile.popularity.shape} experts, not of {geometry.shape()[:2]}")
        if settings.carry_over and "future" in settings.needs and stream is None:
            raise ValueError("a strategy that knows the future and carries its cache over is told the whole stream")
        self._device = settings.device
        self.timing = Timing(0.0, 0.0)
        if self._device is not None:
            self.timing = Timing(
                devices.other_seconds(self._device, geometry, settings.bits),
                devices.expert_seconds(self._device, geometry, settings.bits),
            )
        self._counts = np.zeros((geometry.num_layers, len(core.COUNTERS)), np.int64)
        self.clock = Clock()
        self._grouping = Grouping(settings)
        self.sums = SequenceSums()
        self._cache: core.CacheState | None = None
        self._state: Any = None
        self._event = np.zeros(1, np.int64)

    def add(
        self,
        experts: npt.NDArray[np.integer],
        scores: npt.NDArray[np.float32] | None = None,
        decode_start: int = 0,
    ) -> None:
        """Replay one sequence.

        Args:
            experts: ``(T, L, K)`` expert ids.
            scores: ``(T, H, L, E)`` float32 probabilities, a slice a lookahead of the settings.
            decode_start: The first token that the model wrote itself.

        Raises:
            UserError: The experts do not fit the model, or the scores the sequence, or are no probabilities.
        """
        self.add_sequence(ReplaySequence(self.geometry, experts, scores, decode_start))

    def add_sequence(self, sequence: ReplaySequence) -> None:
        """Replay one sequence, or put it aside until a batch is full."""
        for group in self._grouping.add(sequence):
            self._step(group)

    def watch(self, sequence: ReplaySequence) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Replay one sequence and keep its times.

        Returns:
            ``(events, 3)`` seconds at which each event was routed, had its experts, and was through; and the log of the
            link (`LinkState.log`).
        """
        group = sequence.alone(self.settings)
        spans = np.zeros((len(group.stream.offsets) - 1, 3))
        wire = self._step(group, spans)
        return spans, wire.log[: wire.tally[link.SENT]]

    def _step(self, group: Group, spans: npt.NDArray[np.float64] = NO_SPANS) -> link.LinkState:
        if self._cache is None:
            self._start(group, LOGGED_PER_EVENT * len(spans))
            before = np.zeros_like(self._counts)
        else:
            before = self._cache.counters.copy()
        cache, steps = self._cache, group.steps(self.settings)
        assert cache is not None
        self._check_room(group)
        spent = np.zeros((len(group.size), 2))
        if self.settings.sequential:
            run_accesses(cache, self._state, self._policy.VERBS, steps.ids, group.ends, steps.counted)
        else:
            known = self._stream if self.settings.carry_over and self._stream is not None else group.stream
            outlook = Outlook(np.zeros(self.geometry.num_layers), known.ids, known.offsets, self._event)
            begun = cache.link.clock[link.BUSY]
            run(cache, self._state, self._policy.VERBS, self._plan, steps, self.timing, outlook, spent, spans)
            self.clock.busy += cache.link.clock[link.BUSY] - begun
        demanded = self.clock.add(group, spent, steps.counted)
        self.sums.add(group.names, cache.counters - before, demanded, *self.clock.decoded())
        if not self.settings.carry_over:
            core.finish(cache)
            self._counts += cache.counters
            self._cache = None
        return cache.link

    def _check_room(self, group: Group) -> None:
        """Refuse events that demand more at once than their pool has slots, unless they compute beside it."""
        if self.settings.most_demanded(self.geometry) <= self._pools.min() or self._policy.VERBS.stages:
            return
        demanded = np.diff(group.stream.offsets).reshape(-1, self.geometry.num_layers).max(0)
        if (over := np.flatnonzero(demanded > self._pools)).size:
            layer = int(over[0])
            raise UserError(
                f"layer {layer} is demanded {demanded[layer]} experts at once, more than the "
                f"{self._pools[layer if len(self._pools) > 1 else 0]} slots it may have; give a larger budget"
            )

    def prepare(self, sequence: ReplaySequence) -> None:
        """Make the cache and what the policy knows of the future, as adding the sequence would by itself."""
        self._start(sequence.alone(self.settings), 0)

    def _start(self, group: Group, log_size: int) -> None:
        """Make an empty cache, and fill it where it starts warm."""
        geometry = self.geometry
        wire = idle_link(self.settings, geometry, log_size)
        self._cache = core.empty_cache(geometry.num_layers, geometry.num_experts, self._pools, wire)
        future = self._stream if self.settings.carry_over and self._stream is not None else group.stream
        inputs = PolicyInputs(geometry, self._pools, future, self._profile)
        self._state = self._policy.state(inputs)
        self._event[0] = 0
        if self.settings.warm_start:
            popular = most_used(inputs.popularity(), self._pools)
            core.preload(self._cache, self._state, self._policy.VERBS, popular[::-1].copy())
            self.clock.busy += self._cache.link.clock[link.BUSY]

    def counts(self) -> npt.NDArray[np.int64]:
        """Return what was counted so far: ``(L, 8)`` of `moe_beyond.cache.core.COUNTERS`."""
        for group in self._grouping.rest():
            self._step(group)
        if self._cache is None:
            return self._counts
        # Carried over and not at its end: what was prefetched and not demanded yet is wasted as of now.
        cache = self._cache
        unused = (cache.experts[core.PLACE] >= 0) & (cache.experts[core.ORIGIN] == core.PREFETCHED)
        counts = cache.counters.copy()
        counts[:, core.WASTED] += np.bincount(cache.experts[core.IN_LAYER][unused], minlength=len(counts))
        return counts

    def result(self) -> Result:
        """Return the record of what was added so far."""
        return make_result(self.geometry, self.settings, self.counts(), self.clock, self._grouping)
