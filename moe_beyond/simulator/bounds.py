"""Baselines that need no cache: the best static choice, all experts resident, and just-in-time loading."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.compiler import jit
from moe_beyond.cache.counters import Counter
from moe_beyond.cache.interconnect import LinkState, Relative, Seconds, stall_seconds
from moe_beyond.cache.pools import most_used, pool_capacities
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.simulator.computing import step_timing
from moe_beyond.simulator.idle_interconnect import idle_link
from moe_beyond.simulator.result import Result, make_result
from moe_beyond.simulator.sequence import Group, Grouping, ReplaySequence
from moe_beyond.simulator.settings import ReplaySettings
from moe_beyond.simulator.totals import Totals

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


class Bound:
    """Accumulates the counts and times of a baseline over sequences.

    ``static_hindsight``: the experts that these traces demand most often are transferred once for all sequences and
    never evicted; these transfers count. Other experts bypass the cache in K extra slots and are transferred on demand.
    With flash they are read from it as in a replay, unless host memory holds them. The static experts are resident
    before the first sequence begins, so at a large budget it can be faster than a strategy that starts every sequence
    cold.

    ``all_resident``: no expert is ever transferred.

    ``od_moe`` (OD-MoE, arXiv 2512.03927): there is no cache. G groups of K workers compute the layers in turn, and each
    worker loads one expert over its own interconnect. A group starts to load when it has computed its previous layer.
    Layer i starts at ``max(end[i-1] + t_rest, end[i-G] + t_load)`` and ends ``t_moe`` later. There is no stall while
    ``t_load <= G * t_rest + (G - 1) * t_moe``, the paper's window. The paper's shadow model is assumed to predict the
    demand that far ahead, including the next token. A sequence starts with idle workers. In an event with more than K
    experts (windows, batches) a worker loads several experts in turn. With flash, the workers share one host memory.

    Args:
        geometry: Geometry of the model.
        settings: Settings with one of `moe_beyond.simulator.settings.BOUNDS` as policy.
        uses: Demand of each expert by all sequences (`demand`), which ``static_hindsight`` needs (default: None).

    Raises:
        UserError: ``od_moe`` has no device, or the slots do not fit the model.
    """

    def __init__(self, geometry: Geometry, settings: ReplaySettings, uses: Ints | None = None) -> None:
        self.geometry, self.settings = geometry, settings
        settings.check_sizes(geometry)
        if settings.policy == "od_moe" and settings.device is None:
            raise UserError("od_moe differs from other strategies in time only; give --device")
        pools = pool_capacities(geometry, settings.slots, settings.scope, settings.quotas, settings.budget_bytes)
        self._grouping = Grouping(settings)
        self._totals = Totals.of(geometry, timed=settings.device is not None)
        self._link = idle_link(settings, geometry)
        self._resident = np.full(geometry.total_experts, settings.policy == "all_resident")
        self._once = np.zeros(geometry.num_layers, np.int64)  # transfers of each layer before the first sequence
        if settings.policy == "static_hindsight":
            if uses is None:
                raise ValueError("static_hindsight needs the demand of all sequences")
            self._resident[most_used(uses, pools, geometry.expert_units)] = True
            self._once += (self._resident & (uses > 0)).reshape(geometry.num_layers, -1).sum(1)
        self._totals.sums.once = int(self._once @ np.array(geometry.expert_units))

    def add_sequence(self, sequence: ReplaySequence) -> None:
        """Add one sequence, or hold it until its batch is full."""
        for group in self._grouping.add(sequence):
            self._step(group)

    def _step(self, group: Group) -> None:
        if not self.settings.carry_over:
            self._link = idle_link(self.settings, self.geometry)
        times, busy = self._totals.times, float(self._link.seconds[Seconds.BUSY])
        stall_compute, waited = self._stall_compute(group, self._resident, self._link)
        demanded = times.add(group, stall_compute, group.first >= self.settings.warmup_tokens)
        times.add_busy(float(self._link.seconds[Seconds.BUSY]) - busy)
        counts = self._counts(group, self._resident, waited)
        self._totals.sums.add(group.names, counts, *demanded)
        self._totals.counts += counts

    def absorb(self, later: Totals) -> None:
        """Add the totals of later sequences that another object of these settings stepped."""
        self._totals.extend(later)

    def totals(self) -> Totals:
        """Return counts and times of the sequences added so far, without the transfers before the first one."""
        for group in self._grouping.flush():
            self._step(group)
        before = self._totals
        return replace(
            before,
            sequences=before.sequences + self._grouping.taken,
            too_short=before.too_short + self._grouping.too_short,
        )

    def result(self) -> Result:
        """Return the result of the sequences added so far."""
        totals, link = self.totals(), idle_link(self.settings, self.geometry)
        relative = link.relative[Relative.COPY, :: self.geometry.num_experts]
        seconds = float(self._once @ relative) * float(link.seconds[Seconds.TRANSFER])
        counts = totals.counts.copy()
        counts[:, Counter.PREFETCH_TRANSFERS] += self._once
        counts[:, Counter.USEFUL_PREFETCHES] += self._once
        times = replace(totals.times, link_seconds=[seconds, *totals.times.link_seconds])
        notes = {
            "static_hindsight": "the best static choice, selected on these traces",
            "all_resident": "no expert is transferred",
            "od_moe": f"{self.settings.groups} groups of {self.geometry.top_k} workers; demand assumed to be predicted",
        }
        note = notes[self.settings.policy]
        return make_result(self.geometry, self.settings, replace(totals, counts=counts, times=times), note)

    def _stall_compute(self, group: Group, resident: Bools, link: LinkState) -> tuple[Floats, Bools]:
        """Return seconds of stall and computing, ``(S, 2)``, and whether each event waited, ``(events,)`` bool."""
        device, bits, workers = self.settings.device, self.settings.bits, self.geometry.top_k
        offsets = group.stream.offsets
        if device is None:
            return np.zeros((len(group.size), 2)), np.zeros(len(offsets) - 1, np.bool_)
        timing = step_timing(device, self.geometry, bits, group.size, group.context)
        step = group.step_of_events()
        rest = timing.layer[step]
        experts, stalls = np.diff(offsets), np.zeros(len(offsets) - 1)
        demanded = np.diff(np.concatenate([[0], np.cumsum(group.tokens)])[offsets])
        each = np.maximum(timing.expert, timing.token * demanded / np.maximum(experts, 1))
        if just_in_time := self.settings.policy == "od_moe":
            experts = -(-experts // workers)  # the workers compute in parallel
        computing = experts * each
        loads = np.zeros(workers if just_in_time else 1)
        stall_seconds(link, group.stream.ids, offsets, resident, each * timing.overlap, loads, stalls)
        if just_in_time:
            before = np.zeros(len(stalls))  # dense layers and head of the step before
            before[self.geometry.num_layers :: self.geometry.num_layers] = timing.outside[:-1]
            wait_for_workers(stalls, computing, before + rest, np.zeros(self.settings.groups))
        stall, layers = (np.bincount(step, weights, len(group.size)) for weights in (stalls, computing + rest))
        return np.stack([stall, layers + timing.outside], axis=1), stalls > 0

    def _counts(self, group: Group, resident: Bools, waited: Bools) -> Ints:
        """Return the counts of a group's counted steps, ``(L, 9)`` int64, columns `Counter`."""
        layers, counted = self.geometry.num_layers, counted_demand(group, self.settings)
        counts = np.zeros((layers, len(Counter)), np.int64)
        ids = group.stream.ids[counted]

        def by_layer(chosen: Bools) -> Ints:
            return np.bincount(ids[chosen] // self.geometry.num_experts, minlength=layers)

        if self.settings.policy == "od_moe":
            late = np.repeat(waited, np.diff(group.stream.offsets))[counted]
            counts[:, Counter.LATE_HITS] = by_layer(late)
            counts[:, Counter.HITS] = counts[:, Counter.USEFUL_PREFETCHES] = by_layer(~late)
            counts[:, Counter.PREFETCH_TRANSFERS] = counts[:, Counter.LATE_HITS] + counts[:, Counter.HITS]
        else:
            counts[:, Counter.HITS] = by_layer(resident[ids])
            counts[:, Counter.MISSES] = counts[:, Counter.DEMAND_TRANSFERS] = by_layer(~resident[ids])
        counts[:, Counter.ACCESSES] = counts[:, [Counter.HITS, Counter.LATE_HITS, Counter.MISSES]].sum(1)
        return counts


def counted_demand(group: Group, settings: ReplaySettings) -> Bools:
    """Return which of a group's demanded experts are counted, ``(n,)`` bool."""
    by_event = (group.first >= settings.warmup_tokens)[group.step_of_events()]
    return np.repeat(by_event, np.diff(group.stream.offsets))


def demand(geometry: Geometry, settings: ReplaySettings, sequences: Iterable[ReplaySequence]) -> Ints:
    """Count how often the counted steps of sequences demand each expert.

    Args:
        geometry: Geometry of the model.
        settings: Settings of the replay.
        sequences: Sequences in the order of the replay.

    Returns:
        Counts of the experts, ``(L*E,)`` int64.
    """
    grouping, uses = Grouping(settings), np.zeros(geometry.total_experts, np.int64)
    for group in chain(chain.from_iterable(map(grouping.add, sequences)), grouping.flush()):
        uses += np.bincount(group.stream.ids[counted_demand(group, settings)], minlength=len(uses))
    return uses


@jit
def wait_for_workers(seconds: Floats, computing: Floats, rest: Floats, ends: Floats) -> None:
    """Replace the load time of each event by the time that its layer waits for the load.

    Args:
        seconds: Seconds of loading, ``(events,)`` float64; on return, seconds of waiting.
        computing: Seconds of the workers' computing, ``(events,)`` float64.
        rest: Seconds of computing between the workers' computing for the event before and the routing, ``(events,)``
            float64.
        ends: Time at which each group has computed its last layer, ``(G,)`` float64, zeros.
    """
    end = 0.0
    for event in range(len(seconds)):
        group = event % len(ends)
        routed = end + rest[event]
        seconds[event] = max(0.0, ends[group] + seconds[event] - routed)
        end = routed + seconds[event] + computing[event]
        ends[group] = end
