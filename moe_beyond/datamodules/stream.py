"""Reading planned batches out of shards, a few shards in memory at a time."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset, DistributedSampler, SequentialSampler

from moe_beyond.datamodules.batch_plan import BatchingSettings, Segment, plan_batches
from moe_beyond.predictors.batch import Batch, collate
from moe_beyond.traces.manifest import ShardInfo
from moe_beyond.traces.reader import Shard, TraceSet
from moe_beyond.traces.trace import Trace


class PlannedBatches(DistributedSampler[Batch], SequentialSampler):
    """Yields an epoch's batches as lists of pieces; each rank takes every n-th, all ranks equally many.

    It is a `DistributedSampler` so that Lightning gives it the epoch and does not put one of its own around it, and a
    `SequentialSampler` so that ``overfit_batches`` keeps it: that option replaces any other sampler.
    """

    def __init__(
        self, lengths: Sequence[npt.NDArray[np.int64]], settings: BatchingSettings, *, ranks: int = 1, rank: int = 0
    ) -> None:
        """Plan nothing yet.

        Args:
            lengths: For each shard the tokens of its rows.
            settings: How to plan.
            ranks: Processes that train together.
            rank: Which of them this is.
        """
        super().__init__(range(1), num_replicas=ranks, rank=rank, shuffle=settings.shuffle, seed=settings.seed)  # type: ignore[arg-type]
        self._lengths, self._settings = lengths, settings
        self._planned: tuple[int, list[tuple[Segment, ...]]] | None = None
        self._done = 0

    def _plan(self) -> list[tuple[Segment, ...]]:
        if self._planned is None or self._planned[0] != self.epoch:
            self._planned = self.epoch, plan_batches(self._lengths, self._settings, self.epoch)
        return self._planned[1]

    def resume(self, epoch: int, done: int) -> None:
        """Let the next pass start after ``done`` batches of an epoch."""
        self.set_epoch(epoch)
        self._done = done

    def __iter__(self) -> Iterator[tuple[Segment, ...]]:  # type: ignore[override]
        """Yield this rank's batches."""
        plan, done = self._plan(), self._done
        self._done = 0
        return iter(plan[self.rank : len(self) * self.num_replicas : self.num_replicas][done:])

    def __len__(self) -> int:
        """Batches of this rank; what the ranks cannot share evenly is dropped."""
        return len(self._plan()) // self.num_replicas


class ShardedTraces(Dataset[Batch]):
    """Turns lists of pieces into batches.

    Args:
        traces: The trace set.
        shards: Its shards, in the order that pieces number them.
        window: Shards kept decoded.
        hidden_states: Whether to read those too.
    """

    def __init__(
        self, traces: TraceSet, shards: Sequence[ShardInfo], window: int, *, hidden_states: bool = False
    ) -> None:
        self._traces, self._shards, self._window = traces, shards, window
        self._hidden_states = hidden_states
        self._decoded: OrderedDict[int, Shard] = OrderedDict()

    def __getitem__(self, pieces: tuple[Segment, ...]) -> Batch:
        """Read one batch."""
        return collate([self._cut(piece) for piece in pieces], [piece.start for piece in pieces])

    def _cut(self, piece: Segment) -> Trace:
        trace = self._shard(piece.shard).trace(piece.row)
        part = slice(piece.start, piece.stop)
        return replace(
            trace,
            token_ids=trace.token_ids[part],
            experts=trace.experts[part],
            gate_weights=None if trace.gate_weights is None else trace.gate_weights[part],
            hidden_states=None if trace.hidden_states is None else trace.hidden_states[part],
        )

    def _shard(self, index: int) -> Shard:
        if index not in self._decoded:
            while len(self._decoded) >= self._window:
                self._decoded.popitem(last=False)
            self._decoded[index] = self._traces.read(self._shards[index], hidden_states=self._hidden_states)
        self._decoded.move_to_end(index)
        return self._decoded[index]
