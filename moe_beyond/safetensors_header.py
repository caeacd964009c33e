"""Headers of safetensors files: strict reading with the position of each tensor, and writing."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from moe_beyond.errors import UserError
from moe_beyond.files import parse_json
from moe_beyond.safe_text import brief, shown

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
    try:
        with path.open("rb") as file:
            return parse_header(file, path.stat().st_size, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def parse_header(file: IO[bytes], size: int, path: Path) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """Read the header of a file that is open, as `read_header` does.

    Args:
        file: File at its begin.
        size: Size of the file, in bytes.
        path: Path of the file.

    Raises:
        UserError: The file is damaged or truncated.
    """

    def damaged(reason: str) -> UserError:
        return UserError(f"{path}: is a damaged safetensors file ({reason}); download or write it again")

    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 2 <= length <= min(LONGEST_HEADER, size - 8):
        raise damaged("no header")
    content = parse_json(file.read(length), path)
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
            raise damaged(f"{shown(name)} has {shown(end - begin)} bytes, which its shape {brief(shape)} contradicts")
    position = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != position:
            raise damaged(f"{shown(name)} does not follow the tensor before it")
        position += tensor.nbytes
    if position != size:
        raise damaged(f"{size:,} bytes instead of {position:,}")
    return tensors, metadata


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
