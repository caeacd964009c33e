"""Reading a trace set from a folder, the Hub or any storage that fsspec supports."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise, zip_longest
from operator import index
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moe_beyond.errors import UserError, unknown
from moe_beyond.files import parse_json
from moe_beyond.geometry import Geometry
from moe_beyond.safe_text import brief, shown
from moe_beyond.traces.checks import first_fault
from moe_beyond.traces.copies import count_copies, text_digest
from moe_beyond.traces.engine_log import ENGINE_FILE, EngineLog, load_engine_logs
from moe_beyond.traces.hidden_states import HiddenStates, load_states
from moe_beyond.traces.manifest import MANIFEST_FILE, TOKENIZER_FILE, Manifest, ShardInfo
from moe_beyond.traces.parquet import read_columns
from moe_beyond.traces.router_weights import ROUTERS_FILE, Routers, load_routers
from moe_beyond.traces.schema import arrow_schema
from moe_beyond.traces.shard import Shard, decode, decode_texts, raise_fault
from moe_beyond.traces.state_projection import PROJECTION_FILE, StateProjection, load_projection
from moe_beyond.traces.storage import Storage
from moe_beyond.traces.trace import Trace
from moe_beyond.urls import without_secrets

Part = str | tuple[ShardInfo, ...] | None
"""Part of a trace set: the name of a split, some shards, or None for all splits."""


@dataclass(frozen=True)
class Facts:
    """Facts of a shard that must agree with those of the other shards.

    Attributes:
        sequence_ids: Sequence id of each row.
        gate_weights: Whether the shard has gate weights; None if they were not read (default: None).
    """

    sequence_ids: Sequence[str]
    gate_weights: bool | None = None


class TraceSet:
    """A trace set opened for reading: a collection of its sequences, in stored order.

    ``len(traces)`` is the number of sequences, ``traces[3]`` and ``traces["id"]`` are a `Trace`, ``traces[:10]`` is a
    list of them, and ``"id" in traces`` checks a sequence id. Iteration keeps one shard in memory. Indexing keeps the
    shard that was used last. ``traces.split("validation")`` is the same for one split. A shard's hash is verified
    whenever the shard is read.

    Args:
        folder: A path; ``hf:ORG/REPO@REVISION``, which is downloaded; or a URL that fsspec understands
            (``s3://BUCKET/SET``), whose files are downloaded when they are read. `folder` then holds it without user
            name, password and query.

    Raises:
        UserError: The manifest cannot be read, or the tokenizer's hash differs from the manifest's.
    """

    def __init__(self, folder: str) -> None:
        location = str(folder)
        self.folder = without_secrets(location)
        if not location.strip() or "\0" in location:
            raise UserError(f"{shown(self.folder)} is not the name of a folder; give the folder of a trace set")
        path = f"{self.folder}/{MANIFEST_FILE}"
        self._storage = Storage(location, self.folder)
        try:
            content = self._storage.read(MANIFEST_FILE)
        except FileNotFoundError as error:
            raise UserError(
                f"{self.folder}: no trace set here ({MANIFEST_FILE} is missing); give the folder of one"
            ) from error
        self.manifest = Manifest.from_json(parse_json(content, path), source=path)
        if (sha256 := self.manifest.tokenizer.sha256) is not None:
            self._storage.read_verified(TOKENIZER_FILE, sha256, "tokenizer")
        self._rows: dict[str, tuple[ShardInfo, int]] = {}  # sequence id -> shard and row, of the shards read so far
        self._facts: dict[str, Facts] = {}  # file -> facts of these shards
        self._last: tuple[str, Shard] | None = None  # file and content of the shard that indexing used last

    @property
    def geometry(self) -> Geometry:
        """Shape of the model."""
        return self.manifest.geometry

    def split(self, name: str) -> "Split":
        """Return the sequences of one split.

        Args:
            name: Name of the split.

        Raises:
            UserError: The split does not exist.
        """
        self.shards(name)
        return Split(self, name)

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(Split(self, None))

    @overload
    def __getitem__(self, key: int | str) -> Trace: ...
    @overload
    def __getitem__(self, key: slice) -> list[Trace]: ...
    def __getitem__(self, key: int | str | slice) -> Trace | list[Trace]:
        """Return a sequence by position or sequence id, or several by a slice of positions.

        Raises:
            IndexError: The position is out of range.
            UserError: There is no sequence of this id, or a shard is damaged.
        """
        return Split(self, None)[key]

    def __iter__(self) -> Iterator[Trace]:
        """Iterate over the sequences in stored order, with one shard in memory at a time."""
        return self.traces()

    def __contains__(self, sequence_id: object) -> bool:
        """Return whether there is a sequence of this id."""
        return sequence_id in Split(self, None)

    def __repr__(self) -> str:
        """Return one line: folder, model, and the size of every split."""
        splits = "; ".join(f"{name}: {_sizes(self.shards(name))}" for name in self.manifest.splits)
        return f"<TraceSet {self.folder}: {self.manifest.model_id}; {splits}>"

    def shards(self, part: Part = None) -> tuple[ShardInfo, ...]:
        """Return the shards of a part.

        Args:
            part: Part of the set (default: all splits).

        Raises:
            UserError: The split does not exist.
        """
        if part is None:
            return self.manifest.shards
        if isinstance(part, tuple) and all(isinstance(each, ShardInfo) for each in part):
            return part
        if not isinstance(part, str):
            raise UserError(f"split: must be the name of a split (got {shown(part)})")
        if part not in self.manifest.splits:
            raise unknown(f"split of {self.folder}", part, self.manifest.splits)
        return tuple(shard for shard in self.manifest.shards if shard.split == part)

    def describe(self, split: str | None = None) -> dict[str, Any]:
        """Return plain values that identify the set, for predictors fitted on it and figures measured on it.

        Args:
            split: Name of a split (default: all splits).

        Raises:
            UserError: The split does not exist.
        """
        manifest, shards = self.manifest, self.shards(split)
        more: dict[str, Any] = {} if manifest.steering is None else {"steering": manifest.steering.to_json()}
        if manifest.states is not None:
            more["hidden_states"] = manifest.states_description
        return more | {
            "fingerprint": manifest.fingerprint,
            "split": split,
            "model_id": manifest.model_id,
            "quantization_bits": manifest.quantization_bits,
            "source": manifest.source,
            "tokenizer": asdict(manifest.tokenizer),
            "sequences": sum(shard.sequences for shard in shards),
            "tokens": sum(shard.tokens for shard in shards),
        }

    def traces(self, part: Part = None, *, hidden_states: bool = False) -> Iterator[Trace]:
        """Iterate over sequences in stored order, with one shard in memory at a time.

        Args:
            part: Part of the set (default: all splits).
            hidden_states: Whether to read the hidden states as well.

        Raises:
            UserError: The split does not exist, or a shard is damaged.
        """
        shards = self.shards(part)
        for info, following in zip_longest(shards, shards[1:]):
            if following is not None:
                self._storage.read_ahead(following.file, following.sha256)
            shard = self.read(info, hidden_states=hidden_states)
            for row in range(len(shard)):
                yield shard.trace(row)

    def read(self, info: ShardInfo, *, hidden_states: bool = False) -> Shard:
        """Read and verify one shard.

        Args:
            info: The shard's description in the manifest.
            hidden_states: Whether to read the hidden states as well.

        Raises:
            UserError: A file is missing or damaged, differs from the manifest, or holds a row that the writer refuses.
        """
        path = f"{self.folder}/{info.file}"
        table = self._table(info, arrow_schema(self.geometry, gate_weights=True).names)
        shard = decode(table, self.geometry, path, self.manifest.tokenizer.vocab_size)
        self._check_counts(info, shard.sequence_ids, shard.offsets)
        self.compare(info, Facts(shard.sequence_ids, shard.gate_weights is not None))
        return replace(shard, hidden_states=self._states(info)) if hidden_states else shard

    def row(self, info: ShardInfo, row: int) -> Trace:
        """Return one row of a shard; the shard stays in memory until another one is used.

        Args:
            info: The shard's description in the manifest.
            row: Index of the row in the shard.

        Raises:
            UserError: The shard is missing or damaged.
        """
        if self._last is None or self._last[0] != info.file:
            self._last = None  # free the memory before reading another shard
            self._last = info.file, self.read(info)
        return self._last[1].trace(row)

    def find(self, sequence_id: str, split: str | None = None) -> tuple[ShardInfo, int] | None:
        """Return the shard and the row of a sequence; None if there is no sequence of this id.

        Args:
            sequence_id: Id of the sequence.
            split: Name of a split (default: all splits).

        Raises:
            UserError: The split does not exist, or a shard that had to be searched is damaged.
        """
        shards = self.shards(split)
        for info in shards:
            if sequence_id in self._rows:
                break
            if info.file not in self._facts:
                self._read_texts(info)
        place = self._rows.get(sequence_id)
        return place if place is not None and place[0] in shards else None

    def _table(self, info: ShardInfo, columns: list[str]) -> pa.Table:
        """Verify a shard's file and read some of its columns."""
        path, content = f"{self.folder}/{info.file}", self._storage.read_verified(info.file, info.sha256)
        if len(content) != info.bytes:
            raise UserError(f"{path}: has {len(content)} bytes, but {MANIFEST_FILE} lists {info.bytes}")
        return read_columns(content, columns, self.geometry, info.sequences, info.tokens, path)

    def _check_counts(self, info: ShardInfo, sequence_ids: Sequence[str], offsets: npt.NDArray[np.int64]) -> None:
        path, counts = f"{self.folder}/{info.file}", (len(sequence_ids), int(offsets[-1]))
        if counts != (info.sequences, info.tokens):
            raise UserError(
                f"{path}: holds {counts[0]} sequences of {counts[1]} tokens, but {MANIFEST_FILE} lists "
                f"{info.sequences} of {info.tokens}"
            )

    def compare(self, info: ShardInfo, facts: Facts) -> None:
        """Compare a shard with the shards read so far, by this object or by another process.

        Reading the whole set therefore finds every sequence id that occurs twice.

        Args:
            info: The shard's description in the manifest.
            facts: Facts of the shard.

        Raises:
            UserError: A sequence id occurs twice, or only some shards have gate weights.
        """
        path, ids = f"{self.folder}/{info.file}", facts.sequence_ids
        if len(set(ids)) != len(ids):
            twice = next(name for name, count in Counter(ids).items() if count > 1)
            raise UserError(f"{path}: two sequences have the id {shown(twice)}; ids must be unique")
        for row, sequence_id in enumerate(ids):
            if (first := self._rows.setdefault(sequence_id, (info, row))[0]).file != info.file:
                raise UserError(f"{path}: sequence {shown(sequence_id)} is in {first.file} too; ids must be unique")
        if facts.gate_weights is not None:
            previous = next(
                ((name, f.gate_weights) for name, f in self._facts.items() if f.gate_weights is not None), None
            )
            if previous is not None and previous[1] != facts.gate_weights:
                with_or_without = "with" if previous[1] else "without"
                raise UserError(
                    f"{path}: either all shards have gate weights or none; {previous[0]} is {with_or_without}"
                )
        if facts.gate_weights is not None or info.file not in self._facts:
            self._facts[info.file] = facts

    def facts(self, part: Part = None) -> list[tuple[ShardInfo, Facts]]:
        """Return the facts of the shards of a part that were read, for `compare` in another process.

        Args:
            part: Part of the set (default: all splits).
        """
        return [(info, self._facts[info.file]) for info in self.shards(part) if info.file in self._facts]

    def _states(self, info: ShardInfo) -> HiddenStates:
        form, shape, sha256 = self.manifest.states, self.manifest.states_shape, info.states_sha256
        if form is None or shape is None or sha256 is None:
            raise UserError(
                f"{self.folder}: has no hidden states; collect it with --record experts,gate_weights,hidden_states"
            )
        self._storage.fetch_optional(info.states_file)
        path, content = (
            f"{self.folder}/{info.states_file}",
            self._storage.read_verified(info.states_file, sha256, "file"),
        )
        if len(content) != info.states_bytes:
            raise UserError(f"{path}: has {len(content)} bytes, but {MANIFEST_FILE} lists {info.states_bytes}")
        return load_states(content, (info.tokens, *shape), path, form.dtype)

    def lengths(self, part: Part = None) -> list[npt.NDArray[np.int64]]:
        """Return the tokens of every row, shard by shard, without decoding the experts.

        Args:
            part: Part of the set (default: all splits).

        Raises:
            UserError: The split does not exist, or a shard is damaged or holds a text that the writer refuses.
        """
        return [np.diff(self._read_texts(info)[0]) for info in self.shards(part)]

    def text_digests(self, part: Part = None) -> list[bytes]:
        """Return the hash of every sequence (`text_digest`), in stored order; copies have equal hashes.

        Args:
            part: Part of the set (default: all splits).

        Raises:
            UserError: The split does not exist, or a shard is damaged.
        """
        digests = []
        for info in self.shards(part):
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
            UserError: A shard is damaged.
        """
        return count_copies({split: self.text_digests(split) for split in self.manifest.splits})

    def _read_texts(self, info: ShardInfo) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """Read a shard's offsets and token ids, and verify everything except its experts."""
        path = f"{self.folder}/{info.file}"
        table = self._table(info, ["sequence_id", "token_ids", "decode_start"])
        sequence_ids, offsets, token_ids, decode_starts = decode_texts(table, path)
        vocab_size = self.manifest.tokenizer.vocab_size
        raise_fault(first_fault(self.geometry, vocab_size, offsets, token_ids, decode_starts), sequence_ids, path)
        self._check_counts(info, sequence_ids, offsets)
        self.compare(info, Facts(sequence_ids))
        return offsets, token_ids

    @cached_property
    def routers(self) -> Routers | None:
        """Weights of the model's routers, or None if they were not recorded.

        Raises:
            UserError: The file is missing or damaged.
        """
        sha256, size = self.manifest.routers_sha256, self.manifest.full_hidden_size
        if sha256 is None or size is None:
            return None
        layers, experts, _ = self.geometry.shape()
        self._storage.fetch_optional(ROUTERS_FILE)
        content = self._storage.read_verified(ROUTERS_FILE, sha256, "file")
        return load_routers(content, (layers, experts, size), f"{self.folder}/{ROUTERS_FILE}")

    @cached_property
    def projection(self) -> StateProjection | None:
        """Projection of the hidden states; None if they have the model's width, or were not recorded.

        Raises:
            UserError: The file is missing or damaged.
        """
        form, shape = self.manifest.states, self.manifest.states_shape
        if form is None or shape is None or form.projection_sha256 is None or form.projected_from is None:
            return None
        self._storage.fetch_optional(PROJECTION_FILE)
        content = self._storage.read_verified(PROJECTION_FILE, form.projection_sha256, "file")
        return load_projection(content, (*shape, form.projected_from), f"{self.folder}/{PROJECTION_FILE}")

    def engine_logs(self) -> list[EngineLog]:
        """Read the log of the engine that recorded the set: its residency and its metrics, one log per sequence.

        Returns:
            Logs in the order of the recording; empty if the set has none.

        Raises:
            UserError: The file is missing or damaged.
        """
        if (sha256 := self.manifest.engine_log_sha256) is None:
            return []
        self._storage.fetch_optional(ENGINE_FILE)
        return load_engine_logs(
            self._storage.read_verified(ENGINE_FILE, sha256, "file"), self.geometry, f"{self.folder}/{ENGINE_FILE}"
        )

    def tokenizer_content(self) -> bytes | None:
        """Return the content of the set's ``tokenizer.json``; None if it has none.

        Raises:
            UserError: The file is missing or damaged.
        """
        sha256 = self.manifest.tokenizer.sha256
        return None if sha256 is None else self._storage.read_verified(TOKENIZER_FILE, sha256, "tokenizer")

    @cached_property
    def token_strings(self) -> list[str] | None:
        """String of every token id (``vocab_size`` strings), or None if the set has no tokenizer."""
        from tokenizers import Tokenizer

        path, sha256 = f"{self.folder}/{TOKENIZER_FILE}", self.manifest.tokenizer.sha256
        if sha256 is None:
            return None
        content = self._storage.read_verified(TOKENIZER_FILE, sha256, "tokenizer")
        try:
            tokenizer = Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path}: is not a tokenizer ({brief(error)})") from error
        strings = (tokenizer.id_to_token(i) for i in range(self.manifest.tokenizer.vocab_size))
        return [string or "" for string in strings]


class Split:
    """The sequences of one split, or of a whole trace set; made by `TraceSet.split`.

    Args:
        traces: The trace set.
        name: Name of the split; None for all splits.
    """

    def __init__(self, traces: TraceSet, name: str | None) -> None:
        self.name = name
        self.shards = traces.shards(name)
        self._traces = traces

    def __len__(self) -> int:
        """Return the number of sequences."""
        return sum(shard.sequences for shard in self.shards)

    @overload
    def __getitem__(self, key: int | str) -> Trace: ...
    @overload
    def __getitem__(self, key: slice) -> list[Trace]: ...
    def __getitem__(self, key: int | str | slice) -> Trace | list[Trace]:
        """Return a sequence by position or sequence id, or several by a slice of positions.

        Raises:
            IndexError: The position is out of range.
            UserError: There is no sequence of this id, or a shard is damaged.
        """
        if isinstance(key, slice):
            return [self[position] for position in range(*key.indices(len(self)))]
        if isinstance(key, str):
            if (place := self._traces.find(key, self.name)) is None:
                raise UserError(f"{self._traces.folder}: has no sequence {shown(key)}; choose an id of its sequences")
            return self._traces.row(*place)
        position = index(key)
        if not -len(self) <= position < len(self):
            raise IndexError(f"{self._traces.folder}: position {position} is out of range for {len(self)} sequences")
        position %= len(self)
        ends = list(accumulate(shard.sequences for shard in self.shards))
        number = bisect_right(ends, position)
        info = self.shards[number]
        return self._traces.row(info, position - ends[number] + info.sequences)

    def __iter__(self) -> Iterator[Trace]:
        """Iterate over the sequences in stored order, with one shard in memory at a time."""
        return self._traces.traces(self.name)

    def __contains__(self, sequence_id: object) -> bool:
        """Return whether there is a sequence of this id."""
        return isinstance(sequence_id, str) and self._traces.find(sequence_id, self.name) is not None

    def __repr__(self) -> str:
        """Return one line: folder, split, model and size."""
        traces = self._traces
        return f"<Split {self.name} of {traces.folder}: {traces.manifest.model_id}; {_sizes(self.shards)}>"


def _sizes(shards: Sequence[ShardInfo]) -> str:
    sequences, tokens = sum(shard.sequences for shard in shards), sum(shard.tokens for shard in shards)
    return f"{sequences:,} sequences, {tokens:,} tokens"
