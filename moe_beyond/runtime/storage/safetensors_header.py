"""Headers of safetensors files: strict reading with the position of each tensor, and writing."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_beyond.errors import UserError
from moe_beyond.files import file_in, parse_json, read_json
from moe_beyond.json_fields import shown
from moe_beyond.pretrained import WEIGHTS_FILE

INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
METADATA = "__metadata__"
LONGEST_HEADER = 100_000_000
"""Limit of the safetensors format, in bytes."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Name in a header -> PyTorch type."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
        file: Path of the file.
        dtype: Name of its type in the header.
        shape: Sizes of its dimensions.
        offset: Position in the file, in bytes.
        nbytes: Size in bytes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """Read the header of a file, and check that its tensors cover the file exactly.

    Args:
        path: Path of the safetensors file.

    Returns:
        Name -> tensor, and the metadata.

    Raises:
        UserError: The file cannot be read, is damaged, or is truncated.
    """

    def damaged(reason: str) -> UserError:
        return UserError(f"{path}: is a damaged safetensors file ({reason}); download or write it again")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(LONGEST_HEADER, size - 8):
                raise damaged("no header")
            content = parse_json(file.read(length), path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if not isinstance(content, dict) or not isinstance(metadata := content.pop(METADATA, {}), dict):
        raise damaged("its header is no object")
    tensors = {}
    for name, entry in content.items():
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if all(
                type(side) is int and side >= 0 for side in shape
            ):
                tensors[name] = StoredTensor(path, dtype, tuple(shape), 8 + length + begin, end - begin)
            case _:
                raise damaged(f"no valid entry for {shown(name)}")
        if dtype not in DTYPES:
            raise UserError(f"{path}: {shown(name)} has an unknown type (got {shown(dtype)}); give another format")
        if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            raise damaged(f"{shown(name)} has {end - begin:,} bytes, which its shape {shape} contradicts")
    position = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != position:
            raise damaged(f"{shown(name)} does not follow the tensor before it")
        position += tensor.nbytes
    if position != size:
        raise damaged(f"{size:,} bytes instead of {position:,}")
    return tensors, metadata


def stored_tensors(folder: Path, where: str) -> dict[str, StoredTensor]:
    """Find all weights of a model folder, in one file or in those of an index.

    Args:
        folder: Folder of the model.
        where: Name of the model, for messages.

    Raises:
        UserError: A file is missing or damaged.
    """
    files = {WEIGHTS_FILE: None}
    names: dict[str, Any] = {}
    if not (folder / WEIGHTS_FILE).is_file() and (folder / INDEX_FILE).is_file():
        content = read_json(folder / INDEX_FILE)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise UserError(f"{where}: {INDEX_FILE} has no weight_map; download the model again")
        if not isinstance(content.get("metadata"), dict):  # transformers reads it
            raise UserError(f'{where}: {INDEX_FILE} has no metadata; add "metadata": {{}}, or download the model again')
        names, files = weight_map, dict.fromkeys(sorted(weight_map.values()))
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        path = file_in(folder, name)
        if not path.is_file():
            raise UserError(f"{where}: has no {name}; give the complete checkpoint of the model")
        tensors |= read_header(path)[0]
    if lacking := [name for name in names if name not in tensors]:
        raise UserError(
            f"{where}: its files lack {shown(lacking[0])}, which {INDEX_FILE} lists; give the complete checkpoint of "
            "the model"
        )
    return tensors


def header_bytes(
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str], alignment: int = 8
) -> bytes:
    """Build the header of a file whose tensors follow one another.

    Args:
        tensors: Name -> name of the type, shape, and size in bytes; the file keeps this order.
        metadata: Text fields of the file.
        alignment: Bytes to which the first tensor is aligned (default: 8).

    Returns:
        The length, the header, and spaces.
    """
    content: dict[str, Any] = {METADATA: dict(metadata)}
    end = 0
    for name, (dtype, shape, nbytes) in tensors.items():
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    return len(text).to_bytes(8, "little") + text
