"""Tools that test, time and compare collections, in miniature."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from _helpers.common import TINY, tiny_trace, tiny_traces
from _helpers.tools import TOOLS, run

import moe_beyond as mb
from moe_beyond.traces.manifest import Manifest, Tokenizer
from moe_beyond.traces.writer import open_writer


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch):
    """Run a tool in this process, which has imported torch already."""

    def run_here(name: str, *words: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(str(TOOLS / name), run_name="__main__")

    return run_here


@pytest.mark.slow
def test_two_kills_lose_nothing(tmp_path: Path) -> None:
    printed = run(
        "kill_collect.py", "--kills", "2", "--prompts", "4", "--seed", "1", "--json", str(tmp_path / "found.json")
    )
    assert "0 lost, 0 repeated, 0 changed" in printed
    found = json.loads((tmp_path / "found.json").read_text())
    assert sum(found["phases"].values()) == 2
    assert found["collections"] >= 1
    assert found["entries"] > 0


def test_recording_is_timed_and_compared_with_the_bare_model(tmp_path: Path, here) -> None:
    words = [
        "--batches",
        "1",
        "--repeats",
        "2",
        "--batch-size",
        "2",
        "--read",
        "16",
        "--answer",
        "8",
        "--generate",
        "4",
    ]
    here("bench_collect.py", *words, "--dtype", "float32", "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["reading"]["tokens"], found["generating"]["tokens"]) == (2 * 16, 2 * (8 + 3))
    for part in (found["reading"], found["generating"]):
        assert 0.5 < part["recorded_over_bare"] < 3
        assert 0 < part["forward_ms"]
        assert 0 < part["writing_ms"]


def test_read_and_generated_text_is_counted_equally(tmp_path: Path, here) -> None:
    """Hits equal those of a replay without the beginnings; generated text counts only from decode_start on."""
    rng = np.random.default_rng(3)
    manifest = Manifest(TINY, Tokenizer("tests", 32), "tiny", 16.0, "model", "tests", "0")
    with open_writer(tmp_path / "read", manifest) as read, open_writer(tmp_path / "written", manifest) as written:
        for number in range(6):
            trace = tiny_trace(f"s{number}", 24, rng)
            read.write(trace)
            loop = np.concatenate([trace.token_ids[:8], np.tile(np.arange(4, dtype=np.int32), 4)])
            written.write(replace(trace, token_ids=loop, decode_start=8))
    words = ["--read", str(tmp_path / "read"), "--written", str(tmp_path / "written"), "--prompt-tokens", "8"]
    here("own_text.py", *words, "--budget", "50%", "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["tokens"], found["sequences"], found["paired"]) == ([96, 96], [6, 6], True)
    replayed = mb.replay(tmp_path / "read", budget="50%", policy="lru", warmup_tokens=8)
    for policy in ("lru", "belady"):
        (expected,) = {result.hit_rate for result in replayed.results if result.policy == policy}
        row = found["figures"][f"{policy} hits at 50%"]
        assert row["read"][0] == row["written"][0] == pytest.approx(expected)
        assert row["read"][1] <= expected <= row["read"][2]
        assert row["difference"] == [0, 0, 0]
    assert found["figures"]["repeated 4-grams"]["read"][0] < 0.1
    # The runs that end at the first seven of sixteen generated tokens are new, unless the prompt has them.
    assert found["figures"]["repeated 4-grams"]["written"][0] == pytest.approx(9 / 16)


def test_sets_of_different_models_are_refused(tmp_path: Path, here) -> None:
    tiny_traces(tmp_path / "one")
    tiny_traces(tmp_path / "other", geometry=replace(TINY, num_experts=16))
    with pytest.raises(SystemExit, match="record different models"):
        here("own_text.py", "--read", str(tmp_path / "one"), "--written", str(tmp_path / "other"))


@pytest.mark.slow
def test_predictors_that_read_hidden_states_are_compared(tmp_path: Path) -> None:
    few = ("--tokens", "8000", "--epochs", "1", "--only", "history", "next_gate", "layer_mlp, stride 2")
    asked = ("--out", str(tmp_path / "out"), "--json", str(tmp_path / "found.json"), "--generate", *few)
    run("compare_predictors.py", *asked)
    measured = json.loads((tmp_path / "found.json").read_text())["measured"]
    assert list(measured) == ["held-out", "generated"]
    assert measured["generated"]["traces"]["tokens"] < measured["held-out"]["traces"]["tokens"]
    found = measured["held-out"]["predictors"]
    recall = {name: row["metrics"] for name, row in found.items()}
    assert recall["next_gate"]["1"]["recall_at_k"] > recall["history"]["token"]["recall_at_k"]
    assert recall["next_gate"]["1"]["recall_of_later_layers"] > recall["next_gate"]["3"]["recall_of_later_layers"]
    assert (found["layer_mlp, stride 2"]["reads"], found["history"]["reads"]) == ("router inputs", "ids")


@pytest.mark.slow
def test_a_run_has_the_recall_and_the_hits_of_an_offline_evaluation(tmp_path: Path) -> None:
    few = ("--prompts", "2", "--new-tokens", "8", "--json", str(tmp_path / "found.json"))
    run("compare_run_recall.py", "cross_layer.small-moe-python-small", *few)
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["recall"]["run"]) == ["1", "2", "3"]
    assert found["recall"]["run"] == pytest.approx(found["recall"]["offline"], abs=0.01)
    counted = found["hits"]["belief + none"]
    assert counted["equal events"] == counted["events"] == 2 * 8 * 8  # prompts, steps, layers
    assert counted["run"] == counted["offline"]


@pytest.mark.slow
def test_forms_of_hidden_states_are_compared(tmp_path: Path) -> None:
    few = ("--tokens", "8000", "--epochs", "3", "--only", "layer_mlp, stride 1")
    forms = ("--forms", "float16", "int8-16-routers", "int8-16-regression", "int8-16-pca", "int8-16-random")
    run("compare_states.py", "--out", str(tmp_path / "out"), "--json", str(tmp_path / "found.json"), *few, *forms)
    found = json.loads((tmp_path / "found.json").read_text())["forms"]
    full, routers, _, _, random = (row["recall"]["layer_mlp, stride 1"] for row in found)
    assert full > 1.2 * random
    assert routers > 1.2 * random
    assert found[0]["times_ids"] == pytest.approx(2 * 128 * 2 / 3, rel=0.01)
    assert found[1]["times_ids"] == pytest.approx(2 * (16 + 4) / 3, rel=0.02)


def test_bytes_of_hidden_states_are_computed() -> None:
    printed = run("compare_states.py", "--sizes")
    assert "1,365.3" in printed  # float16: 2 kinds x 2048 values x 2 bytes, for 6 ids
    assert "86.7" in printed  # int8: 2 x (256 + 4)
