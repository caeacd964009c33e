"""Replaying a recorded run as it ran: with the cache core, event by event, without the model.

The controller of a run is stepped with the recorded routing and the recorded times. A stand-in for the mover does the
work of its readers. Whenever the lock is released, it begins prefetches and reports arrivals: those that had the same
number of operations of the core before them.
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from moe_beyond.download import is_hub_name
from moe_beyond.errors import UserError
from moe_beyond.pretrained import list_pretrained
from moe_beyond.runtime.records.recording import Recording
from moe_beyond.runtime.slab import SlabLayout
from moe_beyond.runtime.slots.copies import CpuCopier
from moe_beyond.runtime.slots.mover import Transfer
from moe_beyond.runtime.slots.pool import SlotPool
from moe_beyond.runtime.stepping.controller import Controller, make_controller
from moe_beyond.runtime.stepping.ledger import Ledger, make_ledger
from moe_beyond.runtime.stepping.telemetry import EventRow, PrefetchRow, StepRow, Telemetry, TransferRow
from moe_beyond.runtime.stepping.times import Times
from moe_beyond.runtime.storage.store import BytesBySource
from moe_beyond.runtime.strategy import RunStrategy, resolve_strategy

COMPARED = ("hits", "late_hits", "misses", "on_host", "transfers", "waves")
"""Fields of an event that must equal the recorded ones."""
NEVER = 2**62
"""Operation of an arrival after the end of the run."""
UNUSED = SlabLayout.of({"unused": ((1,), torch.uint8)})
"""Layout of slots in which nothing is stored."""


@dataclass(frozen=True)
class ReplayAsRun:
    """Comparison of a recorded run with its replay.

    Attributes:
        events: Number of recorded events.
        equal: Number of equal events before the first that differs.
        difference: Description of the first difference; None without one.
    """

    events: int
    equal: int
    difference: str | None

    def __str__(self) -> str:
        """Return one line."""
        line = f"as run: {self.equal:,} of {self.events:,} events equal"
        return line if self.difference is None else f"{line}; {self.difference}"


class _DifferenceError(Exception):
    """The replay differs from the recorded run."""


class _RecordedMover:
    """Does what the mover of a recorded run did.

    Args:
        ledger: Ledger of the replay.
        prefetches: Moments at which a prefetch could begin.
        transfers: Transfers in the order of their arrival.

    Attributes:
        lock: The mover itself, which acts when its lock is released.
        jobs: Transfers on demand since the last event, expert and slot.
    """

    def __init__(self, ledger: Ledger, prefetches: Sequence[PrefetchRow], transfers: Sequence[TransferRow]) -> None:
        self.lock, self._ledger = self, ledger
        self.jobs: list[tuple[int, int]] = []
        self._demanded: list[tuple[int, int]] = []
        self._begins = iter(prefetches)
        self._begin = next(self._begins, None)
        self._arrivals = (row for row in transfers if row.prefetch)
        self._in_transit: TransferRow | None = None

    def demand(self, jobs: Sequence[tuple[int, int]]) -> None:
        """Note transfers on demand."""
        self.jobs += jobs
        self._demanded += jobs

    def wait(self, experts: Sequence[int]) -> None:
        """Report the arrival of all transfers on demand."""
        for expert, slot in self._demanded:
            self._ledger.arrived(_transfer(expert, slot, prefetch=False))
        self._demanded = []

    def wake(self) -> None:
        """Do nothing: the recording has the begins of prefetches."""

    def __enter__(self) -> Self:
        """Take the lock."""
        return self

    def __exit__(self, *error: object) -> None:
        """Release the lock, and begin and end the prefetches that follow the same operation."""
        if error[0] is None:
            while self._arrives() or self._begins_next():
                pass

    def _arrives(self) -> bool:
        """Report the arrival of the prefetch in transit if it follows this operation."""
        row = self._in_transit
        if row is None or row.arrived_operation > self._ledger.operations:
            return False
        self._ledger.arrived(_transfer(row.expert, row.slot, prefetch=True))
        self._in_transit = None
        return True

    def _begins_next(self) -> bool:
        """Begin the next prefetch, or try to, if that follows this operation."""
        row = self._begin
        if row is None or self._in_transit is not None or row.operation > self._ledger.operations:
            return False
        job = self._ledger.next_prefetch(row.now_s) or (-1, -1)
        if job != (row.expert, row.slot):
            raise _DifferenceError(
                f"after operation {row.operation:,}: prefetch of {_described(job)}, recorded "
                f"{_described((row.expert, row.slot))}"
            )
        if row.expert >= 0:
            self._in_transit = next(self._arrivals, None)
            if self._in_transit is None:  # the run ended before it arrived
                self._in_transit = TransferRow(*job, True, 0, row.operation, NEVER, 0.0, 0.0, 0.0, 0, 0, 0)
        self._begin = next(self._begins, None)
        return True


def _transfer(expert: int, slot: int, *, prefetch: bool) -> Transfer:
    """Return a transfer that took no time."""
    return Transfer(expert, slot, prefetch, 0.0, 0.0, 0.0, 0.0, 0.0, BytesBySource())


def replay_as_run(recording: Recording) -> ReplayAsRun:
    """Replay a recorded run as it ran, and compare every event.

    Args:
        recording: Recording of a run.

    Raises:
        UserError: The predictor or profile is not found, is another one, or reads hidden states, which a recording
            lacks; an option does not fit; or the telemetry does not belong to the traces.
    """
    manifest = recording.traces.manifest
    strategy = recorded_strategy(recording)
    telemetry = Telemetry(keep_rows=True)
    pool = SlotPool(strategy.settings.slots, {0: UNUSED}, torch.device("cpu"))
    times = (_times(row) for row in _in_order(recording))
    ledger = make_ledger(manifest.geometry, strategy, pool, telemetry, times)
    mover = _RecordedMover(ledger, recording.prefetches, recording.transfers)
    stand_in: Any = mover
    controller = make_controller(manifest.geometry, strategy, ledger, stand_in, CpuCopier(pool))
    demanded = defaultdict(list)
    for row in recording.transfers:
        if not row.prefetch:
            demanded[row.event].append((row.expert, row.slot))
    equal = 0
    try:
        for _ in _events(recording, controller):
            jobs, mover.jobs = sorted(mover.jobs), []
            _check_equal(telemetry.events[equal], recording.events[equal], jobs, sorted(demanded[equal + 1]))
            equal += 1
        return ReplayAsRun(len(recording.events), equal, None)
    except _DifferenceError as difference:
        return ReplayAsRun(len(recording.events), equal, str(difference))


def recorded_strategy(recording: Recording) -> RunStrategy:
    """Resolve the strategy of a recorded run, and compare its predictor and its profile with the recorded ones.

    Args:
        recording: Recording of a run.

    Raises:
        UserError: One of them is not found, or is another one; or an option does not fit.
    """
    options, manifest, folder = recording.options, recording.traces.manifest, recording.traces.folder
    for role in recording.fingerprints:
        name = getattr(options, role)
        if name is None:
            raise UserError(f"{folder}: its {role} was an instance without a name; give --{role}")
        if not (is_hub_name(str(name)) or str(name) in list_pretrained() or os.path.isdir(name)):
            raise UserError(f"{folder}: its {role} {name} is not found here; give --{role}")
    try:
        strategy = resolve_strategy(options, manifest, manifest.bits)
    except UserError as error:
        raise UserError(f"{folder}: its options: {error}") from error
    for role, sha256 in recording.fingerprints.items():
        if sha256 is not None and strategy.fingerprints.get(role) != sha256:
            raise UserError(
                f"{getattr(options, role)}: is not the {role} of the run (its weights differ); give --{role}"
            )
    return strategy


def _in_order(recording: Recording) -> Iterator[StepRow | EventRow]:
    """Yield the rows of steps and events in the order of their begin."""
    layers = recording.traces.geometry.num_layers
    for number, step in enumerate(recording.steps):
        yield step
        yield from recording.events[number * layers : (number + 1) * layers]


def _times(row: StepRow | EventRow) -> Times:
    """Return the times that the core read at a step or an event."""
    times = Times(row.now_s, row.transfer_estimate_s, row.layer_estimate_s)
    if isinstance(row, StepRow):
        return times
    return times._replace(device=row.device_estimate_s, host=row.host_estimate_s, host_token=row.host_token_estimate_s)


def _events(recording: Recording, controller: Controller) -> Iterator[None]:
    """Step a controller through the sequences of a recorded run, and pause after every event.

    Raises:
        UserError: The telemetry has other steps than the traces.
    """
    traces, geometry = list(recording.traces), recording.traces.geometry
    read = [0] * len(traces)
    if len(recording.events) != len(recording.steps) * geometry.num_layers:
        raise UserError(f"{recording.traces.folder}: its telemetry is incomplete; record the run again")
    for step in recording.steps:
        trace = traces[step.sequence] if 0 <= step.sequence < len(traces) else None
        begin = 0 if trace is None else read[step.sequence]
        if trace is None or begin + step.tokens > len(trace):
            raise UserError(f"{recording.traces.folder}: its telemetry has other steps than its traces; record again")
        part = slice(begin, begin + step.tokens)
        read[step.sequence] = part.stop
        controller.begin_step(trace.token_ids[part].astype(np.int64), begin, (1, step.tokens), step.sequence)
        for layer in range(geometry.num_layers):
            for _ in controller.event(layer, trace.experts[part, layer].astype(np.int64)):
                pass
            yield
        controller.end_step(0.0)


def _check_equal(
    row: EventRow, recorded: EventRow, jobs: list[tuple[int, int]], recorded_jobs: list[tuple[int, int]]
) -> None:
    """Compare an event with the recorded one.

    Raises:
        _DifferenceError: They differ.
    """
    place = f"step {recorded.step + 1:,}, layer {recorded.layer}"
    for name in COMPARED:
        if getattr(row, name) != getattr(recorded, name):
            count = name.replace("_", " ")
            raise _DifferenceError(f"{place}: {getattr(row, name)} {count}, recorded {getattr(recorded, name)}")
    for job, recorded_job in zip(jobs, recorded_jobs, strict=False):  # their numbers are equal
        if job != recorded_job:
            raise _DifferenceError(f"{place}: transfer of {_described(job)}, recorded {_described(recorded_job)}")


def _described(job: tuple[int, int]) -> str:
    return "no expert" if job[0] < 0 else f"expert {job[0]} to slot {job[1]}"
