"""A cache that a Python program steps event by event, through the functions of the replay."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moe_beyond.cache import core, predictions, stepping
from moe_beyond.cache.compiler import bind
from moe_beyond.cache.core import Clock, Expert, Pool
from moe_beyond.cache.interconnect import Seconds, Tally, new_link
from moe_beyond.cache.misses import Handling
from moe_beyond.cache.policies import load_policy
from moe_beyond.cache.policy_inputs import PolicyInputs, Stream
from moe_beyond.cache.pools import pool_capacities
from moe_beyond.cache.prefetch_queue import finish
from moe_beyond.cache.prefetchers import NO_THRESHOLD, PrefetcherId
from moe_beyond.cache.prefetchers._inputs import FutureView, PrefetchSettings
from moe_beyond.cache.steps import MANY_LAYERS, in_layers
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.lookahead import Lookahead
from moe_beyond.usage_profile import UsageProfile

Ints = npt.NDArray[np.int64]
INT64 = np.dtype(np.int64)


class Wave(NamedTuple):
    """Experts of an event that compute together.

    Attributes:
        experts: Experts as ``layer * E + expert``, ascending, ``(n,)`` int64.
        slots: Slot of each expert, ``(n,)`` int64, numbered over all pools; -1 for an expert that bypasses the cache.
        missing: Indices of the experts to transfer, ascending, ``(m,)`` int64.
        last: Whether no further wave of the event follows.
        on_host: Experts of the event that the host computes, ascending, ``(h,)`` int64; only in the first wave. They
            are not among ``experts``.
    """

    experts: Ints
    slots: Ints
    missing: Ints
    last: bool
    on_host: Ints

    def transfers(self) -> list[tuple[int, int]]:
        """Return the experts to transfer, each with its slot."""
        return list(zip(self.experts[self.missing].tolist(), self.slots[self.missing].tolist(), strict=True))


class EventCounts(NamedTuple):
    """Number of hits, late hits and misses of one event, and of those of its experts that the host computes."""

    hits: int
    late_hits: int
    misses: int
    on_host: int = 0


class Cache:
    """A cold cache that a program steps, as a runtime does next to its model.

    Call order for an event: `demand`; `set_scores` for scores that become available when a layer is routed; `next_wave`
    until it returns None, with `queue_prefetches` after the last wave has begun. Scores that become available when the
    layer is computed, and the prefetches that follow from them, come after the event. No other call may come between
    `demand` and the first wave.

    With ``transfer_seconds`` the program begins each prefetch with `begin_prefetch` when its interconnect is idle, and
    reports the arrival with `arrived`. Without it a demanded or prefetched expert counts as arrived immediately, and
    queued prefetches begin automatically. A program with several threads holds one lock during every call.

    Args:
        geometry: Geometry of the model.
        slots: Number of slots in total.
        policy: Name of the eviction policy (default: ``"lru"``).
        scope: ``"global"`` or ``"per-layer"`` (default: ``"global"``).
        quotas: Slots of each layer for ``"per-layer"`` (default: an even split).
        profile: Usage profile of training text, for policies that need it (default: None).
        future: Demand of all events, for policies and prefetchers that need the future (default: None).
        prefetch: Settings of the prefetcher, with a distance of at least 1 (default: no prefetching).
        transfer_seconds: Expected duration of a transfer in seconds, which prefetchers read; 0 if transfers take no
            time (default: 0).
        misses: Miss handling, ``"move"``, ``"cpu"`` or ``"best"``; the last one needs `set_computing` (default:
            ``"move"``).

    Attributes:
        state: Arrays of the cache.
        arrays: Arrays of the policy.

    Raises:
        UserError: The policy is unknown, the slots do not fit the model, or its experts have different sizes.
    """

    def __init__(
        self,
        geometry: Geometry,
        slots: int,
        policy: str = "lru",
        scope: str = "global",
        quotas: Sequence[int] | None = None,
        profile: UsageProfile | None = None,
        future: Stream | None = None,
        prefetch: PrefetchSettings | None = None,
        transfer_seconds: float = 0.0,
        misses: str = "move",
    ) -> None:
        self._geometry = geometry
        if not geometry.has_one_size:
            raise UserError(f"{geometry.model}: slots need experts of one size (got layers of different bytes)")
        pools = pool_capacities(geometry, slots, scope, quotas)
        implementation = load_policy(policy)
        self.arrays: Any = implementation.init(PolicyInputs(geometry, pools, future, profile))
        link = new_link(geometry.total_experts, transfer_seconds)
        self.state = core.empty_cache(geometry.num_layers, geometry.num_experts, pools, link)
        if prefetch is None:
            prefetch = PrefetchSettings(
                PrefetcherId.NONE.value, 0, NO_THRESHOLD, 1, True, geometry.top_k, False, False, False
            )
        self.state.clock[Clock.FORCED] = prefetch.knows_future
        self.state.clock[Clock.HANDLING] = Handling[misses.upper()]
        stream = future or Stream(np.zeros(0, np.int64), np.zeros(1, np.int64))
        self._future = FutureView(np.zeros(geometry.num_layers), stream.ids, stream.offsets, np.zeros(1, np.int64))
        self._experts = ids = np.zeros(0, np.int64)  # of the running event
        cached = (self.state, self.arrays, implementation.HOOKS)
        self._start_step = _bound(stepping.begin_step, (self.state,), True)
        self._begin_event = _bound(stepping.begin_event, cached, 0, ids, ids, 0.0)
        self._next_wave = _bound(stepping.next_wave, (*cached, self._future), ids, 0.0, np.zeros((4, 0), np.int64))
        self._publish = _bound(stepping.publish_rows, cached, np.zeros((0, 0), np.float32), ids)
        self._queue = _bound(stepping.queue_prefetches, (*cached, prefetch, self._future), 0, False)
        self._begin_prefetch = _bound(stepping.begin_prefetch, cached, 0.0)

    @property
    def has_queued(self) -> bool:
        """Whether prefetches are queued."""
        return bool(self.state.link.tally[Tally.QUEUED] > 0)

    def set_transfer_seconds(self, seconds: float) -> None:
        """Set the expected duration of a transfer in seconds, which prefetchers read."""
        self.state.link.seconds[Seconds.TRANSFER] = seconds

    def set_computing(self, device: float, host: float, host_token: float = 0.0) -> None:
        """Set the expected durations of computing, which miss handling ``best`` reads.

        Args:
            device: Seconds of one expert on the device.
            host: Seconds of one expert on the host.
            host_token: Seconds of each token of an expert on the host, if together they take longer (default: 0).
        """
        seconds = self.state.link.seconds
        seconds[Seconds.COMPUTE], seconds[Seconds.HOST], seconds[Seconds.HOST_TOKEN] = device, host, host_token

    def start_step(self, *, counted: bool = True) -> None:
        """Begin a step: a token, or several tokens that are computed together.

        Args:
            counted: Whether its accesses and transfers are counted (default: True).
        """
        self._start_step(counted)

    def set_scores(self, scores: npt.NDArray[np.floating], layers: Ints | None = None) -> None:
        """Make the scores of layers available for the next run of each.

        Args:
            scores: Probabilities as `Stepper.scores` returns them, ``(L, E)`` floating; NaN for layers without scores.
            layers: Layers whose scores become available, as `available_layers` returns them, ``(n,)`` int64 (default:
                all layers with scores, ascending).

        Raises:
            UserError: The shape is wrong, a layer does not exist, or a score is not a probability.
        """
        if scores.shape != self._geometry.shape()[:2]:
            raise UserError(f"scores must have shape {self._geometry.shape()[:2]} (got {scores.shape})")
        if layers is None:
            layers = np.flatnonzero(~np.isnan(scores[:, 0]))
        wrong = self._publish(np.ascontiguousarray(scores, np.float32), _checked(layers))
        if wrong >= self._geometry.num_layers or wrong < -1:
            raise UserError(f"there is no layer {wrong}")
        if wrong >= 0:
            raise UserError(f"scores of layer {wrong} must be finite and within 0..1")

    def demand(self, layer: int, experts: Ints, tokens: Ints, now: float = 0.0) -> None:
        """Begin an event: a layer is routed. Hits, late hits and misses are counted.

        Args:
            layer: Layer that was routed.
            experts: Distinct demanded experts ``layer * E + expert``, ascending, ``(n,)`` int64; may be empty.
            tokens: Number of tokens that demand each expert, ``(n,)`` int64.
            now: Time in seconds (default: 0).

        Raises:
            ValueError: The experts are not distinct, ascending experts of the layer, or the arrays are no int64 arrays
                of the same length.
        """
        if not self._begin_event(layer, _checked(experts), _checked(tokens), now):
            raise ValueError(f"experts must be distinct, ascending and of layer {layer} (got {experts}, {tokens})")
        self._experts = experts

    def next_wave(self, now: float = 0.0) -> Wave | None:
        """End the running wave of the event, and begin the next one.

        The experts of a wave keep their slots until the next call.

        Args:
            now: Time in seconds (default: 0).

        Returns:
            Next wave, which is empty if the event demands nothing; None if the event is over.
        """
        rows = np.empty((4, len(self._experts)), np.int64)
        count, missing, hosted = self._next_wave(self._experts, now, rows)
        if count < 0:
            return None
        clock = self.state.clock
        last = bool(clock[Clock.MOVED] == clock[Clock.MISSING])
        return Wave(rows[0, :count], rows[1, :count], rows[2, :missing], last, rows[3, :hosted])

    def event_counts(self) -> EventCounts:
        """Return the counts of the last event."""
        clock = self.state.clock
        return EventCounts(*clock[[Clock.HITS, Clock.LATE_HITS, Clock.MISSES, Clock.ON_HOST]].tolist())

    def queue_prefetches(
        self, layer: int, deadlines: npt.NDArray[np.float64] | None = None, *, computed: bool = False
    ) -> None:
        """Queue the experts that the prefetcher selects, at the moments that `prefetch_moments` returns.

        Args:
            layer: Layer that was routed or computed; -1 at a step's start.
            deadlines: Times at which each layer of this step is expected to be routed, ``(L,)`` float64 in seconds, for
                prefetchers that read them (default: unchanged).
            computed: Whether the layer was computed (default: False).
        """
        if deadlines is not None:
            self._future.deadline[:] = deadlines
        self._queue(layer, computed)

    def begin_prefetch(self, now: float = 0.0) -> tuple[int, int] | None:
        """Begin the first queued prefetch whose pool has room; the interconnect is idle.

        Args:
            now: Time in seconds (default: 0).

        Returns:
            Expert and its slot, or None if no prefetch can begin.
        """
        expert, slot = self._begin_prefetch(now)
        return (expert, slot) if expert >= 0 else None

    def arrived(self, expert: int) -> None:
        """Note that the prefetch of an expert has arrived; until then a demand of it is a late hit.

        Args:
            expert: Expert ``layer * E + expert``; it may have lost its slot since.
        """
        self.state.link.arrives[expert] = -np.inf

    def finish(self) -> None:
        """End the sequence: prefetched experts that were never demanded count as wasted; the queue is cleared."""
        finish(self.state)

    def slot(self, expert: int) -> int:
        """Return the slot of an expert ``layer * E + expert``, numbered over all pools; -1 if it has none."""
        place = int(self.state.experts[Expert.PLACE, expert])
        pool = self.state.experts[Expert.POOL, expert]
        return int(self.state.pools[pool, Pool.FIRST]) + place if place >= 0 else -1


def prefetch_moments(lookaheads: Sequence[Lookahead]) -> tuple[bool, bool]:
    """Return whether a replay queues prefetches once a layer is routed, and whether once it is computed.

    Args:
        lookaheads: Lookaheads of a predictor, in their order; empty without scores.
    """
    routed, computed = predictions.prefetch_moments(in_layers(lookaheads, MANY_LAYERS))
    return bool(routed), bool(computed)


def available_layers(
    lookaheads: Sequence[Lookahead], layer: int, num_layers: int, *, computed: bool = False, first_step: bool = False
) -> Ints:
    """Return the layers whose scores become available after a layer, in the order in which a replay publishes them.

    Args:
        lookaheads: Lookaheads of a predictor, in their order.
        layer: Layer that was routed or computed; -1 at a step's start.
        num_layers: Number of layers L.
        computed: Whether the layer was computed (default: False).
        first_step: Whether the step is the first of its sequence (default: False).

    Returns:
        Distinct layers, ``(n,)`` int64.
    """
    ahead = in_layers(lookaheads, num_layers)
    ranges = [
        predictions.newly_available(ahead, i, layer, computed, num_layers, first_step)
        for i in reversed(range(len(ahead)))
    ]
    return np.array([later for begin, end in ranges for later in range(begin, end)], np.int64)


def _bound(function: Any, first: tuple[Any, ...], *examples: Any) -> Any:
    """Return a compiled function with its first arguments, for later arguments like the examples."""
    return partial(bind(function, *first, *examples), *first)


def _checked(array: Ints) -> Ints:
    """Return an array whose type and layout machine code reads correctly."""
    if array.dtype != INT64 or array.ndim != 1 or not array.flags.c_contiguous:
        raise ValueError(f"an array must be one-dimensional, contiguous and int64 (got {array.dtype}, {array.strides})")
    return array
