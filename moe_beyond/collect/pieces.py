"""The folder of pieces: what a collection has done so far, and what the same command goes on with."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from torch import nn

from moe_beyond.collect.asked import Collection, Rank, Row
from moe_beyond.errors import UserError
from moe_beyond.files import read_json, replacing, write_json
from moe_beyond.geometry import Geometry
from moe_beyond.traces.hidden_states import SUFFIX, concatenate, load_states
from moe_beyond.traces.manifest import MANIFEST_FILE, Manifest
from moe_beyond.traces.reader import TraceSet, decode
from moe_beyond.traces.routers import Routers
from moe_beyond.traces.schema import to_table
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.writer import writing

REQUEST_FILE = "request.json"
WHOLE = "set"
"""In the folder of pieces: the trace set, once all pieces are in it."""
NUMBERS = 16
"""Of each parameter, that a model is known again by."""
WAIT_SECONDS = 1.0
SPARE = 1.1
"""Of the space that a collection is thought to take."""


def is_taken(out: Path) -> bool:
    """Tell whether a trace set cannot be made there: something is there already."""
    return out.exists() and (not out.is_dir() or any(out.iterdir()))


def request_of(manifest: Manifest, rows: Sequence[Row], asked: Collection) -> dict[str, Any]:
    """Say what a collection is of, so that the same command knows it again; plain values."""
    texts = hashlib.sha256(json.dumps([(p.sequence_id, p.split, ids) for p, ids in rows]).encode()).hexdigest()
    return _plain(_described(manifest) | {"prompts": texts} | asdict(asked))


def _described(manifest: Manifest) -> dict[str, Any]:
    return {name: value for name, value in asdict(manifest).items() if name not in ("shards", "routers_sha256")}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(values))
    return found


def digest(model: nn.Module) -> str:
    """Return a hash of a model's configuration and of some numbers of each of its parameters."""
    found = hashlib.sha256(str(getattr(model, "config", "")).encode())
    for name, parameter in model.named_parameters():
        found.update(f"{name} {tuple(parameter.shape)}".encode())
        found.update(parameter.detach().flatten()[:NUMBERS].float().cpu().numpy().tobytes())
    return found.hexdigest()


@contextmanager
def alone(pieces: Path, rank: Rank) -> Iterator[None]:
    """See that no other process does the same part at the same time; what is killed leaves nothing that would hold.

    Raises:
        UserError: One does.
    """
    lock = FileLock(pieces / f"rank-{rank.number}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{pieces}: another process is collecting there; wait for it, or stop it") from error
    try:
        yield
    finally:
        lock.release()


def begin(pieces: Path, request: dict[str, Any], rank: Rank, out: Path) -> bool:
    """Make the folder of pieces, or see that the one there is was begun with the same.

    Returns:
        Whether there is something to do; nothing where the first rank has put all together meanwhile.

    Raises:
        UserError: It was begun with something else.
    """
    path = pieces / REQUEST_FILE
    while rank.number and not path.exists():
        if is_taken(out):
            return False
        time.sleep(WAIT_SECONDS)
    if not path.exists():
        write_json(path, request)
    elif differ := _differences(read_json(path), request):
        raise UserError(
            f"{pieces}: a collection was begun there with other {differ}; go on with the same, or remove it"
        )
    return True


def _differences(found: Any, request: dict[str, Any]) -> str:
    if not isinstance(found, dict):
        return "contents"
    return " and ".join(name for name in request if found.get(name) != request[name])


def check_finished(out: Path, pieces: Path, request: dict[str, Any]) -> None:
    """See that a set that is there is what the same command made, and was killed before it could remove the rest.

    Raises:
        UserError: It is something else.
    """
    left = sorted(path.name for path in pieces.iterdir() if not path.name.startswith(".") and path.suffix != ".lock")
    ours = left in ([], [REQUEST_FILE]) and (out / MANIFEST_FILE).exists()
    made = {**request, **_plain(_described(TraceSet(str(out)).manifest))} if ours else {}
    if made != request or (left and read_json(pieces / REQUEST_FILE) != request):
        raise UserError(f"{out} already exists; choose another folder or remove it")


def check_space(
    pieces: Path, manifest: Manifest, batches: Sequence[Sequence[Row]], paths: Sequence[Path], asked: Collection
) -> None:
    """Refuse to begin what the disk will not hold: the pieces to come, and the set made of all.

    Raises:
        UserError: It will not.
    """
    by_batch = [sum(len(token_ids) + asked.generate for _, token_ids in batch) for batch in batches]
    to_come = sum(tokens for tokens, path in zip(by_batch, paths, strict=True) if not path.exists())
    geometry = manifest.geometry
    states = 2 * 2 * geometry.num_layers * (manifest.hidden_size or 0)
    an_expert = (1 if geometry.num_experts <= 255 else 2) + 2 * asked.gate_weights
    needed = int(SPARE * (to_come + sum(by_batch)) * (4 + geometry.demand_per_token * an_expert + states))
    free = shutil.disk_usage(pieces).free
    if needed > free:
        raise UserError(
            f"{pieces.parent}: {sum(by_batch):,} tokens need some {needed / 1e6:,.1f} MB more, and "
            f"{free / 1e6:,.1f} MB are free; make room, then run the same command again"
        )


def put_together(
    whole: Path,
    manifest: Manifest,
    batches: Sequence[Sequence[Row]],
    paths: Sequence[Path],
    vocabulary: str | Path,
    routers: Routers | None,
    asked: Collection,
) -> None:
    """Write the trace set out of all pieces; what kills left half-written goes first.

    Raises:
        UserError: A piece is damaged, or of other prompts; or there is no room.
    """
    for left in whole.parent.glob(".*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    with writing(whole, manifest, vocabulary=vocabulary, routers=routers, shard_tokens=asked.shard_tokens) as writer:
        for path, batch in zip(paths, batches, strict=True):
            for trace, (prompt, _) in zip(_read_piece(path, batch, manifest), batch, strict=True):
                writer.write(trace, prompt.split)


def write_piece(path: Path, traces: Sequence[Trace], geometry: Geometry) -> None:
    """Write what a batch routed: its hidden states first, since a piece is there once its entries are."""
    states = [trace.hidden_states for trace in traces if trace.hidden_states is not None]
    if states:
        with replacing(_states_path(path)) as temporary:
            concatenate(states).save(temporary)
    with replacing(path) as temporary:
        pq.write_table(to_table(traces, geometry), temporary, compression="zstd")


def remove_pieces(paths: Sequence[Path]) -> None:
    """Remove those that are there."""
    for path in paths:
        path.unlink(missing_ok=True)
        _states_path(path).unlink(missing_ok=True)


def _read_piece(path: Path, batch: Sequence[Row], manifest: Manifest) -> Iterator[Trace]:
    """Read what a batch routed.

    Raises:
        UserError: The piece is damaged, or of other prompts.
    """
    geometry, size = manifest.geometry, manifest.hidden_size
    try:
        shard = decode(pq.read_table(path), geometry, str(path))
        if size is not None:
            shape, beside = (len(shard.token_ids), geometry.num_layers, size), _states_path(path)
            shard = replace(shard, hidden_states=load_states(beside.read_bytes(), shape, str(beside)))
    except (pa.ArrowException, OSError, UserError) as error:
        either = ":" if size is None else f", or {_states_path(path).name} beside it,"
        told = f"{path}{either} is damaged; remove {path.name}, and the same command collects it again"
        raise UserError(told) from error
    if shard.sequence_ids != [prompt.sequence_id for prompt, _ in batch]:
        raise UserError(f"{path}: is of other prompts; remove it, and the same command collects it again")
    return (shard.trace(row) for row in range(len(shard)))


def _states_path(path: Path) -> Path:
    """Return where the hidden states of a piece lie."""
    return path.with_name(path.stem + SUFFIX)
