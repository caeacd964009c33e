"""Trace sets of this package: copies of a set or a split, and copies from which no text can be read."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from moe_beyond.traces.formats._format import Format
from moe_beyond.traces.manifest import NO_TOKEN_IDS
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.writer import open_writer
from moe_beyond.version import __version__


def export_trace_set(traces: TraceSet, out: str | Path, split: str | None = None) -> None:
    """Write a trace set, or one split of it, as a trace set.

    Args:
        traces: The trace set.
        out: Path of the new folder.
        split: Name of a split (default: all splits).

    Raises:
        UserError: The split does not exist, the folder exists, or a shard is damaged.
    """
    states = traces.manifest.hidden_size is not None
    splits = traces.manifest.splits if split is None else (split,)
    kept = {trace.sequence_id for trace in traces.traces(split)}
    logs = [log for log in traces.engine_logs() if log.sequence_id in kept]
    manifest = replace(
        traces.manifest, shards=(), routers_sha256=None, engine_log_sha256=None, tool_version=__version__
    )
    with open_writer(
        out,
        manifest,
        vocabulary=traces.tokenizer_content(),
        routers=traces.routers,
        projection=traces.projection,
        engine_logs=logs,
    ) as writer:
        for name in splits:
            for trace in traces.traces(name, hidden_states=states):
                writer.write(trace, name)


def export_experts(traces: TraceSet, out: str | Path, split: str | None = None) -> None:
    """Write a trace set with expert ids, lengths and splits only: no text can be read from it.

    Token ids are 0, sequences are numbered, and tokenizer, gate weights, hidden states and engine logs are left out.
    The manifest and the card describe a set without token ids.

    Args:
        traces: The trace set.
        out: Path of the new folder.
        split: Name of a split (default: all splits).

    Raises:
        UserError: The split does not exist, the folder exists, or a shard is damaged.
    """
    manifest = replace(
        traces.manifest, shards=(), tokenizer=NO_TOKEN_IDS, hidden_size=None, states=None,
        routers_sha256=None, engine_log_sha256=None, tool_version=__version__,
    )  # fmt: skip
    number = 0
    with open_writer(out, manifest) as writer:
        for name in traces.manifest.splits if split is None else (split,):
            for trace in traces.traces(name):
                ids = np.zeros_like(trace.token_ids)
                writer.write(Trace(str(number), "", ids, trace.experts, trace.decode_start), name)
                number += 1


@contextmanager
def without_tokens(traces: TraceSet, out: str | Path, split: str | None) -> Iterator[TraceSet]:
    """Yield a trace set with expert ids only (`export_experts`), which is removed afterwards.

    Args:
        traces: The trace set.
        out: File or folder to write later; the set is made next to it.
        split: Name of a split; None for all splits.
    """
    parent = Path(out).resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{Path(out).name}.", dir=parent) as folder:
        export_experts(traces, Path(folder) / "experts", split)
        yield TraceSet(str(Path(folder) / "experts"))


FORMAT = Format(
    summary="a trace set of this package: a copy of the set or of one split",
    writer=export_trace_set,
)
