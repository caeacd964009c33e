"""Tools of maintainers, in miniature."""

import ast
import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from _helpers.common import TINY, release, tiny_traces
from _helpers.tools import TOOLS, run
from safetensors.torch import load_file

from moe_beyond.evaluation.score_store import ScoresFolder
from moe_beyond.predictors.io.folder import save_predictor
from moe_beyond.predictors.registry import create
from moe_beyond.traces.reader import TraceSet


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
        # One permutation per repeat and layer: an id maps to the same id everywhere in them.
        for before, after in zip(originals[name].experts, trace.experts, strict=True):
            for layer in range(small.geometry.num_layers):
                for old, new in zip(before[layer], after[layer], strict=True):
                    assert permutations.setdefault((repeat, layer, int(old)), int(new)) == int(new)
    printed = run("bench_streaming.py", "--data", str(tmp_path / "large"), "--json", str(tmp_path / "b.json"))
    assert "entries/s/core" in printed
    figures = json.loads((tmp_path / "b.json").read_text())
    trained = sum(shard.tokens for shard in large.shards("train")) * large.geometry.num_layers
    assert figures["entries"] == trained


def test_a_sample_holds_routing_of_its_source(tmp_path: Path) -> None:
    source = tiny_traces(tmp_path / "source", sequences=20)
    routing = {
        (int(token), experts.tobytes())
        for trace in source
        for token, experts in zip(trace.token_ids, trace.experts, strict=True)
    }
    entries = 5 * source.manifest.tokens * source.geometry.num_layers
    words = ("--entries", str(entries), "--span", "4", "--swap", "0.5")
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run("sample_traces.py", str(tmp_path / "source"), str(tmp_path / name), *words, "--seed", seed)
    sampled = TraceSet(str(tmp_path / "a"))
    fingerprints = [TraceSet(str(tmp_path / name)).manifest.fingerprint for name in "abc"]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    assert entries <= sampled.manifest.tokens * sampled.geometry.num_layers < 1.2 * entries
    assert sampled.manifest.splits == source.manifest.splits
    for trace in sampled:
        for token, experts in zip(trace.token_ids, trace.experts, strict=True):
            assert (int(token), experts.tobytes()) in routing


@pytest.mark.slow
def test_costs_are_measured_and_projected(tmp_path: Path) -> None:
    sets = [str(tmp_path / name) for name in ("small", "large")]
    for folder, sequences in zip(sets, (24, 96), strict=True):
        tiny_traces(Path(folder), sequences=sequences)
    printed = run("bench_scale.py", *sets, "--steps", "1", "--json", str(tmp_path / "costs.json"))
    assert "same JSON: True" in " ".join(printed.split())
    figures = json.loads((tmp_path / "costs.json").read_text())
    assert {len(rows) for rows in figures["costs"].values()} == {2}
    assert all(row["peak_bytes"] > 1e6 for rows in figures["costs"].values() for row in rows)
    projected = run("bench_scale.py", "--project", str(tmp_path / "costs.json"))
    assert projected.startswith("66,000,000,000 entries are ")
    assert "| replay | " in projected


@pytest.mark.slow
def test_the_small_model_can_be_trained_and_resumed(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(60):  # enough names that one of them is held out
        (text / f"{number}.txt").write_text(f"The {number} routers chose two experts each, and so on. " * 40)
    words = ("--text", str(text), "--work", str(tmp_path / "work"), "--tiny", "--batch", "2", "--vocab", "300")
    words = (*words, "--prompts", "3", "--out", str(tmp_path / "model"))
    run("train_small_moe.py", *words, "--steps", "2")
    printed = run("train_small_moe.py", *words, "--steps", "4")
    assert "resumed at step 2" in printed
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "prompts.jsonl", "README.md"} <= files


def test_a_route_trace_is_compared_with_its_curve(tmp_path: Path) -> None:
    head = "# route_trace v1\n# model=s.gguf arch=s n_layer=2 n_expert=4 n_expert_used=1\n"
    head += "# layer=0 expert_bytes=3145728 dense_bytes=0\n# layer=1 expert_bytes=2097152 dense_bytes=0\n"
    head += "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n"
    # 5 MiB hold an expert of each layer: the second token's are hits, and the third's are not.
    rows = [f"0,1,{step},{layer},0,{step // 2},1,{step % 2},0\n" for step in range(3) for layer in (0, 1)]
    (tmp_path / "r.csv").write_text(head + "".join(rows))
    curve = "budget_mib,policy,hit_pct_cum,hit_pct_decode\n5,lru,33.333,33.333\n5,belady,33.333,33.0\n5,other,1,1\n"
    (tmp_path / "c.csv").write_text(curve)
    metrics = "step,steps,wall_ms\n1,3,1\n2,3,1\n3,3,1\n# summary n_prompt=0 cache_budget_MiB=5.0\n"
    (tmp_path / "m.csv").write_text(metrics)
    words = ("--route", str(tmp_path / "r.csv"), "--curve", str(tmp_path / "c.csv"))
    printed = run(
        "compare_route_curves.py", *words, "--metrics", str(tmp_path / "m.csv"), "--json", str(tmp_path / "j")
    )
    assert printed.splitlines()[-1] == "largest difference: 0.333 points"
    rows = json.loads((tmp_path / "j").read_text())["rows"]
    assert [(row["policy"], round(row["ours"][0], 3)) for row in rows] == [
        ("lru", 33.333), ("belady", 33.333), ("lru; theirs: the engine", 33.333),
    ]  # fmt: skip


def test_the_method_of_the_paper_on_predictions_that_miss_one_in_six(tmp_path: Path) -> None:
    release(tmp_path, [3, 12, 14], missed=1)
    printed = run(
        "reproduce_moe_beyond.py", "--data", str(tmp_path), "--json", str(tmp_path / "f.json"), "--fillings", "2"
    )
    assert "What the method leaves out" in printed
    figures = json.loads((tmp_path / "f.json").read_text())
    assert list(figures["moe_beyond"]) == "166 332 499 665 832 998 1164 1331 1497 1664".split()
    # 5 of 6 were inserted just before; the sixth may be resident by chance, and in a full cache it is.
    assert figures["moe_beyond"]["166"] >= 5 / 6 > figures["moe_infinity"]["166"]
    assert figures["moe_beyond"]["1664"] == figures["moe_infinity"]["1664"] == 1
    found = figures["classifier"]
    assert found["recall_at_6"] == pytest.approx(5 / 6)
    assert found["accuracy"] == pytest.approx(1 - 2 / 64)  # one missed and one predicted in vain, of 64 labels
    assert found["f1_two_class"] == pytest.approx((5 / 6 + 57 / 58) / 2)
    # Padded to the longest of the batch, 14 tokens: 2 of 64 labels are wrong on 29 of 42 tokens.
    assert found["accuracy_with_padding_batch_8"] == pytest.approx(1 - 2 * 29 / (64 * 42))


def test_predictions_of_other_prompts_are_refused(tmp_path: Path) -> None:
    release(tmp_path, [11, 11], missed=0)
    words = [sys.executable, str(TOOLS / "reproduce_moe_beyond.py"), "--data", str(tmp_path)]
    folder = tmp_path / "webglm_moe_beyond_predictions"
    one, two = (folder / f"prompt_{number}_data_predicted.csv" for number in (1, 2))
    one.write_bytes(two.read_bytes())
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{one}: its activated experts are not those of" in done.stderr
    one.unlink()
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "prompt_1_data_formatted.csv: has no predictions" in done.stderr


@pytest.mark.slow
def test_variants_are_fitted_once_and_compared(tmp_path: Path) -> None:
    tiny_traces(tmp_path / "traces", sequences=24)
    small = ["--model.width=16", "--model.heads=2", "--model.window=8", "--model.layer_width=16"]
    small += ["--data.token_budget=64"]
    words = ["--traces", str(tmp_path / "traces"), "--out", str(tmp_path / "out"), "--epochs", "1"]
    words += [
        "--only",
        "flagship",
        "no next run",
        "--shares",
        "0.5",
        "--json",
        str(tmp_path / "found.json"),
        "--",
        *small,
    ]
    assert "no next run" in run("ablate.py", *words)
    found = json.loads((tmp_path / "found.json").read_text())["variants"]
    assert list(found) == ["flagship", "no next run", "50% of the text"]
    half = TraceSet(str(tmp_path / "out" / "traces-0.5"))
    assert [len(list(half.traces(split))) for split in ("train", "validation")] == [9, 6]
    assert 0 < found["flagship"][0]["val/recall_at_k"] < 1
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("metrics.csv")}
    run("ablate.py", *words)
    assert first == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("metrics.csv")}
    for other, says in (("--data.token_budget=32", "other data or settings"), ("--model.depth=none", "fit failed")):
        changed = [*words, other] if "token" in other else [*words[:3], str(tmp_path / "new"), *words[4:], other]
        command = [sys.executable, str(TOOLS / "ablate.py"), *changed]
        failed = subprocess.run(command, capture_output=True, text=True, check=False)
        assert failed.returncode != 0
        assert says in failed.stderr
        assert "Traceback" not in failed.stderr


def test_a_step_is_timed_part_by_part(tmp_path: Path) -> None:
    tiny_traces(tmp_path / "traces")
    predictor = create("cross_layer", TINY, 32, width=16, heads=2, depth=1, layer_width=8)
    save_predictor(predictor, tmp_path / "p", {})
    words = [str(tmp_path / "p"), "--traces", str(tmp_path / "traces"), "--sequences", "3"]
    run("bench_step.py", *words, "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["tokens"] > 3
    whole, parts = (found["microseconds"][name]["median"] for name in ("(token + layers) / L", "layer"))
    assert 0 < parts < whole
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("needs a C compiler, cc, for the program")
    program = [str(tmp_path / "score"), *map(str, sorted((TOOLS / "reference_c").glob("*.c")))]
    subprocess.run([compiler, "-O1", "-o", *program, "-lm"], check=True)
    run("bench_step.py", *words, "--program", program[0], "--json", str(tmp_path / "both.json"))
    both = json.loads((tmp_path / "both.json").read_text())["microseconds"]
    assert {f"{name}, in C" for name in found["microseconds"]} == both.keys() - found["microseconds"].keys()
    assert 0 < both["layer, in C"]["median"] <= both["layer, in C"]["p99"]


def test_an_oracle_knows_the_share_that_it_is_given(tmp_path: Path) -> None:
    tiny_traces(tmp_path / "traces", sequences=4)
    words = ["--traces", str(tmp_path / "traces"), "--out", str(tmp_path / "scores"), "--share"]
    traces = TraceSet(str(tmp_path / "traces"))
    for share, certain in (("1", 1.0), ("0.5", 0.5), ("0", 0.0)):
        run("oracle_scores.py", *words, share)
        folder = ScoresFolder(tmp_path / "scores")
        assert folder.lookaheads == ("next",)
        named = chosen = 0
        for trace in traces.traces():
            scores = folder.scores(trace.sequence_id, len(trace.token_ids))[:, 0]
            assert np.allclose(scores.sum(-1), TINY.top_k, atol=1e-5)
            own = np.take_along_axis(scores, trace.experts.astype(np.int64), -1)
            assert (own == 1).sum() == (scores == 1).sum()
            named, chosen = named + (own == 1).sum(), chosen + own.size
        assert named / chosen == pytest.approx(certain, abs=0.1)


@pytest.mark.slow  # compiles every policy
def test_a_choice_is_compared_with_a_grid(tmp_path: Path) -> None:
    traces = tiny_traces(tmp_path / "traces")
    words = ("--traces", traces.folder, "--device", "rtx4060", "--predictor", "none", "--profile", "none")
    # With all experts resident, every policy without a predictor is as good as LRU.
    printed = run("check_tune.py", *words, "--budget", "100%", "--json", str(tmp_path / "check.json"))
    assert "choice lru + none, lookahead None, global" in printed
    [row] = json.loads((tmp_path / "check.json").read_text())
    assert row["holds"]
    assert row["choice tok/s"] == row["lru tok/s"] == row["best tok/s"]
    assert row["grid"] == row["tried"]


@pytest.mark.slow
def test_runs_are_compared_with_their_replays(tmp_path: Path) -> None:
    words = ("--model", "small-moe", "--tier", "host", "--sequences", "2", "--tokens", "12", "--repeats", "2")
    words = (
        *words,
        "--budgets",
        "25%",
        "50%",
        "--strategies",
        "lru",
        "lfu",
        "--json",
        str(tmp_path / "t.json"),
    )
    printed = run("validate_replay.py", *words, "--recordings", str(tmp_path / "runs"))
    figures = json.loads((tmp_path / "t.json").read_text())
    assert [(row["strategy"], row["budget"]) for row in figures] == [
        ("lru", "25%"), ("lru", "50%"), ("lfu", "25%"), ("lfu", "50%"),
    ]  # fmt: skip
    for row in figures:
        assert row["equal_events"] == row["events"] > 0
        assert row["recorded"] > 0
        assert row["strategy"] != "lru" or row["hits"] == row["hits_forecast"]
    assert "tokens/s within 5%" in printed
    began = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert len(began) == 8
    run("validate_replay.py", *words, "--recordings", str(tmp_path / "runs"))  # reads the recordings
    assert began == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert json.loads((tmp_path / "t.json").read_text()) == figures


@pytest.mark.slow
def test_training_is_timed_on_the_same_segments(tmp_path: Path) -> None:
    tiny_traces(tmp_path / "traces", sequences=40)
    words = ["--data", str(tmp_path / "traces"), "--steps", "1", "--eager", "--json", str(tmp_path / "f.json")]
    assert "best of cross_layer / best of row_encoder" in run("bench_training.py", *words)
    found = json.loads((tmp_path / "f.json").read_text())
    assert {(row["architecture"], row["precision"]) for row in found["runs"]} == {
        (name, precision)
        for name in ("row_encoder", "cross_layer", "cross_layer, small")
        for precision in ("32-true", "bf16-mixed")
    }
    best = found["best"]
    assert found["ratios"] == {
        name: pytest.approx(best[name] / best["row_encoder"]) for name in ("cross_layer", "cross_layer, small")
    }
    assert all(len(row["entries_per_s"]) == 1 and row["entries_per_s"][0] > 0 for row in found["runs"])


@pytest.mark.slow
def test_killed_fits_resume_exactly(tmp_path: Path) -> None:
    names = ["two workers", "two ranks, accumulating 3", "eamc, which counts"]
    run("kill_fit.py", "--kills", "2", "--only", *names, "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["configurations"]) == names
    for row in found["configurations"].values():
        assert row["kills"] == 2
        faults = ("loss", "weights", "exported", "recalls", "rates", "steps", "lost", "repeated", "unreadable", "left")
        assert [row[name] for name in faults] == [0] * len(faults)


@pytest.mark.slow
def test_killed_commands_leave_whole_targets(tmp_path: Path) -> None:
    run("kill_writes.py", "--kills", "2", "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 8
    for row in found.values():
        assert row["absent"] + row["old"] + row["new"] == row["kills"] == 2
        assert (row["broken"], row["failed"], row["kept"]) == (0, 0, 0)


@pytest.mark.slow
def test_flushing_is_timed(tmp_path: Path) -> None:
    run("bench_flush.py", "--repeats", "1", "--folder", str(tmp_path), "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 5
    assert all(row["ms"] > 0 and row["megabytes"] > 0 for row in found.values())


@pytest.mark.slow
def test_replays_at_once_are_equal_and_share_pages(tmp_path: Path) -> None:
    tiny_traces(tmp_path / "traces")
    words = ("--data", str(tmp_path / "traces"), "--budget", "50%", "--processes", "4")
    run("bench_at_once.py", *words, "--json", str(tmp_path / "found.json"))
    alone, together = json.loads((tmp_path / "found.json").read_text())
    assert together["uss"] < together["pss"] < together["rss"]
    assert together["pss"] < alone["pss"]


@pytest.mark.slow
def test_a_crowded_fit_is_compared_with_its_share(tmp_path: Path) -> None:
    words = ("--repeats", "1", "--epochs", "1", "--policies", "passive")
    run("bench_crowded.py", *words, "--json", str(tmp_path / "found.json"))
    [row] = json.loads((tmp_path / "found.json").read_text())
    assert row["slowdown"] == pytest.approx(row["crowded_s"] / row["undisturbed_s"])
    assert row["rest"] == pytest.approx(row["slowdown"] / row["explained"])


@pytest.mark.slow
def test_the_core_is_compared_with_the_reference(tmp_path: Path) -> None:
    printed = run("compare_core.py", "--events", "300", "--only", "lru", "--json", str(tmp_path / "found.json"))
    assert "events equal" in printed
    found = json.loads((tmp_path / "found.json").read_text())["all"]
    assert found["events"] >= 300
    assert min(found.values()) > 0  # each of its columns


@pytest.mark.slow
def test_inputs_are_fuzzed_with_and_without_guidance(tmp_path: Path) -> None:
    run("fuzz.py", "--cases", "50", "--only", "budgets", "config.json", "--json", str(tmp_path / "found.json"))
    targets = json.loads((tmp_path / "found.json").read_text())["targets"]
    assert {name: row["faults"] for name, row in targets.items()} == {"budgets": 0, "config.json": 0}
    pytest.importorskip("atheris")
    assert "budgets: 50 cases: " in run("fuzz_atheris.py", "budgets", "--cases", "50")


def test_published_runs_have_a_forecast_or_wait_for_traces(tmp_path: Path) -> None:
    printed = run("compare_published.py", "--json", str(tmp_path / "published.json"))
    rows = json.loads((tmp_path / "published.json").read_text())
    assert len(rows) >= 12
    assert len({row["engine"] for row in rows}) >= 4
    assert printed.count("\n") == len(rows) + 2
    assert all((row["clock"] is None) == isinstance(row["cached"], str) for row in rows)
    assert all(row["source"] and row["reason"] for row in rows)
    # No hit: 384 experts of 4,718,592 parameters at 4.5 bits over 51 GB/s, 20 us each, are 27.7 ms; computing 3.8 ms.
    never = next(row for row in rows if row["published"] == 6.63)
    assert 1e3 / never["clock"] == pytest.approx(27.7 + 3.8, abs=0.1)


@pytest.mark.slow
def test_a_model_for_benchmarks_decodes_with_the_recorded_routing(tmp_path: Path) -> None:
    traces = tiny_traces(tmp_path / "traces", sequences=4)
    words = ["--data", str(tmp_path / "traces")]
    size = ["--hidden-size", "64", "--expert-width", "32"]
    run("make_bench_model.py", *words, *size, "--out", str(tmp_path / "model"))
    run("make_bench_model.py", *words, *size, "--out", str(tmp_path / "again"))
    files = sorted((tmp_path / "model").iterdir())
    assert all(file.read_bytes() == (tmp_path / "again" / file.name).read_bytes() for file in files)
    shards = [load_file(file) for file in files if file.suffix == ".safetensors"]
    weights = {name: tensor for shard in shards for name, tensor in shard.items()}
    gates = [
        tuple(tensor.flatten().tolist())
        for name, tensor in weights.items()
        if name.endswith("gate_proj.weight") and ".experts." in name
    ]
    assert len(set(gates)) == len(gates) == TINY.total_experts

    words += ["--model", str(tmp_path / "model"), "--budget", "16", "--sequences", "2", "--repeats", "2"]
    names = ["accelerate", "lru", "resident", "unmodified"]
    run("bench_run.py", *words, "--rows", *names, "--json", str(tmp_path / "found.json"))
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    expert = 3 * 64 * 32 * 2
    assert [rows[name]["expert_bytes"] for name in ("accelerate", "unmodified")] == [16 * expert, 32 * expert]
    assert all(rows[name]["tokens"] == 2 * sum(len(trace) for trace in traces[:2]) for name in names[1:])
    tokens = {name: row["per_token"] for name, row in rows.items()}
    assert tokens["accelerate"]["read_bytes"] >= 3 * 8 * expert > tokens["unmodified"]["read_bytes"]
    lru, resident, used = tokens["lru"], tokens["resident"], TINY.num_layers * TINY.top_k
    assert lru["hits"] + lru["misses"] == pytest.approx(used)
    assert lru["disk_bytes"] == pytest.approx(expert * lru["misses"])
    assert resident["hits"] == pytest.approx(used)
    assert resident["disk_bytes"] == 0

    run("bench_run.py", *words, "--overhead", "--policies", "lru", "--json", str(tmp_path / "overhead.json"))
    assert list(json.loads((tmp_path / "overhead.json").read_text())["overhead_us"]) == ["lru"]

    run("bench_disk.py", "--model", str(tmp_path / "model"), "--json", str(tmp_path / "disk.json"))
    times = json.loads((tmp_path / "disk.json").read_text())["direct_read_ms"]
    assert list(times) == ["1", "2", "4"]
    assert min(times.values()) > 0


@pytest.mark.slow
def test_the_checks_of_a_gpu_pass_on_the_cpu(tmp_path: Path) -> None:
    run("check_gpu.py", "--device", "cpu", "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == ["exactness", "overhead", "speed"]
    outputs = [row["output"] for row in (*found["exactness"], *found["speed"][1:])]
    assert len(outputs) == 36
    assert all(output.startswith("identical: ") for output in outputs)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    kinds = ["scores", "devices", "strategies", "budgets"]
    printed = run("damage.py", "--cases", "16", "--only", *kinds, "--json", str(tmp_path / "found.json"))
    assert "damaged files, seed 0" in printed
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["rows"]) == kinds
    assert sum(sum(row.values()) for row in found["rows"].values()) >= 16
    assert found["faults"] == []


@pytest.mark.slow
def test_a_thousand_damaged_files_are_named(tmp_path: Path) -> None:
    run("damage.py", "--cases", "1000", "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert sum(sum(row.values()) for row in found["rows"].values()) >= 1000
    assert found["faults"] == []


@pytest.mark.parametrize("name", sorted(str(path.relative_to(TOOLS)) for path in TOOLS.rglob("*.py")))
def test_the_imports_of_a_tool_exist(name: str) -> None:
    nodes = ast.walk(ast.parse((TOOLS / name).read_text()))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moe_bey")]
    missing = [
        f"{node.module}.{alias.name}"
        for node in imports
        for alias in node.names
        if not hasattr(importlib.import_module(str(node.module)), alias.name)
        and importlib.util.find_spec(f"{node.module}.{alias.name}") is None
    ]
    assert missing == []


@pytest.mark.parametrize("name", sorted(path.name for path in TOOLS.glob("*.py") if path.name != "fuzz_atheris.py"))
def test_a_tool_prints_its_usage(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.syspath_prepend(str(TOOLS))
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(TOOLS / name), run_name="__main__")
    assert capsys.readouterr().out.startswith(f"usage: {name}")


@pytest.mark.slow
def test_interrupted_commands_leave_nothing(tmp_path: Path) -> None:
    words = ("--tries", "2", "--only", "export", "inspect", "--json", str(tmp_path / "found.json"))
    run("interrupt_commands.py", *words)
    rows = json.loads((tmp_path / "found.json").read_text())
    assert [row["interrupted"] + row["finished"] for row in rows.values()] == [2, 2]


def test_an_audit_without_data_is_a_line_and_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nothing answers there
    (tmp_path / "pins.txt").write_text("moe-beyond==0.1.0\n")
    printed = run("audit.py", "--requirements", str(tmp_path / "pins.txt"))
    assert printed == "audit: no data on vulnerabilities can be read here; no package was audited\n"
