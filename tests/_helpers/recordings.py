"""Recordings as other tools write them, small, for tests of their import."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_beyond.geometry import Geometry

SMALL = Geometry("small", (1, 2, 3), num_experts=8, top_k=2, params_per_expert=1000, other_params_per_layer=0)
"""A geometry whose layer 0 is dense."""
LAYERS, EXPERTS, TOP_K = SMALL.shape()


def random_experts(length: int, seed: int = 0, geometry: Geometry = SMALL) -> np.ndarray:
    """Return random expert ids ``(T, L, K)``."""
    layers, experts, top_k = geometry.shape()
    return np.random.default_rng(seed).random((length, layers, experts)).argsort(-1)[..., :top_k].astype(np.int16)


def model_file(folder: Path, geometry: Geometry = SMALL) -> Path:
    """Write a geometry file for ``--model``."""
    path = folder / "small.json"
    path.write_text(json.dumps(geometry.to_json()))
    return path


def batches(experts: np.ndarray, prompt: int, ubatch: int) -> Iterable[tuple[int, np.ndarray, bool]]:
    """Yield the batches of llama.cpp: first token, experts, and whether it is a part of the prompt."""
    for first in range(0, prompt, ubatch):
        yield first, experts[first : min(first + ubatch, prompt)], True
    for first in range(prompt, len(experts)):
        yield first, experts[first : first + 1], False


def expert_rows(experts: np.ndarray, prompt: int, ubatch: int = 512, geometry: Geometry = SMALL) -> str:
    """Return the rows of llama.cpp's own example, with only the last token of a batch in the last layer."""
    rows = []
    for _, batch, _ in batches(experts, prompt, ubatch):
        for row, layer in enumerate(geometry.moe_layers):
            computed = batch[-1:] if layer == geometry.moe_layers[-1] else batch
            rows += [f"{layer},{expert}\n" for expert in computed[:, row].ravel()]
    return "".join(rows)


def position_rows(experts: np.ndarray, prompt: int, ubatch: int = 512, geometry: Geometry = SMALL) -> str:
    """Return the rows of the forks' tool, with negative positions in a prompt."""
    rows = []
    for first, batch, reading in batches(experts, prompt, ubatch):
        for row, layer in enumerate(geometry.moe_layers):
            computed = batch[-1:] if layer == geometry.moe_layers[-1] else batch
            for place, ids in enumerate(computed[:, row]):
                position = -(first + len(computed) - place) if reading else first - prompt
                rows.append(",".join(map(str, [position, layer, *ids])) + "\n")
    return "".join(rows)


def json_lines(experts: np.ndarray, gates: np.ndarray | None = None, geometry: Geometry = SMALL) -> list[str]:
    """Return one line per entry, token by token."""
    lines = []
    for token, row in np.ndindex(experts.shape[:2]):
        line = {"layer_idx": geometry.moe_layers[row], "token_idx": token, "selected_ids": experts[token, row].tolist()}
        weights = {} if gates is None else {"gate_weights": gates[token, row].tolist()}
        lines.append(json.dumps({**line, **weights, "step": 7}))
    return lines


def flame_moe(
    folder: Path,
    experts: np.ndarray,
    gates: np.ndarray,
    token_ids: Sequence[Sequence[int]] = (),
    geometry: Geometry = SMALL,
) -> Path:
    """Write a checkpoint's layers, and the token ids in files of any length; return the checkpoint's folder."""
    actives = folder / "flame" / "actives" / "iter_540"
    actives.mkdir(parents=True)
    for row, layer in enumerate(geometry.moe_layers):
        table = pa.table(
            {
                "scores": pa.array(list(gates[:, row].astype(np.float16)), pa.list_(pa.float16(), geometry.top_k)),
                "indices": pa.array(list(experts[:, row]), pa.list_(pa.int16(), geometry.top_k)),
            }
        )
        pq.write_table(table, actives / f"layer_{layer + 1:02d}.parquet", row_group_size=7)
    for number, part in enumerate(token_ids):
        (folder / "flame" / "samples").mkdir(exist_ok=True)
        table = pa.table({"token_id": pa.array(part, pa.int32())})
        pq.write_table(table, folder / "flame" / "samples" / f"{number:03d}.parquet")
    return actives
