"""``route_trace v1``: a hand-written session of two turns, its log, and every kind of damage in one line."""

from pathlib import Path

import numpy as np
import pytest
from _helpers.common import failure

from moe_beyond.cli.main import main
from moe_beyond.errors import UserError
from moe_beyond.geometry import PRESETS
from moe_beyond.traces import TraceSet
from moe_beyond.traces.engine_log import ENGINE_FILE
from moe_beyond.traces.formats.route_trace import import_route_trace

HEAD = """# route_trace v1
# model=/sdcard/Small-Q4_K_M.gguf arch=small n_layer=3 n_expert=4 n_expert_used=2
# layer=0 expert_bytes=0 dense_bytes=700
# layer=1 expert_bytes=300 dense_bytes=50
# layer=2 expert_bytes=200 dense_bytes=40
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
"""
# Layer 2 is the last: of the prompt's tokens 0 and 1, it has only the last.
PROMPT = """0,0,0,1,0,3,0.75,0,300
0,0,0,1,1,1,0.25,0,300
0,0,1,1,0,1,0.5,0,0
0,0,1,1,1,2,0.5,0,300
0,0,1,2,0,0,0.5,0,200
0,0,1,2,1,3,0.5,0,200
"""
DECODE = """0,1,2,1,0,2,0.5,1,0
0,1,2,1,1,3,0.5,0,300
0,1,2,2,0,1,0.5,2,0
0,1,2,2,1,0,0.5,1,0
"""
SECOND = """1,0,3,1,0,0,0.5,0,300
1,0,3,1,1,1,0.5,1,0
1,0,3,2,0,2,0.5,0,200
1,0,3,2,1,3,0.5,1,0
"""
METRICS = """step,steps,wall_ms,read_bytes,cache_hit_pct
1,1,12.5,300,40.0
# summary tokens=1 tok/s=80.0 n_prompt=2 cache_budget_MiB=0.5
"""


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("run.route.csv").write_text(HEAD + PROMPT + DECODE)
    Path("run.metrics").write_text(METRICS)
    return tmp_path


def command(*more: str) -> list[str]:
    return ["import", "route-trace", "run.route.csv", "--out", "out", *more]


def test_a_run_with_its_log(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command("--metrics", "run.metrics")) == 0
    assert "log of the engine" in capsys.readouterr().out
    traces = TraceSet("out")
    geometry = traces.geometry
    assert (geometry.model, geometry.moe_layers, geometry.shape()) == ("Small-Q4_K_M", (1, 2), (2, 4, 2))
    assert (geometry.expert_bytes, geometry.other_bytes, geometry.expert_units) == ((300, 200), (50, 40), (3, 2))
    assert traces.manifest.quantization_bits is None
    (trace,) = traces
    assert (trace.sequence_id, trace.decode_start) == ("run", 2)
    assert trace.experts.tolist() == [[[3, 1], [255, 255]], [[1, 2], [0, 3]], [[2, 3], [1, 0]]]
    assert trace.gate_weights is not None
    assert trace.gate_weights[0].tolist() == [[0.75, 0.25], [0, 0]]
    (log,) = traces.engine_logs()
    assert log.residency.tolist() == [[[0, 0], [0, 0]], [[0, 0], [0, 0]], [[1, 0], [2, 1]]]
    assert {name: values.tolist()[2:] for name, values in log.metrics.items()} == {
        "wall_ms": [12.5], "read_bytes": [300], "cache_hit_pct": [40],
    }  # fmt: skip
    assert np.isnan(log.metrics["wall_ms"][:2]).all()
    assert log.summary == {"tokens": 1, "tok/s": 80, "n_prompt": 2, "cache_budget_MiB": 0.5}


def test_a_damaged_log_is_named(desk: Path) -> None:
    assert main(command()) == 0
    assert TraceSet("out").engine_logs()[0].metrics == {}
    path = Path("out") / ENGINE_FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"out/{ENGINE_FILE}: file is damaged"):
        TraceSet("out").engine_logs()


def test_every_turn_is_a_sequence(desk: Path) -> None:
    Path("run.route.csv").write_text(HEAD + PROMPT + DECODE + SECOND)
    assert main(command()) == 0
    traces = TraceSet("out")
    assert [(t.sequence_id, len(t), t.decode_start) for t in traces] == [("run-0", 3, 2), ("run-1", 1, 1)]
    assert "2 turns, one sequence each; 1 continue the conversation of the turn before" in traces.manifest.source


def test_a_prompt_in_several_batches(desk: Path) -> None:
    first = "0,0,0,1,0,3,0.75,0,300\n0,0,0,1,1,1,0.25,0,300\n"
    second = PROMPT.replace(first, "")
    Path("run.route.csv").write_text(HEAD + first + second + DECODE)
    assert main(command()) == 0
    whole = TraceSet("out")[0].experts
    # With a third layer the second batch begins where the layer falls.
    head = HEAD.replace("n_layer=3", "n_layer=4").replace("turn,", "# layer=3 expert_bytes=100 dense_bytes=1\nturn,")
    rows = [f"0,0,{step},{layer},{slot},{slot},0.5,0,0\n" for step in (0, 1) for layer in (1, 2) for slot in (0, 1)]
    last = [f"0,0,1,3,{slot},{slot},0.5,0,0\n" for slot in (0, 1)]
    Path("run.route.csv").write_text(head + "".join(rows + last))
    assert main(["import", "route-trace", "run.route.csv", "--out", "chunks"]) == 0
    traces = TraceSet("chunks")
    assert "prompts were read in batches of up to 1 tokens" in traces.manifest.source
    assert traces[0].experts[:, 2].tolist() == [[255, 255], [0, 1]]
    assert whole[0, 1].tolist() == [255, 255]


def test_a_known_model_adds_its_parameters(desk: Path) -> None:
    known = PRESETS["mixtral-8x7b"].geometry
    head = f"# route_trace v1\n# model=x.gguf arch=llama n_layer={known.num_layers} n_expert=8 n_expert_used=1\n"
    head += "".join(f"# layer={layer} expert_bytes=1000 dense_bytes=7\n" for layer in known.moe_layers)
    head += "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes,dropped\n"
    rows = "".join(f"0,1,0,{layer},0,5,nan,1,0,0\n" for layer in known.moe_layers)
    Path("run.route.csv").write_text(head + rows)
    assert main(command("--model", "mixtral-8x7b")) == 0
    traces = TraceSet("out")
    assert traces.geometry.params_per_expert == known.params_per_expert
    assert (traces.geometry.top_k, traces.geometry.has_one_size) == (1, True)
    assert traces.manifest.quantization_bits == 8000 / known.params_per_expert
    assert traces[0].gate_weights is None
    with pytest.raises(UserError, match="give the model of the recording"):
        import_route_trace("run.route.csv", "again", PRESETS["olmoe-1b-7b"])


DAMAGE = {
    "line 1: must be '# route_trace v1' (got '# route_trace v2')": lambda text: text.replace("v1", "v2"),
    "line 3: is not understood": lambda text: text.replace("# layer=0 expert", "# layer=0 experts"),
    "must give the bytes of 3 layers (got 2)": lambda text: text.replace(
        "# layer=2 expert_bytes=200 dense_bytes=40\n", ""
    ),
    "the line with the model is missing": lambda text: text.replace(text.splitlines()[1] + "\n", ""),
    "line 6: must name the column 'weight' once (got 0)": lambda text: text.replace("weight", "gate"),
    "has no rows": lambda text: HEAD,
    "line 16: is truncated (got '0,1,2,2,1,0,0.5,1,')": lambda text: text[:-2],
    "line 16: must have 9 columns (got 8)": lambda text: text[:-3] + "\n",
    "line 15: is the last row, but its entry has 1 of 2 rows": lambda text: text[: text.index("0,1,2,2,1,")],
    "line 9: slot must be 0": lambda text: text.replace("0,0,1,1,0,1,0.5,0,0\n", ""),
    "line 10: step must be 1 as in slot 0 (got 5)": lambda text: text.replace("0,0,1,1,1", "0,0,5,1,1"),
    "line 13: rows are missing or out of order: token 2 of layer 2 is due": lambda text: text[
        : text.index("0,1,2,2,0")
    ],
    "line 11: rows are missing or out of order: token 1 of layer 2 is due": lambda text: text.replace(
        "0,0,1,2,0,0,0.5,0,200\n0,0,1,2,1,3,0.5,0,200\n", ""
    ),
    "line 9: rows are missing or out of order: token 2 of layer 1 is due": lambda text: (
        HEAD + "".join(PROMPT.splitlines(True)[2:4] + PROMPT.splitlines(True)[:2]) + DECODE
    ),
    "line 11: rows are out of order: the prompt follows generated tokens": lambda text: HEAD + DECODE + PROMPT,
    "line 7: layer 0 has no experts": lambda text: text.replace("0,0,0,1,", "0,0,0,0,"),
    "line 7: expert id 4 is out of range 0..3": lambda text: text.replace("0,0,0,1,0,3", "0,0,0,1,0,4"),
    "line 7: an expert occurs twice in one entry": lambda text: text.replace("0,0,0,1,0,3", "0,0,0,1,0,1"),
    "line 7: expert_bytes must be 0 or 300 (got 200)": lambda text: text.replace("0.75,0,300", "0.75,0,200"),
    "line 7: residency must be 0, 1 or 2 (got 3)": lambda text: text.replace("0.75,0,300", "0.75,3,300"),
    "line 7: has no weight, but others do": lambda text: text.replace("0.75", "nan"),
    "line 7: weight must be at most 65504 in half precision (got 1e+06)": lambda text: text.replace("0.75", "1e6"),
    "line 7: phase must be 0 or 1 (got 7)": lambda text: text.replace("\n0,0,", "\n0,7,"),
    "cannot be read as rows of numbers": lambda text: text.replace("0.75", "much"),
}


@pytest.mark.parametrize("says", DAMAGE)
def test_damage_is_named_and_nothing_is_left(says: str, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("run.route.csv")
    path.write_text(DAMAGE[says](path.read_text()))
    assert failure(capsys, desk, command()).startswith(f"run.route.csv: {says}")


def test_a_dropped_expert_is_refused(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head, *rows = (PROMPT + DECODE).splitlines()
    rows = [f"{row},0" for row in (head, *rows[:-1])] + [f"{rows[-1]},1"]
    Path("run.route.csv").write_text(HEAD.replace("expert_bytes\n", "expert_bytes,dropped\n") + "\n".join(rows) + "\n")
    assert failure(capsys, desk, command()).startswith("run.route.csv: line 16: its expert was dropped")


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        (METRICS.replace("1,1,12.5,300,40.0\n", ""), "belongs to another run: the recording generated 1 tokens (got"),
        (METRICS.replace("# sum", "2,2,1,2,3\n# sum"), "belongs to another run: the recording generated 1 tokens (got"),
        (METRICS.replace("n_prompt=2", "n_prompt=9"), "belongs to another run: the recording has a prompt of 2 tokens"),
        (METRICS.replace("1,1,12.5", "3,1,12.5"), "line 2: step must be 1 (got 3)"),
        (METRICS.replace("12.5,", ""), "line 2: must have 5 columns (got 4)"),
        (METRICS.replace("12.5", "inf"), "line 2: must hold finite numbers"),
        (METRICS.replace("12.5", "soon"), "line 2: must hold numbers"),
        ("wall_ms\n1\n", "line 1: must name the columns, with step"),
        ("", "line 1: must name the columns, with step"),
    ],
)
def test_metrics_of_another_run_are_refused(metrics: str, says: str, desk: Path, capsys) -> None:
    Path("run.metrics").write_text(metrics)
    assert failure(capsys, desk, command("--metrics", "run.metrics")).startswith(f"run.metrics: {says}")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--quantization", "4"], "--quantization: run.route.csv has the bytes of every layer (got 4)"),
        (["--metrics", "none.csv"], "none.csv: cannot be read"),
        (["--tokenizer", "words.json"], "--tokenizer: run.route.csv has no token ids"),
    ],
)
def test_an_option_that_does_not_fit_is_named(more: list[str], says: str, desk: Path, capsys) -> None:
    assert failure(capsys, desk, command(*more)).startswith(says)


def test_other_formats_need_a_model(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = failure(capsys, desk, ["import", "vllm", "src", "--out", "out"])
    assert line.startswith("import needs --model with vllm")


def test_bits_cannot_change_stored_bytes(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command()) == 0
    capsys.readouterr()
    line = failure(capsys, desk, ["replay", "--traces", "out", "--budget", "4", "--quantization", "4"])
    assert line.startswith("--quantization: out has the stored bytes of its experts (got 4)")
