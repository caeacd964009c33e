"""Baselines that need no cache: the best static choice, all experts resident, and just-in-time loading."""

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
from moe_beyond.simulator.result import Result, StepTimes, make_result
from moe_beyond.simulator.sequence import Group, Grouping, ReplaySequence
from moe_beyond.simulator.settings import ReplaySettings
from moe_beyond.simulator.sums import SequenceSums

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


class Bound:
    """Accumulates the demand of every event and computes a result of the counted steps.

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

    Raises:
        UserError: ``od_moe`` has no device, or the slots do not fit the model.
    """

    def __init__(self, geometry: Geometry, settings: ReplaySettings) -> None:
        self.geometry, self.settings = geometry, settings
        settings.check_sizes(geometry)
        self._pools = pool_capacities(geometry, settings.slots, settings.scope, settings.quotas, settings.budget_bytes)
        if settings.policy == "od_moe" and settings.device is None:
            raise UserError("od_moe differs from other strategies in time only; give --device")
        self._grouping = Grouping(settings)
        self._groups: list[Group] = []
        self.sums = SequenceSums(units=np.array(geometry.expert_units))

    def add_sequence(self, sequence: ReplaySequence) -> None:
        """Add one sequence, or hold it until its batch is full."""
        self._groups += [group.without_scores() for group in self._grouping.add(sequence)]

    def result(self) -> Result:
        """Return the result of the sequences added so far."""
        self._groups += [group.without_scores() for group in self._grouping.flush()]
        geometry, settings = self.geometry, self.settings
        uses = np.zeros(geometry.total_experts, np.int64)
        for group in self._groups:
            uses += np.bincount(group.stream.ids[self._counted(group)], minlength=len(uses))
        resident = np.full(len(uses), settings.policy == "all_resident")
        counts = np.zeros((geometry.num_layers, len(Counter)), np.int64)
        if settings.policy == "static_hindsight":
            resident[most_used(uses, self._pools, geometry.expert_units)] = True
            moved = (resident & (uses > 0)).reshape(geometry.num_layers, -1).sum(1)
            counts[:, Counter.PREFETCH_TRANSFERS] = counts[:, Counter.USEFUL_PREFETCHES] = moved
        once, units = counts[:, Counter.PREFETCH_TRANSFERS].copy(), np.array(geometry.expert_units)
        self.sums, times = SequenceSums(once=int(once @ units), units=units), StepTimes.of(geometry)
        link = idle_link(settings, geometry)
        relative = link.relative[Relative.COPY, :: geometry.num_experts]
        times.busy = float(once @ relative) * float(link.seconds[Seconds.TRANSFER])
        for group in self._groups:
            if not settings.carry_over:
                link = idle_link(settings, geometry)
            busy = float(link.seconds[Seconds.BUSY])
            stall_compute, waited = self._stall_compute(group, resident, link)
            demanded = times.add(group, stall_compute, group.first >= settings.warmup_tokens)
            times.busy += float(link.seconds[Seconds.BUSY]) - busy
            added = self._counts(group, resident, waited)
            self.sums.add(group.names, added, demanded, *times.decoded())
            counts += added
        notes = {
            "static_hindsight": "the best static choice, selected on these traces",
            "all_resident": "no expert is transferred",
            "od_moe": f"{settings.groups} groups of {geometry.top_k} workers; demand assumed to be predicted",
        }
        return make_result(geometry, settings, counts, times, self._grouping, notes[settings.policy])

    def _counted(self, group: Group) -> Bools:
        """Return which of a group's demanded experts are counted, ``(n,)`` bool."""
        by_event = (group.first >= self.settings.warmup_tokens)[group.step_of_events()]
        return np.repeat(by_event, np.diff(group.stream.offsets))

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
        layers, counted = self.geometry.num_layers, self._counted(group)
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
