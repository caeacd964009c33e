"""The tools a maintainer runs, in miniature."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from helpers import tiny_traces

from moe_beyond.traces.reader import TraceSet

TOOLS = Path(__file__).parents[1] / "tools"


def run(name: str, *words: str) -> str:
    done = subprocess.run([sys.executable, str(TOOLS / name), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_repeated_set_streams_and_shares_no_routing(tmp_path: Path) -> None:
    small = tiny_traces(tmp_path / "small")
    entries = 3 * small.manifest.tokens * small.geometry.num_layers
    run("permute_traces.py", str(tmp_path / "small"), str(tmp_path / "large"), "--entries", str(entries))
    large = TraceSet(str(tmp_path / "large"))
    assert large.manifest.tokens * large.geometry.num_layers == entries
    originals = {trace.sequence_id: trace for trace in small.traces()}
    permutations = {}
    for trace in large.traces():
        name, repeat = trace.sequence_id.rsplit(".", 1)
        assert np.array_equal(trace.token_ids, originals[name].token_ids)
        # One permutation a repeat and layer: an id goes to the same id everywhere in them.
        for before, after in zip(originals[name].experts, trace.experts, strict=True):
            for layer in range(small.geometry.num_layers):
                for old, new in zip(before[layer], after[layer], strict=True):
                    assert permutations.setdefault((repeat, layer, int(old)), int(new)) == int(new)
    said = run("bench_streaming.py", "--data", str(tmp_path / "large"), "--json", str(tmp_path / "b.json"))
    assert "entries/s/core" in said
    figures = json.loads((tmp_path / "b.json").read_text())
    trained = sum(shard.tokens for shard in large.shards("train")) * large.geometry.num_layers
    assert figures["entries"] == trained


def test_the_small_model_can_be_trained_and_resumed(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(60):  # enough that some name falls to the held-out ones
        (text / f"{number}.txt").write_text(f"The {number} routers chose two experts each, and so on. " * 40)
    words = ("--text", str(text), "--work", str(tmp_path / "work"), "--tiny", "--batch", "2", "--vocab", "300")
    words = (*words, "--prompts", "3", "--out", str(tmp_path / "model"))
    run("train_small_moe.py", *words, "--steps", "2")
    said = run("train_small_moe.py", *words, "--steps", "4")
    assert "resumed at step 2" in said
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "prompts.jsonl", "README.md"} <= files
