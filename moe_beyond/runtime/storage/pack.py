"""Packing: a copy of a checkpoint whose experts are contiguous slabs, so that each is one aligned read.

The folder holds the experts in a file of their own, the other weights as they were stored, and the small files.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_beyond.collect.load import EXPERTS_FILE, SMALL_FILES, Checkpoint
from moe_beyond.errors import UserError
from moe_beyond.files import check_is_elsewhere, check_is_free, read_json, replacing_folder
from moe_beyond.pretrained import CONFIG_FILE, WEIGHTS_FILE
from moe_beyond.runtime.slab import Bytes
from moe_beyond.runtime.storage.bare_loading import load_bare
from moe_beyond.runtime.storage.checkpoint_index import assign_keys, expert_parameters, index_checkpoint
from moe_beyond.runtime.storage.disk_store import DiskStore
from moe_beyond.runtime.storage.packed_experts import packed_header, packed_layouts
from moe_beyond.runtime.storage.stored_tensors import INDEX_FILE, stored_tensors
from moe_beyond.safetensors_header import StoredTensor, header_bytes

BLOCK = 1 << 24
"""Bytes per read of a weight that is copied."""
SPARE = 1 << 20
"""Bytes left free on the disk for the small files."""
DTYPE_FIELDS = ("dtype", "torch_dtype")
"""Fields of a configuration with the type of the weights; earlier versions of transformers write the second."""


@dataclass(frozen=True)
class Pack:
    """A packed model.

    Attributes:
        folder: Folder of the model.
        dtype: Type of the experts.
        experts: Number of experts in all layers.
        expert_bytes: Size of the file of experts, in bytes.
        other_bytes: Size of the other weights, in bytes.
    """

    folder: str
    dtype: str
    experts: int
    expert_bytes: int
    other_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return the attributes as a dictionary."""
        return asdict(self)


def pack(
    checkpoint: Checkpoint,
    out: Path,
    *,
    dtype: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Pack:
    """Write a packed copy of a checkpoint.

    Args:
        checkpoint: Files of the model.
        out: Folder to write, which must not exist.
        dtype: Type of the experts (default: ``"auto"``, as stored).
        progress: Function of the number of written experts and the number of all experts.

    Raises:
        UserError: The experts cannot be moved, ``out`` exists, the disk has too little space, or the checkpoint is
            packed already.
    """
    check_is_free(out)
    check_is_elsewhere(out)
    where = f"model {checkpoint.name}"
    if (checkpoint.folder / EXPERTS_FILE).is_file():
        raise UserError(f"{where}: is packed already; give the original checkpoint")
    model, layers = load_bare(checkpoint, dtype)
    stored = stored_tensors(checkpoint.folder, where)
    assigned, _ = assign_keys(model, layers, stored)
    moved = expert_parameters(layers)
    others = {key: stored[key] for key, (name, _) in assigned.items() if name not in moved}
    layouts = packed_layouts(layers)
    count = layers[0].num_experts
    header = packed_header(layouts, count)
    experts = [expert for layer in layouts for expert in range(layer * count, (layer + 1) * count)]
    result = Pack(
        folder=str(out),
        dtype=str(layers[0].layout.fields[0].dtype).removeprefix("torch."),
        experts=len(experts),
        expert_bytes=len(header) + sum(count * layout.stride for layout in layouts.values()),
        other_bytes=sum(tensor.nbytes for tensor in others.values()),
    )
    _check_space(out, result.expert_bytes + result.other_bytes + SPARE)
    with closing(DiskStore(index_checkpoint(checkpoint, model, layers))) as source, replacing_folder(out) as folder:
        _copy_small_files(checkpoint.folder, folder, str(model.config.dtype).removeprefix("torch."))
        _write_others(folder / WEIGHTS_FILE, others)
        with (folder / EXPERTS_FILE).open("wb", buffering=0) as file:
            _write(file, header)
            for done, expert in enumerate(experts):
                slab = np.zeros(layouts[expert // count].stride, np.uint8)
                source.read(expert, slab)
                _write(file, slab)
                progress(done + 1, len(experts))
    return result


def _check_space(out: Path, needed: int) -> None:
    """Refuse a disk with too little space before anything is written.

    Raises:
        UserError: There is too little space.
    """
    folder = next(parent for parent in out.absolute().parents if parent.is_dir())
    if (free := shutil.disk_usage(folder).free) < needed:
        raise UserError(
            f"{out}: its disk has too little space (got {free / 1e9:.3g} GB, needs {needed / 1e9:.3g} GB); free some "
            "space, or choose another folder"
        )


def _copy_small_files(source: Path, folder: Path, dtype: str) -> None:
    """Copy configurations and tokenizer files, and write the type of the experts into the configuration."""
    for path in sorted({path for pattern in SMALL_FILES for path in source.glob(pattern)}):
        if path.is_file() and path.name not in (CONFIG_FILE, INDEX_FILE):
            shutil.copyfile(path, folder / path.name)
    content = _with_dtype(read_json(source / CONFIG_FILE), dtype) | {"dtype": dtype}
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _with_dtype(content: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Set the type in a configuration and in those inside it."""
    changed: dict[str, Any] = {}
    for name, value in content.items():
        if name in DTYPE_FIELDS:
            changed["dtype"] = dtype
        else:
            changed[name] = _with_dtype(value, dtype) if isinstance(value, dict) else value
    return changed


def _write_others(path: Path, tensors: dict[str, StoredTensor]) -> None:
    """Copy stored tensors unchanged; transformers converts them when it loads them."""
    header = {key: (tensor.dtype, tensor.shape, tensor.nbytes) for key, tensor in tensors.items()}
    with path.open("wb", buffering=0) as file:
        _write(file, header_bytes(header, {"format": "pt"}))
        for tensor in tensors.values():
            with tensor.file.open("rb") as source:
                source.seek(tensor.offset)
                left = tensor.nbytes
                while left:
                    block = source.read(min(left, BLOCK))
                    if not block:
                        raise UserError(f"{tensor.file}: has changed while it was read; run the same command again")
                    _write(file, block)
                    left -= len(block)


def _write(file: Any, content: bytes | Bytes) -> None:
    """Write all bytes to an unbuffered file, which may take only a part of them at once."""
    left = memoryview(content)  # type: ignore[arg-type]  # arrays of numpy are buffers
    while left:
        left = left[file.write(left) :]
