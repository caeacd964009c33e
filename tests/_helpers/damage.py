"""Damage to trace sets and scores folders, with hashes recomputed or unchanged."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moe_beyond.files import SEAL, sealed


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file and nothing else."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and recompute its splits, fingerprint and seal, as an attacker would."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    del content[SEAL]
    by_split = dict.fromkeys(shard["split"] for shard in content["shards"])
    content["splits"] = {
        split: {
            name: sum(shard[name] for shard in content["shards"] if shard["split"] == split)
            for name in ("sequences", "tokens")
        }
        for split in by_split
    }
    hashes = [(shard["split"], shard["sha256"], *filter(None, [shard["states_sha256"]])) for shard in content["shards"]]
    covered = [content["geometry"], content["tokenizer"]["sha256"], hashes]
    content["fingerprint"] = hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(sealed(content)))


def replace_shard(folder: Path, content: bytes, number: int = 0, **about: Any) -> None:
    """Put other bytes in a shard's place; its size and hash in the manifest are theirs."""
    (folder / shard_of(folder, number)["file"]).write_bytes(content)

    def change(manifest: dict[str, Any]) -> None:
        hashed = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest["shards"][number] |= hashed | about

    edit_manifest(folder, change)


def edit_shard(folder: Path, change: Callable[[pa.Table], pa.Table], number: int = 0, **about: Any) -> None:
    """Change a shard's rows; its size and hash in the manifest are the new ones."""
    path = folder / shard_of(folder, number)["file"]
    sink = pa.BufferOutputStream()
    pq.write_table(change(pq.read_table(path)), sink)
    replace_shard(folder, sink.getvalue().to_pybytes(), number, **about)


def shard_of(folder: Path, number: int) -> dict[str, Any]:
    """A shard's fields in the manifest."""
    shard: dict[str, Any] = json.loads((folder / "manifest.json").read_text())["shards"][number]
    return shard


def with_column(table: pa.Table, name: str, values: pa.Array | list[Any]) -> pa.Table:
    """A table with other values in a column."""
    array = values if isinstance(values, pa.Array) else pa.array(values, table.schema.field(name).type)
    return table.set_column(table.schema.get_field_index(name), name, array)


def hash_scores(folder: Path) -> None:
    """Recompute the hashes of a scores folder, as an attacker would."""
    path = folder / "scores.json"
    content = json.loads(path.read_text())
    content["sha256"] = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in dict.fromkeys(content["files"].values())
    }
    path.write_text(json.dumps(sealed(content)))
