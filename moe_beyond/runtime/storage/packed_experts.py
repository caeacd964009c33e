"""The file of packed experts: one slab per expert, each at the beginning of a page.

It is a safetensors file with one uint8 tensor per expert, ``layer.L.expert.E``, in the order of their numbers. Its
metadata holds the layouts of the slabs.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_beyond.errors import UserError
from moe_beyond.files import parse_json
from moe_beyond.runtime.experts import ExpertsLayer
from moe_beyond.runtime.slab import PAGE, SlabField, SlabLayout
from moe_beyond.runtime.storage.expert_index import Entry, ExpertIndex, Piece, Segment
from moe_beyond.safetensors_header import header_bytes, read_header

LAYOUTS = "layouts"
"""Metadata field of the layouts, as JSON."""
AGAIN = "pack the model again"


def packed_layouts(layers: Mapping[int, ExpertsLayer]) -> dict[int, SlabLayout]:
    """Return the layouts of slabs that begin at pages.

    Args:
        layers: Experts of a model.
    """
    return {
        position: SlabLayout.of({field.name: (field.shape, field.dtype) for field in layer.layout.fields}, PAGE)
        for position, layer in layers.items()
    }


def packed_header(layouts: Mapping[int, SlabLayout], num_experts: int) -> bytes:
    """Build the header of the file, whose length is a multiple of a page.

    Args:
        layouts: MoE layer -> layout.
        num_experts: Experts per layer, E.
    """
    tensors = {
        _name(layer, expert): ("U8", (layout.stride,), layout.stride)
        for layer, layout in layouts.items()
        for expert in range(num_experts)
    }
    content = [_to_json(layout) for layout in layouts.values()]
    return header_bytes(tensors, {"format": "pt", LAYOUTS: json.dumps(content)}, PAGE)


def packed_index(path: Path, layers: Mapping[int, ExpertsLayer]) -> ExpertIndex:
    """Find the slabs of a model in its file of packed experts.

    Args:
        path: File of packed experts.
        layers: Experts of the model.

    Raises:
        UserError: The file is damaged, or belongs to another model, or was packed for another type.
    """
    tensors, metadata = read_header(path)
    content = parse_json(str(metadata.get(LAYOUTS)).encode(), path)
    layouts = packed_layouts(layers)
    for position, layer in layers.items():
        expected = _to_json(layouts[position])
        stored = content[position] if isinstance(content, list) and position < len(content) else None
        if expected != stored:
            dtype, packed = _dtype(expected), _dtype(stored)
            if packed not in (dtype, None):
                raise UserError(
                    f"{path}: is packed in {packed} (got dtype {dtype}); leave dtype out, or pack the original "
                    f"model again with dtype {dtype}"
                )
            raise UserError(f"{path}: does not hold the experts of layer {layer.layer} as the model has them; {AGAIN}")
    entries = []
    for position, layout in layouts.items():
        for expert in range(layers[position].num_experts):
            tensor = tensors.get(_name(position, expert))
            if tensor is None or tensor.nbytes != layout.stride or tensor.offset % PAGE:
                raise UserError(f"{path}: lacks the slab of expert {expert} of layer {layers[position].layer}; {AGAIN}")
            entries.append(Entry((Segment(0, tensor.offset, layout.stride, (Piece(0, layout.stride),)),), ()))
    return ExpertIndex((path,), layouts, tuple(layer.layer for layer in layers.values()), entries)


def _name(layer: int, expert: int) -> str:
    return f"layer.{layer}.expert.{expert}"


def _to_json(layout: SlabLayout) -> list[dict[str, Any]]:
    return [_field_to_json(field) for field in layout.fields]


def _dtype(fields: Any) -> str | None:
    """Return the type of the first field; None if there is none."""
    match fields:
        case [{"dtype": str(dtype)}, *_]:
            return dtype
    return None


def _field_to_json(field: SlabField) -> dict[str, Any]:
    dtype = str(field.dtype).removeprefix("torch.")
    return {"name": field.name, "shape": list(field.shape), "dtype": dtype, "offset": field.offset}
