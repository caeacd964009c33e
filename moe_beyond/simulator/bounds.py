"""What stands beside a replay and needs no cache: the best fixed choice, all resident, loading just in time."""

import numpy as np
import numpy.typing as npt

from moe_beyond.cache import core
from moe_beyond.cache.pools import most_used, pool_slots
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.simulator import devices
from moe_beyond.simulator.result import Clock, Result, make_result
from moe_beyond.simulator.sequence import Group, Grouping, Sequence
from moe_beyond.simulator.settings import ReplaySettings


class Bound:
    """Accumulates what every event of counted steps demands, and makes a record of it.

    ``static_hindsight``: the experts that these very traces demand most often, moved in once and never evicted; others
    compute in K slots of staging. ``all_resident``: nothing is ever moved. ``od_moe`` (arXiv 2512.03927): no cache; G
    groups of K workers take the layers in turn, each worker moves one expert in over a link of its own while the others
    compute, which is in time if ``t_load <= G * t_moe + (G - 1) * t_rest``; its shadow model is taken to know the
    demand.

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
        self._demanded: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
        self._shapes: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]] = []

    def add_sequence(self, sequence: Sequence) -> None:
        """Note one sequence, or put it aside until a batch is full."""
        for group in self._grouping.add(sequence):
            self._note(group)

    def _note(self, group: Group) -> None:
        step = np.searchsorted(group.ends, group.stream.events() - 1, side="right")
        counted = group.first >= self.settings.warmup_tokens
        keep = counted[step]
        number = np.cumsum(counted) - 1
        self._demanded.append((group.stream.ids[keep], number[step[keep]]))
        self._shapes.append((group.size[counted], group.decoding[counted]))

    def result(self) -> Result:
        """Return the record of what was added so far."""
        for group in self._grouping.rest():
            self._note(group)
        geometry, settings = self.geometry, self.settings
        ids = np.concatenate([ids for ids, _ in self._demanded] or [np.zeros(0, np.int64)])
        counts = np.zeros((geometry.num_layers, len(core.COUNTERS)), np.int64)
        layers = geometry.num_layers
        layer_of = np.arange(geometry.total_experts) // geometry.num_experts
        uses = np.bincount(ids, minlength=geometry.total_experts)

        def by_layer(values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
            return np.bincount(layer_of, weights=values, minlength=layers).astype(np.int64)

        counts[:, core.ACCESSES] = by_layer(uses)
        resident = np.ones(geometry.total_experts, np.bool_)
        just_in_time = settings.policy == "od_moe"
        if settings.policy == "static_hindsight":
            resident = np.isin(np.arange(len(uses)), most_used(uses, self._pools))
            counts[:, core.PREFETCH_TRANSFERS] = counts[:, core.USEFUL] = by_layer((resident & (uses > 0)).astype(int))
        late = just_in_time and self._shortfall() > 0
        counts[:, core.HITS] = 0 if late else by_layer(np.where(resident, uses, 0))
        if just_in_time:
            counts[:, core.PREFETCH_TRANSFERS] = counts[:, core.ACCESSES]
            counts[:, core.LATE_HITS if late else core.USEFUL] = counts[:, core.ACCESSES]
        else:
            counts[:, core.MISSES] = counts[:, core.DEMAND_TRANSFERS] = counts[:, core.ACCESSES] - counts[:, core.HITS]
        clock = Clock()
        for (demanded, step), (size, decoding) in zip(self._demanded, self._shapes, strict=True):
            clock.add(self._spent(demanded, step, len(size), resident), size, decoding)
            clock.all_tokens += int(size.sum())
        clock.busy = float(counts[:, [core.DEMAND_TRANSFERS, core.PREFETCH_TRANSFERS]].sum()) * self._transfer()
        notes = {
            "static_hindsight": "the best fixed choice, knowing these very traces",
            "all_resident": "nothing has to be moved",
            "od_moe": f"{settings.groups} groups of {geometry.top_k} workers; demand taken to be known",
        }
        return make_result(geometry, settings, counts, clock, notes[settings.policy])

    def _transfer(self) -> float:
        if self.settings.device is None:
            return 0.0
        size = self.geometry.params_per_expert * self.settings.bits / 8
        return devices.transfer_seconds(self.settings.device, size)

    def _shortfall(self) -> float:
        """Return the seconds that a layer of ``od_moe`` waits for its experts."""
        device, groups = self.settings.device, self.settings.groups
        if device is None:
            return 0.0
        moe = devices.expert_seconds(device, self.geometry, self.settings.bits)  # the K workers compute side by side
        rest = devices.other_seconds(device, self.geometry, self.settings.bits)
        return max(0.0, self._transfer() - groups * moe - (groups - 1) * rest)

    def _spent(
        self,
        ids: npt.NDArray[np.int64],
        step: npt.NDArray[np.int64],
        steps: int,
        resident: npt.NDArray[np.bool_],
    ) -> npt.NDArray[np.float64]:
        """Return ``(S, 2)`` seconds of stall and computing."""
        spent = np.zeros((steps, 2))
        device, bits, layers = self.settings.device, self.settings.bits, self.geometry.num_layers
        if device is None:
            return spent
        expert = devices.expert_seconds(device, self.geometry, bits)
        demanded = np.bincount(step, minlength=steps)
        if self.settings.policy == "od_moe":
            spent[:, 0] = layers * self._shortfall()
            demanded = np.full(steps, layers)
        else:
            spent[:, 0] = np.bincount(step, weights=~resident[ids], minlength=steps) * self._transfer()
        spent[:, 1] = layers * devices.other_seconds(device, self.geometry, bits) + demanded * expert
        return spent
