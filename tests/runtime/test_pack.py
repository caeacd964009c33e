"""Packed models: equal to the original, aligned, one read per expert, and refusals before anything is written."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from _helpers import moe_architectures as moes
from safetensors import safe_open
from transformers import AutoConfig

from moe_beyond.collect.load import EXPERTS_FILE, Checkpoint, open_checkpoint
from moe_beyond.errors import UserError
from moe_beyond.runtime.slab import PAGE
from moe_beyond.runtime.storage import bare_loading
from moe_beyond.runtime.storage.bare_loading import load_bare
from moe_beyond.runtime.storage.checkpoint_index import index_checkpoint
from moe_beyond.runtime.storage.disk_store import DiskStore
from moe_beyond.runtime.storage.pack import pack

NAMES = (
    "MixtralForCausalLM", "DeepseekV2ForCausalLM", "GptOssForCausalLM", "Inkling2ForCausalLM", "AriaTextForCausalLM",
    "Ernie4_5_MoeForCausalLM", "NemotronHForCausalLM", "Qwen4ExpForCausalLM",
)  # fmt: skip
"""One architecture of each kind of conversion, with weights that stay in float32, and with biases."""


def checkpoint_of(folder: Path) -> Checkpoint:
    """The files of a tiny model, which has no tokenizer."""
    return Checkpoint(str(folder), folder, None, None, AutoConfig.from_pretrained(folder), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in NAMES if name in moes.architectures()])  # earlier releases lack one
def test_a_packed_model_equals_the_original(
    name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bare_loading, "AutoModelForCausalLM", moes.model_class(name))
    moes.tiny_model(name).save_pretrained(tmp_path / "a", max_shard_size="200KB")
    checkpoint = checkpoint_of(tmp_path / "a")
    result = pack(checkpoint, tmp_path / "b", dtype=dtype)
    packed = checkpoint_of(tmp_path / "b")
    assert sorted(path.name for path in packed.folder.iterdir()) == [
        "config.json", EXPERTS_FILE, "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    original, layers = load_bare(checkpoint, dtype)
    again, packed_layers = load_bare(packed)  # the type is that of the configuration
    assert original.state_dict().keys() == again.state_dict().keys()
    for key, tensor in original.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key])
        assert tensor.dtype == again.state_dict()[key].dtype
    sources = DiskStore(index_checkpoint(checkpoint, original, layers))
    index = index_checkpoint(packed, again, packed_layers)
    store = DiskStore(index)
    assert result.experts == len(index.entries) == len(layers) * moes.EXPERTS
    assert result.expert_bytes == (packed.folder / EXPERTS_FILE).stat().st_size
    for expert, entry in enumerate(index.entries):
        layer = expert // moes.EXPERTS
        assert len(entry.segments) == 1
        assert entry.segments[0].offset % PAGE == entry.segments[0].length % PAGE == 0
        slabs = [np.zeros(layout[layer].stride, np.uint8) for layout in (sources.layouts, store.layouts)]
        sources.read(expert, slabs[0])
        store.read(expert, slabs[1])
        views = [
            layout[layer].views(torch.from_numpy(slab)[None])
            for layout, slab in zip((sources.layouts, store.layouts), slabs, strict=True)
        ]
        assert views[0].keys() == views[1].keys()
        assert all(torch.equal(views[0][field], views[1][field]) for field in views[0])


def test_the_file_of_experts_is_a_safetensors_file(tmp_path: Path) -> None:
    checkpoint, counts = open_checkpoint("small-moe"), []
    pack(checkpoint, tmp_path / "p", progress=lambda done, total: counts.append((done, total)))
    assert counts == [(done, len(counts)) for done in range(1, len(counts) + 1)]
    with safe_open(tmp_path / "p" / EXPERTS_FILE, "pt") as file:
        assert len(file.keys()) == len(counts)
        assert file.get_tensor("layer.0.expert.0").dtype == torch.uint8
        assert json.loads(file.metadata()["layouts"])[0][0]["name"] == "gate_up_proj"
    again = open_checkpoint(str(tmp_path / "p"))
    assert again.tokenizer.get_vocab() == checkpoint.tokenizer.get_vocab()
    with pytest.raises(UserError, match="its files lack"):
        again.load()
    with pytest.raises(UserError, match="is packed already; give the original checkpoint"):
        pack(again, tmp_path / "q")


def test_another_type_or_model_is_refused(tmp_path: Path) -> None:
    for name, experts in (("a", 8), ("b", 4)):
        moes.tiny_model("MixtralForCausalLM", num_local_experts=experts).save_pretrained(tmp_path / name)
        pack(checkpoint_of(tmp_path / name), tmp_path / f"{name}-packed")
    packed = checkpoint_of(tmp_path / "a-packed")
    bare, layers = load_bare(packed, "bfloat16")
    with pytest.raises(UserError, match=r"is packed in float32 \(got dtype bfloat16\); leave dtype out, or pack"):
        index_checkpoint(packed, bare, layers)
    shutil.copyfile(tmp_path / "b-packed" / EXPERTS_FILE, packed.folder / EXPERTS_FILE)
    bare, layers = load_bare(packed)
    with pytest.raises(UserError, match="lacks the slab of expert 4 of layer 0; pack the model again"):
        index_checkpoint(packed, bare, layers)
    with (packed.folder / EXPERTS_FILE).open("r+b") as file:
        file.truncate(3 * PAGE)
    with pytest.raises(UserError, match="is a damaged safetensors file"):
        index_checkpoint(packed, bare, layers)


def test_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, out = open_checkpoint("small-moe"), tmp_path / "out"

    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(checkpoint, out, progress=interrupt)
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 10**5))
        with pytest.raises(UserError, match=r"its disk has too little space \(got 0\.0001 GB, needs 0\.\d+ GB\)"):
            pack(checkpoint, out)
    assert not list(tmp_path.iterdir())
    (out / "mine").mkdir(parents=True)
    with pytest.raises(UserError, match="already exists"):
        pack(checkpoint, out)
