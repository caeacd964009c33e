"""Models whose weights are elsewhere: recorded as those that are here, or refused in one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _helpers.common import error_line
from _helpers.moe_architectures import tiny_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import moe_beyond as mb
from moe_beyond.cli.main import main
from moe_beyond.collect.devices import describe, input_device
from moe_beyond.collect.resume import _differences, digest, digests
from moe_beyond.errors import UserError
from moe_beyond.pretrained import shipped_folder
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.steering import Steering

SMALL = shipped_folder("small-moe")
PROMPTS = ["def f(x):\n    return", "import os"]
STEERING = Steering(((2, 1),), ((3, 0),))
HALF = {
    **{name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")},
    **{f"model.layers.{layer}": "cpu" if layer < 4 else "disk" for layer in range(9)},
}


def loaded(**more: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(SMALL, dtype=torch.float32, **more)


def recorded(model: Any, out: Path, **asked: Any) -> TraceSet:
    return mb.record(model, AutoTokenizer.from_pretrained(SMALL), PROMPTS, out, **asked)


def check_same(one: TraceSet, other: TraceSet) -> None:
    """Entries are equal; numbers agree in half precision, since rounding depends on where a weight is in memory."""
    assert sorted(path.name for path in Path(one.folder).iterdir()) == sorted(
        path.name for path in Path(other.folder).iterdir()
    )
    kept = one.manifest.hidden_size is not None
    for trace, again in zip(one.traces(hidden_states=kept), other.traces(hidden_states=kept), strict=True):
        assert np.array_equal(trace.token_ids, again.token_ids)
        assert np.array_equal(trace.experts, again.experts)
        np.testing.assert_allclose(trace.gate_weights, again.gate_weights, atol=2e-3)
        if trace.hidden_states is not None and again.hidden_states is not None:
            for name in ("router_inputs", "layer_inputs"):
                states, others = (getattr(each.hidden_states, name) for each in (trace, again))
                np.testing.assert_allclose(states, others, rtol=2e-3, atol=2e-3)
    assert (one.routers is None) == (other.routers is None)
    if one.routers is not None and other.routers is not None:
        assert np.array_equal(one.routers.weight, other.routers.weight)


@pytest.mark.parametrize("place", ["cpu and disk", "all on the host", "all on disk"])
def test_an_offloaded_model_is_recorded_as_one_that_is_not(tmp_path: Path, place: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    if place == "cpu and disk":
        model = loaded(device_map=HALF, offload_folder=tmp_path / "off")
        assert describe(model) == "cpu, disk"
    else:
        model = loaded()
        if place == "all on disk":
            accelerate.disk_offload(model, tmp_path / "off", execution_device=torch.device("cpu"))
        else:
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert model.device.type == "meta"
    assert input_device(model) == torch.device("cpu")
    for name, asked in (("states", {"generate": 8, "hidden_states": True}), ("steered", {"steering": STEERING})):
        plain = recorded(loaded(), tmp_path / "plain" / name, **asked)
        check_same(plain, recorded(model, tmp_path / "offloaded" / name, **asked))
        assert (plain.routers is not None) == (name == "states")


def test_the_command_takes_a_device_map(tmp_path: Path, capsys) -> None:
    pytest.importorskip("accelerate")
    (tmp_path / "map.json").write_text(json.dumps(HALF))
    (tmp_path / "p.txt").write_text("def f(x):\nimport os\n")
    words = ["collect", "--model", SMALL, "--prompts", tmp_path / "p.txt", "--dtype", "float32"]
    for device, said in ((tmp_path / "map.json", "on cpu, disk\n"), ("cpu", "on cpu\n"), ("auto", "on cpu\n")):
        out = tmp_path / f"traces-{Path(device).stem}"
        assert main([str(word) for word in (*words, "--out", out, "--device", device)]) == 0
        assert f"2 sequences, 9 tokens, {said}" in capsys.readouterr().out
    sets = [TraceSet(str(tmp_path / f"traces-{name}")) for name in ("map", "cpu", "auto")]
    check_same(sets[0], sets[1])
    check_same(sets[0], sets[2])
    assert not list(tmp_path.glob(".*"))


def test_a_model_without_a_head_is_read(tmp_path: Path) -> None:
    bare = AutoModel.from_pretrained(SMALL, dtype=torch.float32)
    check_same(recorded(loaded(), tmp_path / "a" / "t"), recorded(bare, tmp_path / "b" / "t"))
    with pytest.raises(UserError) as error:
        recorded(bare, tmp_path / "c" / "t", generate=2)
    assert str(error.value) == (
        "--generate 2: DeepseekV2Model has no language-model head; load it with AutoModelForCausalLM, or record "
        "only prefill (--generate 0)"
    )
    assert not (tmp_path / "c").exists()


class Sharded(torch.Tensor):
    """A tensor whose numbers are in other processes, as a DTensor's: to look at them is an error."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ not in ("__get__", "dim", "size", "numel", "detach", "requires_grad_"):
            raise NotImplementedError(f"{func.__name__}: numbers are elsewhere")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_what_has_no_bytes_here_is_known_by_its_shape() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
    whole = {"weights": digest(model), "parameters": digests(model)}
    assert whole["weights"] is not None
    model["b"].to("meta")
    model["a"].bias = nn.Parameter(torch.Tensor._make_subclass(Sharded, torch.ones(2)), requires_grad=False)
    part = {"weights": digest(model), "parameters": digests(model)}
    assert part["weights"] is None
    assert part["parameters"] | {"a.weight": None} == {
        "a.weight": None, "a.bias": [[2], None], "b.weight": [[2, 3], None], "b.bias": [[2], None]
    }  # fmt: skip
    # What one run had here and another had not is the same as far as both know; what both had, or a shape, may differ.
    assert _differences(whole, part) == _differences(part, whole) == ""
    with torch.no_grad():
        model["a"].weight += 1
    other = {"weights": digest(model), "parameters": digests(model)}
    assert _differences(whole, other) == _differences(other, part) == "weights"
    grown = {"weights": None, "parameters": part["parameters"] | {"b.bias": [[4], None]}}
    assert _differences(whole, grown) == "weights"
    # A record without digests by parameter cannot identify a model that is offloaded in part.
    assert _differences({"weights": whole["weights"]}, whole) == ""
    assert _differences({"weights": whole["weights"]}, part) == "weights"


def test_a_model_of_distributed_tensors_is_recorded(tmp_path: Path) -> None:
    """As of tensor parallelism; a mesh of one process makes DTensors all the same."""
    from torch import distributed
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    model = tiny_model("MixtralForCausalLM", vocab_size=2048)
    tokenizer = AutoTokenizer.from_pretrained(SMALL)
    plain = mb.record(model, tokenizer, PROMPTS, tmp_path / "plain" / "t")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            projection = layer.self_attn.q_proj
            projection.weight = nn.Parameter(distribute_tensor(projection.weight.detach(), mesh, [Shard(0)]))
            projection.register_forward_pre_hook(
                lambda module, args: (distribute_tensor(args[0], mesh, [Replicate()]),)
            )
            projection.register_forward_hook(lambda module, args, output: output.full_tensor())
        assert digest(model) is None
        sharded = mb.record(model, tokenizer, PROMPTS, tmp_path / "sharded" / "t")
    finally:
        distributed.destroy_process_group()
    for one, other in zip(plain.traces(), sharded.traces(), strict=True):
        assert np.array_equal(one.experts, other.experts)


def test_a_collection_goes_on_where_its_weights_lie_elsewhere(tmp_path: Path, monkeypatch) -> None:
    """As device_map="auto" does from run to run."""
    pytest.importorskip("accelerate")
    from moe_beyond.collect import collection as collecting

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(collecting, "merge_parts", stop)
    with pytest.raises(KeyboardInterrupt):
        recorded(loaded(), tmp_path / "t")
    monkeypatch.undo()
    assert recorded(loaded(device_map=HALF, offload_folder=tmp_path / "off"), tmp_path / "t").manifest.tokens


def test_an_unknown_option_and_a_wrong_number_are_one_line(tmp_path: Path, capsys) -> None:
    model = tiny_model("MixtralForCausalLM", vocab_size=2048)
    tokenizer = AutoTokenizer.from_pretrained(SMALL)
    for asked, says in (
        ({"genrate": 2}, "record: unknown argument 'genrate'; did you mean 'generate'?"),
        ({"generate": "2"}, "--generate: must be a whole number from 0 (got '2')"),
        ({"batch_size": 0}, "--batch-size: must be a whole number from 1 (got 0)"),
        ({"temperature": 1.0}, "--temperature: needs --generate N (got 1.0); add --generate"),
        ({"val_blocks": "2"}, "--val-blocks '2': write SIZE:EVERY"),
    ):
        with pytest.raises(UserError) as error:
            mb.record(model, tokenizer, ["a"], tmp_path / "t", **asked)
        assert str(error.value).startswith(says)
    chats = [[{"role": "user", "content": "hi"}], "text", {"prompt": "record"}]
    with pytest.raises(UserError, match="prompt-1: is a chat, and the tokenizer has no chat template"):
        mb.record(model, tokenizer, chats, tmp_path / "t")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    traces = list(mb.record(model, tokenizer, chats, tmp_path / "t").traces())
    assert [tokenizer.decode(trace.token_ids, skip_special_tokens=True) for trace in traces] == ["hi", "text", "record"]
    words = ["collect", "--model", SMALL, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "t"]
    assert error_line(capsys, words).endswith("already exists; choose another folder or remove it")  # before prompts
