"""The data module of trace sets."""

import multiprocessing
import multiprocessing.forkserver
import signal
import threading
from collections.abc import Iterator

import lightning as L
import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from moe_beyond.datamodules.batch_plan import PlanSettings, plan_batches, whole_in_order
from moe_beyond.datamodules.stream import PlannedBatches, ShardedTraces
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.training_stats import TrainingStats
from moe_beyond.traces.manifest import Manifest
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.schema import expert_ids
from moe_beyond.traces.tokenizers import same_tokenizer

TOKENS_AT_ONCE = 4096


class TraceDataModule(L.LightningDataModule):
    """Streams a trace set in length-bucketed batches, the same ones with any number of workers.

    Training sequences are cut into pieces of ``max_tokens`` and shuffled by seed and epoch; validation, test and
    prediction see whole sequences in a fixed order.

    Args:
        traces: Trace set to train on; a folder, ``hf:ORG/REPO``, or a URL that fsspec knows.
        train_split: Its split to train on.
        val_split: Split to validate on; None trains without validation.
        val_traces: Another trace set to take the validation split from.
        test_traces: Trace set that `test` and `predict` read, all its splits; by default the validation split.
        token_budget: Padded tokens of a batch at most.
        max_tokens: Tokens of a training piece at most.
        window: Shards whose sequences are mixed in training, and held in memory.
        seed: Of the shuffling.
        num_workers: Processes that read, per split.

    Attributes:
        hidden_states: Whether batches carry hidden states; a task turns it on for a predictor that reads them.
    """

    def __init__(
        self,
        traces: str,
        train_split: str = "train",
        val_split: str | None = "validation",
        val_traces: str | None = None,
        test_traces: str | None = None,
        token_budget: int = 2048,
        max_tokens: int = 256,
        window: int = 8,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        least = {"token_budget": 1, "max_tokens": 1, "window": 1, "seed": 0, "num_workers": 0}
        numbers = dict(zip(least, (token_budget, max_tokens, window, seed, num_workers), strict=True))
        for name, number in numbers.items():
            if number < least[name]:
                raise UserError(f"data.{name} must be at least {least[name]} (got {number})")
        folders = {"traces": traces, "val_traces": val_traces, "test_traces": test_traces}
        if empty := [name for name, folder in folders.items() if folder is not None and not folder.strip()]:
            raise UserError(f"data.{empty[0]}: the name is empty; name the folder of a trace set")
        self.train_split, self.val_split = train_split, val_split
        self.token_budget, self.max_tokens, self.window = token_budget, max_tokens, window
        self.seed, self.num_workers = seed, num_workers
        self.hidden_states = False
        self._resume_at: tuple[int, int] | None = None
        self.traces = TraceSet(traces)
        self.val_traces = self.traces if val_traces is None else self._agreeing(val_traces)
        self.test_traces = None if test_traces is None else self._agreeing(test_traces)

    @property
    def manifest(self) -> Manifest:
        """The training set's manifest."""
        return self.traces.manifest

    @property
    def geometry(self) -> Geometry:
        """The shape that a predictor must have."""
        return self.manifest.geometry

    @property
    def vocab_size(self) -> int:
        """Token ids that a predictor must know."""
        return self.manifest.tokenizer.vocab_size

    @property
    def hidden_size(self) -> int | None:
        """Width of the hidden states, where the traces have some."""
        return self.manifest.hidden_size

    def training_stats(self) -> TrainingStats:
        """Count the training split's tokens, and name them."""
        counts = np.zeros(self.vocab_size, np.int64)
        for info in self.traces.shards(self.train_split):
            counts += np.bincount(self.traces.read(info).token_ids, minlength=self.vocab_size)
        return TrainingStats(counts, self.traces.token_strings, self._expert_counts, self.traces.routers)

    def _expert_counts(self, token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Count how often the training split routed tokens to each expert: ``(n, L*E)``."""
        layers, experts, _ = self.geometry.shape()
        counts = np.zeros((len(token_ids), layers * experts), np.int32)
        row_of = np.full(self.vocab_size, -1)
        row_of[token_ids] = np.arange(len(token_ids))
        base = np.arange(layers)[:, None] * experts
        for info in self.traces.shards(self.train_split):
            shard = self.traces.read(info)
            rows = row_of[shard.token_ids]
            for start in range(0, len(rows), TOKENS_AT_ONCE):
                part = slice(start, start + TOKENS_AT_ONCE)
                known = rows[part] >= 0
                ids = expert_ids(shard.experts[part][known], experts)
                there = ids < experts
                token = np.broadcast_to(rows[part][known][:, None, None], ids.shape)
                np.add.at(counts, (token[there], (ids + base)[there]), 1)
        return counts

    def setup(self, stage: str) -> None:
        """Check that the splits are there before anything runs."""
        if stage == "fit":
            self.traces.shards(self.train_split)
        if stage in ("fit", "validate") and self.val_split is not None:
            self._check_validation()
        if stage == "fit" and self.val_split is not None:
            self._note_copies(self.val_split)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled pieces of the training split."""
        # With overfit_batches the same batches come in every epoch.
        shuffle = not (self.trainer and self.trainer.overfit_batches)  # type: ignore[attr-defined]
        settings = PlanSettings(self.token_budget, self.max_tokens, self.window, self.seed, shuffle=shuffle)
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        sampler = PlannedBatches(self.traces.lengths(self.train_split), settings, ranks=ranks, rank=rank)
        if self._resume_at is not None:
            sampler.resume(*self._resume_at)
            self._resume_at = None
        return self._loader(self.traces, self.train_split, self.window, sampler)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """The validation split, whole sequences."""
        return [] if self.val_split is None else self._evaluation_loader(self.val_traces, self.val_split)

    def test_dataloader(self) -> DataLoader[Batch]:
        """All of ``test_traces``, or else the validation split, whole sequences."""
        if self.test_traces is not None:
            return self._evaluation_loader(self.test_traces, None)
        self._check_validation()
        return self._evaluation_loader(self.val_traces, self.val_split)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """What `test_dataloader` gives."""
        return self.test_dataloader()

    def _note_copies(self, split: str) -> None:
        """Note validation sequences that are exact copies of training ones; without token ids that would take long."""
        if not (self.manifest.has_token_ids and self.val_traces.manifest.has_token_ids):
            return
        training, validation = set(self.traces.text_digests(self.train_split)), self.val_traces.text_digests(split)
        if copies := sum(text in training for text in validation):
            rank_zero_info(
                f"note: {copies:,} of {len(validation):,} validation sequences are exact copies of training sequences; "
                "--val-blocks of `import` and `collect` leaves such copies out"
            )

    def _check_validation(self) -> None:
        if self.val_split is None or self.val_split not in self.val_traces.manifest.splits:
            raise UserError(
                f"{self.val_traces.folder}: has no split {self.val_split!r} to validate on; make one with "
                "--val-blocks, or name one with --data.val_traces, or train without by --data.val_split null"
            )

    def _agreeing(self, folder: str) -> TraceSet:
        other = TraceSet(folder)
        if other.geometry.shape() != self.geometry.shape():
            raise UserError(
                f"{folder}: has {other.geometry.describe_shape()}, "
                f"but {self.traces.folder} has {self.geometry.describe_shape()}"
            )
        theirs, ours = other.manifest.tokenizer, self.manifest.tokenizer
        if not same_tokenizer(theirs, ours):
            raise UserError(f"{folder}: its tokenizer is not that of {self.traces.folder}")
        return other

    def _evaluation_loader(self, traces: TraceSet, split: str | None) -> DataLoader[Batch]:
        """Load a split as whole sequences, in order; every rank all of them."""
        sampler = PlannedBatches(traces.lengths(split), whole_in_order(self.token_budget))
        return self._loader(traces, split, 1, sampler)

    def _loader(self, traces: TraceSet, split: str | None, window: int, sampler: PlannedBatches) -> DataLoader[Batch]:
        if self.num_workers:
            _start_server_of_workers()
        return DataLoader(
            ShardedTraces(traces, traces.shards(split), window, hidden_states=self.hidden_states),
            sampler=sampler,
            batch_size=None,
            num_workers=self.num_workers,
            # Arrow's threads do not survive a fork.
            multiprocessing_context="forkserver" if self.num_workers else None,
        )

    def plan(self) -> dict[str, int]:
        """Return the settings that decide which sequences are in which batch of an epoch."""
        return {"token_budget": self.token_budget, "max_tokens": self.max_tokens, "window": self.window,
                "seed": self.seed}  # fmt: skip

    def resume(self, epoch: int, done: int) -> None:
        """Let the next pass over the training split begin within an epoch.

        Args:
            epoch: Epoch, counted from 0.
            done: Batches of it to skip.
        """
        self._resume_at = epoch, done


def _start_server_of_workers() -> None:
    """Start the process that workers fork from so that Ctrl-C, which a terminal sends to all, ends no worker.

    Only the main process is to answer it, and then stops its workers. They inherit from their birth that it is ignored;
    one that were to die of it would print a traceback, and end the fit before it saved a checkpoint.
    """
    if threading.current_thread() is not threading.main_thread():  # where signals cannot be set
        return
    # Imported once in the server, not by every worker of every epoch: Ctrl-C would wait for workers that still import.
    multiprocessing.set_forkserver_preload([ShardedTraces.__module__])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)


def whole_sequences(
    traces: TraceSet, split: str | None = None, *, token_budget: int = 2048, hidden_states: bool = False
) -> Iterator[Batch]:
    """Read a split, or all, as whole sequences, in the very batches that `test` reads at the same token budget.

    Args:
        traces: The trace set.
        split: The split, or None for all.
        token_budget: Padded tokens of a batch at most.
        hidden_states: Whether batches carry those.
    """
    reader = ShardedTraces(traces, traces.shards(split), window=1, hidden_states=hidden_states)
    return (reader[pieces] for pieces in plan_batches(traces.lengths(split), whole_in_order(token_budget), epoch=0))
