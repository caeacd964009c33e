"""Reading a trace set, from a folder or any storage that fsspec knows."""

import hashlib
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from moe_beyond.download import HubName, download, is_hub_name, parse_hub_name
from moe_beyond.errors import UserError, unknown
from moe_beyond.geometry import Geometry
from moe_beyond.traces.hidden_states import HiddenStates, load_states
from moe_beyond.traces.manifest import MANIFEST_FILE, VOCABULARY_FILE, Manifest, ShardInfo
from moe_beyond.traces.routers import ROUTERS_FILE, Routers, load_routers
from moe_beyond.traces.schema import arrow_schema, none_id
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
        UserError: There is no readable manifest.
    """

    def __init__(self, folder: str) -> None:
        self.folder = str(folder)
        path = f"{self.folder}/{MANIFEST_FILE}"
        place = _downloaded(self.folder) if is_hub_name(self.folder) else self.folder
        try:
            self._files, self._root = fsspec.core.url_to_fs(place)
        except (ValueError, ImportError) as error:
            raise UserError(f"{self.folder}: cannot be opened ({error})") from error
        try:
            content = json.loads(self._read(MANIFEST_FILE))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(f"{path}: not found; is {self.folder} a trace set?") from error
        except ValueError as error:
            raise UserError(f"{path}: is not JSON ({error})") from error
        self.manifest = Manifest.from_json(content, source=path)

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
            UserError: A file is missing, damaged, or does not have the columns of a trace set.
        """
        table = pq.read_table(io.BytesIO(self._verified(info.file, info.sha256)))
        shard = decode(table, self.geometry, f"{self.folder}/{info.file}")
        return replace(shard, hidden_states=self._states(info)) if hidden_states else shard

    def _states(self, info: ShardInfo) -> HiddenStates:
        size, sha256 = self.manifest.hidden_size, info.states_sha256
        if size is None or sha256 is None:
            raise UserError(
                f"{self.folder}: holds no hidden states; collect it with --record experts,gate_weights,hidden_states"
            )
        self._bring(info.states_file)
        content = self._verified(info.states_file, sha256, "file")
        return load_states(content, (info.tokens, self.geometry.num_layers, size), f"{self.folder}/{info.states_file}")

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
            UserError: A shard is missing or damaged.
        """
        found = []
        for info in self.shards(split):
            content = self._verified(info.file, info.sha256)
            table = pq.read_table(io.BytesIO(content), columns=["token_ids"])
            found.append(np.diff(_list_column(table, "token_ids")[0]))
        return found

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

        try:
            content = self._read(VOCABULARY_FILE)
        except FileNotFoundError:
            return None
        if hashlib.sha256(content).hexdigest() != self.manifest.tokenizer.sha256:
            raise UserError(
                f"{self.folder}/{VOCABULARY_FILE}: is not the tokenizer that {MANIFEST_FILE} names (sha256)"
            )
        tokenizer = Tokenizer.from_str(content.decode())
        strings = (tokenizer.id_to_token(i) for i in range(self.manifest.tokenizer.vocab_size))
        return [string or "" for string in strings]

    def _read(self, name: str) -> bytes:
        content: bytes = self._files.cat_file(f"{self._root}/{name}")
        return content


def _downloaded(name: str) -> str:
    """Download a trace set and say which one it is."""
    hub_name = parse_hub_name(name)
    folder = download(hub_name, "dataset", (MANIFEST_FILE,), (VOCABULARY_FILE, "*.parquet"))
    print(f"{hub_name} is {folder.name}", file=sys.stderr)
    return str(folder)


def decode(table: pa.Table, geometry: Geometry, source: str) -> Shard:
    """Turn a table of rows into flat arrays.

    Args:
        table: Columns of `moe_beyond.traces.schema.arrow_schema`.
        geometry: The model's shape.
        source: Where it came from, for error messages.

    Raises:
        UserError: A column is missing or of another type, or a row's lists do not fit the geometry.
    """
    for field in arrow_schema(geometry, gate_weights="gate_weights" in table.schema.names):
        if field.name not in table.schema.names:
            raise UserError(f"{source}: column {field.name!r} is missing")
        if (found := table.schema.field(field.name).type) != field.type:
            raise UserError(f"{source}: column {field.name!r} is {found}, not {field.type}")
    layers, experts, top_k = geometry.shape()
    tokens = _list_column(table, "token_ids")
    routed = _list_column(table, "experts")
    wrong = np.flatnonzero(np.diff(routed[0]) != np.diff(tokens[0]) * layers * top_k)
    if len(wrong):
        raise UserError(f"{source}: row {wrong[0]}: experts do not hold {layers} x {top_k} ids a token")
    ids = routed[1]
    if (((ids < 0) | (ids >= experts)) & (ids != none_id(ids.dtype))).any():
        raise UserError(f"{source}: an expert id is out of range 0..{experts - 1}")
    gates = None
    if "gate_weights" in table.schema.names:
        offsets, gates = _list_column(table, "gate_weights")
        if len(wrong := np.flatnonzero(np.diff(offsets) != np.diff(routed[0]))):
            raise UserError(f"{source}: row {wrong[0]}: there are not as many gate weights as experts")
    return Shard(
        geometry=geometry,
        sequence_ids=table["sequence_id"].to_pylist(),
        sources=table["source"].to_pylist(),
        offsets=tokens[0],
        token_ids=tokens[1],
        experts=routed[1].reshape(-1, layers, top_k),
        decode_starts=table["decode_start"].to_numpy(),
        gate_weights=None if gates is None else gates.reshape(-1, layers, top_k),
    )


def _list_column(table: pa.Table, name: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
    column = table[name].combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # an empty table
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    return column.offsets.to_numpy().astype(np.int64), column.values.to_numpy(zero_copy_only=False)
