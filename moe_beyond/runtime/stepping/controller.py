"""Stepping the cache core and the predictor with a running model, event by event.

The order within a step is that of the replay's engine: scores and prefetches at the step's start; then for each layer
its demand, the scores that follow its routing, the transfers of missing experts, and prefetches. The lock of the mover
guards the core, because reader threads start prefetches and report arrivals.

Every call of the core from here is an operation with a number. Prefetches and arrivals are recorded with the number
of operations before them. The core gets new times only when a step, an event or a prefetch begins. Telemetry has these
times and numbers, so that a run with prefetches can be repeated exactly.
"""

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.cache import Cache, Wave, available_layers
from moe_beyond.geometry import Geometry
from moe_beyond.lookahead import Lookahead
from moe_beyond.runtime.slots.copies import Copier
from moe_beyond.runtime.slots.mover import Mover, Transfer
from moe_beyond.runtime.slots.pool import SlotPool
from moe_beyond.runtime.stepping.scorer import SequenceScorer
from moe_beyond.runtime.stepping.telemetry import EventRow, PrefetchRow, StepRow, Telemetry, TransferRow
from moe_beyond.runtime.strategy import RunStrategy

Ints = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]

STEP_START = -1
"""Place of a layer in front of the first one."""
FIRST_TRANSFER_S = 1e-3
"""Seconds per transfer that prefetchers assume before the first one."""
SMOOTHING = 0.1
"""Weight of a new duration in the estimates that prefetchers with deadlines read."""


class Times(NamedTuple):
    """Times that the core reads, in seconds.

    Attributes:
        now: Time since the begin of the run.
        transfer: Estimate of the duration of a transfer; 0 before the first one.
        layer: Estimate of the time from one layer's routing to the next without stall; 0 before the first one.
    """

    now: float
    transfer: float
    layer: float


class Controller:
    """Makes the experts of each event resident, by the decisions of the cache core.

    Args:
        geometry: Geometry of the model.
        cache: Cache of the run, with transfers that take time.
        pool: Memory of the slots.
        telemetry: Sums and rows of the run.
        scorer: Scores of a predictor (default: None).
        lookaheads: Lookaheads of the scores, ascending (default: none).
        after_computing: Whether scores follow a layer's computing, instead of its routing (default: False).
        prefetches: Whether there is a prefetcher (default: False).
        reads_deadlines: Whether it reads the times at which later layers will be routed (default: False).
        recorded: Times of the steps and events of a recorded run, in place of measured ones (default: None).

    Attributes:
        mover: Mover from the store into the slots; set it before the first event.
        copier: Way of an expert into its slot, which orders copies after kernels; set it before the first event.
        cache: Cache of the run.
        operations: Number of operations of the core so far.
    """

    mover: Mover
    copier: Copier

    def __init__(
        self,
        geometry: Geometry,
        cache: Cache,
        pool: SlotPool,
        telemetry: Telemetry,
        scorer: SequenceScorer | None = None,
        lookaheads: Sequence[Lookahead] = (),
        *,
        after_computing: bool = False,
        prefetches: bool = False,
        reads_deadlines: bool = False,
        recorded: Iterator[Times] | None = None,
    ) -> None:
        self.cache, self._pool, self._telemetry = cache, pool, telemetry
        self._scorer, self._after_computing = scorer, after_computing
        self._prefetches, self._reads_deadlines = prefetches, reads_deadlines
        layers = geometry.num_layers
        self._available = [available_layers(lookaheads, layer, layers) for layer in range(layers)]
        self._at_start = [available_layers(lookaheads, STEP_START, layers, first_step=first) for first in (False, True)]
        self._num_experts, self._num_layers = geometry.num_experts, layers
        self._in_transit = False  # whether experts of the running wave may not have arrived
        self._scored = False  # whether the step has scores
        self._state: npt.NDArray[np.float16] | None = None
        self._began = time.perf_counter()
        self._steps = self._events = self.operations = 0
        self._layer = STEP_START
        self._length = 0  # tokens of each row of the step
        self._step: StepRow | None = None
        self._sums = telemetry.decode
        self._prefetch_events: dict[int, tuple[int, int]] = {}
        self._waiting: tuple[int, Ints] | None = None  # a computed layer that the predictor has not observed
        self._interrupted = False  # whether the last event has not ended, for example after Ctrl-C
        self._transfer_s = self._layer_s = 0.0
        self._recorded, self._times = recorded, Times(0.0, 0.0, 0.0)
        self._event_ended = self._began

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
        self._finish_observing()
        self._layer = STEP_START
        rows, self._length = shape
        length = self._length
        self._sums = self._telemetry.decode if length == 1 else self._telemetry.prefill
        self._step = StepRow(sequence, rows * length, self.operations)
        began = time.perf_counter()
        scores = None if self._scorer is None else self._scorer.start(token_ids, past)
        self._sums.predictor_s += time.perf_counter() - began
        scored_before, self._scored = self._scored, scores is not None
        self._step.scored = self._scored
        if length == 1 and self._scorer is not None and scores is None:
            self._telemetry.unscored += 1
        self._telemetry.add_step(self._step)
        self._steps += 1
        with self.mover.lock:
            began = time.perf_counter()
            self.operations += 1
            now, self._step.transfer_estimate_s, self._step.layer_estimate_s = self._next_times(began)
            self._step.now_s = now
            self.cache.start_step()
            if scores is not None:  # without scores in the step before, those for a layer's next run are new, too
                self.cache.set_scores(scores, self._at_start[past == 0 or not scored_before])
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
        scores = None
        if not self._after_computing:
            scores, row.predictor_s = self._scores_after(layer, routed, self._state)
            self._state = None
        with self.mover.lock:
            self.operations += 1
            self._events += 1
            row.now_s, row.transfer_estimate_s, row.layer_estimate_s = self._next_times(began)
            self.cache.demand(layer, experts + layer * self._num_experts, tokens, row.now_s)
            if scores is not None:
                self.cache.set_scores(scores, self._available[layer])
            wave = self._next_wave(row)
        row.cache_s = time.perf_counter() - began - row.predictor_s
        self._row = row
        while wave is not None:
            began, waited = time.perf_counter(), row.wait_s
            yield wave
            self.wait(wave.experts.tolist())
            assert self._pool.holds(wave.slots.tolist(), wave.experts.tolist()), "a wave computed without its experts"
            self.copier.after_compute(wave.slots.tolist())
            computed = time.perf_counter()
            row.compute_s += computed - began - (row.wait_s - waited)
            with self.mover.lock:
                self.operations += 1
                wave = self._next_wave(row)
            self._event_ended = time.perf_counter()
            row.cache_s += self._event_ended - computed
        if gap:
            self._layer_s = _smoothed(self._layer_s, gap + row.cache_s + row.predictor_s + row.compute_s)
        if self._after_computing:
            self._waiting = (layer, routed)
            if not self._scored:  # states matter only for scores, and a chunk's are not seen
                self._observe_computed(None)
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

    def take_state(self, layer: int, state: npt.NDArray[np.float16]) -> None:
        """Take the hidden state of a single token that the predictor reads.

        Args:
            layer: Layer whose router, or whose whole layer, reads the state.
            state: Hidden state, ``(D,)``.
        """
        if not self._after_computing:
            self._state = state
        elif self._waiting is not None and self._waiting[0] < layer:
            self._observe_computed(state)

    def next_prefetch(self, now: float | None = None) -> tuple[int, int] | None:
        """Start the next queued prefetch, for an idle reader that holds the lock.

        Args:
            now: Time since the begin of the run, in seconds (default: measured).

        Returns:
            Expert and slot; None if no prefetch is queued, or none has room.
        """
        now = time.perf_counter() - self._began if now is None else now
        started = self.cache.begin_prefetch(now)
        expert, slot = started or (-1, -1)
        self._telemetry.add_prefetch(PrefetchRow(self.operations, now, expert, slot))
        if started is not None:
            self._pool.give(slot, expert)
            self._prefetch_events[expert] = (self._events, self.operations)
        return started

    def arrived(self, transfer: Transfer) -> None:
        """Report the arrival of an expert, for a reader that holds the lock."""
        self._pool.arrived(transfer.slot, transfer.expert)
        if self.cache.slot(transfer.expert) == transfer.slot:  # it may have been evicted in transit
            self.cache.arrived(transfer.expert)
        self._transfer_s = _smoothed(self._transfer_s, transfer.ended - transfer.started)
        event, operation = self._prefetch_events.pop(transfer.expert, (self._events, self.operations))
        host, page_cache, disk = transfer.source
        self._telemetry.add_transfer(
            TransferRow(
                transfer.expert, transfer.slot, transfer.prefetch, event, operation, self.operations,
                transfer.started - transfer.requested, transfer.read_s, transfer.copy_s, host, page_cache, disk,
            )
        )  # fmt: skip

    def _next_wave(self, row: EventRow) -> Wave | None:
        """Begin the next wave of the running event, and request its missing experts; None at the event's end."""
        self._pool.end_wave()
        wave = self.cache.next_wave(self._times.now)
        if wave is None:
            row.hits, row.late_hits, row.misses = self.cache.event_counts()
            self._wake_mover()  # a queued prefetch may have room now
            return None
        row.waves += 1
        jobs = wave.transfers()
        self._in_transit = bool(jobs) or self.cache.event_counts().late_hits > 0
        if jobs:
            for expert, slot in jobs:
                self._pool.give(slot, expert)
            row.transfers += len(jobs)
            self.mover.demand(jobs)
        if self._in_transit:  # the kernel computes experts last that a prefetch is bringing
            wave = wave._replace(missing=self._pool.absent(wave.slots, wave.experts))
        self._pool.begin_wave(wave.slots.tolist())
        if wave.last and not self._after_computing:
            self._queue_prefetches(row.layer)
        else:
            self._wake_mover()  # the event has unpinned experts of earlier prefetches
        return wave

    def _recover(self) -> None:
        """End an interrupted event, and transfer the experts that have a slot but may never arrive.

        Raises:
            UserError: An expert cannot be read.
        """
        with self.mover.lock:
            self._pool.end_wave()
            while self.cache.next_wave(self._times.now) is not None:
                pass
            absent = []
            for expert in range(self._num_layers * self._num_experts):
                slot = self.cache.slot(expert)
                if slot >= 0 and self._pool.content[slot] != expert:
                    self._pool.give(slot, expert)
                    absent.append((expert, slot))
            self.mover.demand(absent)
        self.mover.wait([expert for expert, _ in absent])
        self._waiting = self._state = None
        self._interrupted = False

    def _scores_after(
        self, layer: int, routed: Ints, state: npt.NDArray[np.float16] | None
    ) -> tuple[Scores | None, float]:
        """Let the predictor observe a layer, without the lock; return the scores that follow, and the seconds."""
        if self._scorer is None:
            return None, 0.0
        began = time.perf_counter()
        scores = self._scorer.routed(layer, routed, state)
        return scores, time.perf_counter() - began

    def _observe_computed(self, state: npt.NDArray[np.float16] | None) -> None:
        """Let the predictor observe the layer that computed last."""
        assert self._waiting is not None
        (layer, routed), self._waiting = self._waiting, None
        scores, seconds = self._scores_after(layer, routed, state)
        self._sums.predictor_s += seconds
        with self.mover.lock:
            self.operations += 1
            if scores is not None:
                self.cache.set_scores(scores, self._available[layer])
            self._queue_prefetches(layer)

    def _finish_observing(self) -> None:
        """Let the predictor observe the last layer of a step, which no layer's input follows."""
        if self._waiting is not None:
            self._observe_computed(None)

    def _queue_prefetches(self, layer: int) -> None:
        """Queue the prefetches that follow a layer; the lock is held."""
        if not self._prefetches:
            return
        deadlines = None
        if self._reads_deadlines:
            ahead = np.arange(self._num_layers, dtype=np.float64) - layer
            deadlines = self._times.now + self._times.layer * ahead
        self.cache.queue_prefetches(layer, deadlines)
        self._wake_mover()

    def _next_times(self, now: float) -> Times:
        """Give the core the times of a step or an event that begins.

        Args:
            now: Time in seconds of `time.perf_counter`.
        """
        measured = Times(now - self._began, self._transfer_s, self._layer_s)
        self._times = measured if self._recorded is None else next(self._recorded)
        if self._times.transfer:
            self.cache.set_transfer_seconds(self._times.transfer)
        return self._times

    def _wake_mover(self) -> None:
        """Wake the mover if prefetches are queued; waking a thread costs as much as a whole event without transfers."""
        if self.cache.has_queued:
            self.mover.wake()


def make_controller(
    geometry: Geometry,
    strategy: RunStrategy,
    pool: SlotPool,
    telemetry: Telemetry,
    recorded: Iterator[Times] | None = None,
) -> Controller:
    """Make the controller of a strategy, with a cold cache.

    Args:
        geometry: Geometry of the model.
        strategy: Strategy of the run.
        pool: Memory of the slots.
        telemetry: Sums and rows of the run.
        recorded: Times of the steps and events of a recorded run (default: None, measured ones).
    """
    settings, predictor = strategy.settings, strategy.predictor
    prefetch = settings.prefetch_settings(geometry)
    cache = Cache(
        geometry, settings.slots, settings.policy, settings.scope, profile=strategy.profile, prefetch=prefetch,
        transfer_seconds=FIRST_TRANSFER_S,
    )  # fmt: skip
    scorer = None if predictor is None else SequenceScorer(predictor)
    return Controller(
        geometry, cache, pool, telemetry, scorer, settings.lookaheads,
        after_computing=settings.available_after == "computed",
        prefetches=settings.prefetch != "none", reads_deadlines=prefetch.reads_deadlines, recorded=recorded,
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


def _smoothed(estimate: float, duration: float) -> float:
    return duration if estimate == 0 else (1 - SMOOTHING) * estimate + SMOOTHING * duration
