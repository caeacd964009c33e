"""A trace set that is published is read again as it was, by this package and by plain `datasets`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from _helpers.common import TINY, error_line, projected_traces, tiny_trace, tiny_traces
from _helpers.hub_stand_in import TOKEN, Hub
from huggingface_hub import DatasetCard

from moe_beyond.cli.main import main
from moe_beyond.traces.manifest import Manifest, Tokenizer
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.writer import open_writer


def pushed(folder: Path, *words: str) -> None:
    assert main(["push", str(folder), "org/traces", *words]) == 0


def test_what_is_pulled_is_what_was_pushed(hub: Hub, tmp_path: Path):
    traces = tiny_traces(tmp_path / "traces", sequences=24)
    (tmp_path / "traces" / "notes.txt").write_text("no part of it")
    pushed(tmp_path / "traces")
    files = hub.repositories["datasets", "org/traces"].files
    shards = [shard.file for shard in traces.manifest.shards]
    assert len(shards) > 2
    assert sorted(files) == sorted([".gitattributes", "README.md", "manifest.json", *shards])
    for ours, theirs in zip(traces.traces(), TraceSet("hf:org/traces").traces(), strict=True):
        assert (ours.sequence_id, ours.decode_start) == (theirs.sequence_id, theirs.decode_start)
        assert np.array_equal(ours.experts, theirs.experts)
        assert np.array_equal(ours.token_ids, theirs.token_ids)


def test_hidden_states_and_routers_come_along(hub: Hub, tmp_path: Path):
    traces = tiny_traces(tmp_path / "traces", hidden_states=True)
    pushed(tmp_path / "traces")
    pulled = TraceSet("hf:org/traces")
    assert len(list(pulled.traces())) == len(list(traces.traces()))
    assert not list(tmp_path.rglob("hub-cache/**/*.safetensors"))  # hidden states are downloaded on request
    for ours, theirs in zip(traces.traces(hidden_states=True), pulled.traces(hidden_states=True), strict=True):
        assert np.array_equal(ours.hidden_states.layer_inputs, theirs.hidden_states.layer_inputs)
    assert np.array_equal(pulled.routers.weight, traces.routers.weight)
    projected, projection = projected_traces(tmp_path / "projected")
    pushed(tmp_path / "projected")
    pulled = TraceSet("hf:org/traces")
    assert pulled.manifest.states == projected.manifest.states
    assert np.array_equal(pulled.projection.layer_inputs, projection.layer_inputs)
    tiny_traces(tmp_path / "without")
    pushed(tmp_path / "without")
    assert not [name for name in hub.repositories["datasets", "org/traces"].files if name.endswith(".safetensors")]


def test_plain_datasets_loads_the_splits(hub: Hub, tmp_path: Path):
    """In processes of their own, which HF_ENDPOINT and its like reach as they would anybody's."""
    traces = tiny_traces(tmp_path / "traces", sequences=24)
    named = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | named

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
        )

    done = run("-m", "moe_beyond", "push", "traces", "org/traces")
    assert hub.repositories["datasets", "org/traces"].branches["main"] in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    code = (
        "import json, datasets; loaded = datasets.load_dataset('org/traces');"
        "print(json.dumps({split: list(zip(rows['sequence_id'], rows['experts'])) for split, rows in loaded.items()}))"
    )
    loaded = json.loads(run("-c", code).stdout.splitlines()[-1])
    assert list(loaded) == ["train", "validation"]
    for split, rows in loaded.items():
        expected = [[trace.sequence_id, trace.experts.ravel().tolist()] for trace in traces.traces(split)]
        assert rows == expected


def test_the_card_says_what_routed_and_who_wrote_the_text(hub: Hub, tmp_path: Path):
    traces = tiny_traces(tmp_path / "traces", sequences=24)
    pushed(tmp_path / "traces")
    card = DatasetCard(hub.repositories["datasets", "org/traces"].files["README.md"].decode())
    assert card.data["size_categories"] == "n<1K"
    assert card.data["language_creators"] == ["found"]
    assert {"moe", "expert-routing"} <= set(card.data["tags"])
    (config,) = card.data["configs"]
    assert [one["split"] for one in config["data_files"]] == ["train", "validation"]
    assert config["data_files"][0]["path"] == [shard.file for shard in traces.shards("train")]
    for said in ("Model: tiny, 4 MoE layers x 8 experts, top-2", "read by the model", traces.manifest.fingerprint):
        assert said in card.text
    train = traces.shards("train")
    sequences, tokens = sum(shard.sequences for shard in train), sum(shard.tokens for shard in train)
    assert f"| train | {sequences:,} | {tokens:,} | {4 * tokens:,} |" in card.text


def test_a_card_that_was_written_by_hand_is_kept(hub: Hub, tmp_path: Path):
    tiny_traces(tmp_path / "traces")
    card = "---\nlicense: cc0-1.0\ntags: mine\npretty_name: Mine\n---\n\n# My traces\n\nMine alone.\n"
    (tmp_path / "traces" / "README.md").write_text(card)
    pushed(tmp_path / "traces")
    once = hub.repositories["datasets", "org/traces"].files["README.md"]
    found = DatasetCard(once.decode())
    assert found.text.startswith("\n# My traces\n\nMine alone.\n")
    assert (found.data["license"], found.data["pretty_name"]) == ("cc0-1.0", "Mine")
    assert found.data["tags"][:2] == ["mine", "moe-beyond"]
    assert 'load_dataset("org/traces", split="train")' in found.text
    (tmp_path / "traces" / "README.md").write_bytes(once)
    pushed(tmp_path / "traces")
    assert hub.repositories["datasets", "org/traces"].files["README.md"] == once


def test_shards_of_an_earlier_push_go(hub: Hub, tmp_path: Path):
    tiny_traces(tmp_path / "many", sequences=40)
    few = tiny_traces(tmp_path / "few", sequences=4)
    pushed(tmp_path / "many")
    pushed(tmp_path / "few")
    files = hub.repositories["datasets", "org/traces"].files
    assert [name for name in sorted(files) if name.endswith(".parquet")] == [one.file for one in few.manifest.shards]


def test_a_damaged_shard_is_not_published(hub: Hub, tmp_path: Path, capsys):
    traces = tiny_traces(tmp_path / "traces")
    last = tmp_path / "traces" / traces.manifest.shards[-1].file
    last.write_bytes(last.read_bytes()[:-1])
    assert f"{last}: shard is damaged" in error_line(capsys, ["push", tmp_path / "traces", "org/traces"])
    assert hub.asked == []


@pytest.mark.parametrize(("method", "path"), [("PUT", "/lfs/"), ("POST", "/commit/")])
def test_an_upload_that_breaks_publishes_nothing(hub: Hub, tmp_path: Path, capsys, method: str, path: str):
    tiny_traces(tmp_path / "traces")
    hub.breaks(method, path, 403)
    said = error_line(capsys, ["push", tmp_path / "traces", "org/traces"])
    assert said.startswith("hf:org/traces@main: the token does not allow it")
    assert len(hub.repositories["datasets", "org/traces"].commits) == 1
    hub.broken.clear()
    pushed(tmp_path / "traces")


def test_a_split_that_datasets_does_not_take_is_named(tmp_path: Path, capsys):
    manifest = Manifest(TINY, Tokenizer("tests", 32), "tiny", 16.0, "model", "tests", "0")
    with open_writer(tmp_path / "traces", manifest) as writer:
        writer.write(tiny_trace("s", 5, np.random.default_rng(0)), "held-out")
    assert "split 'held-out'" in error_line(capsys, ["push", tmp_path / "traces", "org/traces", "--dry-run"])


def test_trace_sets_have_no_option_traces(tmp_path: Path, capsys):
    tiny_traces(tmp_path / "traces")
    words = ["push", tmp_path / "traces", "org/traces", "--dry-run", "--traces", "hf:org/others"]
    assert "--traces hf:org/others: is only for predictors" in error_line(capsys, words)
