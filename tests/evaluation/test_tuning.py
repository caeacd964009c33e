"""Tuning: traces whose best strategy is known, the fallback to LRU, and an exhaustive grid."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from _helpers.common import TINY, VOCAB, tiny_traces
from _helpers.scoring import seer

from moe_beyond.errors import UserError
from moe_beyond.evaluation import search, tuning
from moe_beyond.evaluation.engine import replay_sequences
from moe_beyond.evaluation.options import ReplayOptions
from moe_beyond.evaluation.sources import Scored, ScoreSource
from moe_beyond.evaluation.strategies import grid
from moe_beyond.evaluation.tuning import TuningReport, run_tuning
from moe_beyond.simulator import ReplaySettings
from moe_beyond.simulator.devices import load_device
from moe_beyond.traces.manifest import Manifest, Tokenizer
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.writer import open_writer

pytestmark = pytest.mark.usefixtures("few_policies")
LAYERS, EXPERTS, TOP_K = TINY.shape()
FAST = "rtx3060,link_gb_per_s=0.01,link_latency_us=0,memory_gb_per_s=0.02,efficiency=1,layer_us=0"
SATURATED = "rtx3060,link_gb_per_s=0.0005,link_latency_us=0,memory_gb_per_s=0.02"


def hot_and_scanned(folder: Path, sequences: int = 8, length: int = 30) -> TraceSet:
    """Traces in which each layer uses expert 0 for every token, and another expert in turn."""
    manifest = Manifest(TINY, Tokenizer("tests", VOCAB), "tiny", 16.0, "dataset", "tests", "0")
    rng = np.random.default_rng(0)
    with open_writer(folder, manifest) as writer:
        for number in range(sequences):
            scanned = 1 + (np.arange(length)[:, None] + rng.integers(0, 7, LAYERS)) % 7
            experts = np.stack([np.zeros_like(scanned), scanned], axis=-1).astype(np.uint8)
            ids = rng.integers(0, VOCAB, length).astype(np.int32)
            writer.write(Trace(f"s{number}", "tests", ids, experts, 0))
    return TraceSet(str(folder))


def knowing(share: Callable[[np.ndarray], np.ndarray], name: str = "knowing") -> ScoreSource:
    """A source whose scores of lookahead 1 are a function of the experts that are used, ``(T, L, E)`` bool."""

    def sequences(traces: TraceSet, split: str | None, in_order: bool = False) -> Iterator[Scored]:
        for trace in traces.traces(split):
            used = (trace.experts[..., None] == np.arange(EXPERTS)).any(-2)
            yield trace, share(used)[:, None].astype(np.float32)

    return ScoreSource(name, (1,), True, sequences)


def tuned(traces: TraceSet, budget: str, source: ScoreSource | None = None, **options: object) -> TuningReport:
    aim = options.pop("aim", None)
    return run_tuning(ReplayOptions(budget=(budget,), **options), traces, source, aim=aim)  # type: ignore[arg-type]


def test_a_known_best_policy_is_chosen(tmp_path: Path) -> None:
    """Six slots hold the four hot experts, or less than the eight experts of a token, which LRU keeps in turn."""
    report = tuned(hot_and_scanned(tmp_path / "traces"), "6", aim="hits")
    choice, lru, belady = report.held_out
    assert lru.hits == 0
    assert choice.hits >= 4 * 28 * 4  # every layer's hot expert in four sequences, except at their first two tokens
    assert choice.hits <= belady.hits
    assert report.choice.policy != "lru"
    assert (report.choice.budget, report.choice.prefetch, report.choice.predictor) == ("6", "none", None)
    assert report.tried[0].hit_rate == max(result.hit_rate for result in report.tried)
    assert "no prefetcher was tried: they need scores; give --predictor" in report.sentences


def test_right_scores_are_used_on_an_idle_interconnect(tmp_path: Path) -> None:
    source = knowing(lambda used: np.where(used, 0.8, 0.2))
    report = tuned(hot_and_scanned(tmp_path / "traces"), "8", source, device=FAST)
    choice, *_, lru, _ = report.held_out
    assert choice.prefetch != "none"
    # No layer waits: a token takes 4 layers * (10 kB + 2 * 2 kB) / 0.02 GB/s = 2.8 ms, as with all experts resident.
    assert choice.tokens_per_second == pytest.approx(1000 / 2.8)
    assert lru.tokens_per_second < 320


def test_no_prefetch_is_best_on_a_saturated_interconnect(tmp_path: Path) -> None:
    # The experts of two tokens ago have left the cache, and are not used again for four tokens.
    source = knowing(lambda used: np.where(np.roll(used, 2, axis=0) & ~used, 0.9, 0.1))
    report = tuned(hot_and_scanned(tmp_path / "traces"), "8", source, device=SATURATED)
    assert report.choice.prefetch == "none"
    assert any(sentence.startswith("no prefetch is best: ") for sentence in report.sentences)


@pytest.mark.parametrize("aim", ["tokens", "hits", "bytes"])
@pytest.mark.parametrize("budget", ["6", "20", pytest.param("8", marks=pytest.mark.slow)])
def test_the_search_finds_the_best_of_a_grid(tmp_path: Path, aim: str, budget: str) -> None:
    traces, source = tiny_traces(tmp_path / "traces", sequences=12), seer("seer", (1, 2))
    report = tuned(traces, budget, source, device=FAST, aim=aim)
    common = ReplaySettings(TINY.total_experts, device=load_device(FAST))
    policies = ("lru", "lfu", "lfu_in_cache", "lfru", "class_lru", "least_stale", "hobbit", "belief", "moe_infinity")
    policies = tuple(name for name in policies if name in search.POLICIES)
    prefetches = ("none", *(f"top{n}" for n in range(1, 9)), *(f"p>{n / 10:g}" for n in range(1, 10)), "adaptive")
    settings = [
        each
        for scope in (("global", "per-layer") if budget == "20" else ("global",))
        for each in grid(replace(common, scope=scope), [int(budget)], policies, prefetches, source, (1, 2))
    ]
    results = replay_sequences(TINY, settings, report.halves.tuning)
    best = min(results, key=report.aim.rank)
    found, of_grid = report.aim.value(report.tried[0]), report.aim.value(best)
    assert found >= 0.98 * of_grid if report.aim.sign > 0 else found <= of_grid / 0.98
    assert len(report.tried) < len(settings)
    assert report.to_json() == tuned(traces, budget, source, device=FAST, aim=aim).to_json()


def test_the_host_computes_misses_where_that_is_best(tmp_path: Path) -> None:
    device = f"{SATURATED},host_gb_per_s=0.02"
    report = tuned(hot_and_scanned(tmp_path / "traces"), "8", device=device, misses=("move", "cpu"))
    assert report.choice.misses == "cpu"
    choice, *_, lru, _ = report.held_out
    assert (choice.miss_handling, lru.miss_handling) == ("cpu", "move")
    assert tuned(hot_and_scanned(tmp_path / "same"), "8", device=SATURATED).choice.misses == "move"


def test_lru_is_chosen_unless_another_strategy_is_clearly_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces = hot_and_scanned(tmp_path / "traces")
    equal = tuned(traces, "100%", aim="hits")  # with all experts resident, all policies are equal
    assert equal.choice.policy == "lru"
    assert [result.strategy for result in equal.held_out] == ["lru", "belady"]
    monkeypatch.setattr(tuning, "_gain", lambda *_: (-0.1, 0.2))
    unclear = tuned(traces, "6", aim="hits")
    assert unclear.choice.policy == "lru"
    assert any("within its spread, so lru is chosen" in sentence for sentence in unclear.sentences)
    assert unclear.held_out[0].policy == "lru"


def test_the_choice_is_not_below_lru(tmp_path: Path) -> None:
    for seed in range(5):
        traces = tiny_traces(tmp_path / f"t{seed}", sequences=16, seed=seed)
        choice, *_, lru, _ = tuned(traces, "8", seer(), device=FAST).held_out
        assert choice.tokens_per_second >= lru.tokens_per_second


def test_what_cannot_be_tuned(tmp_path: Path) -> None:
    traces = hot_and_scanned(tmp_path / "traces")
    for options, message in (
        ({"aim": "speed"}, "unknown value of --for 'speed'; known: bytes, hits, tokens"),
        ({"aim": "tokens"}, "--for tokens: a speed needs the timing model; add --device"),
        ({"sequential": True}, "--sequential: excludes prefetching, which tune tries; leave it out"),
    ):
        with pytest.raises(UserError) as error:
            tuned(traces, "8", **options)
        assert str(error.value) == message
    with pytest.raises(UserError, match="seer: reads what no run knows in time"):
        tuned(traces, "8", seer("seer", (0,)))
    with pytest.raises(UserError, match=r"--budget: tune is for one budget \(got 2\)"):
        run_tuning(ReplayOptions(budget=("6", "8")), traces)
