"""Reading planned batches from shards, with a few shards in memory at a time."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset, DistributedSampler, SequentialSampler

from moe_beyond.datamodules.batch_plan import BatchingSettings, Segment, plan_batches
from moe_beyond.datamodules.ranks import shards_of_rank
from moe_beyond.predictors.batch import Batch, collate
from moe_beyond.traces.manifest import ShardInfo
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.shard import Shard
from moe_beyond.traces.trace import Trace


class PlannedBatches(DistributedSampler[Batch], SequentialSampler):
    """Yields the batches of an epoch as tuples of segments.

    Each of n ranks plans the batches of its own shards, every n-th one, so no shard is read by two ranks. With fewer
    shards than ranks it takes every n-th batch of a plan of all shards.

    As a `DistributedSampler` it receives the epoch from Lightning, which then adds no sampler of its own. As a
    `SequentialSampler` it is kept by ``overfit_batches``, which replaces all others.
    """

    def __init__(
        self,
        lengths: Sequence[npt.NDArray[np.int64]],
        settings: BatchingSettings,
        *,
        ranks: int = 1,
        rank: int = 0,
        even: bool = True,
    ) -> None:
        """Store the settings; the plan is made when it is first needed.

        Args:
            lengths: Numbers of tokens of the rows of each shard.
            settings: Settings of the batch plan.
            ranks: Number of processes that read together (default: 1).
            rank: Index of this process (default: 0).
            even: Whether all ranks take as many batches as the rank with the fewest, as training needs (default: True).
        """
        super().__init__(range(1), num_replicas=ranks, rank=rank, shuffle=settings.shuffle, seed=settings.seed)  # type: ignore[arg-type]
        self._lengths, self._settings, self._even = lengths, settings, even
        self._planned: tuple[int, list[tuple[Segment, ...]]] | None = None
        self._resumed = -1, 0  # epoch, and number of its batches to skip

    def _plan(self) -> list[tuple[Segment, ...]]:
        if self._planned is None or self._planned[0] != self.epoch:
            self._planned = self.epoch, self._plan_of(self.rank)
        return self._planned[1]

    def _plan_of(self, rank: int) -> list[tuple[Segment, ...]]:
        own = shards_of_rank(len(self._lengths), self.num_replicas, rank)
        plan = plan_batches([self._lengths[shard] for shard in own], self._settings, self.epoch)
        if len(own) == len(self._lengths):  # one rank, or fewer shards than ranks
            return plan[rank :: self.num_replicas]
        return [tuple(segment._replace(shard=own[segment.shard]) for segment in batch) for batch in plan]

    @cached_property
    def counts(self) -> list[int]:
        """Number of batches that each rank plans, the same in every epoch."""
        return [len(self._plan_of(rank)) for rank in range(self.num_replicas)]

    def resume(self, epoch: int, done: int) -> None:
        """Skip batches of an epoch.

        Args:
            epoch: Index of the epoch.
            done: Number of its batches to skip.
        """
        self.set_epoch(epoch)
        self._resumed = epoch, done

    def __iter__(self) -> Iterator[tuple[Segment, ...]]:  # type: ignore[override]
        """Yield the batches of this rank."""
        # Changes no state: a data loader with workers makes two iterators, and Lightning may read from none.
        epoch, done = self._resumed
        return iter(self._plan()[done if self.epoch == epoch else 0 : len(self)])

    def __len__(self) -> int:
        """Return the number of batches of this rank."""
        return min(self.counts) if self._even else self.counts[self.rank]


class ShardedTraces(Dataset[Batch]):
    """Reads batches, each as a tuple of segments.

    Args:
        traces: Trace set to read.
        shards: Shards, in the order in which segments number them.
        window: Number of decoded shards in memory.
        hidden_states: Whether to read hidden states (default: False).
    """

    def __init__(
        self, traces: TraceSet, shards: Sequence[ShardInfo], window: int, *, hidden_states: bool = False
    ) -> None:
        self._traces, self._shards, self._window = traces, shards, window
        self._hidden_states = hidden_states
        self._decoded: OrderedDict[int, Shard] = OrderedDict()

    def __getitem__(self, segments: tuple[Segment, ...]) -> Batch:
        """Read one batch."""
        return collate([self._cut(segment) for segment in segments], [segment.start for segment in segments])

    def _cut(self, segment: Segment) -> Trace:
        trace = self._shard(segment.shard).trace(segment.row)
        part = slice(segment.start, segment.stop)
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
