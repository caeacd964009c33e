"""References for a replay that need no cache: the best fixed choice, all experts resident, loading just in time."""

import numpy as np
import numpy.typing as npt

from moe_beyond.cache import core
from moe_beyond.cache.interconnect import BUSY, TRANSFER, LinkState, load_seconds
from moe_beyond.cache.jit import jit
from moe_beyond.cache.pools import most_used, pool_slots
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.simulator import devices
from moe_beyond.simulator.interconnects import idle_link
from moe_beyond.simulator.result import Clock, Result, make_result
from moe_beyond.simulator.sequence import Group, Grouping, ReplaySequence
from moe_beyond.simulator.settings import ReplaySettings
from moe_beyond.simulator.sums import SequenceSums

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


class Bound:
    """Accumulates what every event demands, and makes a record of the steps that count.

    ``static_hindsight``: the experts that these very traces demand most often, moved in once for all sequences and
    never evicted; these transfers count. Others compute in K slots of staging next to the budget and cross the link on
    demand; where there is flash they are read from it as in a replay, unless host memory holds them. The fixed experts
    are in place before the first sequence begins, so at a large budget it can be faster than a strategy that starts
    every sequence cold.

    ``all_resident``: nothing is ever moved.

    ``od_moe`` (OD-MoE, arXiv 2512.03927): no cache. G groups of K workers take the layers in turn, and each worker
    moves one expert in over a link of its own. A group begins to load as soon as it has computed its layer before, so
    layer i starts at ``max(end[i-1] + t_rest, end[i-G] + t_load)`` and ends ``t_moe`` later: nothing stalls while
    ``t_load <= G * t_rest + (G - 1) * t_moe``, the paper's window. Its shadow model is taken to know the demand that
    far ahead, the next token's too. A sequence begins with idle workers. Of an event with more than K experts (windows,
    batches) a worker takes several, one after another. Where there is flash, the workers share one host memory.

    Args:
        geometry: The model.
        settings: With one of `moe_beyond.simulator.settings.BOUNDS` as policy.

    Raises:
        UserError: ``od_moe`` has no device, or the slots do not do.
    """

    def __init__(self, geometry: Geometry, settings: ReplaySettings) -> None:
        self.geometry, self.settings = geometry, settings
        self._pools = pool_slots(geometry, settings.slots, settings.scope, settings.quotas)
        if settings.policy == "od_moe" and settings.device is None:
            raise UserError("od-moe is a matter of time alone; give --device")
        self._grouping = Grouping(settings)
        self._groups: list[Group] = []
        self.sums = SequenceSums()

    def add_sequence(self, sequence: ReplaySequence) -> None:
        """Note one sequence, or put it aside until a batch is full."""
        self._groups += [group.without_scores() for group in self._grouping.add(sequence)]

    def result(self) -> Result:
        """Return the record of what was added so far."""
        self._groups += [group.without_scores() for group in self._grouping.rest()]
        geometry, settings = self.geometry, self.settings
        uses = np.zeros(geometry.total_experts, np.int64)
        for group in self._groups:
            uses += np.bincount(group.stream.ids[self._counted(group)], minlength=len(uses))
        resident = np.full(len(uses), settings.policy == "all_resident")
        counts = np.zeros((geometry.num_layers, len(core.COUNTERS)), np.int64)
        if settings.policy == "static_hindsight":
            resident[most_used(uses, self._pools)] = True
            moved = (resident & (uses > 0)).reshape(geometry.num_layers, -1).sum(1)
            counts[:, core.PREFETCH_TRANSFERS] = counts[:, core.USEFUL] = moved
        self.sums, clock = SequenceSums(once=int(counts[:, core.PREFETCH_TRANSFERS].sum())), Clock()
        wire = idle_link(settings, geometry)
        clock.busy = self.sums.once * float(wire.clock[TRANSFER])
        for group in self._groups:
            if not settings.carry_over:
                wire = idle_link(settings, geometry)
            busy = float(wire.clock[BUSY])
            spent, waited = self._timed(group, resident, wire)
            demanded = clock.add(group, spent, group.first >= settings.warmup_tokens)
            clock.busy += float(wire.clock[BUSY]) - busy
            added = self._counts(group, resident, waited)
            self.sums.add(group.names, added, demanded, *clock.decoded())
            counts += added
        notes = {
            "static_hindsight": "the best fixed choice, knowing these very traces",
            "all_resident": "nothing has to be moved",
            "od_moe": f"{settings.groups} groups of {geometry.top_k} workers; demand taken to be known",
        }
        return make_result(geometry, settings, counts, clock, self._grouping, notes[settings.policy])

    def _counted(self, group: Group) -> Bools:
        """Return which of a group's demands count: ``(n,)``."""
        by_event = (group.first >= self.settings.warmup_tokens)[group.step_of_events()]
        return np.repeat(by_event, np.diff(group.stream.offsets))

    def _timed(self, group: Group, resident: Bools, wire: LinkState) -> tuple[Floats, Bools]:
        """Return ``(S, 2)`` seconds of stall and computing, and whether each event waited: ``(events,)``."""
        device, bits, workers = self.settings.device, self.settings.bits, self.geometry.top_k
        offsets = group.stream.offsets
        if device is None:
            return np.zeros((len(group.size), 2)), np.zeros(len(offsets) - 1, np.bool_)
        rest = devices.other_seconds(device, self.geometry, bits)
        experts, stalls = np.diff(offsets), np.zeros(len(offsets) - 1)
        if just_in_time := self.settings.policy == "od_moe":
            experts = -(-experts // workers)  # the workers compute side by side
        computing = experts * devices.expert_seconds(device, self.geometry, bits)
        load_seconds(wire, group.stream.ids, offsets, resident, np.zeros(workers if just_in_time else 1), stalls)
        if just_in_time:
            wait_for_workers(stalls, computing, rest, np.zeros(self.settings.groups))
        step = group.step_of_events()
        spent = [np.bincount(step, weights, len(group.size)) for weights in (stalls, computing + rest)]
        return np.stack(spent, axis=1), stalls > 0

    def _counts(self, group: Group, resident: Bools, waited: Bools) -> Ints:
        """Return the counts ``(L, 8)`` of a group's steps that count."""
        layers, counted = self.geometry.num_layers, self._counted(group)
        counts = np.zeros((layers, len(core.COUNTERS)), np.int64)
        ids = group.stream.ids[counted]

        def by_layer(those: Bools) -> Ints:
            return np.bincount(ids[those] // self.geometry.num_experts, minlength=layers)

        if self.settings.policy == "od_moe":
            late = np.repeat(waited, np.diff(group.stream.offsets))[counted]
            counts[:, core.LATE_HITS] = by_layer(late)
            counts[:, core.HITS] = counts[:, core.USEFUL] = by_layer(~late)
            counts[:, core.PREFETCH_TRANSFERS] = counts[:, core.LATE_HITS] + counts[:, core.HITS]
        else:
            counts[:, core.HITS] = by_layer(resident[ids])
            counts[:, core.MISSES] = counts[:, core.DEMAND_TRANSFERS] = by_layer(~resident[ids])
        counts[:, core.ACCESSES] = counts[:, [core.HITS, core.LATE_HITS, core.MISSES]].sum(1)
        return counts


@jit
def wait_for_workers(seconds: Floats, computing: Floats, rest: float, ends: Floats) -> None:
    """Turn the time that each layer's load takes into the time that the layer waits for it.

    Args:
        seconds: ``(events,)``, of loading; on return, of waiting.
        computing: ``(events,)``, of the workers' computing.
        rest: Seconds of everything else in a layer.
        ends: ``(G,)``, zeros: when each group has computed its last layer.
    """
    end = 0.0
    for event in range(len(seconds)):
        group = event % len(ends)
        routed = end + rest
        seconds[event] = max(0.0, ends[group] + seconds[event] - routed)
        end = routed + seconds[event] + computing[event]
        ends[group] = end
