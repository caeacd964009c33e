"""The projection of hidden states: its rows by linear algebra, and collections that use it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _helpers.common import error_line
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_beyond.cli.main import main
from moe_beyond.collect import collection
from moe_beyond.collect.collection import collect
from moe_beyond.collect.config import CollectConfig, ProcessRank
from moe_beyond.collect.prompts import Prompt
from moe_beyond.collect.recorder import _record_input, recording
from moe_beyond.collect.router_probe import find_routers
from moe_beyond.collect.state_projection import make_projection
from moe_beyond.errors import UserError
from moe_beyond.pretrained import shipped_folder
from moe_beyond.traces.hidden_states import HiddenStates
from moe_beyond.traces.reader import TraceSet

SMALL = shipped_folder("small-moe")
TEXTS = ["def main():", "The list of arguments", "import numpy as np\n\n", "Returns the number of items in a set."]
LAYERS, EXPERTS, FULL = 5, 4, 40
ROUTERS = np.random.default_rng(0).normal(size=(LAYERS, EXPERTS, FULL)).astype(np.float32)


@pytest.mark.parametrize("width", [2, 4, 9, 20, 39])
def test_rows_are_orthonormal_and_depend_on_the_layer_alone(width: int) -> None:
    projection = make_projection(ROUTERS, range(LAYERS), FULL, width)
    for matrices in (projection.router_inputs, projection.layer_inputs):
        assert matrices.shape == (LAYERS, width, FULL)
        for matrix in matrices.astype(np.float32):
            np.testing.assert_allclose(matrix @ matrix.T, np.eye(width), atol=3e-3)
    # What reads the residual stream next after a layer's router input also reads the next layer's input next.
    np.testing.assert_array_equal(projection.router_inputs[:-1], projection.layer_inputs[1:])
    some = make_projection(ROUTERS, [1, 3], FULL, width)
    np.testing.assert_array_equal(some.router_inputs, projection.router_inputs[[1, 3]])
    assert some.sha256 == make_projection(ROUTERS.copy(), [1, 3], FULL, width).sha256


def test_a_router_that_comes_next_loses_nothing_if_its_rows_fit() -> None:
    """The first router of a basis has the largest weight, so it is kept first; the last layers keep earlier routers."""
    states = np.random.default_rng(1).normal(size=(50, FULL))

    def error(matrix: np.ndarray, router: int) -> float:
        matrix, weight = matrix.astype(np.float64), ROUTERS[router].astype(np.float64)
        kept = states @ matrix.T @ matrix @ weight.T
        return float(np.linalg.norm(kept - states @ weight.T) / np.linalg.norm(states @ weight.T))

    three = make_projection(ROUTERS, range(LAYERS), FULL, (2 + 3) * EXPERTS)  # a basis is made of so many routers
    for layer in range(LAYERS - 1):
        assert error(three.router_inputs[layer], layer + 1) < 0.01
        assert error(three.layer_inputs[layer], layer) < 0.01
    assert error(three.router_inputs[-1], LAYERS - 1) < 0.01
    narrow = make_projection(ROUTERS, range(LAYERS), FULL, EXPERTS)
    random = make_projection(None, range(LAYERS), FULL, EXPERTS)
    for layer in range(LAYERS - 2):
        errors = [error(narrow.router_inputs[layer], layer + step) for step in (1, 2)]
        assert errors[0] < 0.6 < errors[1] < 1
        assert error(random.router_inputs[layer], layer + 1) > 0.85


@pytest.fixture(scope="module")
def small() -> Any:
    return AutoModelForCausalLM.from_pretrained(SMALL, dtype=torch.float32), AutoTokenizer.from_pretrained(SMALL)


def collected(small: Any, out: Path, **options: Any) -> TraceSet:
    prompts = [Prompt(text, f"p{number}") for number, text in enumerate(TEXTS)]
    config = CollectConfig(hidden_states=True, **options)
    traces = collect(*small, prompts, out, config, rank=ProcessRank(0, 1))
    assert traces is not None
    return traces


def test_stored_states_are_the_projected_and_coded_ones_of_a_full_recording(small: Any, tmp_path: Path) -> None:
    full = collected(small, tmp_path / "full", generate=4)
    half = collected(small, tmp_path / "half", generate=4, state_width=30)
    coded = collected(small, tmp_path / "coded", generate=4, state_width=30, state_dtype="int8", state_layers=3)
    weights = full.routers.weight
    projection = make_projection(weights, range(8), 128, 30)
    np.testing.assert_array_equal(half.projection.router_inputs, projection.router_inputs)
    np.testing.assert_array_equal(half.routers.weight, weights)
    assert coded.manifest.states.layers == (1, 3, 6)
    np.testing.assert_array_equal(coded.projection.layer_inputs, projection.layer_inputs[[0, 2, 5]])
    sets = (each.traces(hidden_states=True) for each in (full, half, coded))
    for whole, narrow, few in zip(*sets, strict=True):
        np.testing.assert_array_equal(whole.experts, few.experts)
        for kind in ("router_inputs", "layer_inputs"):
            states, matrices = getattr(whole.hidden_states, kind).astype(np.float32), getattr(projection, kind)
            expected = np.einsum("tld,lwd->tlw", states, matrices.astype(np.float32))
            found = getattr(narrow.hidden_states, kind)
            np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)
            scales = np.abs(found).max(-1, keepdims=True)[:, [0, 2, 5]] / 127
            assert (np.abs(getattr(few.hidden_states, kind) - expected[:, [0, 2, 5]]) <= 0.6 * scales + 2e-3).all()


def test_the_full_width_is_no_projection(small: Any, tmp_path: Path) -> None:
    traces = collected(small, tmp_path / "traces", state_width=128, state_layers=(3, 1))
    assert (traces.manifest.states.projected_from, traces.manifest.states.layers) == (None, (1, 3))
    assert traces.projection is None
    model = small[0]
    readers = {layer: router.module for layer, router in find_routers(model).items()}
    for trace in traces.traces(hidden_states=True):
        with recording(model, readers) as recorder, torch.inference_mode():
            model(torch.from_numpy(trace.token_ids.astype(np.int64))[None])
            (call,) = recorder.pop()
        states = call.hidden_states
        assert isinstance(states, HiddenStates)
        np.testing.assert_allclose(trace.hidden_states.router_inputs, states.router_inputs[:, [0, 2]], atol=4e-3)


def test_values_beyond_half_precision_are_cut_before_and_after_the_projection() -> None:
    model = torch.nn.Linear(4, 1)
    buffer: list[torch.Tensor] = []
    matrix = np.full((2, 4), 0.5, np.float16)
    handle = _record_input(model, buffer, matrix)
    model(torch.tensor([[1e9, 0, 0, 0], [60000, 60000, 60000, 60000]]))
    handle.remove()
    np.testing.assert_array_equal(buffer[0], [[65504 / 2] * 2, [np.inf] * 2])  # the recorder cuts infinity


FORM = "--state-layers: must be all, a number of layers, or a list of layers such as 1,5,9 (got {})"
LAYERS_OF_SMALL = "layer 0 is no MoE layer of small-moe; its MoE layers are 1, 2, 3, 4, 5, 6, 7, 8"
REFUSED = [
    (
        "--state-width",
        "129",
        "--state-width: must be at most 128, the width of the hidden states of small-moe (got 129)",
    ),
    ("--state-width", "0", "--state-width: must be a whole number from 1 (got 0)"),
    ("--state-dtype", "int4", "unknown --state-dtype 'int4'; did you mean 'int8'?"),
    ("--state-layers", "9", "--state-layers: small-moe has 8 MoE layers (got 9); give fewer"),
    ("--state-layers", "0,1", f"--state-layers: {LAYERS_OF_SMALL}"),
    ("--state-layers", "0", FORM.format(0)),
    *(("--state-layers", wrong, FORM.format(repr(wrong))) for wrong in ("1,,2", "-1", "half", "", ",")),
]


@pytest.mark.parametrize(("option", "value", "says"), REFUSED)
def test_wrong_options_are_refused_in_one_line(option: str, value: str, says: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    words = ["collect", "--model", "small-moe", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out"]
    record = ["--record", "experts,hidden_states"]
    assert error_line(capsys, [*words, *record, f"{option}={value}"]) == says
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


@pytest.mark.parametrize("option", ["--state-width=9", "--state-dtype=int8", "--state-layers=1,"])
def test_options_of_states_need_states(option: str, tmp_path: Path, capsys: Any) -> None:
    words = ["collect", "--model", "small-moe", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out"]
    name = option.partition("=")[0]
    assert error_line(capsys, [*words, option]) == f"{name}: needs hidden states; add hidden_states to --record"


def test_a_collection_resumes_only_with_the_same_form(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    words = ["collect", "--model", "small-moe", "--prompts", str(tmp_path / "prompts.txt"), "--quiet", "--batch-size=1"]
    words += ["--record", "experts,gate_weights,hidden_states"]

    def asked(name: str, **form: Any) -> list[str]:
        options = {"state-dtype": "int8", "state-width": 24, "state-layers": "all"} | form
        return [*words, "--out", str(tmp_path / name), *(f"--{option}={value}" for option, value in options.items())]

    assert main(asked("whole")) == 0
    written = collection.write_part

    def interrupted(path: Path, *rest: Any) -> None:
        if "000002" in path.name:
            raise KeyboardInterrupt
        written(path, *rest)

    monkeypatch.setattr(collection, "write_part", interrupted)
    assert main(asked("resumed")) != 0
    monkeypatch.setattr(collection, "write_part", written)
    capsys.readouterr()
    parts = tmp_path / ".resumed.collecting"
    assert len(list(parts.glob("*.states.safetensors"))) == 2
    for other in ({"state-width": 16}, {"state-dtype": "float16"}, {"state-layers": 4}):
        line = error_line(capsys, asked("resumed", **other))
        assert line.startswith(f"{parts}: contains an unfinished collection with different ")
        assert "states" in line
    assert main(asked("resumed", **{"state-layers": 8})) == 0  # all of them
    whole, resumed = (TraceSet(str(tmp_path / name)) for name in ("whole", "resumed"))
    assert whole.manifest.fingerprint == resumed.manifest.fingerprint
    assert whole.manifest.states == resumed.manifest.states
    assert whole.manifest.hidden_size == 24


def test_python_takes_the_same_settings() -> None:
    assert CollectConfig(hidden_states=True, state_layers=[1, 5]).state_layers == (1, 5)  # type: ignore[arg-type]
    for wrong in (0, (), True, "half", 1.5, (1, True)):
        with pytest.raises(UserError, match="--state-layers: must be all, a number of layers, or a list"):
            CollectConfig(hidden_states=True, state_layers=wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="state_dtype: must be text"):
        CollectConfig(hidden_states=True, state_dtype=8)  # type: ignore[arg-type]
