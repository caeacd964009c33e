"""Writing a trace set."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from moe_beyond.errors import UserError
from moe_beyond.files import replacing_folder, write_json
from moe_beyond.json_fields import is_plain_name
from moe_beyond.pretrained import CARD_FILE
from moe_beyond.safe_text import shown
from moe_beyond.traces.card import traces_card
from moe_beyond.traces.checks import first_fault
from moe_beyond.traces.engine_log import ENGINE_FILE, EngineLog, engine_table
from moe_beyond.traces.hidden_states import SHARD_BYTES, HiddenStates, concatenate, load_states, shape_fault
from moe_beyond.traces.manifest import MANIFEST_FILE, TOKENIZER_FILE, Manifest, ShardInfo
from moe_beyond.traces.router_weights import ROUTERS_FILE, Routers
from moe_beyond.traces.schema import ROWS_PER_GROUP, experts_dtype, to_table
from moe_beyond.traces.state_projection import PROJECTION_FILE, StateProjection
from moe_beyond.traces.trace import Trace

# Per entry of six one-byte ids, zstd level 9 stores 4.3 bytes and level 1 stores 4.5; both are read equally fast.
COMPRESSION_LEVEL = 9


class TraceWriter:
    """Writes traces into shards; made by `open_writer`."""

    def __init__(self, folder: Path, manifest: Manifest, shard_tokens: int) -> None:
        """Begin an empty set in an existing folder."""
        self._folder = folder
        self._manifest = manifest
        self._shard_tokens = shard_tokens
        self._pending: dict[str, list[Trace]] = {}
        self._shards: dict[str, list[ShardInfo]] = {}
        self._sequences: set[str] = set()
        self._gate_weights: bool | None = None  # whether traces have gate weights; the first trace decides

    @property
    def tokens(self) -> int:
        """Number of tokens written so far."""
        finished = sum(shard.tokens for shards in self._shards.values() for shard in shards)
        return finished + sum(len(trace) for traces in self._pending.values() for trace in traces)

    def write(self, trace: Trace, split: str = "train") -> None:
        """Add a trace to a split.

        Args:
            trace: Trace to write.
            split: Name of the split.

        Raises:
            UserError: The trace is invalid, does not fit the manifest or the earlier traces, or has an id that was
                written before.
        """
        geometry = self._manifest.geometry
        length, (layers, _, top_k) = len(trace), geometry.shape()
        if trace.experts.shape != (length, layers, top_k):
            raise UserError(
                f"sequence {trace.sequence_id!r}: experts must have shape {(length, layers, top_k)} for "
                f"{geometry.describe_shape()} (got {trace.experts.shape})"
            )
        self._check_gate_weights(trace)
        if trace.gate_weights is not None:
            with np.errstate(over="ignore"):  # too large values become infinite, and are refused below
                trace = replace(trace, gate_weights=np.ascontiguousarray(trace.gate_weights, np.float16))
        fault = first_fault(
            geometry,
            self._manifest.tokenizer.vocab_size,
            np.array([0, length]),
            trace.token_ids,
            np.array([trace.decode_start]),
            trace.experts,
            trace.gate_weights,
        )
        if fault is not None:
            raise UserError(f"sequence {trace.sequence_id!r}: {fault[1]}")
        if trace.sequence_id in self._sequences:
            raise UserError(f"sequence {trace.sequence_id!r}: was written before; give every sequence an id of its own")
        if not is_plain_name(split):
            raise UserError(f"sequence {trace.sequence_id!r}: split must be a plain name (got {shown(split)})")
        self._check_hidden_states(trace)
        self._sequences.add(trace.sequence_id)
        trace = replace(
            trace,
            token_ids=np.ascontiguousarray(trace.token_ids, np.int32),
            experts=np.ascontiguousarray(trace.experts, experts_dtype(geometry)),
        )
        pending = self._pending.setdefault(split, [])
        pending.append(trace)
        states_bytes = sum(trace.hidden_states.nbytes for trace in pending if trace.hidden_states is not None)
        if sum(map(len, pending)) >= self._shard_tokens or states_bytes >= SHARD_BYTES:
            self._flush(split)

    def _check_gate_weights(self, trace: Trace) -> None:
        has_gates = trace.gate_weights is not None
        if self._gate_weights is None:
            self._gate_weights = has_gates
        if has_gates != self._gate_weights:
            with_or_without = "with" if self._gate_weights else "without"
            raise UserError(
                f"sequence {trace.sequence_id!r}: all traces of this set must be {with_or_without} gate weights"
            )
        if trace.gate_weights is not None and trace.gate_weights.shape != trace.experts.shape:
            raise UserError(
                f"sequence {trace.sequence_id!r}: gate weights must have the experts' shape "
                f"{trace.experts.shape} (got {trace.gate_weights.shape})"
            )

    def _check_hidden_states(self, trace: Trace) -> None:
        states, form, shape = trace.hidden_states, self._manifest.states, self._manifest.states_shape
        if (states is None) != (form is None):
            with_or_without = "without" if form is None else "with"
            raise UserError(
                f"sequence {trace.sequence_id!r}: all traces of this set must be {with_or_without} hidden states"
            )
        if states is not None and form is not None and shape is not None:
            fault = shape_fault(states, form.dtype, (len(trace), *shape))
            if fault is not None:
                raise UserError(f"sequence {trace.sequence_id!r}: {fault}")

    def _flush(self, split: str) -> None:
        traces = self._pending.pop(split, [])
        if not traces:
            return
        shards = self._shards.setdefault(split, [])
        path = self._folder / f"{split}-{len(shards):05d}.parquet"
        table = to_table(traces, self._manifest.geometry)
        pq.write_table(
            table,
            path,
            compression="zstd",
            compression_level=COMPRESSION_LEVEL,
            row_group_size=ROWS_PER_GROUP,
        )
        if not pq.read_table(path).equals(table):  # the entries read back are those written
            raise OSError(f"{path}: the content read back differs from the content written")
        content = path.read_bytes()
        info = ShardInfo(
            file=path.name,
            split=split,
            sequences=len(traces),
            tokens=sum(map(len, traces)),
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
        )
        states = [trace.hidden_states for trace in traces if trace.hidden_states is not None]
        shards.append(self._with_states(info, concatenate(states)) if states else info)

    def _with_states(self, info: ShardInfo, states: HiddenStates) -> ShardInfo:
        """Write the file of hidden states of a shard."""
        path = self._folder / info.states_file
        states.save(path)
        content = path.read_bytes()
        read_back = load_states(
            content, states.router_values.shape, str(path), str(states.router_values.dtype)
        ).arrays()
        if not all(np.array_equal(read_back[name], array, equal_nan=True) for name, array in states.arrays().items()):
            raise OSError(f"{path}: the content read back differs from the content written")
        return replace(info, states_bytes=len(content), states_sha256=hashlib.sha256(content).hexdigest())

    def _finish(self) -> None:
        for split in list(self._pending):
            self._flush(split)
        shards = tuple(shard for split in self._shards.values() for shard in split)
        if not shards:
            raise UserError("no sequence was written, so the trace set would be empty; write at least one")
        manifest = replace(self._manifest, shards=shards)
        write_json(self._folder / MANIFEST_FILE, manifest.to_json())
        (self._folder / CARD_FILE).write_text(traces_card(manifest), encoding="utf-8")


@contextmanager
def open_writer(
    folder: str | Path,
    manifest: Manifest,
    *,
    vocabulary: str | Path | bytes | None = None,
    routers: Routers | None = None,
    projection: StateProjection | None = None,
    engine_logs: Sequence[EngineLog] = (),
    shard_tokens: int = 65536,
) -> Iterator[TraceWriter]:
    """Write a trace set. The complete folder appears when the block ends without an error.

    Args:
        folder: Path of the new folder.
        manifest: Manifest without shards.
        vocabulary: Path or content of the set's ``tokenizer.json``, in which predictors read token strings (default:
            none).
        routers: Router weights of the model (default: none).
        projection: Projection of the hidden states, whose hash the manifest states (default: none).
        engine_logs: Log of another engine for each sequence (default: none).
        shard_tokens: Number of tokens at which a shard is closed. About 100 MB of hidden states close it too.

    Raises:
        UserError: The folder exists, a trace is invalid, nothing was written, or the projection is another one than the
            manifest states.
    """
    if (projection and projection.sha256) != (manifest.states and manifest.states.projection_sha256):
        raise UserError(
            f"{folder}: the projection differs from that of the manifest; give the projection of the stored states"
        )
    content = vocabulary if isinstance(vocabulary, bytes | None) else Path(vocabulary).read_bytes()
    if content is not None:
        sha256 = hashlib.sha256(content).hexdigest()
        manifest = replace(manifest, tokenizer=replace(manifest.tokenizer, sha256=sha256))
    with replacing_folder(folder) as temporary:
        if routers is not None:
            routers.save(temporary / ROUTERS_FILE)
            sha256 = hashlib.sha256((temporary / ROUTERS_FILE).read_bytes()).hexdigest()
            manifest = replace(manifest, routers_sha256=sha256)
        if projection is not None:
            (temporary / PROJECTION_FILE).write_bytes(projection.content)
        if engine_logs:
            pq.write_table(engine_table(engine_logs), temporary / ENGINE_FILE, compression="zstd")
            sha256 = hashlib.sha256((temporary / ENGINE_FILE).read_bytes()).hexdigest()
            manifest = replace(manifest, engine_log_sha256=sha256)
        writer = TraceWriter(temporary, manifest, shard_tokens)
        yield writer
        if content is not None:
            (temporary / TOKENIZER_FILE).write_bytes(content)
        writer._finish()  # noqa: SLF001
