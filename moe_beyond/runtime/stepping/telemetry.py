"""Telemetry of a run: sums, and on request one row per step, per event and per transfer."""

from dataclasses import astuple, dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.runtime.storage.store import BytesBySource


@dataclass(slots=True)
class StepRow:
    """A forward of the model.

    Attributes:
        sequence: Number of the sequence that the model reads, from 0; -1 for a batch of several.
        tokens: Number of tokens that the forward reads, in all rows of the batch.
        operation: Number of operations of the core before the step.
        seconds: Duration of the forward, in seconds.
        scored: Whether the predictor gave scores for the step.
        transfer_estimate_s: Seconds per transfer that prefetchers with deadlines assume.
        layer_estimate_s: Seconds per layer without stall that they assume.
        now_s: Time at the start of the step, in seconds of the run.
    """

    sequence: int
    tokens: int
    operation: int
    seconds: float = 0.0
    scored: bool = False
    transfer_estimate_s: float = 0.0
    layer_estimate_s: float = 0.0
    now_s: float = 0.0


@dataclass(slots=True)
class EventRow:
    """A layer of a step.

    Attributes:
        step: Number of the step, from 0.
        layer: Position of the layer among the MoE layers.
        hits: Demanded experts that were resident when the event began.
        late_hits: Demanded experts whose prefetch was queued or in transit.
        misses: Demanded experts that were neither.
        transfers: Transfers on demand, including those of queued prefetches.
        waves: Number of waves.
        cache_s: Seconds of stepping the cache core.
        predictor_s: Seconds of stepping the predictor.
        wait_s: Seconds of waiting for transfers: the stall.
        compute_s: Seconds from the arrival of the experts to the end of their kernel's call.
        transfer_estimate_s: Seconds per transfer that prefetchers with deadlines assume.
        layer_estimate_s: Seconds per layer without stall that they assume.
        now_s: Time at the start of the event, in seconds of the run.
        on_host: Demanded experts that the host computes.
        host_s: Seconds in which the host computes them, with copies of their rows.
        device_estimate_s: Seconds per expert on the device that miss handling assumes.
        host_estimate_s: Seconds per expert on the host that it assumes.
        host_token_estimate_s: Seconds per token of an expert on the host that it assumes.
    """

    step: int
    layer: int
    hits: int = 0
    late_hits: int = 0
    misses: int = 0
    transfers: int = 0
    waves: int = 0
    cache_s: float = 0.0
    predictor_s: float = 0.0
    wait_s: float = 0.0
    compute_s: float = 0.0
    transfer_estimate_s: float = 0.0
    layer_estimate_s: float = 0.0
    now_s: float = 0.0
    on_host: int = 0
    host_s: float = 0.0
    device_estimate_s: float = 0.0
    host_estimate_s: float = 0.0
    host_token_estimate_s: float = 0.0


@dataclass(slots=True)
class PrefetchRow:
    """A moment at which the interconnect was idle and prefetches were queued.

    Attributes:
        operation: Number of operations of the core before it.
        now_s: Time, in seconds of the run.
        expert: Expert ``layer * E + expert`` whose prefetch began; -1 if none had room or was admitted.
        slot: Number of its slot, -1 for none.
    """

    operation: int
    now_s: float
    expert: int
    slot: int


@dataclass(slots=True)
class TransferRow:
    """A transfer of one expert into a slot.

    Attributes:
        expert: Expert ``layer * E + expert``.
        slot: Number of the slot.
        prefetch: Whether it was started as a prefetch.
        event: Number of events that had begun when it was requested.
        operation: Number of operations of the core before it was requested.
        arrived_operation: Number of operations of the core before it arrived.
        wait_s: Seconds from the request to the start of the read.
        read_s: Seconds of reading.
        copy_s: Seconds of copying to the device.
        host: Bytes from host memory.
        page_cache: Bytes of files that were in memory.
        disk: Bytes read from disk.
    """

    expert: int
    slot: int
    prefetch: bool
    event: int
    operation: int
    arrived_operation: int
    wait_s: float
    read_s: float
    copy_s: float
    host: int
    page_cache: int
    disk: int


@dataclass
class Sums:
    """Sums over the forwards of one kind.

    Attributes:
        steps: Number of forwards whose last layer has computed.
        tokens: Number of tokens that they read of one sequence; the rows of a batch or of beams count once. So tokens
            per second are those of each sequence.
        durations: Seconds of each forward.
        cache_s: Seconds of stepping the cache core.
        predictor_s: Seconds of stepping the predictor.
        wait_s: Seconds of waiting for transfers.
        compute_s: Seconds of the experts' kernels.
        host_s: Seconds in which the host computes experts.
    """

    steps: int = 0
    tokens: int = 0
    durations: list[float] = field(default_factory=list)
    cache_s: float = 0.0
    predictor_s: float = 0.0
    wait_s: float = 0.0
    compute_s: float = 0.0
    host_s: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of all forwards."""
        return sum(self.durations)


@dataclass
class Telemetry:
    """Sums of a run, and its rows if they are kept.

    Attributes:
        keep_rows: Whether rows are kept, about 5 KB per token for 26 layers (default: False).
        prefill: Sums of the forwards that read several tokens of a sequence.
        decode: Sums of the forwards that read one token of each sequence.
        sources: Bytes of all transfers by source.
        transferred: Number of transfers.
        unscored: Number of decode forwards for which a predictor gave no scores.
        steps: Rows of the forwards.
        events: Rows of the layers of each forward.
        prefetches: Rows of the moments at which a prefetch could begin.
        transfers: Rows of the transfers, in the order of their arrival.
    """

    keep_rows: bool = False
    prefill: Sums = field(default_factory=Sums)
    decode: Sums = field(default_factory=Sums)
    sources: BytesBySource = field(default_factory=BytesBySource)
    transferred: int = 0
    unscored: int = 0
    steps: list[StepRow] = field(default_factory=list)
    events: list[EventRow] = field(default_factory=list)
    prefetches: list[PrefetchRow] = field(default_factory=list)
    transfers: list[TransferRow] = field(default_factory=list)

    def add_step(self, row: StepRow) -> None:
        """Add a forward that begins."""
        if self.keep_rows:
            self.steps.append(row)

    def add_event(self, row: EventRow, sums: Sums) -> None:
        """Add a layer that has computed.

        Args:
            row: Layer of a forward.
            sums: Sums of the forward's kind.
        """
        sums.cache_s += row.cache_s
        sums.predictor_s += row.predictor_s
        sums.wait_s += row.wait_s
        sums.compute_s += row.compute_s
        sums.host_s += row.host_s
        if self.keep_rows:
            self.events.append(row)

    def add_prefetch(self, row: PrefetchRow) -> None:
        """Add a moment at which a prefetch could begin."""
        if self.keep_rows:
            self.prefetches.append(row)

    def add_transfer(self, row: TransferRow) -> None:
        """Add a transfer that has arrived."""
        self.transferred += 1
        host, page_cache, disk = self.sources
        self.sources = BytesBySource(host + row.host, page_cache + row.page_cache, disk + row.disk)
        if self.keep_rows:
            self.transfers.append(row)


def columns(rows: list[Any], kind: type) -> dict[str, npt.NDArray[Any]]:
    """Return rows of a dataclass as one array per field.

    Args:
        rows: Rows, all of the same dataclass.
        kind: The dataclass, for the names of the fields.
    """
    names = [each.name for each in fields(kind)]
    values = zip(*map(astuple, rows), strict=True) if rows else ([] for _ in names)
    return {name: np.array(list(column)) for name, column in zip(names, values, strict=True)}
