import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from _helpers.common import TINY, VOCAB, tiny_trace, tiny_traces, word_tokenizer
from _helpers.predictor_variants import counted

from moe_beyond.datamodules import TraceDataModule
from moe_beyond.datamodules.batch_plan import BatchingSettings, plan_batches
from moe_beyond.datamodules.stream import ShardedTraces
from moe_beyond.datamodules.traces import whole_sequences
from moe_beyond.errors import UserError
from moe_beyond.predictors.batch import Batch
from moe_beyond.testing.predictors import count_prefixes
from moe_beyond.traces.manifest import Manifest, ShardInfo, Tokenizer
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.shard import Shard
from moe_beyond.traces.writer import open_writer

SMALL: dict[str, Any] = {"token_budget": 48, "max_tokens": 8, "window": 2}


def module(trace_set: TraceSet, **arguments: Any) -> TraceDataModule:
    return TraceDataModule(trace_set.folder, **{**SMALL, **arguments})


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.sequence_ids, one.starts) == (other.sequence_ids, other.starts)
        assert torch.equal(one.lengths, other.lengths)
        assert torch.equal(one.token_ids, other.token_ids)
        assert torch.equal(one.experts, other.experts)


def assert_holds_exactly(batches: list[Batch], trace_set: TraceSet, split: str) -> None:
    """Every token of the split is in the batches once, with its own id and experts."""
    traces = {trace.sequence_id: trace for trace in trace_set.traces(split)}
    seen: Counter[tuple[str, int]] = Counter()
    for batch in batches:
        for row, (name, start, length) in enumerate(
            zip(batch.sequence_ids, batch.starts, batch.lengths.tolist(), strict=True)
        ):
            part = slice(start, start + length)
            assert np.array_equal(batch.token_ids[row, :length], traces[name].token_ids[part])
            assert np.array_equal(batch.experts[row, :length], traces[name].experts[part])
            seen.update((name, position) for position in range(start, start + length))
    assert seen == Counter((name, i) for name, trace in traces.items() for i in range(len(trace)))


def test_training_batches_hold_the_training_split_once(trace_set):
    batches = list(module(trace_set).train_dataloader())
    assert_holds_exactly(batches, trace_set, "train")
    assert max(int(batch.lengths.max()) for batch in batches) == 8
    assert all(batch.token_ids.numel() <= 48 for batch in batches)


def test_epochs_and_seeds_order_training_differently(trace_set):
    loader = module(trace_set).train_dataloader()
    first = [batch.sequence_ids for batch in loader]
    assert [batch.sequence_ids for batch in loader] == first
    loader.sampler.set_epoch(1)
    second = list(loader)
    assert [batch.sequence_ids for batch in second] != first
    assert_holds_exactly(second, trace_set, "train")
    assert [batch.sequence_ids for batch in module(trace_set, seed=1).train_dataloader()] != first


def test_evaluation_keeps_whole_sequences_in_one_order(trace_set):
    data = module(trace_set)
    batches = list(data.val_dataloader())
    assert_holds_exactly(batches, trace_set, "validation")
    names = [name for batch in batches for name in batch.sequence_ids]
    assert sorted(names) == sorted({trace.sequence_id for trace in trace_set.traces("validation")})
    assert all(set(batch.starts) == {0} for batch in batches)
    assert_same(list(data.val_dataloader()), batches)
    assert_same(list(module(trace_set, seed=5, window=1, max_tokens=1).val_dataloader()), batches)
    assert_same(list(whole_sequences(trace_set, "validation", token_budget=48)), batches)
    assert_same(list(data.test_dataloader()), batches)
    assert_same(list(data.predict_dataloader()), batches)


def test_testing_on_another_trace_set_reads_all_its_splits(trace_set, tmp_path):
    other = tiny_traces(tmp_path / "other", seed=3)
    data = module(trace_set, test_traces=other.folder)
    batches = list(data.test_dataloader())
    assert {name for batch in batches for name in batch.sequence_ids} == {t.sequence_id for t in other.traces()}
    assert_same(list(data.predict_dataloader()), batches)
    assert_same(list(whole_sequences(other, token_budget=48)), batches)


def test_validation_may_come_from_another_trace_set(trace_set, tmp_path):
    other = tiny_traces(tmp_path / "other", seed=3)
    data = module(trace_set, val_traces=other.folder)
    data.setup("fit")
    assert_holds_exactly(list(data.val_dataloader()), other, "validation")
    assert_holds_exactly(list(data.train_dataloader()), trace_set, "train")


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_batches(trace_set, workers):
    alone, helped = module(trace_set).train_dataloader(), module(trace_set, num_workers=workers).train_dataloader()
    for loader in (alone, helped):
        loader.sampler.set_epoch(3)
    assert_same(list(helped), list(alone))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_pass_continues_within_its_epoch(trace_set, workers):
    whole = module(trace_set).train_dataloader()
    whole.sampler.set_epoch(1)
    resumed = module(trace_set, num_workers=workers)
    resumed.resume(1, 2)
    rest = resumed.train_dataloader()
    assert_same(list(rest), list(whole)[2:])
    for loader in (whole, rest):
        loader.sampler.set_epoch(2)
    assert_same(list(rest), list(whole))


def test_two_ranks_share_the_shards(trace_set):
    whole = module(trace_set)
    ranks = []
    for rank in range(2):
        data = module(trace_set)
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank, overfit_batches=0.0)  # what Lightning attaches
        ranks.append(data)
    training = [list(data.train_dataloader()) for data in ranks]
    assert len(training[0]) == len(training[1])
    names = [{name for batch in part for name in batch.sequence_ids} for part in training]
    assert names[0].isdisjoint(names[1])
    # One validation shard for two ranks: each reads all of it.
    assert not ranks[0].is_shared("val")
    for data in ranks:
        assert_same(list(data.val_dataloader()), list(whole.val_dataloader()))


def test_two_ranks_validate_the_batches_of_one(tmp_path):
    traces = tiny_traces(tmp_path / "traces", sequences=60)
    assert len(traces.shards("validation")) >= 2
    parts = []
    for rank in range(2):
        data = module(traces)
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank, overfit_batches=0.0)
        assert data.is_shared("val")
        parts += data.val_dataloader()
        assert_same(list(data.predict_dataloader()), list(module(traces).predict_dataloader()))
        assert_same(list(data.whole_validation()), list(module(traces).val_dataloader()))
    expected = list(module(traces).val_dataloader())
    assert len(parts) == len(expected)
    by_name = {batch.sequence_ids: batch for batch in parts}
    assert_same([by_name[batch.sequence_ids] for batch in expected], expected)


class CountingTraces(TraceSet):
    """Notes which shards are decoded."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.decoded: list[str] = []

    def read(self, info: ShardInfo, **how: bool) -> Shard:
        self.decoded.append(info.file)
        return super().read(info, **how)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_no_more_shards_than_the_window_are_in_memory_and_each_is_decoded_once(tmp_path, window):
    folder = tiny_traces(tmp_path / "traces", sequences=80).folder
    traces = CountingTraces(folder)
    shards, lengths = traces.shards("train"), traces.lengths("train")
    assert len(shards) > 2 * 3
    reader = ShardedTraces(traces, shards, window)
    for pieces in plan_batches(lengths, BatchingSettings(48, 8, window, 0, True), epoch=0):
        reader[pieces]
        assert len(reader._decoded) <= window
    assert sorted(traces.decoded) == [info.file for info in shards]


def test_the_training_text_counts_the_training_split_alone(trace_set):
    text = module(trace_set).training_stats()
    ids = np.concatenate([trace.token_ids for trace in trace_set.traces("train")])
    assert text.token_counts.tolist() == np.bincount(ids, minlength=VOCAB).tolist()
    assert text.token_strings is None  # this set carries no tokenizer


def test_what_a_predictor_must_fit_is_that_of_the_training_set(trace_set):
    data = module(trace_set)
    assert data.geometry == TINY
    assert data.vocab_size == VOCAB
    assert data.manifest == trace_set.manifest


def test_a_missing_training_split_is_named_before_anything_runs(trace_set):
    data = module(trace_set, train_split="trian")
    with pytest.raises(UserError, match=f"split of {re.escape(trace_set.folder)} 'trian'; did you mean 'train'"):
        data.setup("fit")
    data.setup("test")  # which reads no training split


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_a_missing_validation_split_is_named_before_anything_runs(trace_set, stage):
    data = module(trace_set, val_split="dev")
    with pytest.raises(
        UserError, match=f"^{re.escape(trace_set.folder)}: has no validation split 'dev'.*--data.val_split null"
    ):
        data.setup(stage)


def test_training_without_validation(trace_set):
    data = module(trace_set, val_split=None)
    data.setup("fit")
    assert data.val_dataloader() == []
    with pytest.raises(UserError, match=re.escape(trace_set.folder)):
        data.test_dataloader()


def test_a_missing_trace_set_is_named(trace_set, tmp_path):
    missing = str(tmp_path / "nowhere")
    for arguments in ({"traces": missing}, {"val_traces": missing}, {"test_traces": missing}):
        with pytest.raises(UserError, match=re.escape(f"{missing}: no trace set here")):
            TraceDataModule(**{"traces": trace_set.folder, **arguments})


@pytest.mark.parametrize("role", ["val_traces", "test_traces"])
def test_trace_sets_of_another_shape_are_refused(trace_set, tmp_path, role):
    other = tiny_traces(tmp_path / "other", geometry=replace(TINY, top_k=3)).folder
    with pytest.raises(UserError, match=f"^{re.escape(other)}: has .*top-3.*has 4 MoE layers x 8 experts, top-2"):
        module(trace_set, **{role: other})


def traces_of(folder: Path, tokenizer: Tokenizer, word: str | None = None) -> str:
    vocabulary = None if word is None else word_tokenizer(folder.parent / f"{folder.name}.json", [word])
    manifest = Manifest(TINY, tokenizer, "tiny", 16.0, "dataset", "tests", "0")
    with open_writer(folder, manifest, vocabulary=vocabulary) as writer:
        for split in ("train", "validation"):
            writer.write(tiny_trace(split, 3, np.random.default_rng(0)), split)
    return str(folder)


@pytest.mark.parametrize("role", ["val_traces", "test_traces"])
@pytest.mark.parametrize(
    ("vocab_size", "words"), [(VOCAB, ("a", "b")), (10 * VOCAB, (None, None))], ids=["hash", "size"]
)
def test_trace_sets_of_another_tokenizer_are_refused(tmp_path, role, vocab_size, words):
    first = traces_of(tmp_path / "a", Tokenizer("tests", VOCAB), words[0])
    second = traces_of(tmp_path / "b", Tokenizer("tests", vocab_size), words[1])
    with pytest.raises(UserError, match=f"^{re.escape(second)}: has another tokenizer"):
        TraceDataModule(first, **{role: second})


@pytest.mark.parametrize("name", ["token_budget", "max_tokens", "window"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_below_one_are_refused(trace_set, name, value):
    with pytest.raises(UserError, match=name):
        module(trace_set, **{name: value})


def test_a_damaged_shard_is_named_and_not_skipped(trace_set):
    shard = trace_set.shards("train")[-1].file
    path = Path(trace_set.folder) / shard
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    with pytest.raises(UserError, match=f"{re.escape(shard)}: shard is damaged"):
        list(module(trace_set).train_dataloader())


@pytest.mark.parametrize("holes", [0.0, 0.4])
def test_training_statistics_count_the_experts_of_tokens_and_prefixes(tmp_path, monkeypatch, holes):
    monkeypatch.setattr("moe_beyond.datamodules.training_stats.COUNTED_TOKENS", 5)
    trace_set = tiny_traces(tmp_path / "traces", holes=holes)
    text, traces = module(trace_set).training_stats(), list(trace_set.traces("train"))
    asked = np.random.default_rng(0).permutation(VOCAB)[: VOCAB // 2]
    assert np.array_equal(text.expert_counts(asked), counted(traces, trace_set.geometry.num_experts)(asked))
    demanded = sum(int((trace.experts < 8).sum()) for trace in traces)
    assert text.expert_counts(np.flatnonzero(text.token_counts)).sum() == demanded
    for limit in (1, 30, 10**6):
        expected = count_prefixes(traces, trace_set.geometry.num_experts, VOCAB)(limit)
        for found, part in zip(text.prefixes(limit), expected, strict=True):
            np.testing.assert_array_equal(found, part)


@pytest.mark.parametrize(("raised", "printed"), [("gone", False), ("open('missing')", True)])
def test_a_worker_that_starts_too_late_prints_no_traceback(raised: str, printed: bool) -> None:
    script = (
        "import moe_beyond.datamodules.worker_start\n"
        "from multiprocessing import synchronize\n"
        "gone = None\n"
        + ("synchronize.SemLock.__setstate__(synchronize.SemLock.__new__(synchronize.SemLock), (0, 1, 1, '/gone'))"
           if raised == "gone" else raised)
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert ("Traceback" in done.stderr) == printed


def test_a_worker_that_cannot_send_a_batch_ends() -> None:
    script = (
        "import time, torch.multiprocessing\n"
        "import moe_beyond.datamodules.worker_start\n"
        "torch.multiprocessing.Queue().put(lambda: 'no pickle')\n"
        "time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("moe-beyond: error: a worker cannot send a batch: Can't pickle <function <lambda>")
    assert done.stderr.count("\n") == 1


def test_workers_end_with_a_killed_process(trace_set: TraceSet) -> None:
    code = (
        "import time, psutil\n"
        "from moe_beyond.datamodules import TraceDataModule\n"
        f"data = TraceDataModule({trace_set.folder!r}, token_budget=32, num_workers=1)\n"
        "data.setup('fit')\n"
        "batches = iter(data.train_dataloader())\n"
        "next(batches)\n"
        "print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    children = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    assert len(children) >= 2  # the fork server and the worker
    process.kill()
    assert psutil.wait_procs(children, timeout=20)[1] == []
