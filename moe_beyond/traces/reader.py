"""Reading a trace set, from a folder or any storage that fsspec knows."""

import hashlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from moe_beyond.download import HubName, download, is_hub_name, parse_hub_name
from moe_beyond.errors import UserError, unknown
from moe_beyond.fields import brief, shown
from moe_beyond.files import file_in, parse_json
from moe_beyond.geometry import Geometry
from moe_beyond.traces.checks import first_fault
from moe_beyond.traces.copies import count_copies, text_digest
from moe_beyond.traces.hidden_states import HiddenStates, load_states
from moe_beyond.traces.manifest import MANIFEST_FILE, TOKENIZER_FILE, Manifest, ShardInfo
from moe_beyond.traces.parquet import check_schema, read_columns
from moe_beyond.traces.router_weights import ROUTERS_FILE, Routers, load_routers
from moe_beyond.traces.schema import arrow_schema
from moe_beyond.traces.trace import Trace


@dataclass(frozen=True)
class Shard:
    """A decoded shard: flat columns and where each row starts.

    Attributes:
        geometry: The model's shape.
        sequence_ids: One a row.
        sources: One a row.
        offsets: ``(rows + 1,)`` int64, token offsets of the rows.
        token_ids: ``(tokens,)`` int32.
        experts: ``(tokens, L, K)`` uint8 or int16, as in a `Trace`.
        decode_starts: ``(rows,)`` int32.
        gate_weights: ``(tokens, L, K)`` float16, or None.
        hidden_states: Of all tokens, where they were asked for.
    """

    geometry: Geometry
    sequence_ids: list[str]
    sources: list[str]
    offsets: npt.NDArray[np.int64]
    token_ids: npt.NDArray[np.int32]
    experts: npt.NDArray[Any]
    decode_starts: npt.NDArray[np.int32]
    gate_weights: npt.NDArray[np.float16] | None
    hidden_states: HiddenStates | None = None

    def __len__(self) -> int:
        """Rows."""
        return len(self.sequence_ids)

    def trace(self, row: int) -> Trace:
        """Return one row, as views into the shard's arrays."""
        part = slice(self.offsets[row], self.offsets[row + 1])
        return Trace(
            sequence_id=self.sequence_ids[row],
            source=self.sources[row],
            token_ids=self.token_ids[part],
            experts=self.experts[part],
            decode_start=int(self.decode_starts[row]),
            gate_weights=None if self.gate_weights is None else self.gate_weights[part],
            hidden_states=None if self.hidden_states is None else self.hidden_states[part],
        )


class TraceSet:
    """A trace set opened for reading.

    Args:
        folder: A path; ``hf:ORG/REPO@REVISION``, which is downloaded; or a URL that fsspec understands, which is not
            (``hf://datasets/...``).

    Raises:
        UserError: There is no readable manifest, or the tokenizer is not the one that it names.
    """

    def __init__(self, folder: str) -> None:
        self.folder = str(folder)
        if not self.folder.strip() or "\0" in self.folder:
            raise UserError(f"{shown(self.folder)} is not the name of a folder; give that of a trace set")
        path = f"{self.folder}/{MANIFEST_FILE}"
        place = _downloaded(self.folder) if is_hub_name(self.folder) else self.folder
        try:
            self._files, self._root = fsspec.core.url_to_fs(place)
        except (ValueError, ImportError) as error:
            raise UserError(f"{self.folder}: cannot be opened ({error})") from error
        try:
            content = self._read(MANIFEST_FILE)
        except FileNotFoundError as error:
            raise UserError(f"{path}: not found; is {self.folder} a trace set?") from error
        self.manifest = Manifest.from_json(parse_json(content, path), source=path)
        if (sha256 := self.manifest.tokenizer.sha256) is not None:
            self._verified(TOKENIZER_FILE, sha256, "tokenizer")
        self._file_of: dict[str, str] = {}  # sequence id -> file, of the shards read so far
        self._gate_weights: tuple[bool, str] | None = None  # whether they have some, and the last one's file

    @property
    def geometry(self) -> Geometry:
        """The model's shape."""
        return self.manifest.geometry

    def shards(self, split: str | None = None) -> tuple[ShardInfo, ...]:
        """List the shards of a split, or of all splits.

        Raises:
            UserError: There is no such split.
        """
        if split is None:
            return self.manifest.shards
        if not isinstance(split, str):
            raise UserError(f"split: is the name of a split (got {shown(split)})")
        if split not in self.manifest.splits:
            raise unknown(f"split of {self.folder}", split, self.manifest.splits)
        return tuple(shard for shard in self.manifest.shards if shard.split == split)

    def describe(self, split: str | None = None) -> dict[str, Any]:
        """Say what a split, or all of the set, is, as plain values: what a fit was on, or figures were measured on.

        Raises:
            UserError: There is no such split.
        """
        manifest, shards = self.manifest, self.shards(split)
        steered = {} if manifest.steering is None else {"steering": manifest.steering.to_json()}
        return steered | {
            "fingerprint": manifest.fingerprint,
            "split": split,
            "model_id": manifest.model_id,
            "quantization_bits": manifest.quantization_bits,
            "source": manifest.source,
            "tokenizer": asdict(manifest.tokenizer),
            "sequences": sum(shard.sequences for shard in shards),
            "tokens": sum(shard.tokens for shard in shards),
        }

    def read(self, info: ShardInfo, *, hidden_states: bool = False) -> Shard:
        """Read and verify one shard.

        Args:
            info: Which.
            hidden_states: Whether to read those beside it as well.

        Raises:
            UserError: A file is missing or damaged, is not what the manifest says, or holds what the writer refuses.
        """
        path = f"{self.folder}/{info.file}"
        table = self._table(info, arrow_schema(self.geometry, gate_weights=True).names)
        shard = decode(table, self.geometry, path, self.manifest.tokenizer.vocab_size)
        self._check_texts(info, shard.sequence_ids, shard.offsets)
        has_gates, others = shard.gate_weights is not None, self._gate_weights
        if others is not None and others[0] != has_gates:
            with_or_without = "with" if others[0] else "without"
            raise UserError(f"{path}: either all shards have gate weights or none; {others[1]} is {with_or_without}")
        self._gate_weights = has_gates, info.file
        return replace(shard, hidden_states=self._states(info)) if hidden_states else shard

    def _table(self, info: ShardInfo, columns: list[str]) -> pa.Table:
        """Verify a shard's file and read some of its columns."""
        path, content = f"{self.folder}/{info.file}", self._verified(info.file, info.sha256)
        if len(content) != info.bytes:
            raise UserError(f"{path}: is {len(content)} bytes long, but {MANIFEST_FILE} says {info.bytes}")
        return read_columns(content, columns, self.geometry, info.sequences, info.tokens, path)

    def _check_texts(self, info: ShardInfo, sequence_ids: Sequence[str], offsets: npt.NDArray[np.int64]) -> None:
        """Refuse other counts than the manifest's, and an id that is there twice, also in a shard that was read before.

        Whatever reads a whole set so finds every id that is twice in it.
        """
        path, found = f"{self.folder}/{info.file}", (len(sequence_ids), int(offsets[-1]))
        if found != (info.sequences, info.tokens):
            raise UserError(
                f"{path}: holds {found[0]} sequences of {found[1]} tokens, but {MANIFEST_FILE} says "
                f"{info.sequences} of {info.tokens}"
            )
        if len(set(sequence_ids)) != len(sequence_ids):
            twice = next(name for name, count in Counter(sequence_ids).items() if count > 1)
            raise UserError(f"{path}: two sequences have the id {shown(twice)}; ids must be unique")
        for sequence_id in sequence_ids:
            if (file := self._file_of.setdefault(sequence_id, info.file)) != info.file:
                raise UserError(f"{path}: sequence {shown(sequence_id)} is in {file} too; ids must be unique")

    def _states(self, info: ShardInfo) -> HiddenStates:
        size, sha256 = self.manifest.hidden_size, info.states_sha256
        if size is None or sha256 is None:
            raise UserError(
                f"{self.folder}: holds no hidden states; collect it with --record experts,gate_weights,hidden_states"
            )
        self._bring(info.states_file)
        path, content = f"{self.folder}/{info.states_file}", self._verified(info.states_file, sha256, "file")
        if len(content) != info.states_bytes:
            raise UserError(f"{path}: is {len(content)} bytes long, but {MANIFEST_FILE} says {info.states_bytes}")
        return load_states(content, (info.tokens, self.geometry.num_layers, size), path)

    def _bring(self, file: str) -> None:
        """Download a file that few want, where the set was downloaded."""
        if is_hub_name(self.folder) and not self._files.exists(f"{self._root}/{file}"):
            commit = self._root.rpartition("/")[2]
            download(HubName(parse_hub_name(self.folder).repository, commit), "dataset", (file,))

    def _verified(self, file: str, sha256: str, what: str = "shard") -> bytes:
        path = f"{self.folder}/{file}"
        try:
            content = self._read(file)
        except FileNotFoundError as error:
            raise UserError(f"{path}: {what} named in {MANIFEST_FILE} is missing") from error
        if hashlib.sha256(content).hexdigest() != sha256:
            raise UserError(f"{path}: {what} is damaged (its sha256 is not the one in {MANIFEST_FILE})")
        return content

    def lengths(self, split: str | None = None) -> list[npt.NDArray[np.int64]]:
        """Return the tokens of every row, shard by shard, without decoding the experts.

        Raises:
            UserError: A shard is missing or damaged, is not what the manifest says, or holds texts that the writer
                refuses.
        """
        return [np.diff(self._read_texts(info)[0]) for info in self.shards(split)]

    def text_digests(self, split: str | None = None) -> list[bytes]:
        """Return the hash of every sequence, equal for exact copies (`text_digest`), in stored order.

        Raises:
            UserError: A shard is missing or damaged, or is not what the manifest says.
        """
        digests = []
        for info in self.shards(split):
            if self.manifest.has_token_ids:
                offsets, content = self._read_texts(info)
            else:
                shard = self.read(info)
                offsets, content = shard.offsets, shard.experts
            digests += [text_digest(content[start:stop]) for start, stop in pairwise(offsets.tolist())]
        return digests

    def copies(self) -> dict[str, dict[str, int]]:
        """Count the exact copies of every split (`moe_beyond.traces.copies.count_copies`).

        Raises:
            UserError: A shard is missing or damaged, or is not what the manifest says.
        """
        return count_copies({split: self.text_digests(split) for split in self.manifest.splits})

    def _read_texts(self, info: ShardInfo) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """Read a shard's offsets and token ids, and verify all but its experts."""
        path = f"{self.folder}/{info.file}"
        table = self._table(info, ["sequence_id", "token_ids", "decode_start"])
        sequence_ids, offsets, token_ids, decode_starts = _texts(table, path)
        vocab_size = self.manifest.tokenizer.vocab_size
        _refuse(first_fault(self.geometry, vocab_size, offsets, token_ids, decode_starts), sequence_ids, path)
        self._check_texts(info, sequence_ids, offsets)
        return offsets, token_ids

    def traces(self, split: str | None = None, *, hidden_states: bool = False) -> Iterator[Trace]:
        """Iterate over the traces of a split, or of all splits, in stored order, one shard in memory at a time."""
        for info in self.shards(split):
            shard = self.read(info, hidden_states=hidden_states)
            for row in range(len(shard)):
                yield shard.trace(row)

    @cached_property
    def routers(self) -> Routers | None:
        """The routers of the model, or None where they were not recorded or found.

        Raises:
            UserError: Their file is missing or damaged.
        """
        sha256, size = self.manifest.routers_sha256, self.manifest.hidden_size
        if sha256 is None or size is None:
            return None
        layers, experts, _ = self.geometry.shape()
        self._bring(ROUTERS_FILE)
        content = self._verified(ROUTERS_FILE, sha256, "file")
        return load_routers(content, (layers, experts, size), f"{self.folder}/{ROUTERS_FILE}")

    @cached_property
    def token_strings(self) -> list[str] | None:
        """The string of every token id, ``vocab_size`` of them, or None where the set carries no tokenizer."""
        from tokenizers import Tokenizer

        path, sha256 = f"{self.folder}/{TOKENIZER_FILE}", self.manifest.tokenizer.sha256
        try:
            content = self._read(TOKENIZER_FILE)
        except FileNotFoundError:
            return None
        if hashlib.sha256(content).hexdigest() != sha256:
            raise UserError(f"{path}: is not the tokenizer that {MANIFEST_FILE} names (sha256)")
        try:
            tokenizer = Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{path}: is not a tokenizer ({brief(error)})") from error
        strings = (tokenizer.id_to_token(i) for i in range(self.manifest.tokenizer.vocab_size))
        return [string or "" for string in strings]

    def _read(self, name: str) -> bytes:
        """Read a file of the set.

        Raises:
            FileNotFoundError: It is not there.
            UserError: It cannot be read, or is outside the folder.
        """
        path = f"{self.folder}/{name}"
        if isinstance(self._files, LocalFileSystem):
            file_in(self._root, name)
        try:
            content: bytes = self._files.cat_file(f"{self._root}/{name}")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(path) from error
        except Exception as error:  # every file system has errors of its own
            raise UserError(f"{path}: cannot be read ({brief(error)})") from error
        return content


def _downloaded(name: str) -> str:
    """Download a trace set and say which one it is."""
    hub_name = parse_hub_name(name)
    folder = download(hub_name, "dataset", (MANIFEST_FILE,), (TOKENIZER_FILE, "*.parquet"))
    print(f"{hub_name} is {folder.name}", file=sys.stderr)
    return str(folder)


def decode(table: pa.Table, geometry: Geometry, source: str, vocab_size: int = 2**31) -> Shard:
    """Turn a table of rows into flat arrays, once every row is known to be what `TraceWriter.write` takes.

    Args:
        table: Columns of `moe_beyond.traces.schema.arrow_schema`.
        geometry: The model's shape.
        source: Where it came from, for error messages.
        vocab_size: One more than the largest token id there may be.

    Raises:
        UserError: A column is missing or of another type, holds nulls, or a row does not fit the geometry or is none
            that a model makes.
    """
    check_schema(table.schema, geometry, source)
    layers, _, top_k = geometry.shape()
    sequence_ids, offsets, token_ids, decode_starts = _texts(table, source)
    routed, experts = _list_column(table, "experts", source)
    _check_lengths(routed, offsets, layers * top_k, f"experts do not hold {layers} x {top_k} ids a token", source)
    gates = None
    if "gate_weights" in table.schema.names:
        weighed, gates = _list_column(table, "gate_weights", source)
        _check_lengths(weighed, routed, 1, "there are not as many gate weights as experts", source)
    shard = Shard(
        geometry=geometry,
        sequence_ids=sequence_ids,
        sources=_strings(table, "source", source),
        offsets=offsets,
        token_ids=token_ids,
        experts=experts.reshape(-1, layers, top_k),
        decode_starts=decode_starts,
        gate_weights=None if gates is None else gates.reshape(-1, layers, top_k),
    )
    fault = first_fault(geometry, vocab_size, offsets, token_ids, decode_starts, shard.experts, shard.gate_weights)
    _refuse(fault, sequence_ids, source)
    return shard


def _texts(
    table: pa.Table, source: str
) -> tuple[list[str], npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return sequence ids, offsets, token ids and decode starts, as in a `Shard`."""
    offsets, token_ids = _list_column(table, "token_ids", source)
    _refuse_nulls(table["decode_start"], "decode_start", source)
    decode_starts = table["decode_start"].to_numpy()
    return _strings(table, "sequence_id", source), offsets, token_ids, decode_starts


def _check_lengths(
    found: npt.NDArray[np.int64], expected: npt.NDArray[np.int64], times: int, fault: str, source: str
) -> None:
    wrong = np.flatnonzero(np.diff(found) != np.diff(expected) * times)
    if len(wrong):
        raise UserError(f"{source}: row {wrong[0]}: {fault}")


def _refuse(fault: tuple[int, str] | None, sequence_ids: Sequence[str], source: str) -> None:
    if fault is not None:
        row, what = fault
        raise UserError(f"{source}: row {row} (sequence {shown(sequence_ids[row])}): {what}")


def _refuse_nulls(column: pa.ChunkedArray | pa.Array, name: str, source: str) -> None:
    if column.null_count:
        raise UserError(f"{source}: column {name!r} holds nulls")


def _strings(table: pa.Table, name: str, source: str) -> list[str]:
    _refuse_nulls(table[name], name, source)
    try:
        strings: list[str] = table[name].to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: column {name!r} holds bytes that are no UTF-8 text") from error
    return strings


def _list_column(table: pa.Table, name: str, source: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
    """Return the offsets of a column of lists, and what they hold, flat."""
    column = table[name].combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # an empty table
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    _refuse_nulls(column, name, source)
    _refuse_nulls(column.values, name, source)
    return column.offsets.to_numpy().astype(np.int64), column.values.to_numpy(zero_copy_only=False)
