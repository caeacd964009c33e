"""Reading back what wandb writes without a server: `run-*.wandb`, protobuf records in the frames of a LevelDB log."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def frames(path: Path) -> Iterator[bytes]:
    """The records of a log; one that does not fit into a block goes on in the next."""
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    at, record = HEADER, b""
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:  # too short for a header: padding
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        at += HEADER
        record = content[at : at + length] if kind in (FULL, FIRST) else record + content[at : at + length]
        at += length
        if kind in (FULL, LAST):
            yield record


@dataclass
class OfflineRun:
    """What one offline run holds."""

    folder: Path
    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    exit_code: int | None = None

    def table(self, name: str) -> list[dict[str, Any]]:
        """The rows of a table as it was logged last."""
        told = json.loads((self.folder / "files" / self.last(name)["path"]).read_text())
        return [dict(zip(told["columns"], row, strict=True)) for row in told["data"]]

    def artifacts_of(self, *types: str) -> list[Any]:
        """The artifacts of some types; every table is one too."""
        return [artifact for artifact in self.artifacts if artifact.type in types]

    def last(self, name: str) -> Any:
        """What was logged last under a name."""
        return [row[name] for row in self.history if name in row][-1]


def offline_runs(folder: Path) -> list[OfflineRun]:
    """The runs under a folder, oldest first."""
    return [read(path) for path in sorted(folder.glob("**/offline-run-*/run-*.wandb"), key=lambda p: p.stat().st_ctime)]


def read(path: Path) -> OfflineRun:
    """Read one run."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = OfflineRun(path.parent)
    for frame in frames(path):
        record = Record()
        record.ParseFromString(frame)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            take(found.config, record.run.config.update)
        elif kind == "config":
            take(found.config, record.config.update)
        elif kind == "history":
            found.history.append(take({}, record.history.item))
        elif kind == "summary":
            take(found.summary, record.summary.update)
        elif kind == "artifact":
            found.artifacts.append(record.artifact)
        elif kind == "request" and record.request.HasField("log_artifact"):
            found.artifacts.append(record.request.log_artifact.artifact)
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def take(into: dict[str, Any], items: Any) -> dict[str, Any]:
    """Put key-value items into a dictionary; nested keys go into nested ones."""
    for item in items:
        *outer, name = list(item.nested_key) or [item.key]
        place = into
        for key in outer:
            place = place.setdefault(key, {})
        place[name] = json.loads(item.value_json)
    return into
