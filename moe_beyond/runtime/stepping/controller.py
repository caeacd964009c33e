"""Stepping the cache core and the predictor with a running model, event by event.

The order within a step is that of the replay's engine: scores and prefetches at the step's start; then for each layer
its demand, the scores that follow its routing, the transfers of missing experts, and prefetches. Scores that follow its
computing, and their prefetches, come last. The lock of the mover guards the ledger with the core, because reader
threads start prefetches and report arrivals. The core gets new times only when a step, an event or a prefetch begins;
telemetry has these times.
"""

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.cache import Wave, available_layers, prefetch_moments
from moe_beyond.geometry import Geometry
from moe_beyond.lookahead import Lookahead
from moe_beyond.runtime.slots.copies import Copier
from moe_beyond.runtime.slots.mover import Mover
from moe_beyond.runtime.stepping.ledger import Ledger
from moe_beyond.runtime.stepping.observer import Half, Observed, Observer, make_observer
from moe_beyond.runtime.stepping.telemetry import EventRow, StepRow
from moe_beyond.runtime.strategy import RunStrategy

if TYPE_CHECKING:
    from moe_beyond.predictors.information import StateKind

Ints = npt.NDArray[np.int64]

STEP_START = -1
"""Place of a layer in front of the first one."""


class Controller:
    """Makes the experts of each event resident, by the decisions of the cache core.

    Args:
        geometry: Geometry of the model.
        ledger: Cache core, slots and arrivals.
        mover: Mover from the store into the slots; its lock guards the ledger.
        copier: Way of an expert into its slot, which orders copies after kernels.
        observer: Predictor that gives scores (default: none).
        lookaheads: Lookaheads of the scores, ascending (default: none).
        prefetches: Whether there is a prefetcher (default: False).
        reads_deadlines: Whether it reads the times at which later layers will be routed (default: False).

    Attributes:
        mover: Mover from the store into the slots.
    """

    def __init__(
        self,
        geometry: Geometry,
        ledger: Ledger,
        mover: Mover,
        copier: Copier,
        observer: Observer | None = None,
        lookaheads: Sequence[Lookahead] = (),
        *,
        prefetches: bool = False,
        reads_deadlines: bool = False,
    ) -> None:
        self.mover, self._copier, self._observer = mover, copier, observer or Observer()
        self._ledger, self._cache, self._pool, self._telemetry = ledger, ledger.cache, ledger.pool, ledger.telemetry
        self._prefetches, self._reads_deadlines = prefetches, reads_deadlines
        layers = geometry.num_layers
        self._after_routing, self._after_computing = prefetch_moments(lookaheads)
        self._available = [
            [available_layers(lookaheads, layer, layers, computed=computed) for layer in range(layers)]
            for computed in (False, True)
        ]
        self._at_start = [available_layers(lookaheads, STEP_START, layers, first_step=first) for first in (False, True)]
        self._num_experts, self._num_layers = geometry.num_experts, layers
        self._in_transit = False  # whether experts of the running wave may not have arrived
        self._steps, self._layer = 0, STEP_START
        self._length = 0  # tokens of each row of the step
        self._step: StepRow | None = None
        self._sums = self._telemetry.decode
        self._interrupted = False  # whether the last event has not ended, for example after Ctrl-C
        self._event_ended = 0.0

    def begin_step(self, token_ids: Ints | None, past: int, shape: tuple[int, ...], sequence: int) -> None:
        """Begin a forward of the model.

        Args:
            token_ids: Tokens of its sequence, ``(T,)``; None if it belongs to none, as `SequenceLog` decides.
            past: Number of tokens of the sequence that were read before.
            shape: Rows of the batch, and tokens of each.
            sequence: Number of the sequence, for the telemetry; -1 for none.

        Raises:
            UserError: A token id is not in the predictor's vocabulary.
        """
        if self._interrupted:
            self._recover()
        self._layer = STEP_START
        rows, self._length = shape
        length = self._length
        self._sums = self._telemetry.decode if length == 1 else self._telemetry.prefill
        self._step = StepRow(sequence, rows * length, self._ledger.operations)
        began, scored_before = time.perf_counter(), self._observer.scored
        scores = self._observer.start(token_ids, past)
        self._sums.predictor_s += time.perf_counter() - began
        self._step.scored = self._observer.scored
        if length == 1 and self._observer.has_predictor and scores is None:
            self._telemetry.unscored += 1
        self._telemetry.add_step(self._step)
        self._steps += 1
        with self.mover.lock:
            began = time.perf_counter()
            self._ledger.operations += 1
            times = self._ledger.begin_times(began)
            self._step.now_s, self._step.transfer_estimate_s, self._step.layer_estimate_s = times[:3]
            self._cache.start_step()
            if scores is not None:  # without scores in the step before, those for a layer's next run are new, too
                self._cache.set_scores(scores, self._at_start[past == 0 or not scored_before])
            self._queue_prefetches(STEP_START)
            self._sums.cache_s += time.perf_counter() - began
        self._event_ended = time.perf_counter()

    def end_step(self, seconds: float) -> None:
        """End a forward, which counts if its last layer has computed.

        Args:
            seconds: Duration of the forward.
        """
        complete = self._layer == self._num_layers - 1 and not self._interrupted
        if self._step is not None and complete:
            self._step.seconds = seconds
            self._sums.steps += 1
            self._sums.tokens += self._length
            self._sums.durations.append(seconds)
        self._step = None

    def end(self) -> None:
        """End the run, whose last tokens change online updates."""
        self._observer.end()

    def event(self, layer: int, routed: Ints) -> Iterator[Wave]:
        """Yield the waves of an event, as `moe_beyond.runtime.slots.kernels.Residency` does.

        Args:
            layer: Position of the layer among the MoE layers.
            routed: Chosen experts, ``(N, K)``.

        Raises:
            UserError: An expert cannot be read.
        """
        began = time.perf_counter()
        row = EventRow(self._steps - 1, layer)
        experts, tokens = demand_of(routed)
        gap = began - self._event_ended if self._layer != STEP_START else 0.0
        self._layer = layer
        self._interrupted = True
        observed = self._observer.routed(layer, routed)
        if observed is not None:
            row.predictor_s = observed.seconds
        with self.mover.lock:
            self._ledger.operations += 1
            self._ledger.events += 1
            times = self._ledger.begin_times(began)
            row.now_s, row.transfer_estimate_s, row.layer_estimate_s = times[:3]
            row.device_estimate_s, row.host_estimate_s, row.host_token_estimate_s = times[3:]
            self._cache.demand(layer, experts + layer * self._num_experts, tokens, row.now_s)
            if observed is not None and observed.scores is not None:
                self._cache.set_scores(observed.scores, self._available[False][layer])
            wave = self._next_wave(row)
        row.cache_s = time.perf_counter() - began - row.predictor_s
        self._row = row
        routes = 0  # tokens of the experts on the host
        while wave is not None:
            if len(wave.on_host):
                routes = int(tokens[np.isin(experts, wave.on_host - layer * self._num_experts)].sum())
            began, waited, hosted = time.perf_counter(), row.wait_s, row.host_s
            yield wave
            self.wait(wave.experts.tolist())
            assert self._pool.holds(wave.slots.tolist(), wave.experts.tolist()), "a wave computed without its experts"
            self._copier.after_compute(wave.slots.tolist())
            computed = time.perf_counter()
            row.compute_s += computed - began - (row.wait_s - waited) - (row.host_s - hosted)
            with self.mover.lock:
                self._ledger.operations += 1
                wave = self._next_wave(row)
            self._event_ended = time.perf_counter()
            row.cache_s += self._event_ended - computed
        if gap:
            self._ledger.times.add_layer(gap + row.cache_s + row.predictor_s + row.compute_s + row.host_s)
        self._ledger.times.add_computing(row.compute_s, len(experts) - row.on_host)
        if row.on_host:
            self._ledger.times.add_host(row.host_s, row.on_host, routes)
        self._publish(self._observer.computed(layer))
        self._telemetry.add_event(row, self._sums)
        self._interrupted = False

    def wait(self, experts: list[int]) -> None:
        """Wait until experts of the running wave are in their slots.

        Args:
            experts: Experts ``layer * E + expert``.

        Raises:
            UserError: An expert cannot be read.
        """
        if self._in_transit:
            began = time.perf_counter()
            self.mover.wait(experts)
            self._row.wait_s += time.perf_counter() - began

    def computed_on_host(self, seconds: float) -> None:
        """Note the seconds in which the host has computed its experts of the running event."""
        self._row.host_s += seconds

    def take_state(self, kind: "StateKind", layer: int, state: Half) -> None:
        """Take a hidden state of a single token that the predictor reads.

        Args:
            kind: Kind of the state.
            layer: Layer whose router, or whose whole layer, reads the state.
            state: Hidden state, ``(D,)``.
        """
        self._publish(self._observer.take_state(kind, layer, state))

    def _next_wave(self, row: EventRow) -> Wave | None:
        """Begin the next wave of the running event, and request its missing experts; None at the event's end."""
        self._pool.end_wave()
        wave = self._cache.next_wave(self._ledger.times.last.now)
        if wave is None:
            row.hits, row.late_hits, row.misses, row.on_host = self._cache.event_counts()
            self._wake_mover()  # a queued prefetch may have room now
            return None
        row.waves += 1
        jobs = wave.transfers()
        self._in_transit = bool(jobs) or self._cache.event_counts().late_hits > 0
        if jobs:
            self._ledger.give(jobs)
            row.transfers += len(jobs)
            self.mover.demand(jobs)
        if self._in_transit:  # the kernel computes experts last that a prefetch is bringing
            wave = wave._replace(missing=self._pool.absent(wave.slots, wave.experts))
        self._pool.begin_wave(wave.slots.tolist())
        if wave.last and self._after_routing:
            self._queue_prefetches(row.layer)
        else:
            self._wake_mover()  # the event has unpinned experts of earlier prefetches
        return wave

    def _recover(self) -> None:
        """End an interrupted event, and transfer the experts that may never arrive.

        Raises:
            UserError: An expert cannot be read.
        """
        with self.mover.lock:
            self._copier.after_compute(range(self._pool.slots))  # kernels of the interrupted wave may still run
            absent = self._ledger.end_interrupted_event()
            self.mover.demand(absent)
        self.mover.wait([expert for expert, _ in absent])
        self._observer.forget()
        self._interrupted = False

    def _publish(self, observed: Observed | None) -> None:
        """Let the scores of a computed layer become available, and queue the prefetches that follow."""
        if observed is None:
            return
        self._sums.predictor_s += observed.seconds
        with self.mover.lock:
            self._ledger.operations += 1
            if observed.scores is not None:
                self._cache.set_scores(observed.scores, self._available[True][observed.layer])
            if self._after_computing:
                self._queue_prefetches(observed.layer, computed=True)

    def _queue_prefetches(self, layer: int, *, computed: bool = False) -> None:
        """Queue the prefetches that follow a layer's routing or computing; the lock is held."""
        if not self._prefetches:
            self._wake_mover()  # fills may be queued, or have room now
            return
        deadlines = None
        if self._reads_deadlines:
            ahead, times = np.arange(self._num_layers, dtype=np.float64) - layer, self._ledger.times.last
            deadlines = times.now + times.layer * ahead
        self._cache.queue_prefetches(layer, deadlines, computed=computed)
        self._wake_mover()

    def _wake_mover(self) -> None:
        """Wake the mover if prefetches are queued; waking a thread costs as much as a whole event without transfers."""
        if self._cache.has_queued:
            self.mover.wake()


def make_controller(
    geometry: Geometry, strategy: RunStrategy, ledger: Ledger, mover: Mover, copier: Copier
) -> Controller:
    """Make the controller of a strategy.

    Args:
        geometry: Geometry of the model.
        strategy: Strategy of the run.
        ledger: Ledger of the strategy.
        mover: Mover from the store into the slots.
        copier: Way of an expert into its slot.
    """
    settings = strategy.settings
    return Controller(
        geometry, ledger, mover, copier, make_observer(strategy), settings.lookaheads,
        prefetches=settings.prefetch != "none",
        reads_deadlines=settings.prefetch_settings(geometry).reads_deadlines,
    )  # fmt: skip


def demand_of(routed: Ints) -> tuple[Ints, Ints]:
    """Return the demand of an event.

    Args:
        routed: Chosen experts, ``(N, K)``.

    Returns:
        Distinct experts, ``(n,)`` int64, ascending, and the number of tokens that demand each of them.
    """
    if len(routed) == 1:
        experts = np.sort(routed[0])
        if (experts[1:] != experts[:-1]).all():
            return experts, np.ones(len(experts), np.int64)
    return np.unique(routed, return_counts=True)
