"""Refusals of replays and plans: one line with the way out, and nothing is written."""

import json
from pathlib import Path

import numpy as np
import pytest
from _helpers.common import error_line, tiny_traces
from _helpers.damage import hash_scores
from _helpers.scoring import history_folder, scores_folder
from safetensors.numpy import load_file, save_file

from moe_beyond.cli.main import main
from moe_beyond.predictors.base import Predictor
from moe_beyond.predictors.io.folder import save_predictor
from moe_beyond.predictors.registry import create


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("house")
    traces = tiny_traces(folder / "traces", sequences=4)
    scores_folder(folder / "scores", traces, (1, 2))
    scores_folder(folder / "token", traces, ("token",))
    scores_folder(folder / "leak", traces, (0,), causal=False)
    history_folder(folder / "history", traces)
    predictor: Predictor = create("token_table", traces.geometry, 32, source="tests")
    save_predictor(predictor, folder / "table", {})
    (folder / "other.json").write_text("[]")
    return folder


@pytest.fixture
def refused(house: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a command that must be refused in the house, find nothing new there, and return its one line."""
    monkeypatch.chdir(house)

    def run(verb: str, *words: str, budget: str | None = "8") -> str:
        before = sorted(house.rglob("*"))
        budgets = () if budget is None else ("--budget", budget)
        said = error_line(capsys, [verb, "--traces", "traces", "--json", "out.json", *budgets, *words])
        assert sorted(house.rglob("*")) == before
        return said

    return run


LOCAL = ("--scope", "per-layer")
DEVICE = ("--device", "rtx3060")
SCORES = ("--scores", "scores")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        # Names.
        (("--policy", "beladi"), "unknown policy 'beladi'; did you mean 'belady'?"),
        (("--device", "rtx306"), "unknown device 'rtx306'; did you mean 'rtx3060'?"),
        (
            ("--device", "rtx3060,memory_gb_per=3"),
            "unknown device field 'memory_gb_per'; did you mean 'memory_gb_per_s'?",
        ),
        (("--device", "rtx3060,link_gb_per_s=0"), "link_gb_per_s must be a finite number above 0"),
        (("--device", "gone.json"), "gone.json: cannot be read"),
        (("--device", "other.json"), "other.json: is not a JSON object"),
        (("--strategy", "llama"), "unknown strategy 'llama'; did you mean 'llama.cpp'?"),
        (("--strategy", "zzz"), "unknown strategy 'zzz'; known: all, belief-cross-layer, fiddler"),
        # Prefetchers, and scores that serve them.
        (("--prefetch", "p>1.01", *SCORES), "prefetch 'p>1.01': the threshold must be a probability, 0 to 1"),
        (("--prefetch", "p>-0.1", *SCORES), "prefetch 'p>-0.1': the threshold must be a probability, 0 to 1"),
        (("--prefetch", "adaptive,p>2", *SCORES, *DEVICE), "the threshold must be a probability, 0 to 1"),
        (("--prefetch", "top0", *SCORES), "prefetch 'top0' cannot be parsed; write none, top6"),
        (("--prefetch", "oracle@2", *SCORES), "prefetch 'oracle@2' cannot be parsed"),
        (("--prefetch", "adaptive", *SCORES), "needs the times of a device; give --device"),
        (("--prefetch", "adaptive", *DEVICE), "needs scores; give --predictor or --scores"),
        (("--prefetch", "adaptive", "--scores", "leak", *DEVICE), "but scores of lookahead 0 are only available"),
        (("--prefetch", "moe_infinity", "--scores", "leak"), "but scores of lookahead 0 are only available"),
        (("--prefetch", "top2@2", *SCORES), "a distance needs scores of lookahead token"),
        (("--policy", "moe_infinity"), "policy moe_infinity needs scores; give --predictor eamc"),
        (("--lookahead", "token", *SCORES), "--lookahead token: seer has no such scores; choose from 1, 2"),
        (("--lookahead", "0", *SCORES), "--lookahead 0: seer has no such scores; choose from 1, 2"),
        (("--scores", "traces"), "traces: is not a scores folder (it has no scores.json)"),
        # Slots by layer.
        (("--quotas", "2,2,2,2"), "--quotas 2,2,2,2: quotas need a cache per layer; add --scope per-layer"),
        (("--quotas", "proportional"), "--quotas proportional: quotas need a cache per layer; add --scope per-layer"),
        (
            (*LOCAL, "--quotas", "evenly"),
            "--quotas: cannot be read (got 'evenly'); write even, proportional or slots",
        ),
        ((*LOCAL, "--quotas", "2,2,2,"), "--quotas: cannot be read (got '2,2,2,'); write even"),
        ((*LOCAL, "--quotas", "2,2,4"), "quotas must be 4 numbers that sum to 8 slots (got 3 numbers that sum to 8)"),
        ((*LOCAL, "--quotas", "2,2,2,3"), "quotas must be 4 numbers that sum to 8 slots (got 4 numbers that sum to 9)"),
        ((*LOCAL, "--quotas", "3,3,1,1"), "below one event's demand of 2 experts in each layer"),
        ((*LOCAL, "--quotas", "9,-3,1,1"), "9 slots are more than a layer's 8 experts"),
        ((*LOCAL, "--quotas", "proportional"), "give --profile"),
        # Profiles.
        (("--warm-start",), "a warm start needs the popularity of experts in training text; give --profile"),
        (("--policy", "static"), "policy static needs the popularity of experts in training text; give --profile"),
        (("--profile", "table"), "table: a profile is a fitted history or popularity predictor (got token_table)"),
        (("--profile", "gone"), "'gone'; "),
        (("--profile", "popularity.deepseek-v2-lite-puffin"), "has 4 MoE layers x 8 experts, top-2, but"),
        # Numbers.
        (("--warmup-tokens", "-1"), "--warmup-tokens -1 is less than 0"),
        (("--prefill-chunk", "-2"), "--prefill-chunk -2 is less than 0"),
        (("--batch-size", "0"), "--batch-size 0 is less than 1"),
        (("--quantization", "-4"), "--quantization: bits per parameter must be more than 0 (got -4)"),
        # What does not go together.
        (
            ("--strategy", "llama.cpp", "--policy", "lru"),
            "--strategy: a strategy has its own policy",
        ),
        (
            ("--strategy", "all", "--prefetch", "top2", *SCORES),
            "leave out --policy, --prefetch, --lookahead and --misses",
        ),
        (("--strategy", "od-moe"), "strategy od-moe: not available: is defined only by time; give --device"),
        (("--policy", "od_moe"), "give --device"),
        (("--sequential", *DEVICE), "--sequential counts accesses only"),
        (("--sequential", "--prefill-chunk", "4"), "--sequential steps single accesses"),
        (("--sequential", "--policy", "belief"), "--sequential: policy belief needs whole events"),
    ],
)
def test_replays_that_cannot_be(refused, words: tuple[str, ...], said: str) -> None:
    assert said in refused("replay", "--plots", "plots", *words)


@pytest.mark.parametrize("verb", [("replay",), ("plan", "--pins", "pins.json")])
@pytest.mark.parametrize(
    ("budget", "more", "said"),
    [
        ("1", (), "budget of 1 slots is below one event's demand of 2 experts; give at least 2 slots"),
        ("7", LOCAL, "below one event's demand of 2 experts in each layer; give at least 8 slots"),
        ("33", (), "budget '33' is 33 slots, more than all 32 experts"),
        ("110%", (), "more than all 32 experts"),
        ("1GB", (), "more than all 32 experts"),
        ("0", (), "too small for one expert"),
        ("-8", (), "budget '-8' cannot be read"),
        ("8.5", (), "a number of slots is whole"),
    ],
)
def test_budgets(refused, verb: tuple[str, ...], budget: str, more: tuple[str, ...], said: str) -> None:
    assert said in refused(*verb, *more, budget=budget)


@pytest.mark.parametrize(
    "words",
    [
        ("replay", "--budget", "2", "--prefill-chunk", "8"),
        ("replay", "--budget", "3", "--batch-size", "4"),
        ("replay", "--budget", "12", "--scope", "per-layer", "--batch-size", "4"),
        pytest.param(("replay", "--budget", "2", "--strategy", "moe-spac"), marks=pytest.mark.slow),
    ],
)
def test_a_union_that_the_cache_cannot_hold_runs_in_waves(
    house: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--traces", str(house / "traces"), "--json", "-"]) == 0
    for result in json.loads(capsys.readouterr().out)["results"]:
        assert result["hits"] + result["late_hits"] + result["misses"] == result["accesses"] > 0


def test_a_plan_of_unions(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--traces", str(house / "traces"), "--target", "30%", "--batch-size", "4", "--json", "-"]) == 0
    for answer in json.loads(capsys.readouterr().out)["answers"]:
        assert answer["result"]["hit_rate"] >= 0.3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "plan: nothing to do; give --target TARGET to reach, or --pins FILE to write"),
        (("--target", "fast"), "--target: cannot be read (got 'fast'); write 90% for a hit rate, or 10tok/s"),
        (("--target", "0%"), "cannot be read"),
        (("--target", "120%"), "cannot be read"),
        (("--target", "10tok/s"), "--target 10tok/s: a speed needs the timing model; add --device"),
        (("--target", "90%", "--strategy", "specm"), "unknown strategy 'specm'; did you mean 'specmd'?"),
        (("--target", "90%", "--prefetch", "top2"), "needs scores; give --predictor or --scores"),
        (("--target", "90%", "--policy", "static"), "policy static needs the popularity"),
        (("--pins", "pins.json", "--budget", "9"), "--pins: the list is for one budget (got 2); give --budget once"),
        (("--pins", "pins.json", *LOCAL, "--quotas", "2,2,2,3"), "(got 4 numbers that sum to 9)"),
        # No pins are left behind if the plan fails.
        (("--pins", "pins.json", "--target", "fast"), "cannot be read"),
        (("--pins", "pins.json", "--target", "90%", "--strategy", "our"), "unknown strategy"),
        (("--pins", "pins.json", "--target", "90%", "--strategy", "specmd"), "strategy specmd: not available"),
        (("--pins", "pins.json", "--target", "90%", "--prefetch", "top2"), "needs scores"),
        (("--pins", "pins.json", "--target", "90%", "--policy", "static"), "policy static needs the popularity"),
    ],
)
def test_plans_that_cannot_be(refused, words: tuple[str, ...], said: str) -> None:
    assert said in refused("plan", *words)


def damaged(folder: Path, how: str) -> None:
    shard = next(folder.glob("*.safetensors"))
    index = json.loads((folder / "scores.json").read_text())
    if how in ("nan", "two", "shape"):
        tensors = load_file(shard)
        last = tensors[list(index["files"])[-1]]
        last[0, 0, 0, 0] = np.nan if how == "nan" else 2.0
        if how == "shape":
            tensors = {name: np.zeros((*scores.shape[:3], 9), np.float32) for name, scores in tensors.items()}
        save_file(tensors, shard)
        hash_scores(folder)
        return
    elif how == "cut":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif how == "gone":
        shard.unlink()
    elif how == "no field":
        del index["causal"]
    elif how == "no such lookahead":
        index["lookaheads"] = [-1]
    (folder / "scores.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("nan", "are not all finite and within 0..1"),
        ("two", "are not all finite and within 0..1"),
        ("shape", "expected ("),
        ("cut", "is damaged (its sha256 is not the one in scores.json)"),
        ("gone", "cannot be read"),
        ("no field", "scores.json: field 'causal' is missing"),
        ("no such lookahead", "scores.json: lookahead"),
    ],
)
def test_scores_that_are_damaged(tmp_path: Path, refused, how: str, said: str, house: Path) -> None:
    folder = Path(scores_folder(tmp_path / "damaged", tiny_traces(tmp_path / "traces", sequences=4), (1,)))
    damaged(folder, how)
    line = refused("replay", "--plots", "plots", "--scores", str(folder))
    assert said in line
    assert str(folder) in line


@pytest.mark.usefixtures("refused")
def test_pictures_that_have_no_place(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["replay", "--traces", "traces", "--budget", "8", "--json", "-", "--plots", "other.json"]
    assert error_line(capsys, words) == "--plots other.json: is a file; name a folder"
