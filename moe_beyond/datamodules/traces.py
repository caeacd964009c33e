"""The LightningDataModule of trace sets."""

import multiprocessing
import multiprocessing.forkserver
import resource
import signal
import threading
from collections.abc import Iterator
from itertools import chain

import lightning as L
import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from moe_beyond.datamodules.batch_plan import BatchingSettings, plan_batches, whole_in_order
from moe_beyond.datamodules.ranks import shared_map
from moe_beyond.datamodules.stream import PlannedBatches, ShardedTraces
from moe_beyond.datamodules.training_stats import training_stats
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.training_stats import TrainingStats
from moe_beyond.traces.manifest import Manifest, ShardInfo
from moe_beyond.traces.reader import Facts, Part, TraceSet
from moe_beyond.traces.tokenizers import same_tokenizer
from moe_beyond.workers import end_with_parent

NOTED_SHARE = 0.05
"""Share of the batches that an epoch may leave out without a note."""
OPEN_FILES, OPEN_FILES_PER_WORKER = 32, 16
"""Open files of a fit without workers and of the tensors and pipes of each worker, both with a margin."""


class TraceDataModule(L.LightningDataModule):
    """Streams a trace set in length-bucketed batches, which do not depend on the number of workers.

    Training sequences are cut into segments of ``max_tokens`` and shuffled by seed and epoch. Validation, test and
    prediction read whole sequences in a fixed order. Several ranks share the shards, except for prediction.

    ``geometry``, ``vocab_size``, ``hidden_size`` and ``projected_from`` are available before `setup`.

    Args:
        traces: Trace set for training: a folder, ``hf:ORG/REPO`` or an fsspec URL.
        train_split: Name of the training split (default: ``train``).
        val_split: Name of the validation split, or None to train without validation (default: ``validation``).
        val_traces: Trace set that holds the validation split (default: ``traces``).
        test_traces: Trace set that `test` and `predict` read, with all its splits (default: the validation split).
        token_budget: Largest number of padded tokens per batch (default: 2048).
        max_tokens: Largest number of tokens per training segment (default: 256).
        window: Number of shards whose sequences are mixed in training and kept in memory (default: 8).
        seed: Seed of the shuffling (default: 0).
        num_workers: Number of reading processes per split (default: 0, the main process reads).

    Attributes:
        hidden_states: Whether batches carry hidden states; tasks set it for predictors that read them.
        shares_training: Whether ranks share the training batches; counting tasks unset it.

    Raises:
        UserError: A trace set cannot be read, the trace sets do not fit together, or a number is out of range.
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
        _check_open_files(num_workers)
        folders = {"traces": traces, "val_traces": val_traces, "test_traces": test_traces}
        if empty := [name for name, folder in folders.items() if folder is not None and not folder.strip()]:
            raise UserError(f"data.{empty[0]}: the name is empty; give the folder of a trace set")
        self.train_split, self.val_split = train_split, val_split
        self.token_budget, self.max_tokens, self.window = token_budget, max_tokens, window
        self.seed, self.num_workers = seed, num_workers
        self.hidden_states = False
        self.shares_training = True
        self._resume_at: tuple[int, int] | None = None
        self.traces = TraceSet(traces)
        self.val_traces = self.traces if val_traces is None else self._matching(val_traces)
        self.test_traces = None if test_traces is None else self._matching(test_traces)

    @property
    def manifest(self) -> Manifest:
        """Manifest of the training traces."""
        return self.traces.manifest

    @property
    def geometry(self) -> Geometry:
        """Shape of the model."""
        return self.manifest.geometry

    @property
    def vocab_size(self) -> int:
        """Number of token ids of the tokenizer."""
        return self.manifest.tokenizer.vocab_size

    @property
    def hidden_size(self) -> int | None:
        """Width of the stored hidden states; None if the traces have none."""
        return self.manifest.hidden_size

    @property
    def projected_from(self) -> int | None:
        """Width of the model's hidden states if the stored ones are projected; otherwise None."""
        return None if self.manifest.states is None else self.manifest.states.projected_from

    @property
    def measured_sets(self) -> list[TraceSet]:
        """Trace sets that validation, test and prediction read."""
        return [self.val_traces] if self.test_traces is None else [self.val_traces, self.test_traces]

    def training_stats(self) -> TrainingStats:
        """Return the statistics of the training split that a predictor may read before a fit."""
        return training_stats(self.traces, self.train_split)

    def setup(self, stage: str) -> None:
        """Check that the splits exist."""
        if stage == "fit":
            self.traces.shards(self.train_split)
        if stage in ("fit", "validate") and self.val_split is not None:
            self._check_validation()
        if stage == "fit" and self.val_split is not None:
            self._note_copies(self.val_split)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return shuffled segments of the training split."""
        # overfit_batches needs the same batches in every epoch.
        shuffle = not (self.trainer and self.trainer.overfit_batches)  # type: ignore[attr-defined]
        settings = BatchingSettings(self.token_budget, self.max_tokens, self.window, self.seed, shuffle=shuffle)
        ranks, rank = self._ranks() if self.shares_training else (1, 0)
        sampler = PlannedBatches(shared_lengths(self.traces, self.train_split), settings, ranks=ranks, rank=rank)
        left_out = 1 - ranks * len(sampler) / sum(sampler.counts)
        if left_out > NOTED_SHARE:
            shards = len(self.traces.shards(self.train_split))
            rank_zero_info(
                f"note: the ranks share {shards} shards unevenly: each epoch leaves out {left_out:.0%} of the batches, "
                f"not the same ones; a number of ranks that divides {shards} leaves out fewer"
            )
        if self._resume_at is not None:
            sampler.resume(*self._resume_at)
            self._resume_at = None
        return self._loader(self.traces, self.train_split, self.window, sampler)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return the validation split as whole sequences."""
        return [] if self.val_split is None else self._evaluation_loader(self.val_traces, self.val_split, share=True)

    def whole_validation(self) -> DataLoader[Batch]:
        """Return the validation split as whole sequences, all of them on this rank."""
        self._check_validation()
        return self._evaluation_loader(self.val_traces, self.val_split)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return ``test_traces``, otherwise the validation split, as whole sequences."""
        return self._evaluation_loader(*self._tested(), share=True)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return the sequences of `test_dataloader`, all of them on every rank."""
        return self._evaluation_loader(*self._tested())

    def _tested(self) -> tuple[TraceSet, str | None]:
        """Return the trace set and the split that `test` reads."""
        if self.test_traces is not None:
            return self.test_traces, None
        self._check_validation()
        return self.val_traces, self.val_split

    def is_shared(self, stage: str) -> bool:
        """Return whether each rank reads other sequences, so that counts of all ranks add up to those of the whole.

        With fewer shards than ranks, every rank reads all of them.

        Args:
            stage: ``val`` or ``test``.
        """
        traces, split = (self.val_traces, self.val_split) if stage == "val" else self._tested()
        return 1 < self._ranks()[0] <= len(traces.shards(split))

    def _ranks(self) -> tuple[int, int]:
        """Return the number of processes, and the number of this one."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _note_copies(self, split: str) -> None:
        """Report validation sequences that are exact copies of training sequences, if both sets have token ids."""
        if not (self.manifest.has_token_ids and self.val_traces.manifest.has_token_ids):
            return
        training, validation = set(_digests(self.traces, self.train_split)), _digests(self.val_traces, split)
        if copies := sum(text in training for text in validation):
            rank_zero_info(
                f"note: {copies:,} of {len(validation):,} validation sequences are exact copies of training sequences; "
                "--val-blocks of `import` and `collect` excludes such copies"
            )

    def _check_validation(self) -> None:
        if self.val_split is None or self.val_split not in self.val_traces.manifest.splits:
            raise UserError(
                f"{self.val_traces.folder}: has no validation split {self.val_split!r}; create one with --val-blocks, "
                "give another trace set with --data.val_traces, or train without one: --data.val_split null"
            )

    def _matching(self, folder: str) -> TraceSet:
        other = TraceSet(folder)
        if other.geometry.shape() != self.geometry.shape():
            raise UserError(
                f"{folder}: has {other.geometry.describe_shape()}, "
                f"but {self.traces.folder} has {self.geometry.describe_shape()}"
            )
        if not same_tokenizer(other.manifest.tokenizer, self.manifest.tokenizer):
            raise UserError(f"{folder}: has another tokenizer than {self.traces.folder}; give traces of the same model")
        return other

    def _evaluation_loader(self, traces: TraceSet, split: str | None, *, share: bool = False) -> DataLoader[Batch]:
        """Return a split as whole sequences, in order; ranks share its shards on request if each gets one."""
        ranks, rank = self._ranks()
        settings = whole_in_order(self.token_budget)
        if share and 1 < ranks <= len(traces.shards(split)):
            sampler = PlannedBatches(shared_lengths(traces, split), settings, ranks=ranks, rank=rank, even=False)
        else:
            sampler = PlannedBatches(traces.lengths(split), settings)
        return self._loader(traces, split, 1, sampler)

    def _loader(self, traces: TraceSet, split: str | None, window: int, sampler: PlannedBatches) -> DataLoader[Batch]:
        if self.num_workers:
            _start_forkserver()
        return DataLoader(
            ShardedTraces(traces, traces.shards(split), window, hidden_states=self.hidden_states),
            sampler=sampler,
            batch_size=None,
            num_workers=self.num_workers,
            # Arrow's threads do not survive a fork of this process.
            multiprocessing_context="forkserver" if self.num_workers else None,
            worker_init_fn=end_with_parent if self.num_workers else None,
        )

    def batching(self) -> dict[str, int]:
        """Return the settings that determine the batches of an epoch."""
        return {"token_budget": self.token_budget, "max_tokens": self.max_tokens, "window": self.window,
                "seed": self.seed}  # fmt: skip

    def resume(self, epoch: int, done: int) -> None:
        """Start the next pass over the training split within an epoch.

        Args:
            epoch: Index of the epoch, from 0.
            done: Number of batches to skip.
        """
        self._resume_at = epoch, done


def _check_open_files(workers: int) -> None:
    """Raise an error if this process may not open as many files as it shares with workers.

    A worker that lacks one loses its batch, for which the main process would wait.
    """
    limit, needed = resource.getrlimit(resource.RLIMIT_NOFILE)[0], OPEN_FILES + OPEN_FILES_PER_WORKER * workers
    if workers and resource.RLIM_INFINITY != limit < needed:
        raise UserError(
            f"data.num_workers: {workers} workers need {needed} open files (got a limit of {limit}); "
            f"raise it with `ulimit -n {needed}` or use fewer workers"
        )


def _start_forkserver() -> None:
    """Start the process from which workers are forked, so that workers ignore Ctrl-C.

    A terminal sends Ctrl-C to all processes. Only the main process handles it and then stops its workers. A worker that
    died of it would print a traceback and end the fit before a checkpoint is saved.
    """
    if threading.current_thread() is not threading.main_thread():  # other threads cannot set signal handlers
        return
    # Import once in the server instead of in every worker of every epoch: Ctrl-C would wait for importing workers.
    multiprocessing.set_forkserver_preload(["moe_beyond.datamodules.worker_start"])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)


def shared_lengths(traces: TraceSet, split: str | None) -> list[npt.NDArray[np.int64]]:
    """Return the tokens of every row, shard by shard; each rank reads its own shards.

    Args:
        traces: Trace set to read.
        split: Name of the split; None for all splits.

    Raises:
        UserError: A shard is damaged, or two shards disagree.
    """

    def read(info: ShardInfo) -> tuple[npt.NDArray[np.int64], list[tuple[ShardInfo, Facts]]]:
        return traces.lengths((info,))[0], traces.facts((info,))

    parts = shared_map(read, traces.shards(split))
    for _, facts in parts:
        for info, each in facts:
            traces.compare(info, each)
    return [lengths for lengths, _ in parts]


def _digests(traces: TraceSet, split: str) -> list[bytes]:
    """Return the hash of every sequence; each rank reads its own shards."""
    return list(chain.from_iterable(shared_map(lambda info: traces.text_digests((info,)), traces.shards(split))))


def whole_sequences(
    traces: TraceSet, part: Part = None, *, token_budget: int = 2048, hidden_states: bool = False
) -> Iterator[Batch]:
    """Yield whole sequences in the batches that `test` reads at the same token budget.

    Args:
        traces: Trace set to read.
        part: Part of the set (default: all splits).
        token_budget: Largest number of padded tokens per batch (default: 2048).
        hidden_states: Whether batches carry hidden states (default: False).
    """
    reader = ShardedTraces(traces, traces.shards(part), window=1, hidden_states=hidden_states)
    return (reader[segments] for segments in plan_batches(traces.lengths(part), whole_in_order(token_budget), epoch=0))
