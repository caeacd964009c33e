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
from torch import Tensor, nn

from moe_beyond.collect.config import Collection, Rank, Row
from moe_beyond.collect.tokenizer_files import RecordedTokenizer
from moe_beyond.errors import UserError
from moe_beyond.files import is_taken, read_json, replacing, write_json
from moe_beyond.geometry import Geometry
from moe_beyond.traces.hidden_states import SUFFIX, concatenate, load_states
from moe_beyond.traces.manifest import MANIFEST_FILE, VOCABULARY_FILE, Manifest
from moe_beyond.traces.reader import TraceSet, decode
from moe_beyond.traces.router_weights import Routers
from moe_beyond.traces.schema import to_table
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.writer import writing

REQUEST_FILE = "request.json"
WHOLE = "set"
"""In the folder of pieces: the trace set, once all pieces are in it."""
NUMBERS = 16
"""Of each parameter, that a model is known again by."""
PLACES = ("weights", "parameters")
"""Fields that are compared as far as both runs have them."""
WAIT_SECONDS = 1.0
SPARE = 1.1
"""Of the space that a collection is thought to take."""


def request_of(manifest: Manifest, rows: Sequence[Row], asked: Collection, model: nn.Module) -> dict[str, Any]:
    """Say what a collection is of, so that the same command knows it again; plain values."""
    texts = hashlib.sha256(json.dumps([(p.sequence_id, p.split, ids) for p, ids in rows]).encode()).hexdigest()
    weights = {"dtype": str(getattr(model, "dtype", "")), "weights": digest(model), "parameters": digests(model)}
    return _plain(_described(manifest) | {"prompts": texts} | asdict(asked) | weights)


def _described(manifest: Manifest) -> dict[str, Any]:
    """Describe the trace set to be: all that a piece depends on, and nothing that another version would call so."""
    left_out = ("shards", "routers_sha256", "tool_version", "tokenizer")
    described = {name: value for name, value in asdict(manifest).items() if name not in left_out}
    return described | {"tokenizer": manifest.tokenizer.sha256}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(values))
    return found


def digest(model: nn.Module) -> str | None:
    """Return a hash of a model's configuration and of some numbers of each of its parameters.

    None where some of them are not here (on disk, in another process): `digests` covers those that are.
    """
    found = hashlib.sha256(str(getattr(model, "config", "")).encode())
    for name, parameter in model.named_parameters():
        if (numbers := _numbers(parameter)) is None:
            return None
        found.update(f"{name} {tuple(parameter.shape)}".encode())
        found.update(numbers)
    return found.hexdigest()


def digests(model: nn.Module) -> dict[str, list[Any]]:
    """Return, by name, each parameter's shape, and a hash of some of its numbers: None where it is not here.

    Where a parameter is may change from run to run: ``device_map="auto"`` goes by the memory that is free.
    """
    return {
        name: [list(parameter.shape), None if (numbers := _numbers(parameter)) is None else _hash(numbers)]
        for name, parameter in model.named_parameters()
    }


def _numbers(parameter: Tensor) -> bytes | None:
    """Return some numbers of a parameter; None of one without plain bytes here: offloaded, sharded, or packed."""
    tensor = parameter.data
    if type(tensor) is not Tensor or tensor.is_meta:
        return None
    return tensor.flatten()[:NUMBERS].float().cpu().numpy().tobytes()


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


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


@contextmanager
def leaving_nothing(pieces: Path, paths: Sequence[Path], rank: Rank) -> Iterator[None]:
    """Remove the folder of pieces where a fault of the user's ends the block before there is a piece.

    Other ranks may be at work in the folder, so that with several of them it stays.
    """
    try:
        yield
    except UserError:
        if rank.count == 1 and not any(path.exists() for path in (pieces / WHOLE, *paths)):
            shutil.rmtree(pieces)
        raise


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
    names = [name for name in request if name not in PLACES and not _same(name, found, request)]
    names += ["weights"] if not _same_weights(found, request) else []
    return " and ".join(names)


def _same(name: str, found: dict[str, Any], request: dict[str, Any]) -> bool:
    value = found.get(name)
    if name == "tokenizer" and isinstance(value, dict):  # as earlier versions stored it
        value = value.get("sha256")
    return bool(value == request[name])


def _same_weights(found: dict[str, Any], request: dict[str, Any]) -> bool:
    """Compare what both know of the weights: all, or those parameters that were here in both runs."""
    if None not in (before := found.get("weights"), now := request["weights"]):
        return bool(before == now)
    there, here = found.get("parameters"), request["parameters"]
    if not isinstance(there, dict) or there.keys() != here.keys():
        return False
    pairs = ((there[name], here[name]) for name in here)
    return all(a[0] == b[0] and (a[1] == b[1] or None in (a[1], b[1])) for a, b in pairs)


def check_finished(out: Path, pieces: Path, request: dict[str, Any]) -> None:
    """See that a set that is there is what the same command made, and was killed before it could remove the rest.

    Raises:
        UserError: It is something else.
    """
    left = sorted(path.name for path in pieces.iterdir() if not path.name.startswith(".") and path.suffix != ".lock")
    ours = left in ([], [REQUEST_FILE]) and (out / MANIFEST_FILE).exists()
    made = {**request, **_plain(_described(TraceSet(str(out)).manifest))} if ours else {}
    if made != request or (left and _differences(read_json(pieces / REQUEST_FILE), request)):
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
            f"{free / 1e6:,.1f} MB are free; free some space, then run the same command again"
        )


def put_together(
    whole: Path,
    manifest: Manifest,
    batches: Sequence[Sequence[Row]],
    paths: Sequence[Path],
    tokenizer: RecordedTokenizer,
    routers: Routers | None,
    asked: Collection,
) -> None:
    """Write the trace set out of all pieces; what kills left half-written goes first.

    Raises:
        UserError: A piece is damaged, or of other prompts, or does not fit the manifest; or there is no room.
    """
    for left in whole.parent.glob(".*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    vocabulary = tokenizer.file or whole.parent / f".{VOCABULARY_FILE}"
    if tokenizer.file is None:
        vocabulary.write_bytes(tokenizer.content)
    with writing(whole, manifest, vocabulary=vocabulary, routers=routers, shard_tokens=asked.shard_tokens) as writer:
        for path, batch in zip(paths, batches, strict=True):
            for trace, (prompt, _) in zip(_read_piece(path, batch, manifest), batch, strict=True):
                try:
                    writer.write(trace, prompt.split)
                except UserError as error:
                    raise UserError(
                        f"{path}: {error}; remove {path.name}, and the same command collects it again; all other parts "
                        "are kept"
                    ) from error


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
