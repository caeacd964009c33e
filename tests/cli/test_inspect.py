"""``moe-beyond inspect``: tables for people, JSON for programs, one line for a set that cannot be read."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from _helpers.common import TINY, error_line, tiny_trace, tiny_traces

from moe_beyond.cli.main import main
from moe_beyond.geometry import Geometry
from moe_beyond.traces.analysis.contrast import contrast_traces
from moe_beyond.traces.analysis.statistics import summarize
from moe_beyond.traces.manifest import Manifest, Tokenizer
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.steering import read_steering
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.writer import open_writer


def test_json_is_alone_on_standard_output(trace_set, capsys):
    assert main(["inspect", trace_set.folder, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == summarize(trace_set).to_json()
    assert err == ""


def test_json_in_a_file_leaves_the_tables_where_they_are(trace_set, tmp_path, capsys):
    assert main(["inspect", trace_set.folder, "--json", str(tmp_path / "out.json")]) == 0
    tables = capsys.readouterr().out
    assert main(["inspect", trace_set.folder]) == 0
    assert capsys.readouterr().out == tables != ""
    first = (tmp_path / "out.json").read_bytes()
    assert json.loads(first) == summarize(trace_set).to_json()
    assert main(["inspect", trace_set.folder, "--json", str(tmp_path / "out.json")]) == 0
    assert (tmp_path / "out.json").read_bytes() == first


def test_the_tables_hold_the_counts(trace_set, capsys):
    tokens = {split: sum(map(len, trace_set.traces(split))) for split in ("train", "validation")}
    assert main(["inspect", trace_set.folder]) == 0
    out = capsys.readouterr().out
    assert "4 MoE layers (1..4) x 8 experts, top-2" in out
    assert f"train: {tokens['train']:,} tokens, validation: {tokens['validation']:,} tokens" in out
    assert f"{sum(tokens.values()) * 4:,}" in out
    summary = summarize(trace_set).to_json()["by_layer"]
    rows = cells(out, "popularity by layer")
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    assert [row[2] for row in rows] == [f"{layer['busiest_share']:.1%}" for layer in summary]
    rows = cells(out, "locality and dependence by layer")
    assert [row[1:3] for row in rows] == [
        [f"{layer['jaccard']:.3f}", f"{layer['jaccard_by_chance']:.3f}"] for layer in summary
    ]
    assert [row[4] for row in rows] == [str(layer["reuse_distance"]["percentiles"]["50"]) for layer in summary]
    assert [row[-2:] for row in rows] == [
        *(
            [f"{layer['next_layer'][name]:.3f}" for name in ("mutual_information", "dependence")]
            for layer in summary[:3]
        ),
        ["-", "-"],
    ]
    # What these traces do not have is a dash in the first table, and has none of its own.
    whole = {row[0]: row[1] for row in cells(out, "trace set")}
    assert whole["gate mass of the top-1 expert"] == whole["prefill and decode"] == "-"
    assert "gate mass by layer" not in out
    assert "prefill and decode by layer" not in out


def cells(out: str, title: str) -> list[list[str]]:
    """The cells of a table's rows, without its headings."""
    lines = out.splitlines()
    lines = lines[next(i for i, line in enumerate(lines) if line.strip() == title) :]
    rows = itertools.takewhile(lambda line: not line.startswith("└"), lines)
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in rows if "│" in line]


def generated(folder: Path, seed: int) -> str:
    """A trace set with gate weights, whose sequences are read and then written by the model."""
    rng = np.random.default_rng(seed)
    with open_writer(folder, Manifest(TINY, Tokenizer("t", 32), "tiny", 16.0, "mixed", "tests", "0")) as writer:
        for i in range(6):
            trace = tiny_trace(f"s{i}", 12, rng)
            gates = np.full(trace.experts.shape, 0.25, np.float16) + np.array([0.5, 0], np.float16)
            writer.write(replace(trace, decode_start=5, gate_weights=gates), "train" if i else "validation")
    return str(folder)


def test_gates_phases_and_contrast_have_tables_that_fit(tmp_path, capsys):
    one, other = generated(tmp_path / "one", 0), generated(tmp_path / "other", 1)
    assert main(["inspect", one, "--split", "train", "--contrast", other, "--json", str(tmp_path / "out.json")]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 120
    found = json.loads((tmp_path / "out.json").read_text())
    assert found == summarize(TraceSet(one), "train").to_json() | {
        "contrast": contrast_traces(TraceSet(one), TraceSet(other), "train").to_json()
    }
    whole = {row[0]: row[1] for row in cells(out, "trace set")}
    assert whole["measured"] == "train"
    assert whole["gate mass of the top-1 expert"] == "75.0%"
    assert whole["prefill and decode"] == "25 and 35 tokens of 5 sequences with both phases"
    assert [row[1:3] for row in cells(out, "gate mass by layer")] == [["75.0%", "25.0%"]] * 4
    rows = cells(out, "prefill and decode by layer")
    assert [row[5] for row in rows] == [f"{layer['phases']['total_variation']:.3f}" for layer in found["by_layer"]]
    # The contrast's rows come by how sure they are.
    rows = cells(out, "the 20 largest differences of selection rates")
    ranked = sorted((abs(z) for layer in found["contrast"]["by_layer"] for z in layer["z"]), reverse=True)
    assert [f"{abs(float(row[6])):.1f}" for row in rows] == [f"{z:.1f}" for z in ranked[:20]]
    for row in rows:
        layer = found["contrast"]["by_layer"][int(row[0]) - 1]
        assert row[4] == f"{layer['difference'][int(row[1])]:+.2%}"


def test_pictures_go_where_they_are_told(tmp_path, capsys):
    one, other = generated(tmp_path / "one", 0), generated(tmp_path / "other", 1)
    folder = tmp_path / "some/plots"
    assert main(["inspect", one, "--contrast", other, "--plots", str(folder)]) == 0
    names = ["popularity", "locality", "reuse_distance", "dependence", "phases", "contrast"]
    out = capsys.readouterr().out
    for name in names:
        assert f"picture: {folder / name}.png" in out
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(folder.iterdir())) == len(names)


def test_what_cannot_be_contrasted_or_drawn_is_one_line(trace_set, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    asked = ["inspect", trace_set.folder, "--plots", tmp_path / "file"]
    assert error_line(capsys, asked) == f"--plots {tmp_path / 'file'}: is a file; name a folder"
    assert "split of" in error_line(capsys, ["inspect", trace_set.folder, "--split", "test"])
    mine = generated(tmp_path / "mine", 0)
    assert "nowhere" in error_line(capsys, ["inspect", mine, "--contrast", tmp_path / "nowhere"])
    few = tiny_traces(tmp_path / "few", sequences=3).folder  # has no validation split
    assert f"split of {few}" in error_line(capsys, ["inspect", mine, "--contrast", few, "--split", "validation"])
    large = tiny_traces(tmp_path / "large", geometry=replace(TINY, num_experts=9)).folder
    assert "its geometry is not that" in error_line(
        capsys, ["inspect", mine, "--contrast", large, "--plots", tmp_path / "plots"]
    )
    damage_hash(Path(few), "train-00000.parquet")
    said = error_line(capsys, ["inspect", mine, "--contrast", few, "--plots", tmp_path / "plots"])
    assert said.startswith(f"{few}/train-00000.parquet: shard is damaged")
    assert not (tmp_path / "plots").exists()


def test_the_most_popular_experts_come_first(tmp_path, capsys):
    geometry = Geometry("g", (0,), 4, 2, 1000, 0)
    manifest = Manifest(geometry, Tokenizer("t", 9), "g", 16.0, "dataset", "tests", "0")
    experts = np.array([[[3, 1]], [[3, 1]], [[3, 0]], [[2, 3]]])  # 3 four times of eight, 1 twice, 0 and 2 once
    with open_writer(tmp_path / "set", manifest) as writer:
        writer.write(Trace("a", "tests", np.zeros(4, np.int32), experts, 4))
    assert main(["inspect", str(tmp_path / "set")]) == 0
    assert "3 (50.0%), 1 (25.0%), 0 (12.5%)" in capsys.readouterr().out


def test_names_with_brackets_are_shown_as_they_are(tmp_path, capsys):
    # rich would take them for markup.
    manifest = Manifest(TINY, Tokenizer("t", 32), "model [red]", 16.0, "dataset", "prompts [/v2]", "0")
    with open_writer(tmp_path / "set", manifest) as writer:
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
    with open_writer(tmp_path / "set", manifest) as writer:
        experts = np.zeros((1, 4, geometry.top_k), np.int16) + np.arange(geometry.top_k, dtype=np.int16)
        writer.write(Trace("a", "tests", np.zeros(1, np.int32), experts, 1))
    assert main(["inspect", str(tmp_path / "set")]) == 0
    out = capsys.readouterr().out
    assert f"4 MoE layers (1..4) x {geometry.num_experts} experts" in out


def damage_hash(folder, shard="train-00001.parquet"):
    path = folder / shard
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
        (lambda folder: (folder / "manifest.json").unlink(), "no trace set here (manifest.json is missing)"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: is not JSON"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json: "),
        (change_manifest(format_version=2), "manifest.json: format version 2, not 1"),
        (change_manifest(geometry={}), "manifest.json: "),
        (change_manifest(shards=[{"file": "x"}]), "manifest.json: shard 0: fields are missing or unknown"),
        (change_manifest(shards=[]), "manifest.json"),
        (change_manifest(geometry={**TINY.to_json(), "top_k": 1}), "manifest.json: fingerprint and shards disagree"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("more", [[], ["--json", "-"]], ids=["tables", "json"])
def test_a_damaged_set_is_one_line(harm, says, more, trace_set, capsys):
    harm(Path(trace_set.folder))
    assert says in error_line(capsys, ["inspect", trace_set.folder, *more])


def test_a_place_that_holds_no_set_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert "nowhere: no trace set here" in error_line(capsys, ["inspect", tmp_path / "nowhere"])
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


def test_a_set_with_slots_without_an_expert_has_its_tables_and_pictures(tmp_path, capsys):
    geometry = Geometry("g", (3, 5), num_experts=4, top_k=2, params_per_expert=10, other_params_per_layer=0)
    experts = np.array([[[0, -1], [-1, -1]], [[1, 2], [-1, -1]], [[2, 0], [-1, -1]]])
    with open_writer(
        tmp_path / "set", Manifest(geometry, Tokenizer("t", 9), "g", 16.0, "mixed", "tests", "0")
    ) as writer:
        writer.write(Trace("s", "tests", np.zeros(3, np.int32), experts, 1, (experts >= 0).astype(np.float16)))
    assert main(["inspect", str(tmp_path / "set"), "--plots", str(tmp_path / "plots")]) == 0
    assert "nan" not in capsys.readouterr().out
    assert len(list((tmp_path / "plots").iterdir())) > 4


def test_a_contrast_writes_what_collect_is_steered_by(tmp_path, capsys):
    one, other = (str(tiny_traces(tmp_path / name, seed=seed).folder) for name, seed in (("one", 0), ("other", 1)))
    path = tmp_path / "steer.json"
    assert main(["inspect", one, "--contrast", other, "--steer", str(path), "--on", "2", "--off", "1"]) == 0
    assert f"steering: {path}" in capsys.readouterr().out
    found, rows = read_steering(path), contrast_traces(TraceSet(one), TraceSet(other)).to_json()["by_layer"]
    ((layer, expert),) = found.off
    assert min(min(row["difference"]) for row in rows) == rows[layer - 1]["difference"][expert]
    assert len(found.on) == 2
    for words in (["--steer", "x"], ["--contrast", other, "--on", "1"], ["--contrast", other, "--steer", "x"]):
        assert "--steer FILE goes with --contrast OTHER" in error_line(capsys, ["inspect", one, *words])
