"""``moe-beyond inspect``: tables for people, JSON alone for programs, one line for a set that cannot be read."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY, error_line, tiny_trace

from moe_beyond.cli.main import main
from moe_beyond.geometry import Geometry
from moe_beyond.traces.manifest import Manifest, Tokenizer
from moe_beyond.traces.statistics import summarize
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.writer import writing


def test_json_is_alone_on_standard_output(trace_set, capsys):
    assert main(["inspect", trace_set.folder, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == summarize(trace_set)
    assert err == ""


def test_json_in_a_file_leaves_the_tables_where_they_are(trace_set, tmp_path, capsys):
    assert main(["inspect", trace_set.folder, "--json", str(tmp_path / "out.json")]) == 0
    tables = capsys.readouterr().out
    assert main(["inspect", trace_set.folder]) == 0
    assert capsys.readouterr().out == tables != ""
    first = (tmp_path / "out.json").read_bytes()
    assert json.loads(first) == summarize(trace_set)
    assert main(["inspect", trace_set.folder, "--json", str(tmp_path / "out.json")]) == 0
    assert (tmp_path / "out.json").read_bytes() == first


def test_the_tables_hold_the_counts(trace_set, capsys):
    tokens = {split: sum(map(len, trace_set.traces(split))) for split in ("train", "validation")}
    assert main(["inspect", trace_set.folder]) == 0
    out = capsys.readouterr().out
    assert "4 MoE layers (1..4) x 8 experts, top-2" in out
    assert f"train: {tokens['train']:,} tokens, validation: {tokens['validation']:,} tokens" in out
    assert f"{sum(tokens.values()) * 4:,}" in out
    by_layer = out[out.index("by layer") :]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in by_layer.splitlines() if "│" in line]
    summary = summarize(trace_set)["by_layer"]
    assert [row[0] for row in cells if row[0]] == ["1", "2", "3", "4"]
    assert [row[2] for row in cells if row[0]] == [f"{layer['busiest_share']:.1%}" for layer in summary]


def test_the_most_popular_experts_come_first(tmp_path, capsys):
    geometry = Geometry("g", (0,), 4, 2, 1000, 0)
    manifest = Manifest(geometry, Tokenizer("t", 9), "g", 16.0, "dataset", "tests", "0")
    experts = np.array([[[3, 1]], [[3, 1]], [[3, 0]], [[2, 3]]])  # 3 four times of eight, 1 twice, 0 and 2 once
    with writing(tmp_path / "set", manifest) as writer:
        writer.write(Trace("a", "tests", np.zeros(4, np.int32), experts, 4))
    assert main(["inspect", str(tmp_path / "set")]) == 0
    assert "3 (50.0%), 1 (25.0%), 0 (12.5%)" in capsys.readouterr().out


def test_names_with_brackets_are_shown_as_they_are(tmp_path, capsys):
    # rich would take them for markup.
    manifest = Manifest(TINY, Tokenizer("t", 32), "model [red]", 16.0, "dataset", "prompts [/v2]", "0")
    with writing(tmp_path / "set", manifest) as writer:
        writer.write(tiny_trace("a", 3, np.random.default_rng(0)))
    assert main(["inspect", str(tmp_path / "set")]) == 0
    out = capsys.readouterr().out
    assert "model [red]" in out
    assert "prompts [/v2]" in out


@pytest.mark.parametrize(
    "geometry", [replace(TINY, num_experts=1, top_k=1), replace(TINY, num_experts=300)], ids=["one", "many"]
)
def test_unusual_geometries_are_described(geometry, tmp_path, capsys):
    manifest = Manifest(geometry, Tokenizer("t", 32), "tiny", 16.0, "dataset", "tests", "0")
    with writing(tmp_path / "set", manifest) as writer:
        experts = np.zeros((1, 4, geometry.top_k), np.int16) + np.arange(geometry.top_k, dtype=np.int16)
        writer.write(Trace("a", "tests", np.zeros(1, np.int32), experts, 1))
    assert main(["inspect", str(tmp_path / "set")]) == 0
    out = capsys.readouterr().out
    assert f"4 MoE layers (1..4) x {geometry.num_experts} experts" in out


def damage_hash(folder):
    path = folder / "train-00001.parquet"
    path.write_bytes(path.read_bytes() + b"x")


def change_manifest(**changes):
    def change(folder):
        path = folder / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (damage_hash, "train-00001.parquet: shard is damaged"),
        (lambda folder: (folder / "train-00001.parquet").unlink(), "train-00001.parquet: shard named in manifest.json"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: not found"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: is not JSON"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json: "),
        (change_manifest(format_version=2), "manifest.json: format version 2, not 1"),
        (change_manifest(geometry={}), "manifest.json: "),
        (change_manifest(shards=[{"file": "x"}]), "manifest.json: fields are missing or unknown"),
        (change_manifest(shards=[]), "manifest.json"),
        (change_manifest(geometry={**TINY.to_json(), "top_k": 1}), "train-00000.parquet: row 0: experts do not hold"),
        (change_manifest(geometry={**TINY.to_json(), "num_experts": 4}), "train-00000.parquet: an expert id is out of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("more", [[], ["--json", "-"]], ids=["tables", "json"])
def test_a_damaged_set_is_one_line(harm, says, more, trace_set, capsys):
    harm(Path(trace_set.folder))
    assert says in error_line(capsys, ["inspect", trace_set.folder, *more])


def test_a_place_that_holds_no_set_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert "nowhere/manifest.json: not found; is" in error_line(capsys, ["inspect", tmp_path / "nowhere"])
    assert str(tmp_path / "file") in error_line(capsys, ["inspect", tmp_path / "file"])


@pytest.mark.parametrize("place", ["", "file/out.json"])
def test_json_that_cannot_be_written_is_one_line(place, trace_set, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    target = tmp_path / place
    before = sorted(tmp_path.rglob("*"))
    assert main(["inspect", trace_set.folder, "--json", str(target)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("moe-beyond: error: ")
    assert str(target) in err or str(target.parent) in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
