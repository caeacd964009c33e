"""Recordings written by hand with known costs: the fit finds them, and the forecast is the recording."""

import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from _helpers.recordings import SMALL

from moe_beyond.errors import UserError
from moe_beyond.files import read_json, sealed, write_json
from moe_beyond.runtime.options import RUN_FILE
from moe_beyond.runtime.records.telemetry_files import TELEMETRY_FOLDER, write_telemetry
from moe_beyond.runtime.stepping.telemetry import EventRow, StepRow, Telemetry, TransferRow
from moe_beyond.simulator.devices import load_device
from moe_beyond.traces.engine_log import EngineLog
from moe_beyond.traces.manifest import Manifest, Tokenizer
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.writer import open_writer
from moe_beyond.validation.validate import ValidationOptions, validate

LAYERS, EXPERTS, TOP_K = SMALL.shape()
PROMPT, TOKENS, SLOTS = 4, 24, 8
TRANSFER, COPY, EXPERT, LAYER, CACHE, PREDICTOR, FIXED = 2e-3, 1e-3, 1.5e-3, 0.5e-3, 0.1e-3, 0.2e-3, 3e-3
"""Seconds: of a read, a copy, an expert, a layer without experts, cache core and predictor of a layer; per token."""


def routing(seed: int = 0) -> np.ndarray:
    """Ids ``(T, L, K)`` of a prompt and its tokens, of six experts per layer."""
    rng = np.random.default_rng(seed)
    return rng.random((TOKENS, LAYERS, 6)).argsort(-1)[..., :TOP_K].astype(np.uint8)


def lru_steps(experts: np.ndarray, slots: int) -> list[list[tuple[list[int], list[int]]]]:
    """Residents and misses of every event of every step, by a plain LRU."""
    held: OrderedDict[int, None] = OrderedDict()
    steps = []
    for begin, end in [(0, PROMPT), *((t, t + 1) for t in range(PROMPT, len(experts)))]:
        steps.append([])
        for layer in range(LAYERS):
            demand = sorted({layer * EXPERTS + int(e) for e in experts[begin:end, layer].ravel()})
            hits = [e for e in demand if e in held]
            misses = [e for e in demand if e not in held]
            for expert in hits:
                held.move_to_end(expert)
            for expert in misses:
                if len(held) == slots:
                    held.pop(next(e for e in held if e not in demand))
                held[expert] = None
            for expert in demand:  # equal recency within an event: the lowest leaves first
                held.move_to_end(expert)
            steps[-1].append((hits, misses))
    return steps


def manifest() -> Manifest:
    return Manifest(SMALL, Tokenizer("tests", 10), "small", 8.0, "mixed", "tests", "0")


def write_traces(folder: Path, experts: np.ndarray, logs: list[EngineLog] | None = None) -> None:
    with open_writer(folder, manifest(), engine_logs=logs or ()) as writer:
        writer.write(Trace("a", "tests", np.zeros(len(experts), np.int32), experts, PROMPT))


def write_run(folder: Path, experts: np.ndarray) -> list[float]:
    """Write the recording of a run with these costs, and return the seconds of its forwards."""
    write_traces(folder, experts)
    steps, events, transfers, now = [], [], [], 0.0
    for number, layers in enumerate(lru_steps(experts, SLOTS)):
        begins = now
        steps.append(StepRow(0, PROMPT if number == 0 else 1, 0, now_s=now))
        now += FIXED + LAYER
        for layer, (hits, misses) in enumerate(layers):
            row = EventRow(number, layer, len(hits), 0, len(misses), len(misses), 1, CACHE, PREDICTOR, now_s=now)
            requested = clock = now + PREDICTOR + CACHE
            arrivals = [requested + (place + 1) * (TRANSFER + COPY) for place in range(len(misses))]
            for arrival in [*(requested for _ in hits), *arrivals]:
                row.wait_s += max(0.0, arrival - clock)
                clock = max(clock, arrival) + EXPERT
            row.compute_s = EXPERT * (len(hits) + len(misses))
            events.append(row)
            for place, expert in enumerate(misses):
                wait = place * (TRANSFER + COPY)
                transfers.append(TransferRow(expert, 0, False, len(events), 0, 0, wait, TRANSFER, COPY, 1000, 0, 0))
            now = clock + (LAYER if layer < LAYERS - 1 else 0)
        steps[-1].seconds = now - begins
    hashes = write_telemetry(folder, Telemetry(steps=steps, events=events, transfers=transfers))
    about = {"format_version": 1, "traces": TraceSet(str(folder)).manifest.fingerprint, "telemetry": hashes}
    write_json(folder / RUN_FILE, sealed({**about, "options": {"budget": SLOTS}, "fingerprints": {}}))
    return [step.seconds for step in steps]


def test_the_fit_finds_the_costs_of_a_run(tmp_path: Path):
    seconds = write_run(tmp_path / "run", routing())
    found = validate(tmp_path / "run", ValidationOptions())
    device = found.device
    assert 1e-9 * 1000 / (TRANSFER + COPY) == pytest.approx(device.link_gb_per_s)
    assert device.link_latency_us == 0
    assert device.expert_ms == pytest.approx(1e3 * EXPERT)
    assert device.other_ms == pytest.approx(1e3 * LAYER)
    assert device.layer_us == pytest.approx(1e6 * (CACHE + PREDICTOR))
    assert device.token_ms == pytest.approx(1e3 * FIXED)
    assert all(pair.difference == 0 for pair in found.counts.values())
    assert found.forecast.seconds[1:] == pytest.approx(np.array(seconds[1:]))
    assert found.times.r2 == pytest.approx(1)
    assert found.fitted_on == found.times.tokens == (TOKENS - PROMPT) // 2
    for name, pair in found.times.parts.items():
        assert pair.replayed == pytest.approx(pair.recorded, abs=1e-9), name
    assert found.times.given_computing is None
    assert all(each["recorded_ms"] == pytest.approx(each["forecast_ms"]) for each in found.to_json()["tokens"])


def test_a_fitted_device_is_a_device_file(tmp_path: Path):
    write_run(tmp_path / "run", routing())
    fitted = validate(tmp_path / "run", ValidationOptions())
    write_json(tmp_path / "box.json", fitted.device.to_json())
    device = load_device(str(tmp_path / "box.json"))
    judged = validate(tmp_path / "run", ValidationOptions(device=device))
    assert judged.fitted_on == 0
    assert judged.times.token_ms == fitted.times.token_ms
    assert judged.times.parts["predictor"].replayed == 0  # a device does not name it: it is in the layers
    slower = validate(tmp_path / "run", ValidationOptions(device=load_device(f"{tmp_path}/box.json,expert_ms=3")))
    assert slower.times.token_ms.replayed > 1.15 * fitted.times.token_ms.replayed


def write_engine(folder: Path, experts: np.ndarray, **summary: float) -> np.ndarray:
    """Write the log of an engine with 0.5 us per byte and 4 ms per token besides computing; return its wall times."""
    steps = lru_steps(experts, SLOTS)
    residency = np.zeros(experts.shape, np.uint8)
    positions = [range(PROMPT), *([t] for t in range(PROMPT, len(experts)))]
    for tokens, layers in zip(positions, steps, strict=True):
        for layer, (hits, _) in enumerate(layers):
            for token in tokens:
                residency[token, layer] = np.isin(experts[token, layer] + layer * EXPERTS, hits)
    read = np.array([1000.0 * sum(len(misses) for _, misses in layers) for layers in steps])[1:]
    unknown = np.full(PROMPT, np.nan)
    computing = np.linspace(5, 6, len(read))
    wall = computing + 4 + 0.5e-3 * read
    metrics = {"wall_ms": wall, "compute_ms": computing, "read_bytes": read}
    log = EngineLog("a", residency, {k: np.concatenate([unknown, v]) for k, v in metrics.items()}, summary)
    write_traces(folder, experts, [log])
    return wall


def test_the_fit_finds_the_rate_and_the_fixed_cost_of_an_engine(tmp_path: Path):
    wall = write_engine(tmp_path / "set", routing(1), cache_budget_MiB=SLOTS * 1000 / 2**20)
    found = validate(tmp_path / "set", ValidationOptions())
    assert found.measured.settings.slots == SLOTS
    assert 1e-6 / found.device.link_gb_per_s == pytest.approx(0.5e-3)  # ms per byte
    assert found.device.token_ms == pytest.approx(4)
    assert all(pair.difference == 0 for pair in found.counts.values())
    speed, r2 = found.times.given_computing
    half = len(wall) // 2
    assert speed.recorded == pytest.approx(1e3 * (len(wall) - half) / wall[half:].sum())
    assert speed.error == pytest.approx(0, abs=1e-9)
    assert r2 == pytest.approx(1)


def refusal(folder: Path, **options) -> str:
    with pytest.raises(UserError) as error:
        validate(folder, ValidationOptions(**options))
    message = str(error.value)
    assert "\n" not in message
    return message


def test_bad_recordings(tmp_path: Path):
    experts = routing()
    write_run(tmp_path / "run", experts)
    assert "names its own" in refusal(tmp_path / "run", policy="lru")
    write_traces(tmp_path / "plain", experts)
    assert "neither telemetry of a run nor the log of an engine" in refusal(tmp_path / "plain")
    write_engine(tmp_path / "unknown", experts)
    assert "give --budget" in refusal(tmp_path / "unknown")
    assert validate(tmp_path / "unknown", ValidationOptions(budget=str(SLOTS))).times.tokens == 10
    assert "unknown policy" in refusal(tmp_path / "unknown", budget="8", policy="lur")
    write_engine(tmp_path / "short", experts[: PROMPT + 7], cache_budget_MiB=1.0)
    assert "a fit needs 8 generated tokens with times (got 7)" in refusal(tmp_path / "short", budget="8")
    log = EngineLog("a", np.zeros(experts.shape, np.uint8))
    write_traces(tmp_path / "unmeasured", experts, [log])
    assert "no wall_ms, compute_ms, read_bytes per token" in refusal(tmp_path / "unmeasured", budget="8")


def test_telemetry_of_another_run(tmp_path: Path):
    write_run(tmp_path / "run", routing())
    write_run(tmp_path / "other", routing()[:-2])
    for path in (tmp_path / "other" / TELEMETRY_FOLDER).iterdir():
        (tmp_path / "run" / TELEMETRY_FOLDER / path.name).write_bytes(path.read_bytes())
    assert "is damaged (its sha256 differs from that in the recording)" in refusal(tmp_path / "run")
    own, others = (read_json(tmp_path / name / RUN_FILE) for name in ("run", "other"))
    write_json(tmp_path / "run" / RUN_FILE, sealed(own | {"telemetry": others["telemetry"]}))
    assert "has other steps than its traces" in refusal(tmp_path / "run")
    for path in (tmp_path / "run" / TELEMETRY_FOLDER).iterdir():
        path.unlink()
    assert "cannot be read" in refusal(tmp_path / "run")


def test_a_run_without_transfers_gives_no_bandwidth(tmp_path: Path):
    experts = np.tile(np.arange(TOP_K, dtype=np.uint8), (TOKENS, LAYERS, 1))
    write_run(tmp_path / "run", experts)
    assert "no bandwidth of the interconnect" in refusal(tmp_path / "run")


def test_the_json_has_every_event(tmp_path: Path):
    write_run(tmp_path / "run", routing())
    content = json.loads(json.dumps(validate(tmp_path / "run", ValidationOptions()).to_json(), allow_nan=False))
    assert len(content["events"]) == (TOKENS - PROMPT + 1) * LAYERS
    assert content["events_as_run"]["events"] == len(content["events"])
    totals = {name: sum(row["recorded"][name] for row in content["events"]) for name in ("hits", "misses")}
    assert {name: content["totals"][name]["recorded"] for name in totals} == totals
