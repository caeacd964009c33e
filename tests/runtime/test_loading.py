"""Every mixture of experts of the installed transformers: loaded without experts, and every expert read on its own."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _helpers import moe_architectures as moes
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, core_model_loading

from moe_beyond.collect.geometry import measured_geometry
from moe_beyond.collect.load import Checkpoint, open_checkpoint
from moe_beyond.errors import UserError
from moe_beyond.runtime.experts import find_offloadable, runtime_geometry
from moe_beyond.runtime.slab import SlabField
from moe_beyond.runtime.storage import bare_loading
from moe_beyond.runtime.storage.bare_loading import load_bare
from moe_beyond.runtime.storage.checkpoint_index import _numbers_of_experts, _placement, index_checkpoint
from moe_beyond.runtime.storage.disk_store import DiskStore
from moe_beyond.runtime.storage.expert_index import Source
from moe_beyond.runtime.storage.stored_tensors import stored_tensors
from moe_beyond.safetensors_header import read_header

UNDECORATED = ("dbrx", "jetmoe", "llama4", "longcat_flash")
DECORATED = [
    name for name, folder in moes.architectures().items() if name not in moes.REFUSED and folder not in UNDECORATED
]


def checkpoint_of(folder: Path, config: Any = None) -> Checkpoint:
    """The files of a tiny model, which has no tokenizer."""
    config = config or AutoConfig.from_pretrained(folder)
    return Checkpoint(str(folder), folder, None, None, config, None)  # type: ignore[arg-type]


def saved(folder: Path, name: str = "MixtralForCausalLM", **more: Any) -> tuple[Checkpoint, Any]:
    model = moes.tiny_model(name)
    model.save_pretrained(folder, **more)
    return checkpoint_of(folder, model.config), model


def check_rows(store: Any, layers: Any, whole: Any) -> None:
    """Every expert that a store reads equals the rows of the parameters of the whole model."""
    for position, layer in layers.items():
        module = whole.get_submodule(layer.name)
        slab = np.zeros(store.layouts[position].stride, np.uint8)
        for expert in range(layer.num_experts):
            slab[:] = 255
            source = store.read(position * layer.num_experts + expert, slab)
            assert source.host == 0
            assert source.page_cache + source.disk >= layer.layout.nbytes // 2
            for field, view in store.layouts[position].views(torch.from_numpy(slab)[None]).items():
                assert torch.equal(view[0], getattr(module, field)[expert]), (layer.name, field, expert)


@pytest.mark.parametrize("name", DECORATED)
def test_every_architecture_is_loaded_without_experts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = moes.model_class(name)
    monkeypatch.setattr(bare_loading, "AutoModelForCausalLM", kind)  # some text models have no automatic class
    checkpoint, _ = saved(tmp_path, name, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    # As stored for all; conversions to another type do not depend on the architecture, so every third one has them.
    for dtype in ("float32", "bfloat16")[: 2 if DECORATED.index(name) % 3 == 0 else 1]:
        whole = kind.from_pretrained(tmp_path, dtype=dtype)
        bare, layers = load_bare(checkpoint, dtype=dtype)
        removed = {f"{layer.name}.{field.name}" for layer in layers.values() for field in layer.layout.fields}
        held = bare.state_dict()
        assert held.keys() == whole.state_dict().keys() - removed
        assert removed
        for key, tensor in held.items():
            assert key.endswith("balancing_biases") or torch.equal(tensor, whole.state_dict()[key])  # of zaya: random
        for layer in layers.values():
            assert all(getattr(layer.module, field.name) is None for field in layer.layout.fields)
        assert not any(tensor.is_meta for tensor in (*bare.parameters(), *bare.buffers()))
        assert vars(bare).keys() == vars(whole).keys() | {"is_quantized"}
        assert not bare.is_quantized
        assert bare.config.to_dict() == whole.config.to_dict()
        store = DiskStore(index_checkpoint(checkpoint, bare, layers))
        check_rows(store, layers, whole)
        store.close()


def test_experts_are_neither_read_nor_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, model = saved(tmp_path)
    read: list[int] = []
    materialize = core_model_loading.spawn_materialize

    def spy(pool: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        read.append(int(np.prod(tensor.get_shape())))
        return materialize(pool, tensor, *args, **kwargs)

    monkeypatch.setattr(core_model_loading, "spawn_materialize", spy)
    bare, layers = load_bare(checkpoint)
    experts = sum(layer.num_experts * layer.layout.params for layer in layers.values())
    assert (
        sum(read) == sum(p.numel() for p in bare.parameters()) == sum(p.numel() for p in model.parameters()) - experts
    )
    top_k = model.config.num_experts_per_tok
    assert runtime_geometry(bare, layers, "m", top_k) == measured_geometry(model, "m", top_k)
    with pytest.raises(UserError, match="has no parameters of its 8 experts; give a model with its weights"):
        find_offloadable(bare)
    again = type(model).from_pretrained(tmp_path)  # other loads are as before
    assert again.state_dict().keys() == model.state_dict().keys()


def test_adjacent_tensors_are_one_read(tmp_path: Path) -> None:
    """small-moe stores the matrices of an expert one after another, in the order of their names."""
    checkpoint = open_checkpoint("small-moe")
    bare, layers = load_bare(checkpoint)
    index = index_checkpoint(checkpoint, bare, layers)
    assert len(index.entries) == index.num_experts * len(layers)
    for entry in index.entries:
        assert len(entry.segments) == 1
        assert not entry.conversions
        assert entry.segments[0].length == layers[0].layout.nbytes
    assert index.describe(index.num_experts + 2) == f"expert 2 of layer {layers[1].layer} in model.safetensors"


@pytest.mark.parametrize("direct_io", [False, True])
def test_moved_values_of_another_type_are_converted(tmp_path: Path, *, direct_io: bool) -> None:
    """A checkpoint in float32 read in bfloat16, and a conversion that moves single values."""
    for name, dtype in (("Qwen3MoeForCausalLM", "bfloat16"), ("AriaTextForCausalLM", "float16")):
        checkpoint, model = saved(tmp_path / name, name)
        bare, layers = load_bare(checkpoint, dtype=dtype)
        index = index_checkpoint(checkpoint, bare, layers)
        assert all(entry.conversions and not entry.segments for entry in index.entries)
        store = DiskStore(index, direct_io=direct_io)
        slab = np.zeros(layers[0].layout.stride, np.uint8)
        assert sum(store.read(0, slab)) == 4 * layers[0].layout.params
        check_rows(store, layers, model.to(getattr(torch, dtype)))


@pytest.mark.parametrize(
    ("convert", "runs"),
    [
        (lambda x: torch.cat([x[0], x[1]], 0), 2),
        (lambda x: torch.cat([x[1], x[0]], 1), 64),
        (lambda x: torch.stack([x[0], x[1]], 1).view(64, 32), 64),
        (lambda x: torch.cat([x[0][:16], x[1][16:], x[0][:16], x[1][16:]], 0), 4),
        (lambda x: torch.cat([x[0].T, x[1].T], 0), None),
        (lambda x: 2 * torch.cat(x, 0), None),
        (lambda x: torch.cat(x, 0) + 1, None),
        (lambda x: -torch.cat(x, 0), None),
        (lambda x: torch.cat(x, 0).float(), None),
    ],
)
def test_runs_are_read_off_addresses(convert: Any, runs: int | None) -> None:
    """The runs of two stored matrices, moved as they are, move any values as the conversion does."""
    values = [torch.randn(32, 32) for _ in range(2)]
    expected = convert(values)
    field = SlabField("w", tuple(expected.shape), torch.float32, 0)
    found = _placement(convert, [Source(0, 0, (32, 32), torch.float32)] * 2, field)
    assert (None if found is None else len(found)) == runs
    if found is not None:
        moved = torch.zeros(expected.numel())
        for run in found:
            moved[run.place : run.place + run.length] = values[run.source].view(-1)[run.begin : run.begin + run.length]
        assert torch.equal(moved.view_as(expected), expected)


def rewritten(folder: Path, change: Any) -> None:
    """Change the tensors of a saved model."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


EXPERT = "model.layers.2.block_sparse_moe.experts.5.w1.weight"


def removed(*keys: str) -> Any:
    def change(tensors: Any) -> None:
        for key in keys:
            del tensors[key]

    return change


def added(key: str, tensor: torch.Tensor) -> Any:
    return lambda tensors: tensors.update({key: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (removed(EXPERT), "its files lack expert 5 of layer 2, whose tensors are named as"),
        (removed(*(EXPERT.replace("5.w1", f"{n}.w2") for n in range(8))), "its files lack the experts of layer 2"),
        (added(EXPERT, torch.zeros(3, 64)), "the weights of expert 5 of layer 2 do not have the shapes of its config"),
        (added(EXPERT.replace("5.w1", "8.w1"), torch.zeros(32, 64)), "layer 2 has more experts than its config"),
    ],
)
def test_missing_and_wrong_experts_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    checkpoint, _ = saved(tmp_path)
    rewritten(tmp_path, change)
    bare, layers = load_bare(checkpoint)
    with pytest.raises(UserError) as error:
        index_checkpoint(checkpoint, bare, layers)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_weights_and_quantized_checkpoints_are_refused(tmp_path: Path) -> None:
    checkpoint, _ = saved(tmp_path)
    checkpoint.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(UserError, match=r"quantized \(got fp8\); in Python, load it with FineGrainedFP8Config"):
        load_bare(checkpoint)
    del checkpoint.config.quantization_config
    rewritten(tmp_path, removed("model.layers.1.self_attn.q_proj.weight"))
    with pytest.raises(UserError, match=r"its files lack model\.layers\.1\.self_attn\.q_proj\.weight"):
        load_bare(checkpoint)


def test_undecorated_and_dense_checkpoints_are_refused(tmp_path: Path) -> None:
    checkpoint, _ = saved(tmp_path / "a", "DbrxForCausalLM")
    with pytest.raises(UserError, match="experts are computed outside transformers' experts registry"):
        load_bare(checkpoint)
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=0
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "b")
    with pytest.raises(UserError, match="LlamaForCausalLM: has no experts module"):
        load_bare(Checkpoint("dense", tmp_path / "b", None, None, config, None))  # type: ignore[arg-type]


def header(content: Any, data: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(begin: int, end: int, shape: tuple[int, ...] = (4,), dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no header"),
        (b"\xff" * 8, "no header"),
        (header([]), "is no object"),
        (header(b"{ "), "is not JSON"),
        (header(b'{"a": 1, "a": 2}'), "has key 'a' twice"),
        (header({"a": {"dtype": "U8"}}), "no valid entry for 'a'"),
        (header({"a": tensor(0, 4, (-4,))}), "no valid entry for 'a'"),
        (header({"a": tensor(0, 4, dtype="X")}, b"0000"), "unknown type (got 'X')"),
        (header({"a": tensor(0, 4, (5,))}, b"0000"), "'a' has 4 bytes, which its shape [5] contradicts"),
        (header({"a": tensor(0, 4)}, b"000"), "bytes instead of"),
        (header({"a": tensor(0, 4)}, b"00000"), "bytes instead of"),
        (header({"a": tensor(0, 4), "b": tensor(2, 6)}, b"000000"), "'b' does not follow"),
        (header({"a": tensor(0, 4), "b": tensor(5, 9)}, b"000000000"), "'b' does not follow"),
    ],
)
def test_damaged_headers_are_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_header(path)
    assert str(error.value).startswith(f"{path}: ")
    assert reason in str(error.value)


def test_an_incomplete_index_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, max_shard_size="200KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = shard.name
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"m: its files lack 'ghost', which model\.safetensors\.index\.json lists"):
        stored_tensors(tmp_path, "m")
    shard.unlink()
    with pytest.raises(UserError, match=rf"m: has no {shard.name}"):
        stored_tensors(tmp_path, "m")
    index.write_text(json.dumps({"weight_map": content["weight_map"]}))
    with pytest.raises(UserError, match=r"m: model\.safetensors\.index\.json has no metadata; add"):
        stored_tensors(tmp_path, "m")


def test_a_damaged_file_is_named_before_the_model_is_loaded(tmp_path: Path) -> None:
    checkpoint, _ = saved(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError) as error:
        load_bare(checkpoint)
    assert str(error.value).startswith(f"{path}: is a damaged safetensors file (")


def test_experts_are_counted_by_the_number_that_varies() -> None:
    assert _numbers_of_experts(["layers.3.w2.0.weight", "layers.3.w2.2.weight"]) == [0, 2]
    assert _numbers_of_experts(["layers.3.w2"]) == [0]
