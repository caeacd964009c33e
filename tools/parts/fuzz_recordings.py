"""Part of `fuzz.py`: recordings of other engines, and of runs, as targets."""

import io
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
from tokenizers.models import WordLevel

from moe_beyond.files import file_sha256, sealed
from moe_beyond.geometry import Preset
from moe_beyond.runtime.records.as_run import recorded_strategy
from moe_beyond.runtime.records.recording import ROWS, read_recording
from moe_beyond.traces.formats import FORMATS
from moe_beyond.traces.manifest import NO_TOKEN_IDS, Manifest
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.schema import padding_id
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.writer import open_writer
from parts.fuzz_mutations import edited_bytes, edited_json, edited_lines, edited_table, several
from parts.fuzz_seeds import SMALL
from parts.fuzz_targets import OPTION_WORDS, Target

TELEMETRY_FOLDER = "telemetry"
TOKENS = 4
"""Tokens of a recorded sequence."""
PROMPT = 2
"""Tokens of its prompt."""
WORDS = ("a", "b", "c", "d")
ROUTE_TRACE = """# route_trace v1
# model=/sdcard/Small-Q4_K_M.gguf arch=small n_layer=3 n_expert=4 n_expert_used=2
# layer=0 expert_bytes=0 dense_bytes=700
# layer=1 expert_bytes=300 dense_bytes=50
# layer=2 expert_bytes=200 dense_bytes=40
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
0,0,0,1,0,3,0.75,0,300
0,0,0,1,1,1,0.25,0,300
0,0,1,1,0,1,0.5,0,0
0,0,1,1,1,2,0.5,0,300
0,0,1,2,0,0,0.5,0,200
0,0,1,2,1,3,0.5,0,200
0,1,2,1,0,2,0.5,1,0
0,1,2,1,1,3,0.5,0,300
0,1,2,2,0,1,0.5,2,0
0,1,2,2,1,0,0.5,1,0
"""
METRICS = """step,steps,wall_ms,read_bytes,cache_hit_pct
1,1,12.5,300,40.0
# summary tokens=1 tok/s=80.0 n_prompt=2 cache_budget_MiB=0.5
"""


def experts(chance: Random) -> np.ndarray:
    """Return expert ids of one sequence, ``(T, L, K)``."""
    layers, count, top_k = SMALL.shape()
    rng = np.random.default_rng(chance.randrange(4))
    return rng.random((TOKENS, layers, count)).argsort(-1)[..., :top_k].astype(np.int16)


@cache
def tokenizer() -> str:
    """Return the path of a tokenizer of `WORDS`."""
    path = Path(tempfile.mkdtemp(prefix="fuzz-tokenizer-")) / "tokenizer.json"
    tokenizers.Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a")).save(str(path))
    return str(path)


# Writers of valid recordings, with changes.


def write_lines(path: Path, lines: Sequence[str], chance: Random) -> None:
    """Write changed lines into a file, whose bytes are sometimes changed too."""
    content = "\n".join([*several(edited_lines, lines, chance), ""]).encode("utf-8", "replace")
    path.write_bytes(edited_bytes(content, chance) if chance.random() < 0.1 else content)


def write_array(path: Path, array: Any, chance: Random) -> None:
    """Write a ``.npy``, sometimes with another value, type or shape, or with changed bytes."""
    if chance.random() < 0.3:
        array = np.array(several(edited_json, np.asarray(array).tolist(), chance) or 0, dtype=object)
        array = _narrowed(array, chance)
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    content = buffer.getvalue()
    path.write_bytes(several(edited_bytes, content, chance) if chance.random() < 0.3 else content)


def _narrowed(array: np.ndarray, chance: Random) -> np.ndarray:
    """Return an array of objects as numbers, if that is possible."""
    try:
        rows = np.array(array.tolist())
        with np.errstate(invalid="ignore"):  # a damaged number may fit no kind of integer
            return rows.astype(chance.choice((np.int16, np.uint8, np.int32, np.uint64, np.float64, rows.dtype)))
    except (ValueError, TypeError, OverflowError):
        return array


def write_table(path: Path, table: pa.Table, chance: Random, edit: bool) -> None:
    """Write a Parquet file, with a changed table or with changed bytes."""
    pq.write_table(several(edited_table, table, chance) if edit else table, path)
    if edit and chance.random() < 0.15:
        path.write_bytes(edited_bytes(path.read_bytes(), chance))


def sidecars(folder: Path, name: str, chance: Random) -> None:
    """Write token ids and the start of the decode phase, or one of them, or neither."""
    if chance.random() < 0.5:
        write_array(folder / f"{name}.tokens.npy", np.arange(TOKENS, dtype=np.int32) % len(WORDS), chance)
    if chance.random() < 0.3:
        write_array(folder / f"{name}.decode_start.npy", np.array(PROMPT), chance)


def make_jsonl(chance: Random, folder: Path) -> Path:
    """Write JSON lines of one or two sequences."""
    for name in ("q1", "q2")[: chance.choice((1, 1, 2))]:
        lines = []
        for token, row in np.ndindex(TOKENS, SMALL.num_layers):
            line = {"layer_idx": SMALL.moe_layers[row], "token_idx": token, "selected_ids": [1, 2]}
            line |= {"gate_weights": [0.7, 0.3]} if name == "q1" else {}
            lines.append(line)
        changed = several(edited_json, lines, chance)
        texts = [json.dumps(line) for line in changed] if isinstance(changed, list) else [json.dumps(changed)]
        write_lines(folder / f"{name}.jsonl", texts, chance) if chance.random() < 0.3 else (
            folder / f"{name}.jsonl"
        ).write_text("\n".join(texts))
        sidecars(folder, name, chance)
    return folder if chance.random() < 0.5 else folder / "q1.jsonl"


def make_llama_cpp(chance: Random, folder: Path) -> Path:
    """Write the rows of one of the two forms of llama-moe-trace."""
    ids, lines = experts(chance), []
    last = SMALL.moe_layers[-1]
    if chance.random() < 0.5:
        for begin, end in ((0, PROMPT), *((token, token + 1) for token in range(PROMPT, TOKENS))):
            for row, layer in enumerate(SMALL.moe_layers):
                batch = ids[end - 1 : end] if layer == last else ids[begin:end]
                lines += [f"{layer},{expert}" for expert in batch[:, row].ravel()]
    else:
        for begin, end in ((0, PROMPT), *((token, token + 1) for token in range(PROMPT, TOKENS))):
            for row, layer in enumerate(SMALL.moe_layers):
                for token in range(end - 1 if layer == last else begin, end):
                    lines.append(",".join(map(str, (token - PROMPT, layer, *ids[token, row]))))
    write_lines(folder / "q.csv", lines, chance)
    if chance.random() < 0.3:
        write_array(folder / "q.tokens.npy", np.arange(TOKENS, dtype=np.int32) % len(WORDS), chance)
    return folder / "q.csv"


def make_moe_beyond_csv(chance: Random, folder: Path) -> Path:
    """Write one or two prompts of the MoE-Beyond release."""
    for number in range(chance.choice((1, 1, 2))):
        lines = ["Layer ID,Token,Activated Expert IDs"]
        for layer, token in np.ndindex(SMALL.num_layers, TOKENS):
            lines.append(f'{SMALL.moe_layers[layer]},{WORDS[token]},"[{token}, {token + 3}]"')
        write_lines(folder / f"prompt_{number}_data.csv", lines, chance)
    return folder


def make_vllm(chance: Random, folder: Path) -> Path:
    """Write a ``.npy``, a folder of them, or an ``.npz``."""
    ids = experts(chance)
    if chance.random() < 0.3:
        ids[: chance.randrange(TOKENS)] = -1
    if chance.random() < 0.3:
        ids = np.insert(ids, 0, 0, axis=1)  # a dense layer
    if chance.random() < 0.4:
        arrays = {"q1": ids, "q1.tokens": np.arange(TOKENS), "q1.decode_start": np.array(PROMPT), "q2": ids}
        chosen = {name: array for name, array in arrays.items() if chance.random() < 0.7}
        np.savez(folder / "q.npz", **chosen)
        content = (folder / "q.npz").read_bytes()
        (folder / "q.npz").write_bytes(several(edited_bytes, content, chance))
        return folder / "q.npz"
    write_array(folder / "q1.npy", ids, chance)
    sidecars(folder, "q1", chance)
    return folder if chance.random() < 0.5 else folder / "q1.npy"


def make_flame_moe(chance: Random, folder: Path) -> Path:
    """Write the layers of a checkpoint, and token ids."""
    actives = folder / "flame" / "actives" / "iter_5"
    actives.mkdir(parents=True)
    ids, edited = experts(chance), chance.randrange(SMALL.num_layers + 1)
    for row, layer in enumerate(SMALL.moe_layers):
        table = pa.table(
            {
                "scores": pa.array([[0.5, 0.25]] * TOKENS, pa.list_(pa.float32(), SMALL.top_k)),
                "indices": pa.array(list(ids[:, row]), pa.list_(pa.int16(), SMALL.top_k)),
            }
        )
        write_table(actives / f"layer_{layer + 1:02d}.parquet", table, chance, row == edited)
    if chance.random() < 0.5:
        (folder / "flame" / "samples").mkdir()
        table = pa.table({"token_id": pa.array(range(TOKENS), pa.int32())})
        write_table(folder / "flame" / "samples" / "0.parquet", table, chance, edited == SMALL.num_layers)
    return actives


def make_route_trace(chance: Random, folder: Path) -> tuple[Path, Path | None]:
    """Write a route trace, sometimes with its metrics."""
    route, metrics = folder / "run.route.csv", folder / "run.metrics"
    write_lines(route, ROUTE_TRACE.splitlines(), chance)
    if chance.random() < 0.5:
        return route, None
    write_lines(metrics, METRICS.splitlines(), chance)
    return route, metrics


# Readers.


def imported(name: str, source: Any, preset: Preset | None = None, **options: Any) -> str | None:
    """Import a recording, and read the trace set that it becomes."""
    out = Path(tempfile.mkdtemp(prefix="fuzz-out-")) / "out"
    try:
        reader = FORMATS[name].reader
        assert reader is not None, "the format is read"
        traces: TraceSet = reader(source, out, preset, **options)
        geometry, count = traces.geometry, 0
        for trace in TraceSet(str(out)).traces():
            count += len(trace)
            valid = (trace.experts < geometry.num_experts) | (trace.experts == padding_id(trace.experts.dtype))
            if not valid.all() or not 0 <= trace.decode_start <= len(trace) or not trace.sequence_id:
                return f"sequence {trace.sequence_id!r} with experts {trace.experts.tolist()}"
        return None if count == traces.manifest.tokens > 0 else f"{count} tokens"
    finally:
        shutil.rmtree(out.parent)


def imported_small(name: str, source: Path) -> str | None:
    """Import a recording of the small model."""
    return imported(name, source, Preset(SMALL, tokenizer=tokenizer()))


def imported_route(source: tuple[Path, Path | None]) -> str | None:
    """Import a route trace, which describes its model."""
    route, metrics = source
    return imported("route-trace", route, metrics=metrics)


# Recordings of runs.

RUN_ROLES = ("predictor", "profile")
RUN_OPTIONS = (
    {"budget": 8, "policy": "lru", "predictor": None, "prefetch": None, "lookahead": None, "profile": None,
     "scope": "global", "misses": "move"},
    {"budget": "50%", "policy": "belief", "scope": "per-layer", "misses": "best"},
)  # fmt: skip


@cache
def recorded() -> Path:
    """Return the folder of a recorded run of two tokens."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-run-")) / "run"
    manifest = Manifest(SMALL, NO_TOKEN_IDS, "m", 16.0, "mixed", "prompts", "0")
    with open_writer(folder, manifest) as writer:
        ids = np.tile(np.array([1, 2], np.uint8), (2, SMALL.num_layers, 1))
        writer.write(Trace("s", "p", np.zeros(2, np.int32), ids, 1))
    (folder / TELEMETRY_FOLDER).mkdir()
    for name, kind in ROWS.items():
        row = {field.name: {int: 1, float: 0.5, bool: True}[field.type] for field in fields(kind)}
        pq.write_table(pa.Table.from_pylist([row] * 2), folder / TELEMETRY_FOLDER / f"{name}.parquet")
    return folder


def make_recording(chance: Random, folder: Path) -> Path:
    """Copy a recording, and change its ``run.json`` or a file of telemetry."""
    path = folder / "run"
    shutil.copytree(recorded(), path)
    if chance.random() < 0.3:
        file = path / TELEMETRY_FOLDER / f"{chance.choice(tuple(ROWS))}.parquet"
        write_table(file, pq.read_table(file), chance, edit=True)
    content = {
        "format_version": 1,
        "traces": TraceSet(str(path)).manifest.fingerprint,
        "telemetry": {name: file_sha256(path / TELEMETRY_FOLDER / f"{name}.parquet") for name in ROWS},
        "options": chance.choice(RUN_OPTIONS),
        "fingerprints": {},
        "figures": {"tokens": 2},
    }
    changed = several(edited_json, content, chance)
    if isinstance(changed, dict) and chance.random() < 0.8:
        changed = sealed(changed)
    (path / "run.json").write_bytes(json.dumps(changed).encode("utf-8", "surrogatepass"))
    return path


def read_run(path: Path) -> str | None:
    """Read a recording, and resolve its strategy."""
    recording = read_recording(path)
    strategy = recorded_strategy(recording)
    for name, rows in (("steps", recording.steps), ("transfers", recording.transfers), ("events", recording.events)):
        for row in rows:
            wrong = [f.name for f in fields(row) if not isinstance(getattr(row, f.name), int | float)]
            if wrong:
                return f"{name} with {wrong[0]} {getattr(row, wrong[0])!r}"
    return None if 1 <= strategy.settings.slots <= SMALL.total_experts else f"{strategy.settings.slots} slots"


def _importer(name: str, make: Callable[[Random, Path], Path], weight: float = 0.4) -> Target:
    return Target(make, partial(imported_small, name), (), weight)


RECORDING_TARGETS: dict[str, Target] = {
    "import jsonl": _importer("jsonl", make_jsonl),
    "import llama-cpp": _importer("llama-cpp", make_llama_cpp),
    "import moe-beyond-csv": _importer("moe-beyond-csv", make_moe_beyond_csv),
    "import vllm": _importer("vllm", make_vllm),
    "import flame-moe": _importer("flame-moe", make_flame_moe, 0.3),
    "import route-trace": Target(make_route_trace, imported_route, (), 0.4),
    "recordings of runs": Target(make_recording, read_run, ("run", *OPTION_WORDS, *RUN_ROLES), 0.3),
}
