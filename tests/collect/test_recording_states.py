"""Recorded hidden states: the layer inputs that transformers returns, and the inputs by which routers choose."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from _helpers import moe_architectures as moes
from _helpers.fitting import CONFIGS, fit
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_beyond.cli.main import main
from moe_beyond.collect.collection import collect
from moe_beyond.collect.config import CollectConfig, ProcessRank
from moe_beyond.collect.geometry import measured_geometry
from moe_beyond.collect.prompts import Prompt
from moe_beyond.collect.recorder import recording
from moe_beyond.collect.router_probe import find_routers, stored_routers
from moe_beyond.errors import UserError
from moe_beyond.pretrained import shipped_folder
from moe_beyond.router_activations import ROUTER_ACTIVATIONS
from moe_beyond.traces.reader import TraceSet

SMALL = shipped_folder("small-moe")
TEXTS = ["def main():", "The list of arguments", "import numpy as np\n\n", "x", "Returns the number of items in a set."]
OTHER_WIDTHS = ("DeepseekV4ForCausalLM", "HYV4ForCausalLM", "Qwen4ExpForCausalLM", "ZayaForCausalLM")
"""Several streams a token between layers, or a router of several maps: what is read is not one state of one width."""


@pytest.mark.parametrize("name", [n for n in moes.architectures() if n not in (*moes.REFUSED, *OTHER_WIDTHS)])
def test_states_are_what_the_layers_read_and_the_routers_choose_by(name: str) -> None:
    model = moes.tiny_model(name)
    routers = find_routers(model)
    readers = {layer: router.module for layer, router in routers.items()}
    with recording(model, readers) as recorder, torch.inference_mode():
        expected_states = model(moes.PROMPT, output_hidden_states=True, use_cache=False).hidden_states
        (call,) = recorder.pop()
    states = call.hidden_states
    assert states is not None
    for column, layer in enumerate(recorder.moe_layers):
        expected = expected_states[layer].reshape(moes.PROMPT.numel(), -1).float()
        scale = float(expected.abs().max())
        np.testing.assert_allclose(states.layer_inputs[:, column], expected, atol=2e-3 * scale)
    stored = stored_routers(routers, measured_geometry(model, "tiny", call.experts.shape[-1]))
    assert stored is not None
    read = torch.from_numpy(states.router_inputs).float()
    logits = torch.einsum("nld,led->nle", read, torch.from_numpy(stored.weight))
    scores = ROUTER_ACTIVATIONS[stored.scoring](logits + (0 if stored.bias is None else torch.from_numpy(stored.bias)))
    scores = scores + (0 if stored.selection_bias is None else torch.from_numpy(stored.selection_bias))
    top = scores.topk(call.experts.shape[-1]).indices
    chosen = torch.from_numpy(call.experts)
    shared = (top[..., None] == chosen[..., None, :]).any(-1)[chosen >= 0].float().mean()  # where holes are, less
    assert shared > (0.5 if moes.groups(model) or model.config.model_type == "longcat_flash" else 0.97)


def test_what_half_precision_cannot_hold_is_its_largest() -> None:
    model = copy.deepcopy(moes.tiny_model("MixtralForCausalLM"))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1e9)
    with recording(model, {}) as recorder, torch.inference_mode():
        model(moes.PROMPT)
        (call,) = recorder.pop()
    assert call.hidden_states is not None
    first = call.hidden_states.layer_inputs[:, 0]
    assert np.isfinite(first).all()
    assert np.abs(first).max() == np.finfo(np.float16).max


@pytest.mark.parametrize("name", OTHER_WIDTHS)
def test_what_has_no_state_of_one_width_is_refused(name: str, small: Any, tmp_path: Path) -> None:
    model = moes.tiny_model(name, vocab_size=len(small[1]))
    asked = CollectConfig(hidden_states=True)
    with pytest.raises(UserError, match="hidden states of such a model cannot be recorded"):
        collect(model, small[1], [Prompt("x", "p")], tmp_path / "traces", asked, rank=ProcessRank(0, 1))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def small() -> Any:
    return AutoModelForCausalLM.from_pretrained(SMALL, dtype=torch.float32), AutoTokenizer.from_pretrained(SMALL)


def collected(small: Any, out: Path, **asked: Any) -> TraceSet:
    prompts = [Prompt(text, f"p{n}", split="validation" if n == 3 else "train") for n, text in enumerate(TEXTS)]
    traces = collect(*small, prompts, out, CollectConfig(hidden_states=True, **asked), rank=ProcessRank(0, 1))
    assert traces is not None
    return traces


def test_batches_padding_and_writing_give_the_same_states(small: Any, tmp_path: Path) -> None:
    alone = collected(small, tmp_path / "alone", batch_size=1, generate=5)
    together = collected(small, tmp_path / "together", batch_size=8, generate=5)
    model = small[0]
    for one, other in zip(alone.traces(hidden_states=True), together.traces(hidden_states=True), strict=True):
        assert one.sequence_id == other.sequence_id
        assert one.decode_start < len(one)
        with recording(model, {}) as recorder, torch.inference_mode():
            model(torch.from_numpy(one.token_ids.astype(np.int64))[None])
            (call,) = recorder.pop()
        for name in ("router_inputs", "layer_inputs"):
            three = one.hidden_states, other.hidden_states, call.hidden_states
            first, second, read = (getattr(states, name) for states in three)
            np.testing.assert_allclose(first, second, atol=4e-3)
            np.testing.assert_allclose(first, read, atol=4e-3)


def test_a_set_with_states_is_one_of_entries_too(small: Any, tmp_path: Path) -> None:
    traces = collected(small, tmp_path / "traces", batch_size=2)
    assert traces.manifest.hidden_size == small[0].config.hidden_size
    loaded = datasets.load_dataset(traces.folder, cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 4, "validation": 1}
    weight = small[0].model.layers[3].mlp.gate.weight.detach().numpy()
    assert traces.routers is not None
    np.testing.assert_array_equal(traces.routers.weight[2], weight)
    assert "hidden states" in (tmp_path / "traces" / "README.md").read_text()


def test_next_gate_reads_what_was_collected(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS[:2] * 8))
    record = ["--record", "experts,gate_weights,hidden_states"]
    words = ["collect", "--model", str(SMALL), "--prompts", str(tmp_path / "prompts.txt"), *record]
    assert main([*words, "--out", str(tmp_path / "traces"), "--generate", "8"]) == 0
    counting = ["-c", str(CONFIGS / "trainer/counting.yaml"), "-c", str(CONFIGS / "model/next_gate.yaml")]
    run = fit(tmp_path, tmp_path / "traces", *counting, "--data.val_split=null")
    capsys.readouterr()
    asked = ["evaluate", str(run / "predictor"), "--traces", str(tmp_path / "traces"), "--budget", "25%"]
    assert main([*asked, "--json", "-"]) == 0
    near, _, far = json.loads(capsys.readouterr().out)["metrics"]
    assert near["recall_at_k"] > far["recall_at_k"] > 2 * 3 / 24  # twice what chance gives
    assert near["gate_mass_at_k"] > near["recall_at_k"]  # heavy experts are easier to name


@pytest.mark.slow
def test_killed_with_states_it_goes_on(small: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(f"{n} {TEXTS[n % 2]}" for n in range(40)))
    words = [
        *(sys.executable, "-m", "moe_beyond", "collect", "--model", str(SMALL), "--batch-size", "1", "--quiet"),
        *("--prompts", str(tmp_path / "prompts.txt"), "--record", "experts,gate_weights,hidden_states"),
    ]
    pieces = tmp_path / ".killed.collecting"
    running = subprocess.Popen([*words, "--out", str(tmp_path / "killed")])
    while len(list(pieces.glob("*.parquet"))) < 5:
        assert running.poll() is None
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    # As if it had died between the two files of a piece.
    sorted(pieces.glob("0*.parquet"))[0].unlink()
    for name in ("killed", "whole"):
        subprocess.run([*words, "--out", str(tmp_path / name)], check=True)
    prints = {TraceSet(str(tmp_path / name)).manifest.fingerprint for name in ("killed", "whole")}
    assert len(prints) == 1
