"""Recordings of runs: the trace set, its equality with a collection and a replay, and the telemetry."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from moe_beyond.cache.steps import EventRecord
from moe_beyond.collect.collection import collect
from moe_beyond.collect.config import CollectConfig
from moe_beyond.collect.load import open_checkpoint
from moe_beyond.collect.prompts import as_prompts
from moe_beyond.errors import UserError
from moe_beyond.evaluation.options import ReplayOptions
from moe_beyond.evaluation.run import run_replay
from moe_beyond.runtime import OffloadedRun, load_offloaded
from moe_beyond.runtime.generation import Sampling, TextGenerator
from moe_beyond.runtime.records.recording import read_recording, write_recording
from moe_beyond.runtime.records.summary import replayed_baselines
from moe_beyond.runtime.result import carried_settings, logged_sequences
from moe_beyond.simulator import Replay
from moe_beyond.traces.reader import TraceSet

PROMPTS = ("def read(path):", "The list of all exceptions that the module raises is short:", "A")
SAMPLING = Sampling(12, temperature=0.7, seed=3)


def record(folder: Path, budget: int | str, **options) -> OffloadedRun:
    generator = TextGenerator(open_checkpoint("small-moe"), SAMPLING)
    with load_offloaded("small-moe", budget=budget, keep_rows=True, **options) as run:
        generations = [generator.generate(run.model, prompt) for prompt in as_prompts(PROMPTS)]
    write_recording(run, folder, generations, SAMPLING, "tests", {"figure": 1})
    return run


def test_the_trace_set_equals_a_collection(tmp_path):
    run = record(tmp_path / "run", budget=12)
    checkpoint = open_checkpoint("small-moe")
    config = CollectConfig(generate=12, temperature=0.7, seed=3, batch_size=1, gate_weights=False)
    expected = collect(checkpoint.load(), checkpoint.tokenizer, as_prompts(PROMPTS), tmp_path / "collected", config)
    traces = TraceSet(str(tmp_path / "run"))
    assert expected is not None
    assert len(traces) == len(expected) == 3
    for trace, reference in zip(traces, expected, strict=True):
        assert trace.sequence_id == reference.sequence_id
        assert trace.decode_start == reference.decode_start
        assert np.array_equal(trace.token_ids, reference.token_ids)
        assert np.array_equal(trace.experts, reference.experts)
    manifest = traces.manifest
    assert (manifest.author, manifest.source, manifest.model_id) == ("mixed", "tests", "small-moe")
    assert manifest.generation == {"tokens": 12, "temperature": 0.7, "seed": 3}
    assert manifest.tokenizer.sha256 == expected.manifest.tokenizer.sha256
    assert manifest.geometry.shape() == run.geometry.shape()
    content = json.loads((tmp_path / "run" / "run.json").read_text())
    assert content["figure"] == 1
    assert content["options"]["budget"] == 12


@pytest.mark.parametrize(
    ("budget", "policy", "scope"),
    [(3, "lru", "global"), (12, "lfu", "global"), (48, "lfu", "per-layer"), (192, "lru", "global")],
)
def test_a_replay_has_the_same_events(tmp_path, budget, policy, scope):
    run = record(tmp_path / "run", budget=budget, policy=policy, scope=scope)
    traces = TraceSet(str(tmp_path / "run"))
    chunk = max(trace.decode_start for trace in traces)
    options = ReplayOptions(budget=[str(budget)], policy=[policy], scope=scope, carry_over=True, prefill_chunk=chunk)
    replayed, measured = run_replay(options, traces).results[0], run.result()
    for name in ("accesses", "demanded", "hits", "misses", "demand_transfers", "bytes_ratio", "per_layer", "tokens"):
        assert getattr(replayed, name) == getattr(measured, name), name
    assert measured.demand_transfers == run.telemetry.transferred
    replay = Replay(run.geometry, carried_settings(run.strategy.settings, run.log))
    events = np.concatenate([replay.watch(sequence)[0] for sequence in logged_sequences(run.log, run.geometry)])
    columns = {"hits": EventRecord.HITS, "misses": EventRecord.MISSES}
    assert len(events) == len(run.telemetry.events)
    for name, column in columns.items():
        assert [getattr(row, name) for row in run.telemetry.events] == events[:, column].tolist(), name
    lru, belady = replayed_baselines(run)
    assert (lru.policy, belady.policy) == ("lru", "belady")
    assert belady.misses <= min(lru.misses, measured.misses)
    assert lru.accesses == measured.accesses
    if policy == "lru":
        assert lru.per_layer == measured.per_layer


def test_the_telemetry_adds_up(tmp_path):
    run = record(tmp_path / "run", budget=48)
    recording = read_recording(tmp_path / "run")
    telemetry, result = run.telemetry, run.result()
    assert recording.steps == telemetry.steps
    assert recording.events == telemetry.events
    assert recording.transfers == telemetry.transfers
    prompts = [trace.decode_start for trace in recording.traces]
    assert [step.tokens for step in recording.steps] == [n for first in prompts for n in (first, *[1] * 11)]
    assert sum(step.tokens for step in recording.steps) == result.tokens == sum(map(len, recording.traces))
    assert sum(row.hits for row in recording.events) == result.hits
    assert sum(row.transfers for row in recording.events) == len(recording.transfers) == result.demand_transfers
    assert sum(telemetry.sources) == len(recording.transfers) * run.geometry.params_per_expert * 2  # float16
    assert sum(row.wait_s for row in recording.events) == pytest.approx(
        telemetry.prefill.wait_s + telemetry.decode.wait_s
    )
    assert result.measured
    assert result.device == "this machine (cpu)"


@torch.inference_mode()
def test_the_speed_is_that_of_a_clock_around_the_forwards():
    cache, seconds = DynamicCache(), []
    with load_offloaded("small-moe", budget=48) as run:
        for token in range(40):
            began = time.perf_counter()
            run.model(torch.tensor([[token]]), past_key_values=cache)
            seconds.append(time.perf_counter() - began)
    result = run.result()
    assert 0.9 * sum(seconds) < 40 / result.tokens_per_second <= sum(seconds)
    assert 0.8 * max(seconds) < result.token_ms_p99 * 1e-3 <= max(seconds)
    stall_and_compute = result.stall_ms_per_token + result.compute_ms_per_token
    assert stall_and_compute == pytest.approx(1e3 / result.tokens_per_second)
    assert result.prefill_ms == 0


def test_datasets_reads_the_recording(tmp_path):
    datasets = pytest.importorskip("datasets")
    record(tmp_path / "run", budget=48)
    rows = datasets.load_dataset(str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"))["train"]
    assert rows["sequence_id"][:] == [prompt.sequence_id for prompt in as_prompts(PROMPTS)]
    assert set(rows.column_names) == {"sequence_id", "source", "token_ids", "decode_start", "experts"}


def test_nothing_is_written_after_a_mistake(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(UserError, match="already exists"):
        record(tmp_path / "taken", budget=48)
    generator = TextGenerator(open_checkpoint("small-moe"), Sampling(4))
    prompt = as_prompts(["A"])[0]
    with load_offloaded("small-moe", budget=48, keep_rows=True) as run:
        generations = [generator.generate(run.model, prompt), generator.generate(run.model, prompt)]
    with pytest.raises(UserError, match="was written before"):  # two sequences of one name
        write_recording(run, tmp_path / "out", generations, Sampling(4), "tests", {})
    ids = run.tokenizer("a b", return_tensors="pt").input_ids
    with load_offloaded("small-moe", budget=48, keep_rows=True) as run:
        with torch.inference_mode():
            run.model(ids.repeat(2, 1))
    with pytest.raises(UserError, match="1 forwards were interrupted, read several sequences"):
        replayed_baselines(run)
    assert {path.name for path in tmp_path.iterdir()} == {"taken"}
