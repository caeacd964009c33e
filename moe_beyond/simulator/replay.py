"""Replay of sequences through the cache core."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.cache import core
from moe_beyond.cache.core import Clock, Expert, Origin
from moe_beyond.cache.counters import Counter
from moe_beyond.cache.engine import run_accesses, run_events
from moe_beyond.cache.interconnect import LinkState, Seconds, Tally
from moe_beyond.cache.misses import Handling
from moe_beyond.cache.policies import load_policy
from moe_beyond.cache.policy_inputs import PolicyInputs, Stream
from moe_beyond.cache.pools import most_used, pool_capacities
from moe_beyond.cache.prefetch_queue import finish
from moe_beyond.cache.prefetchers._inputs import FutureView
from moe_beyond.cache.steps import EventRecord, Timing, no_computing
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.simulator.computing import step_timing
from moe_beyond.simulator.idle_interconnect import idle_link
from moe_beyond.simulator.result import Result, make_result
from moe_beyond.simulator.sequence import Group, Grouping, ReplaySequence
from moe_beyond.simulator.settings import ReplaySettings
from moe_beyond.simulator.totals import Totals
from moe_beyond.usage_profile import UsageProfile

NO_EVENTS = np.zeros((0, len(EventRecord)))
LOGGED_PER_EVENT = 64


class Replay:
    """Accumulates the counts and times of one strategy over sequences.

    Args:
        geometry: Geometry of the model.
        settings: Strategy and budget.
        profile: Usage profile of training text (default: None).
        stream: Demand of all sequences; required if the cache is carried over and the strategy needs the future.

    Raises:
        UserError: The strategy does not fit the model, or a required input is missing.
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
        settings.check_sizes(geometry)
        self._pools = pool_capacities(geometry, settings.slots, settings.scope, settings.quotas, settings.budget_bytes)
        self._implementation = load_policy(settings.policy)
        self._prefetch = settings.prefetch_settings(geometry)
        if "profile" in settings.needs and profile is None:
            reader = "a warm start" if settings.warm_start else f"policy {settings.policy}"
            raise UserError(f"{reader} needs the popularity of experts in training text; give --profile")
        if profile is not None and profile.popularity.shape != geometry.shape()[:2]:
            raise UserError(
                f"the profile must cover (L, E) = {geometry.shape()[:2]} experts (got {profile.popularity.shape})"
            )
        if settings.carry_over and "future" in settings.needs and stream is None:
            raise ValueError("a strategy that needs the future and carries its cache over needs the whole stream")
        self._device = settings.device
        self._totals = Totals.of(geometry, timed=settings.device is not None)
        self.times = self._totals.times
        self._grouping = Grouping(settings)
        self._cache: core.CacheState | None = None
        self._policy: Any = None
        self._event = np.zeros(1, np.int64)

    def add(
        self,
        experts: npt.NDArray[np.integer],
        scores: npt.NDArray[np.float32] | None = None,
        decode_start: int = 0,
    ) -> None:
        """Replay one sequence.

        Args:
            experts: Expert ids, ``(T, L, K)`` integer.
            scores: Probabilities, ``(T, H, L, E)`` float32, one slice per lookahead of the settings (default: none).
            decode_start: Position of the first generated token (default: 0).

        Raises:
            UserError: The experts do not fit the model, the scores do not fit the sequence, or a score is not a
                probability.
        """
        self.add_sequence(ReplaySequence(self.geometry, experts, scores, decode_start))

    def add_sequence(self, sequence: ReplaySequence) -> None:
        """Replay one sequence, or hold it until its batch is full."""
        for group in self._grouping.add(sequence):
            self._step(group)

    def watch(self, sequence: ReplaySequence) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Replay one sequence and return its events.

        Returns:
            Times and counts of each event, ``(events, 7)`` float64, columns `moe_beyond.cache.steps.EventRecord`; and
            the log of the interconnect (`LinkState.log`).
        """
        group = sequence.as_group(self.settings)
        events = np.zeros((len(group.stream.offsets) - 1, len(EventRecord)))
        link = self._step(group, events)
        return events, link.log[: link.tally[Tally.SENT]]

    def _step(self, group: Group, events: npt.NDArray[np.float64] = NO_EVENTS) -> LinkState:
        """Step a group, and return the interconnect at its end."""
        if self._cache is None:
            self._start(group, LOGGED_PER_EVENT * len(events))
            before = np.zeros_like(self._totals.counts)
        else:
            before = self._cache.counters.copy()
        cache, steps = self._cache, group.steps(self.settings)
        assert cache is not None
        stall_compute = np.zeros((len(group.size), 2))
        hooks = self._implementation.HOOKS
        if self.settings.sequential:
            run_accesses(cache, self._policy, hooks, steps.ids, group.ends, steps.counted)
        else:
            stream = self._stream if self.settings.carry_over and self._stream is not None else group.stream
            future = FutureView(np.zeros(self.geometry.num_layers), stream.ids, stream.offsets, self._event)
            busy = cache.link.seconds[Seconds.BUSY]
            timing = self.timing(group)
            run_events(cache, self._policy, hooks, self._prefetch, steps, timing, future, stall_compute, events)
            self.times.add_busy(float(cache.link.seconds[Seconds.BUSY] - busy))
        added = self.times.add(group, stall_compute, steps.counted)
        self._totals.sums.add(group.names, cache.counters - before, *added)
        if not self.settings.carry_over:
            finish(cache)
            self._totals.counts += cache.counters
            self._cache = None
        return cache.link

    def timing(self, group: Group) -> Timing:
        """Return the seconds of computing of a group's steps."""
        if self._device is None:
            return no_computing(len(group.size))
        return step_timing(self._device, self.geometry, self.settings.bits, group.size, group.context)

    def prepare(self, sequence: ReplaySequence) -> None:
        """Create the cache and the policy's arrays for a sequence, which adding it would do otherwise."""
        self._start(sequence.as_group(self.settings), 0)

    def _start(self, group: Group, log_size: int) -> None:
        """Create an empty cache, and fill it for a warm start."""
        geometry = self.geometry
        link = idle_link(self.settings, geometry, log_size)
        self._cache = core.empty_cache(
            geometry.num_layers, geometry.num_experts, self._pools, link, geometry.expert_units
        )
        self._cache.clock[Clock.HANDLING] = Handling[self.settings.misses.upper()]
        future = self._stream if self.settings.carry_over and self._stream is not None else group.stream
        inputs = PolicyInputs(geometry, self._pools, future, self._profile)
        self._policy = self._implementation.init(inputs)
        self._event[0] = 0
        if self.settings.warm_start:
            popular = most_used(inputs.popularity(), self._pools, geometry.expert_units)
            core.preload(self._cache, self._policy, self._implementation.HOOKS, popular[::-1].copy())
            self.times.add_busy(float(self._cache.link.seconds[Seconds.BUSY]))

    def counts(self) -> npt.NDArray[np.int64]:
        """Return the counts so far, ``(L, 9)`` int64, columns `Counter`."""
        for group in self._grouping.flush():
            self._step(group)
        if self._cache is None:
            return self._totals.counts
        return counts_so_far(self._cache)

    def absorb(self, later: Totals) -> None:
        """Add the totals of later sequences that another replay of these settings stepped."""
        self._totals.extend(later)

    def totals(self) -> Totals:
        """Return counts and times of the sequences added so far."""
        counts, before = self.counts(), self._totals
        return replace(
            before,
            counts=counts,
            sequences=before.sequences + self._grouping.taken,
            too_short=before.too_short + self._grouping.too_short,
        )

    def result(self) -> Result:
        """Return the result of the sequences added so far."""
        return make_result(self.geometry, self.settings, self.totals())


def counts_so_far(cache: core.CacheState) -> npt.NDArray[np.int64]:
    """Return the counts of a cache that is carried over; prefetched experts not demanded yet count as wasted for now.

    Args:
        cache: Cache that was stepped.

    Returns:
        Counts of each layer, ``(L, 9)`` int64, columns `Counter`.
    """
    unused = (cache.experts[Expert.PLACE] >= 0) & (cache.experts[Expert.ORIGIN] == Origin.PREFETCHED)
    counts = cache.counters.copy()
    counts[:, Counter.WASTED_PREFETCHES] += np.bincount(cache.experts[Expert.LAYER][unused], minlength=len(counts))
    return counts
