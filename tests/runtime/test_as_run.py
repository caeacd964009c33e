"""Recorded runs, replayed as they ran with the cache core: every event is equal, with and without prefetches."""

import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_beyond.collect.load import open_checkpoint
from moe_beyond.collect.prompts import as_prompts
from moe_beyond.errors import UserError
from moe_beyond.files import file_sha256, read_json, sealed, write_json
from moe_beyond.predictors.architectures.naive_bayes import NaiveBayes
from moe_beyond.predictors.architectures.next_gate import NextGate
from moe_beyond.predictors.batch import collate
from moe_beyond.predictors.io.folder import read_config, read_predictor, save_predictor
from moe_beyond.runtime import load_offloaded
from moe_beyond.runtime.generation import Sampling, TextGenerator
from moe_beyond.runtime.records.as_run import replay_as_run
from moe_beyond.runtime.records.recording import Recording, read_recording, write_recording
from moe_beyond.traces import parquet

PROMPTS = ("def read(path):", "The list of all exceptions that the module raises is short:", "A")
TOKENS = 24


def record(folder: Path, **options) -> Recording:
    """Run small-moe, and record it."""
    generator = TextGenerator(open_checkpoint("small-moe"), Sampling(TOKENS))
    with load_offloaded("small-moe", keep_rows=True, **options) as run:
        generations = [generator.generate(run.model, prompt) for prompt in as_prompts(PROMPTS)]
    write_recording(run, folder, generations, Sampling(TOKENS), "tests", {})
    return read_recording(folder)


def naming(recording: Recording, predictor: Path) -> Recording:
    return replace(recording, options=replace(recording.options, predictor=str(predictor)))


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A predictor that was fitted on a run."""
    folder = tmp_path_factory.mktemp("predictor")
    traces = record(folder / "traces", budget="100%").traces
    fitted = NaiveBayes(traces.geometry, traces.manifest.tokenizer.vocab_size)
    fitted.partial_fit(collate(list(traces)))
    tokenizer = {"sha256": traces.manifest.tokenizer.sha256}
    save_predictor(fitted, folder / "fitted", {"fingerprint": traces.manifest.fingerprint, "tokenizer": tokenizer})
    return folder / "fitted"


# One event, fewer than a prompt demands of a layer, and all experts.
@pytest.mark.parametrize(("budget", "tier"), [(3, "disk"), (12, "host"), (192, "disk")])
def test_a_run_on_demand_is_replayed(tmp_path, budget, tier):
    recording = record(tmp_path / "run", budget=budget, tier=tier, policy="lfu")
    replayed = replay_as_run(recording)
    assert replayed.difference is None
    assert replayed.equal == replayed.events == len(recording.events) == 8 * 3 * TOKENS
    assert any(row.waves > 1 for row in recording.events) == (budget < 192)
    assert str(replayed) == f"as run: {replayed.events} of {replayed.events} events equal"


# Each pair compiles the core: every prefetcher once, and every policy once.
@pytest.mark.parametrize(
    ("policy", "prefetch"), [("lru", "p>0.3"), ("lru", "adaptive"), ("lru", "moe_infinity"), ("belief", "top3")]
)
def test_a_run_with_prefetches_is_replayed(tmp_path, predictor, policy, prefetch):
    recording = record(tmp_path / "run", budget=60, policy=policy, predictor=predictor, prefetch=prefetch)
    assert recording.options.predictor == "fitted"
    assert str(predictor) not in (tmp_path / "run" / "run.json").read_text()
    replayed = replay_as_run(naming(recording, predictor))
    assert replayed.difference is None, replayed
    assert replayed.equal == 8 * 3 * TOKENS
    assert sum(row.prefetch for row in recording.transfers) > 0


@pytest.mark.parametrize("misses", ["cpu", "best"])
@pytest.mark.parametrize("prefetch", [None, "p>0.3"])
def test_a_run_whose_host_computes_is_replayed(tmp_path, predictor, misses, prefetch):
    options = {} if prefetch is None else {"predictor": predictor, "prefetch": prefetch}
    recording = record(tmp_path / "run", budget=60, tier="host", misses=misses, **options)
    assert recording.options.misses == misses
    replayed = replay_as_run(recording if prefetch is None else naming(recording, predictor))
    assert replayed.difference is None, replayed
    assert replayed.equal == len(recording.events) > 0
    assert sum(row.on_host for row in recording.events) > 0


def test_the_first_difference_is_named(tmp_path, predictor):
    recording = naming(record(tmp_path / "run", budget=60, predictor=predictor), predictor)
    other = replay_as_run(replace(recording, options=replace(recording.options, policy="lfu")))
    assert other.difference is not None
    assert other.equal < other.events
    event = recording.events[100]
    changed = [*recording.events]
    changed[100] = replace(event, hits=event.hits + 1)
    found = replay_as_run(replace(recording, events=changed))
    assert found.equal == 100
    assert (
        found.difference == f"step {event.step + 1}, layer {event.layer}: {event.hits} hits, recorded {event.hits + 1}"
    )
    number = next(i for i, row in enumerate(recording.prefetches) if row.expert >= 0)
    row = recording.prefetches[number]
    moved = [*recording.prefetches]
    moved[number] = replace(row, expert=row.expert + 1)
    found = replay_as_run(replace(recording, prefetches=moved))
    assert f"prefetch of expert {row.expert} to slot {row.slot}, recorded expert {row.expert + 1}" in str(found)


def test_a_predictor_is_the_one_of_the_run(tmp_path, predictor):
    recording = record(tmp_path / "named", budget=60, predictor=predictor)
    with pytest.raises(UserError, match="its predictor fitted is not found here; give --predictor"):
        replay_as_run(recording)
    other = read_predictor(predictor)
    next(iter(other.buffers())).add_(1)
    save_predictor(other, tmp_path / "other", read_config(predictor)["training"])
    with pytest.raises(UserError, match=r"other: is not the predictor of the run \(its weights differ\)"):
        replay_as_run(naming(recording, tmp_path / "other"))
    recording = record(tmp_path / "instance", budget=60, predictor=read_predictor(predictor))
    assert recording.options.predictor is None
    with pytest.raises(UserError, match="its predictor was an instance without a name; give --predictor"):
        replay_as_run(recording)
    assert replay_as_run(naming(recording, predictor)).difference is None


def test_a_predictor_that_reads_hidden_states_is_refused(tmp_path):
    with load_offloaded("small-moe") as run:
        manifest = run.manifest
    reads_states = NextGate(manifest.geometry, manifest.tokenizer.vocab_size, hidden_size=manifest.hidden_size)
    save_predictor(reads_states, tmp_path / "gate", {"tokenizer": {"sha256": manifest.tokenizer.sha256}})
    recording = record(tmp_path / "run", budget=60, predictor=tmp_path / "gate")
    assert any(row.prefetch for row in recording.transfers)
    with pytest.raises(UserError, match="has no hidden states, which next_gate requires"):
        replay_as_run(naming(recording, tmp_path / "gate"))


def test_mistakes_are_one_line(tmp_path):
    recording = record(tmp_path / "run", budget=30)
    with pytest.raises(UserError, match="its telemetry is incomplete; record the run again"):
        replay_as_run(replace(recording, events=recording.events[:-1]))
    longer = [replace(recording.steps[0], tokens=1000), *recording.steps[1:]]
    with pytest.raises(UserError, match="other steps than its traces"):
        replay_as_run(replace(recording, steps=longer))
    with pytest.raises(UserError, match=r"is no recording of a run \(run.json is missing\)"):
        read_recording(tmp_path)
    path = tmp_path / "run" / "telemetry" / "events.parquet"
    for content in (parquet_of({"other": [1]}), b"damaged"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"events\.parquet: is damaged"):
            read_recording(tmp_path / "run")
        hash_telemetry(tmp_path / "run")
        with pytest.raises(UserError, match=r"events\.parquet: cannot be read"):
            read_recording(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "telemetry")
    with pytest.raises(UserError, match=r"steps\.parquet: cannot be read"):
        read_recording(tmp_path / "run")


def parquet_of(columns: dict) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def hash_telemetry(folder: Path, **changes) -> None:
    """Recompute the hashes of a recording, as an attacker would."""
    content = read_json(folder / "run.json")
    content["telemetry"] = {
        name: file_sha256(folder / "telemetry" / f"{name}.parquet") for name in content["telemetry"]
    }
    write_json(folder / "run.json", sealed(content | changes))


def test_a_changed_recording_is_named(tmp_path):
    folder = tmp_path / "run"
    record(folder, budget=30)
    whole = (folder / "run.json").read_bytes()
    (folder / "run.json").write_bytes(whole.replace(b'"lru"', b'"lfu"'))
    with pytest.raises(UserError, match=r"run\.json: content_sha256 does not match the other fields"):
        read_recording(folder)
    for changes, says in (
        ({"fingerprints": {"other": None}}, "fingerprints must be an object with the hashes of predictor and profile"),
        ({"fingerprints": {"profile": "f"}}, "fingerprints must be"),
        ({"options": {"predictor": 5}}, "options: predictor must be text"),
        ({"options": {"budget": -1.5}}, "budget must be text such as"),
        ({"telemetry": {}}, "telemetry must be an object with the hashes of steps, events, prefetches, transfers"),
        ({"traces": "0" * 64}, "belongs to other traces than"),
        ({"format_version": True}, "format version True, not 1"),
    ):
        (folder / "run.json").write_bytes(whole)
        hash_telemetry(folder)
        write_json(folder / "run.json", sealed(read_json(folder / "run.json") | changes))
        with pytest.raises(UserError, match=rf"run\.json: {says}"):
            read_recording(folder)
    (folder / "run.json").write_bytes(whole)
    steps = pq.read_table(folder / "telemetry" / "steps.parquet")
    for name, value, kind in (
        ("seconds", float("nan"), pa.float64()),
        ("tokens", -1, pa.int64()),
        ("tokens", None, None),
    ):
        column = pa.array([value, *steps[name].to_pylist()[1:]], kind)
        changed = steps.set_column(steps.schema.get_field_index(name), name, column)
        pq.write_table(changed, folder / "telemetry" / "steps.parquet")
        hash_telemetry(folder)
        with pytest.raises(UserError, match=rf"steps\.parquet: column '{name}' (holds an impossible number|must hold)"):
            read_recording(folder)


def test_telemetry_that_would_take_the_memory_is_not_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "BOMB_BYTES", 2**20)
    record(tmp_path / "run", budget=30)
    steps = tmp_path / "run" / "telemetry" / "steps.parquet"
    row = pq.read_table(steps).slice(0, 1)
    pq.write_table(pa.concat_tables([row] * 2**16).combine_chunks(), steps, compression="zstd")
    assert steps.stat().st_size < 2**16
    hash_telemetry(tmp_path / "run")
    with pytest.raises(UserError, match=r"steps\.parquet: .* bytes would decode into "):
        read_recording(tmp_path / "run")
