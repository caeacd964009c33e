"""``moe-beyond export pins``: each form is read as its engine reads it."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from _helpers.common import TINY, tiny_traces

from moe_beyond.cli.main import main
from moe_beyond.evaluation.pins import Pins, read_pins, write_pins

PINS = Pins(
    model="tiny",
    budget_slots=7,
    counted_on="tests",
    num_experts=3,
    expert_bytes=None,
    uses_share=0.7,
    layers={"1": [2], "3": [0, 1, 2], "11": [1, 0], "12": [2]},
)
"""Seven experts: two whole layers of three, of which 3 has most pins, then 11."""
MATRICES = ("gate", "up", "down", "gate_up")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_pins("pins.json", PINS)


def export(*words: str) -> dict[str, Any]:
    assert main(["export", "pins", *words, "--json", "result.json"]) == 0
    return json.loads(Path("result.json").read_text())


def in_host_memory(line: str, tensors: list[str]) -> list[str]:
    """Tensors that llama.cpp moves: it splits the value at commas and at the first =, and searches each pattern."""
    moved = set()
    for override in line.rstrip("\n").split(","):
        pattern, _, buffer = override.partition("=")
        assert buffer == "CPU"
        moved |= {name for name in tensors if re.search(pattern, name)}
    return [name for name in tensors if name in moved]


def llama_cpp_tensors(layers: range) -> list[str]:
    """Names of the tensors of a model; only those with ``_exps`` are routed experts."""
    parts = [f"ffn_{matrix}_exps.weight" for matrix in MATRICES] + [f"ffn_{m}_exps.bias" for m in MATRICES]
    parts += [
        "ffn_gate_inp.weight",
        "ffn_up_shexp.weight",
        "ffn_gate_up_shexp.weight",
        "attn_q.weight",
        "ffn_up.weight",
    ]
    return ["token_embd.weight", *(f"blk.{layer}.{part}" for layer in layers for part in parts)]


def test_llama_cpp_keeps_the_experts_of_whole_layers(capsys: pytest.CaptureFixture[str]) -> None:
    result = export("pins.json", "pins.txt", "--to", "llama.cpp")
    tensors = llama_cpp_tensors(range(113))
    moved = in_host_memory(Path("pins.txt").read_text(), tensors)
    assert moved == [name for name in tensors if "_exps." in name and name.split(".")[1] in ("1", "12")]
    assert result["layers"] == {"3": 3, "11": 3}
    assert (result["experts"], result["uses_share"], result["pinned_uses_share"]) == (6, 0.5, 0.7)
    said = capsys.readouterr().out
    assert "pins.txt: 6 experts in 2 of 4 layers" in said
    assert "They have 50.0% of all uses; the 7 pinned experts have 70.0%." in said
    assert '--override-tensor "$(cat pins.txt)"' in said


def test_small_layers_are_whole_first_and_the_memory_is_that_of_the_pins() -> None:
    # 10 + 3 * 20 + 2 * 5 + 5 = 85 bytes: layers 11 and 12 take 15 each, layer 1 takes 30, and 60 are too many.
    write_pins("pins.json", replace(PINS, expert_bytes=[10, 20, 5, 5]))
    assert export("pins.json", "pins.txt", "--to", "llama.cpp")["layers"] == {"1": 3, "11": 3, "12": 3}


def test_without_room_for_a_layer_llama_cpp_keeps_none() -> None:
    write_pins("pins.json", replace(PINS, layers={"1": [2], "3": [], "11": [1], "12": []}))
    assert export("pins.json", "pins.txt", "--to", "llama.cpp")["layers"] == {}
    tensors = llama_cpp_tensors(range(13))
    moved = in_host_memory(Path("pins.txt").read_text(), tensors)
    assert moved == [name for name in tensors if "_exps." in name and name.split(".")[1] in PINS.layers]


def ktransformers_mask(path: str, ratio: float, layers: int, experts: int, moe_layers: list[int]) -> torch.Tensor:
    """Experts that kt-kernel keeps in GPU memory: those with the highest counts of all layers."""
    counts = torch.load(path, weights_only=True)["logical_count"]
    assert counts.dim() == 3
    assert counts.shape[1:] == (layers, experts)
    frequency = counts.sum(0).float()
    chosen = torch.topk(frequency.flatten(), int(len(moe_layers) * experts * ratio)).indices
    return torch.zeros(layers * experts, dtype=torch.bool).index_fill(0, chosen, True).view(layers, experts)


def test_ktransformers_keeps_exactly_the_pinned_experts() -> None:
    usage = export("pins.json", "pins.pt", "--to", "ktransformers")["usage"]
    options = dict(zip(usage.split()[::2], usage.split()[1::2], strict=True))
    assert options["--kt-expert-placement-strategy"] == "frequency"
    ratio = float(options["--kt-gpu-experts-ratio"])
    mask = ktransformers_mask(options["--init-expert-location"], ratio, 13, 3, [1, 3, 11, 12])
    assert {str(layer): row.nonzero()[:, 0].tolist() for layer, row in enumerate(mask) if row.any()} == {
        layer: sorted(experts) for layer, experts in PINS.layers.items()
    }
    # With room for fewer experts, the first experts of each layer's list stay.
    fewer = ktransformers_mask("pins.pt", 4 / 12, 13, 3, [1, 3, 11, 12])
    assert fewer[[1, 3, 11, 12], [2, 0, 1, 2]].all()


def test_the_ktransformers_rule_matches_the_experts_of_whole_layers() -> None:
    export("pins.json", "pins.yaml", "--to", "ktransformers-rules")
    (rule,) = yaml.safe_load(Path("pins.yaml").read_text())
    modules = [
        f"model.layers.{layer}.{name}"
        for layer in range(40)
        for name in ("mlp", "mlp.experts", "mlp.shared_experts", "block_sparse_moe.experts", "mlp.experts.0.up_proj")
    ]
    matched = [name for name in modules if re.search(rule["match"]["name"], name)]
    assert matched == [f"model.layers.{n}.{part}.experts" for n in (3, 11) for part in ("mlp", "block_sparse_moe")]
    assert rule["replace"]["class"] == "ktransformers.operators.experts.KTransformersExperts"
    assert rule["replace"]["kwargs"] == {"generate_device": "cuda:0", "generate_op": "KExpertsMarlin"}
    assert rule["recursive"] is False


def test_the_pins_of_a_plan_are_exported() -> None:
    traces = tiny_traces(Path("traces"), sequences=8)
    assert main(["plan", "--traces", traces.folder, "--budget", "50%", "--pins", "planned.json"]) == 0
    pins = read_pins("planned.json")
    assert (pins.num_experts, pins.expert_bytes, pins.experts) == (TINY.num_experts, None, 16)
    assert export("planned.json", "pins.txt", "--to", "llama.cpp")["uses_share"] == 0.5
    assert export("planned.json", "pins.pt", "--to", "ktransformers")["uses_share"] == pins.uses_share > 0.5


def edited(**changes: Any) -> None:
    Path("pins.json").write_text(json.dumps(vars(PINS) | changes))


@pytest.mark.parametrize(
    ("changes", "words", "says"),
    [
        ({}, ("pins.json", "x", "--to", "vllm"), "unknown engine 'vllm'"),
        ({}, ("pins.json", "x"), "export pins needs --to ENGINE"),
        ({}, ("nowhere.json", "x", "--to", "llama.cpp"), "nowhere.json: cannot be read"),
        ({}, ("pins.json", "pins.json", "--to", "llama.cpp"), "pins.json already exists"),
        ({}, ("pins.json", "pins.txt", "--to", "ktransformers"), "pins.txt: ktransformers reads"),
        ({"more": 1}, (), "pins.json: is no list of experts to pin; write the file with moe-beyond plan --pins"),
        ({"num_experts": 0}, (), "pins.json: num_experts must be a whole number within 1..32767 (got 0)"),
        ({"uses_share": 2}, (), "pins.json: uses_share must be a number within 0..1 (got 2)"),
        ({"layers": {}}, (), "pins.json: layers must be an object of model layers, ascending (got "),
        ({"layers": {"3": [], "1": []}}, (), "pins.json: layers must be an object of model layers, ascending"),
        ({"layers": {"01": []}}, (), "pins.json: layers must be an object of model layers, ascending"),
        ({"layers": {"1|2": []}}, (), "pins.json: layers must be an object of model layers, ascending"),
        ({"layers": {"1": [3]}}, (), "pins.json: layer 1 must be a list of experts in 0..2"),
        ({"layers": {"1": [True]}}, (), "pins.json: layer 1 must be a list of experts in 0..2"),
        ({"layers": {"1": [1, 1]}}, (), "pins.json: layer 1 has an expert twice"),
        ({"expert_bytes": [1]}, (), "pins.json: expert_bytes must be 4 sizes (got a list of 1)"),
        ({"layers": {"1": [0, 1, 2]}}, (), "x: all experts of tiny are pinned; run llama.cpp without an override"),
        ({"layers": {"1": [0]}}, ("pins.json", "x", "--to", "ktransformers-rules"), "x: the rule places whole layers"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_left(
    changes: dict[str, Any], words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edited(**changes)
    before = sorted(Path().iterdir())
    assert main(["export", "pins", *(words or ("pins.json", "x", "--to", "llama.cpp"))]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert captured.err.removeprefix("moe-beyond: error: ").startswith(says)
    assert sorted(Path().iterdir()) == before
