"""``moe-beyond replay`` from options to tables, JSON and pictures."""

import json
from pathlib import Path

import pytest
from _helpers.common import tiny_traces
from _helpers.scoring import history_folder, scores_folder

from moe_beyond.cache.pools import proportional_quotas
from moe_beyond.cli.main import main
from moe_beyond.evaluation.sources import load_profile
from moe_beyond.traces.reader import TraceSet

COUNTS = {
    "strategy", "policy", "prefetch", "predictor", "lookahead", "scope", "budget_slots", "budget_share", "demand_ratio",
    "accesses", "hits", "late_hits", "misses", "hit_rate", "bytes_ratio", "demand_transfers", "prefetch_transfers",
    "useful_prefetches", "wasted_prefetches", "per_layer",
}  # fmt: skip
TIMES = {"device", "bytes_per_token", "stall_ms_per_token", "compute_ms_per_token", "tokens_per_second"}
REFERENCES = ["lru", "belady", "static_hindsight"]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with traces, scores of them (all lookaheads but the token's), whole-token scores, and a profile."""
    folder = tmp_path_factory.mktemp("house")
    traces = tiny_traces(folder / "traces")
    scores_folder(folder / "scores", traces, (1, 2))
    scores_folder(folder / "token", traces, ("token",))
    scores_folder(folder / "computed", traces, ("computed", 1, "next"))
    scores_folder(folder / "leak", traces, (0,), causal=False)
    history_folder(folder / "history", traces)
    (folder / "mine.json").write_text(
        json.dumps({"link_gb_per_s": 0.003, "link_latency_us": 0, "memory_gb": 1, "memory_gb_per_s": 0.02})
    )
    return folder


@pytest.fixture(autouse=True)
def _there(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(house)


def replay(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    """Run with JSON to standard output, which then holds nothing else."""
    capsys.readouterr()
    assert main(["replay", "--traces", "traces", "--json", "-", *words]) == 0
    return json.loads(capsys.readouterr().out)


def results(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict]:
    return replay(capsys, *words)["results"]


def names(found: list[dict]) -> list[str]:
    return [result["strategy"] for result in found]


def test_the_fields_of_a_result(capsys):
    found = results(capsys, "--budget", "25%", "--policy", "belief", "--prefetch", "p>0.5", "--scores", "scores")
    assert names(found) == ["belief + p>0.5", *REFERENCES]
    for result in found:
        assert result.keys() >= COUNTS
        assert not result.keys() & TIMES
        assert result["accesses"] == result["hits"] + result["late_hits"] + result["misses"]
        assert result["hit_rate"] == result["hits"] / result["accesses"]
        moved = result["demand_transfers"] + result["prefetch_transfers"]
        assert result["bytes_ratio"] == moved / result["accesses"]
        assert sum(layer["hits"] for layer in result["per_layer"]) == result["hits"]
    ours = found[0]
    assert (ours["predictor"], ours["lookahead"], ours["scope"]) == ("seer", 1, "global")
    assert (ours["budget_slots"], ours["budget_share"], ours["demand_ratio"]) == (8, 0.25, 1.0)


def test_a_device_adds_times(capsys, house):
    words = ("--budget", "8", "--scores", "scores", "--prefetch", "p>0.5", "--prefetch", "adaptive")
    found = results(capsys, *words, "--device", "mine.json")
    assert names(found) == [
        "lru + p>0.5", "lru + adaptive", *REFERENCES, "clairvoyant prefetch", "all_resident",
    ]  # fmt: skip
    traces = TraceSet("traces")
    for result in found:
        assert result.keys() >= COUNTS | TIMES
        assert result["device"] == "mine"
        token_ms = result["stall_ms_per_token"] + result["compute_ms_per_token"]
        assert result["tokens_per_second"] == pytest.approx(1e3 / token_ms)
        moved = result["demand_transfers"] + result["prefetch_transfers"]
        assert result["bytes_per_token"] == pytest.approx(2000 * moved / traces.manifest.tokens)
        # 4 layers of 10 kB, and 8 experts of 2 kB, at 20 kB a ms.
        assert result["compute_ms_per_token"] == pytest.approx(2.8)
    resident = found[-1]
    assert (resident["stall_ms_per_token"], resident["budget_slots"]) == (0, 32)
    assert all(resident["tokens_per_second"] > result["tokens_per_second"] for result in found[:-1])
    assert found[1]["lookahead"] is None  # adaptive reads all lookaheads
    # Fields changed, bits changed: half the bytes at double the speeds, a quarter of all times.
    changes = "link_gb_per_s=0.006,memory_gb_per_s=0.04"
    again = results(capsys, *words, "--device", f"mine.json,{changes}", "--quantization", "8")
    assert again[0]["device"] == f"mine,{changes}"
    lru, faster = found[2], again[2]
    assert faster["bytes_per_token"] == lru["bytes_per_token"] / 2
    assert faster["stall_ms_per_token"] == pytest.approx(lru["stall_ms_per_token"] / 4)


def test_the_host_computes_misses(capsys):
    words = ("--budget", "8", "--device", "mine.json,host_gb_per_s=0.1", "--misses", "move", "--misses", "cpu")
    moved, on_host, *_ = results(capsys, *words)
    assert [moved["strategy"], on_host["strategy"]] == ["lru", "lru, misses cpu"]
    assert (moved["miss_handling"], moved["on_host"], on_host["miss_handling"]) == ("move", 0, "cpu")
    assert on_host["on_host"] == on_host["accesses"] - on_host["hits"]
    assert (on_host["demand_transfers"], on_host["stall_ms_per_token"]) == (0, 0)
    assert main(["replay", "--traces", "traces", *words]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "on host: accesses that the host computed; the output equals the model's up to rounding" in said
    assert main(["replay", "--traces", "traces", "--misses", "cpu"]) == 2
    assert "--misses cpu: needs the times of a device; give --device" in capsys.readouterr().err
    assert main(["replay", "--traces", "traces", "--misses", "cpu", "--device", "mine.json"]) == 2
    assert "device mine has no host_gb_per_s" in capsys.readouterr().err


@pytest.mark.slow  # compiles their policies
def test_named_systems(capsys):
    found = replay(capsys, "--strategy", "all", "--scores", "leak", "--budget", "50%")
    assert names(found["results"]) == ["moe-beyond", "moe-spac", "llama.cpp", *REFERENCES, "lru, window 8"]
    lru, spac, windowed = (found["results"][place] for place in (3, 1, 6))
    for row in (spac, windowed):  # of the same tokens; in the same windows
        assert [row[name] for name in ("tokens", "demanded")] == [lru[name] for name in ("tokens", "demanded")]
        assert row["accesses"] < row["demanded"] == lru["accesses"]
        assert (row["window"], lru["window"]) == (8, 1)
        assert row["bytes_ratio"] == (row["demand_transfers"] + row["prefetch_transfers"]) / row["demanded"]
    assert spac["accesses"] == windowed["accesses"]
    assert [result["lookahead"] for result in found["results"][:3]] == [0, None, None]
    assert found["results"][0]["causal"] is False
    missing = {one["strategy"]: one["reason"] for one in found["unavailable"]}
    timed = {"od-moe", "llama.cpp-cpu", "fiddler"}
    assert set(missing) == {"belief-cross-layer", "moe-infinity", "specmd", "hybrimoe"} | timed
    words = ("--strategy", "moe-beyond", "--strategy", "belief-cross-layer", "--scores", "leak")
    assert main(["replay", "--traces", "traces", *words]) == 0
    said = capsys.readouterr().out
    assert (
        "belief-cross-layer: not available: no pretrained cross_layer predictor fits this model and tokenizer" in said
    )
    assert "LEAK" in said
    assert "as published" in said


def per_layer(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    return results(capsys, "--scope", "per-layer", "--budget", "14", *words)[0]


def test_quotas(capsys):
    even, listed = per_layer(capsys), per_layer(capsys, "--quotas", "4,4,3,3")
    assert even == listed == per_layer(capsys, "--quotas", "even")
    other = per_layer(capsys, "--quotas", "2,2,2,8")
    assert (other["scope"], other["budget_slots"]) == ("per-layer", 14)
    rates = [[layer["hit_rate"] for layer in result["per_layer"]] for result in (even, other)]
    assert all(a > b for a, b in zip(rates[0][:3], rates[1][:3], strict=True))
    assert rates[0][3] < rates[1][3]
    traces = TraceSet("traces")
    popularity = load_profile("history", traces.manifest, traces.folder).popularity
    quotas = proportional_quotas(traces.geometry, 14, popularity)
    proportional = per_layer(capsys, "--quotas", "proportional", "--profile", "history")
    assert proportional == per_layer(capsys, "--quotas", ",".join(map(str, quotas)))


def test_a_warm_start_is_paid_for_and_the_references_are_cold(capsys):
    cold = results(capsys, "--budget", "8", "--profile", "history")
    warm = results(capsys, "--budget", "8", "--profile", "history", "--warm-start")
    traces = TraceSet("traces")
    assert warm[0]["prefetch_transfers"] == 8 * len(list(traces.traces()))
    assert warm[0]["hits"] > cold[0]["hits"]
    assert warm[2:] == cold[1:]  # Belady and hindsight; LRU itself is replayed warm, and cold as a baseline
    assert warm[1] == cold[0]


def test_carrying_over_forgets_nothing(capsys):
    cold, carried = (results(capsys, "--budget", "16", *more) for more in ((), ("--carry-over",)))
    assert carried[0]["hits"] > cold[0]["hits"]
    assert carried[1]["hits"] > cold[1]["hits"]
    assert carried[2] == cold[2] | {"carry_over": True}  # hindsight's choice is one for all
    assert carried[1]["hits"] >= carried[0]["hits"]


def test_chunks_and_batches_make_unions(capsys):
    plain = results(capsys, "--budget", "16")[0]
    chunked = results(capsys, "--budget", "16", "--prefill-chunk", "4", "--device", "mine.json")[0]
    batched = results(capsys, "--budget", "16", "--batch-size", "3", "--device", "mine.json")[0]
    traces = list(TraceSet("traces").traces())
    unions = sum(
        len(set(t.experts[i : i + 4, layer].ravel())) for t in traces for i in range(0, len(t), 4) for layer in range(4)
    )
    assert chunked["accesses"] == unions < plain["accesses"]
    assert chunked["prefill_ms"] > 0
    assert chunked["tokens_per_second"] is None  # these traces have nothing but prompt
    groups = [traces[i : i + 3] for i in range(0, len(traces), 3)]
    assert batched["accesses"] == sum(
        len({int(e) for t in group if step < len(t) for e in t.experts[step, layer]})
        for group in groups for step in range(max(map(len, group))) for layer in range(4)
    )  # fmt: skip
    assert batched["tokens_per_second"] > 0


def test_sequential_counts_access_by_access(capsys):
    found = results(capsys, "--budget", "3", "--sequential")
    assert names(found) == REFERENCES
    hits, cache = 0, []
    for trace in TraceSet("traces").traces():
        cache.clear()
        for token in trace.experts:
            for access in [(layer, int(e)) for layer, row in enumerate(token) for e in row]:
                hits += access in cache
                cache = ([one for one in cache if one != access] + [access])[-3:]
    assert found[0]["hits"] == hits


@pytest.mark.parametrize("prefetch", ["p>0.5", "top2@2", "oracle"])
def test_prefetchers(capsys, prefetch):
    ours, lru, *_ = results(capsys, "--budget", "16", "--scores", "token", "--prefetch", prefetch)
    assert ours["prefetch"] == prefetch
    assert ours["hits"] > lru["hits"]
    assert ours["useful_prefetches"] + ours["wasted_prefetches"] == ours["prefetch_transfers"] > 0
    if prefetch == "oracle":
        assert (ours["hit_rate"], ours["wasted_prefetches"], ours["predictor"]) == (1, 0, None)


def test_scores_of_a_computed_layer(capsys):
    """They come later than those of a routed one, so fewer transfers end in time, and more prefetches wait for one."""
    words = ("--budget", "16", "--scores", "computed", "--prefetch", "top2", "--device", "mine.json")
    computed, routed, *_ = results(capsys, *words, "--lookahead", "computed", "--lookahead", "1")
    assert (computed["lookahead"], routed["lookahead"]) == ("computed", 1)
    assert computed["hits"] < routed["hits"]
    assert computed["hits"] + computed["late_hits"] > computed["misses"]
    first, *_ = results(capsys, *words)
    assert first == computed  # the predictor's first


@pytest.mark.parametrize("more", [(), ("--device", "mine.json", "--prefetch", "adaptive", "--policy", "belief")])
def test_the_same_command_gives_the_same_bytes(capsys, house, more):
    words = ["replay", "--traces", "traces", "--scores", "scores", "--budget", "8", "--budget", "50%", *more]
    for name in ("one.json", "two.json"):
        assert main([*words, "--json", name]) == 0
    assert (house / "one.json").read_bytes() == (house / "two.json").read_bytes()
    capsys.readouterr()
    assert main([*words, "--json", "-"]) == 0
    assert capsys.readouterr().out.encode() == (house / "one.json").read_bytes()


@pytest.mark.parametrize(
    ("more", "pictures"),
    [
        ((), {"frontier", "layers"}),
        (("--budget", "50%"), {"frontier", "layers", "budgets"}),
        (("--device", "mine.json", "--scores", "scores"), {"frontier", "layers", "timeline"}),
        (("--device", "mine.json", "--budget", "50%"), {"frontier", "layers", "budgets", "timeline"}),
        (("--device", "mine.json", "--batch-size", "2"), {"frontier", "layers"}),  # a token is no step there
    ],
)
def test_pictures(capsys, tmp_path, more, pictures):
    folder = tmp_path / "some" / "plots"
    assert main(["replay", "--traces", "traces", "--budget", "25%", "--plots", str(folder), *more]) == 0
    said = capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {f"{name}.png" for name in pictures}
    for path in folder.iterdir():
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert path.stat().st_size > 5000
        assert f"picture: {path}" in said
