"""Part files of an unfinished collection: writing, checking, resuming and merging them."""

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

from moe_beyond.collect.config import STATE_OPTIONS, CollectConfig, ProcessRank, TokenizedPrompt
from moe_beyond.collect.tokenizer_files import RecordedTokenizer
from moe_beyond.errors import UserError
from moe_beyond.files import is_taken, read_json, replacing, write_json
from moe_beyond.geometry import Geometry
from moe_beyond.traces.hidden_states import SUFFIX, concatenate, load_states
from moe_beyond.traces.manifest import MANIFEST_FILE, TOKENIZER_FILE, Manifest
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.router_weights import Routers
from moe_beyond.traces.schema import to_table
from moe_beyond.traces.shard import decode
from moe_beyond.traces.state_projection import StateProjection
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.writer import open_writer

KEY_FILE = "key.json"
MERGED = "set"
"""Name of the merged trace set in the folder of parts."""
DIGEST_VALUES = 16
"""Number of leading values of each parameter that enter its digest."""
PARTIAL_FIELDS = ("weights", "parameters")
"""Fields of a key that are compared as far as both runs have them."""
WAIT_SECONDS = 1.0
SPACE_MARGIN = 1.1
"""Factor on the estimated size of a collection."""


def collection_key(
    manifest: Manifest, rows: Sequence[TokenizedPrompt], config: CollectConfig, model: nn.Module
) -> dict[str, Any]:
    """Return the identity of a collection, by which the same command resumes it; JSON values.

    Args:
        manifest: Manifest of the trace set.
        rows: Prompts and their token ids.
        config: Settings of the collection.
        model: Model that is recorded.
    """
    texts = hashlib.sha256(json.dumps([(p.sequence_id, p.split, ids) for p, ids in rows]).encode()).hexdigest()
    weights = {"dtype": str(getattr(model, "dtype", "")), "weights": digest(model), "parameters": digests(model)}
    # The manifest has the form of hidden states, which several settings may describe.
    settings = {name: value for name, value in asdict(config).items() if name not in STATE_OPTIONS}
    return _json_values(_manifest_key(manifest) | {"prompts": texts} | settings | weights)


def _manifest_key(manifest: Manifest) -> dict[str, Any]:
    """Return the fields of a manifest on which parts depend, without those that differ between versions."""
    excluded = ("shards", "routers_sha256", "tool_version", "tokenizer")
    values = {name: value for name, value in asdict(manifest).items() if name not in excluded}
    return values | {"tokenizer": manifest.tokenizer.sha256}


def _json_values(values: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(json.dumps(values))
    return result


def digest(model: nn.Module) -> str | None:
    """Return a hash of a model's configuration and of the leading values of all its parameters.

    Args:
        model: Model that is recorded.

    Returns:
        The hash; None if some parameters are elsewhere (on disk, in another process): `digests` covers the others.
    """
    result = hashlib.sha256(str(getattr(model, "config", "")).encode())
    for name, parameter in model.named_parameters():
        if (values := _leading_values(parameter)) is None:
            return None
        result.update(f"{name} {tuple(parameter.shape)}".encode())
        result.update(values)
    return result.hexdigest()


def digests(model: nn.Module) -> dict[str, list[Any]]:
    """Return the shape of each parameter and a hash of its leading values, by name.

    The placement of a parameter may change from run to run: ``device_map="auto"`` depends on the free memory.

    Args:
        model: Model that is recorded.

    Returns:
        Name -> [shape, hash]; the hash of a parameter that is elsewhere is None.
    """
    return {
        name: [list(parameter.shape), None if (values := _leading_values(parameter)) is None else _hash(values)]
        for name, parameter in model.named_parameters()
    }


def _leading_values(parameter: Tensor) -> bytes | None:
    """Return leading values of a parameter; None if it is offloaded, sharded or packed."""
    tensor = parameter.data
    if type(tensor) is not Tensor or tensor.is_meta:
        return None
    return tensor.flatten()[:DIGEST_VALUES].float().cpu().numpy().tobytes()


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@contextmanager
def exclusive(parts: Path, rank: ProcessRank) -> Iterator[None]:
    """Keep other processes from writing the same parts; the lock of a killed process does not block.

    Args:
        parts: Folder of the part files.
        rank: Number of this process.

    Raises:
        UserError: Another process writes these parts.
    """
    lock = FileLock(parts / f"rank-{rank.number}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{parts}: another process is collecting there; wait for it, or stop it") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def removing_empty_folder(parts: Path, paths: Sequence[Path], rank: ProcessRank) -> Iterator[None]:
    """Remove the folder of parts if a user's mistake ends the block before the first part is written.

    With several ranks the folder stays, because others may be writing to it.

    Args:
        parts: Folder of the part files.
        paths: Paths of all part files.
        rank: Number of this process.
    """
    try:
        yield
    except UserError:
        if rank.count == 1 and not any(path.exists() for path in (parts / MERGED, *paths)):
            shutil.rmtree(parts)
        raise


def open_or_resume(parts: Path, key: dict[str, Any], rank: ProcessRank, out: Path) -> bool:
    """Make the folder of parts, or check that an existing one belongs to the same collection.

    The first rank writes the key; the others wait for it.

    Args:
        parts: Folder of the part files.
        key: Result of `collection_key`.
        rank: Number of this process.
        out: Folder of the trace set.

    Returns:
        False if the trace set has been finished meanwhile.

    Raises:
        UserError: The folder belongs to a collection with other settings.
    """
    path = parts / KEY_FILE
    while rank.number and not path.exists():
        if is_taken(out):
            return False
        time.sleep(WAIT_SECONDS)
    if not path.exists():
        write_json(path, key)
    elif fields := _differences(read_json(path), key):
        raise UserError(
            f"{parts}: contains an unfinished collection with different {fields}; rerun with the original settings, or "
            "delete the folder"
        )
    return True


def _differences(stored: Any, key: dict[str, Any]) -> str:
    """Name the fields in which a stored key differs; empty if none does."""
    if not isinstance(stored, dict):
        return "contents"
    names = [name for name in key if name not in PARTIAL_FIELDS and not _same_field(name, stored, key)]
    names += ["weights"] if not _same_weights(stored, key) else []
    return " and ".join(names)


def _same_field(name: str, stored: dict[str, Any], key: dict[str, Any]) -> bool:
    value = stored.get(name)
    if name == "tokenizer" and isinstance(value, dict):  # the form of manifests
        value = value.get("sha256")
    return bool(value == key[name])


def _same_weights(stored: dict[str, Any], key: dict[str, Any]) -> bool:
    """Compare digests: of all weights, otherwise of the parameters that were in memory in both runs."""
    if None not in (earlier := stored.get("weights"), current := key["weights"]):
        return bool(earlier == current)
    before, now = stored.get("parameters"), key["parameters"]
    if not isinstance(before, dict) or before.keys() != now.keys():
        return False
    pairs = ((before[name], now[name]) for name in now)
    return all(a[0] == b[0] and (a[1] == b[1] or None in (a[1], b[1])) for a, b in pairs)


def check_finished(out: Path, parts: Path, key: dict[str, Any]) -> None:
    """Check that an existing trace set is the result of the same command, killed before it removed its parts.

    Args:
        out: Folder of the trace set.
        parts: Folder of the part files.
        key: Result of `collection_key`.

    Raises:
        UserError: The trace set has another origin.
    """
    names = sorted(path.name for path in parts.iterdir() if not path.name.startswith(".") and path.suffix != ".lock")
    finished = names in ([], [KEY_FILE]) and (out / MANIFEST_FILE).exists()
    stored = {**key, **_json_values(_manifest_key(TraceSet(str(out)).manifest))} if finished else {}
    if stored != key or (names and _differences(read_json(parts / KEY_FILE), key)):
        raise UserError(f"{out} already exists; choose another folder or remove it")


def check_space(
    parts: Path,
    manifest: Manifest,
    batches: Sequence[Sequence[TokenizedPrompt]],
    paths: Sequence[Path],
    config: CollectConfig,
) -> None:
    """Check that the disk has room for the missing parts and the merged trace set.

    Args:
        parts: Folder of the part files.
        manifest: Manifest of the trace set.
        batches: Prompts of each part.
        paths: Paths of all part files.
        config: Settings of the collection.

    Raises:
        UserError: The disk has too little room.
    """
    tokens_by_batch = [sum(len(token_ids) + config.generate for _, token_ids in batch) for batch in batches]
    missing = sum(tokens for tokens, path in zip(tokens_by_batch, paths, strict=True) if not path.exists())
    geometry = manifest.geometry
    states = 0 if manifest.states is None else manifest.states.token_bytes(manifest.hidden_size or 0)
    bytes_per_id = (1 if geometry.num_experts <= 255 else 2) + 2 * bool(config.gate_weights)
    bytes_per_token = 4 + geometry.demand_per_token * bytes_per_id + states
    needed = int(SPACE_MARGIN * (missing + sum(tokens_by_batch)) * bytes_per_token)
    free = shutil.disk_usage(parts).free
    if needed > free:
        raise UserError(
            f"{parts.parent}: {sum(tokens_by_batch):,} tokens need about {needed / 1e6:,.1f} MB (got {free / 1e6:,.1f} "
            "MB free); free some space, then run the same command again"
        )


def merge_parts(
    merged: Path,
    manifest: Manifest,
    batches: Sequence[Sequence[TokenizedPrompt]],
    paths: Sequence[Path],
    tokenizer: RecordedTokenizer,
    routers: Routers | None,
    projection: StateProjection | None,
    config: CollectConfig,
) -> None:
    """Write the trace set from all parts, after removing temporary files of killed processes.

    Args:
        merged: Folder of the merged trace set.
        manifest: Manifest of the trace set.
        batches: Prompts of each part.
        paths: Paths of all part files.
        tokenizer: Tokenizer of the model.
        routers: Router weights, or None.
        projection: Projection of the hidden states, or None.
        config: Settings of the collection.

    Raises:
        UserError: A part is damaged, belongs to other prompts, or contradicts the manifest; or the disk is full.
    """
    for leftover in merged.parent.glob(".*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    vocabulary = tokenizer.file or merged.parent / f".{TOKENIZER_FILE}"
    if tokenizer.file is None:
        vocabulary.write_bytes(tokenizer.content)
    stored = vocabulary if config.tokens else None
    with open_writer(
        merged, manifest, vocabulary=stored, routers=routers, projection=projection, shard_tokens=config.shard_tokens
    ) as writer:
        for path, batch in zip(paths, batches, strict=True):
            for trace, (prompt, _) in zip(_read_part(path, batch, manifest), batch, strict=True):
                try:
                    writer.write(trace, prompt.split)
                except UserError as error:
                    raise UserError(
                        f"{path}: {error}; remove {path.name}, then run the same command again: it collects this part "
                        "and keeps the others"
                    ) from error


def write_part(path: Path, traces: Sequence[Trace], geometry: Geometry) -> None:
    """Write the traces of a batch; hidden states first, because a part counts as written once its entries exist.

    Args:
        path: Path of the part file.
        traces: Traces of the batch.
        geometry: Geometry of the model.
    """
    states = [trace.hidden_states for trace in traces if trace.hidden_states is not None]
    if states:
        with replacing(_states_path(path)) as temporary:
            concatenate(states).save(temporary)
    with replacing(path) as temporary:
        pq.write_table(to_table(traces, geometry), temporary, compression="zstd")


def remove_parts(paths: Sequence[Path]) -> None:
    """Remove the part files that exist, and their hidden states.

    Args:
        paths: Paths of all part files.
    """
    for path in paths:
        path.unlink(missing_ok=True)
        _states_path(path).unlink(missing_ok=True)


def _read_part(path: Path, batch: Sequence[TokenizedPrompt], manifest: Manifest) -> Iterator[Trace]:
    """Read the traces of a batch.

    Raises:
        UserError: The part is damaged, or belongs to other prompts.
    """
    form, states_shape = manifest.states, manifest.states_shape
    states_path = _states_path(path)
    again = f"remove {path.name}, then run the same command again: it collects this part"
    try:
        shard = decode(pq.read_table(path), manifest.geometry, str(path))
        if form is not None and states_shape is not None:
            shape = (len(shard.token_ids), *states_shape)
            states = load_states(states_path.read_bytes(), shape, str(states_path), form.dtype)
            shard = replace(shard, hidden_states=states)
    except (pa.ArrowException, OSError, UserError) as error:
        files = f"{path}: is" if form is None else f"{path}: this file or {states_path.name} is"
        raise UserError(f"{files} damaged; {again}") from error
    if shard.sequence_ids != [prompt.sequence_id for prompt, _ in batch]:
        raise UserError(f"{path}: belongs to other prompts; {again}")
    return (shard.trace(row) for row in range(len(shard)))


def _states_path(path: Path) -> Path:
    """Return the path of the hidden states of a part."""
    return path.with_name(path.stem + SUFFIX)
