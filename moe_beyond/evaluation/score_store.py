"""Scores folders: safetensors shards with one tensor per sequence, and an index with the hash of every shard."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moe_beyond.errors import UserError
from moe_beyond.files import (
    check_seal,
    file_in,
    file_sha256,
    is_earlier_result,
    read_json,
    replacing_folder,
    sealed,
    write_json,
)
from moe_beyond.geometry import Geometry
from moe_beyond.json_fields import FLAG, OBJECT, PLAIN_NAME, SHA256, TEXT, FieldRule, check_present, optional
from moe_beyond.lookahead import Lookahead, parse_lookahead
from moe_beyond.predictor_config import check_training
from moe_beyond.safe_text import printable, shown

FORMAT_VERSION = 1
INDEX_FILE = "scores.json"
VALUES_PER_SHARD = 64 * 2**20
"""Number of scores at which a shard is written."""
INDEX_FIELDS = {
    "predictor": TEXT,
    "lookaheads": FieldRule("a list", lambda value: isinstance(value, list) and bool(value)),
    "causal": FLAG,
    "geometry": OBJECT,
    "traces": TEXT,
    "training": optional(OBJECT),
    "files": FieldRule("an object of plain file names", lambda value: _is_object_of(PLAIN_NAME, value)),
    "sha256": FieldRule("an object of hashes, 64 hexadecimal digits each", lambda value: _is_object_of(SHA256, value)),
}
"""Types of the fields of the index."""


class ScoresWriter:
    """Writer of shards; `writing_scores` makes one.

    Args:
        folder: Folder to write to; exists.

    Attributes:
        files: Sequence id -> file name of its shard.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending: dict[str, npt.NDArray[np.float32]] = {}
        self.files: dict[str, str] = {}
        self._shards = 0

    def write(self, sequence_id: str, scores: npt.NDArray[np.float32]) -> None:
        """Add the scores of a sequence.

        Args:
            sequence_id: Id of the sequence.
            scores: ``(T, H, L, E)`` float32.

        Raises:
            UserError: The sequence has scores already.
        """
        if sequence_id in self.files:
            raise UserError(f"scores of sequence {sequence_id!r} were written already; give every sequence its own id")
        self._pending[sequence_id] = np.ascontiguousarray(scores, np.float32)
        self.files[sequence_id] = f"scores-{self._shards:05d}.safetensors"
        if sum(s.size for s in self._pending.values()) >= VALUES_PER_SHARD:
            self.flush()

    def flush(self) -> None:
        """Write the pending scores as a shard."""
        if self._pending:
            save_file(self._pending, self._folder / f"scores-{self._shards:05d}.safetensors")
            self._pending, self._shards = {}, self._shards + 1


@contextmanager
def writing_scores(
    folder: str | Path,
    *,
    geometry: Geometry,
    lookaheads: Sequence[Lookahead],
    predictor: str,
    traces: str,
    causal: bool = True,
    training: Mapping[str, Any] | None = None,
) -> Iterator[ScoresWriter]:
    """Write a scores folder; it appears complete when the block ends without an error.

    Args:
        folder: Folder to write.
        geometry: Geometry of the model.
        lookaheads: Lookaheads of the H slices of the scores.
        predictor: Name of the predictor in tables.
        traces: Fingerprint of the trace set.
        causal: Whether the scores ignore later tokens (default: True).
        training: Record of the predictor's training text (default: none).

    Yields:
        Writer of the scores.
    """
    overwrite = is_earlier_result(folder, INDEX_FILE, "scores-*.safetensors")
    with replacing_folder(folder, overwrite=overwrite) as temporary:
        writer = ScoresWriter(temporary)
        yield writer
        writer.flush()
        index: Mapping[str, Any] = {
            "format_version": FORMAT_VERSION,
            "predictor": predictor,
            "lookaheads": list(lookaheads),
            "causal": causal,
            "geometry": geometry.to_json(),
            "traces": traces,
            "training": training and dict(training),
            "files": writer.files,
            "sha256": {name: file_sha256(temporary / name) for name in dict.fromkeys(writer.files.values())},
        }
        write_json(temporary / INDEX_FILE, sealed(index))


class ScoresFolder:
    """Reader of a scores folder.

    Args:
        folder: Scores folder to read.

    Attributes:
        folder: Scores folder to read.
        lookaheads: Lookaheads of the H slices of the scores.
        geometry: Geometry of the model.
        predictor: Name of the predictor in tables.
        causal: Whether the scores ignore later tokens.
        traces: Fingerprint of the trace set.
        training: Record of the predictor's training text; None without a record.

    Raises:
        UserError: The folder is no scores folder of this format.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / INDEX_FILE).exists():
            raise UserError(
                f"{folder}: is not a scores folder (it has no {INDEX_FILE}); name the output of `moe-beyond predict`"
            )
        path = file_in(self.folder, INDEX_FILE)
        index = read_json(path)
        try:
            _check_index(index)
            self.lookaheads: tuple[Lookahead, ...] = tuple(map(parse_lookahead, index["lookaheads"]))
            if len(set(self.lookaheads)) != len(self.lookaheads):
                raise UserError(f"lookaheads are repeated (got {', '.join(map(str, self.lookaheads))}); predict again")
            self.geometry = Geometry.from_json(index["geometry"])
            check_training(index["training"] or {})
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        check_seal(index, path, "restore the file, or predict again")
        self.predictor: str = index["predictor"]
        self.causal: bool = index["causal"]
        self.traces: str = index["traces"]
        self.training: dict[str, Any] | None = index["training"]
        self._files: dict[str, str] = index["files"]
        self._unverified: dict[str, str] = dict(index["sha256"])  # file -> hash, until the file is read

    def scores(self, sequence_id: str, tokens: int) -> npt.NDArray[np.float32]:
        """Read the scores of a sequence.

        Args:
            sequence_id: Id of the sequence.
            tokens: Number of its tokens, T.

        Returns:
            ``(T, H, L, E)`` float32.

        Raises:
            UserError: The sequence has no scores, or they are damaged, of another shape, or no probabilities.
        """
        if sequence_id not in self._files:
            raise UserError(f"{self.folder}: has no scores for sequence {sequence_id!r}; predict again")
        name = self._files[sequence_id]
        path = file_in(self.folder, name)
        try:
            if name in self._unverified:
                if file_sha256(path) != self._unverified[name]:
                    raise UserError(f"{path}: is damaged (its sha256 is not the one in {INDEX_FILE}); predict again")
                del self._unverified[name]
            with safe_open(path, framework="numpy") as file:
                scores: npt.NDArray[Any] = file.get_tensor(sequence_id)
        except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}: cannot be read ({printable(str(error))}); predict again") from error
        if scores.dtype != np.float32:
            raise UserError(f"{path}: scores of {shown(sequence_id)} are {scores.dtype}, not float32; predict again")
        expected = (tokens, len(self.lookaheads), *self.geometry.shape()[:2])
        if scores.shape != expected:
            raise UserError(f"{path}: scores of {sequence_id!r} have shape {scores.shape}, expected {expected}")
        if not np.isfinite(scores).all() or scores.min() < 0 or scores.max() > 1:
            raise UserError(f"{path}: scores of {sequence_id!r} are not all finite and within 0..1; predict again")
        return scores


def _check_index(index: Any) -> None:
    """Check an index.

    Raises:
        UserError: A field is missing or of another type, or a file has no hash.
    """
    if not isinstance(index, Mapping):
        raise UserError("is not an object")
    version = index.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise UserError(f"scores format {shown(version)}; this package reads {FORMAT_VERSION}")
    check_present(INDEX_FIELDS, index)
    if set(index["files"].values()) != set(index["sha256"]):
        raise UserError("files and sha256 do not name the same files")


def _is_object_of(rule: FieldRule, value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(rule.accepts, value.values()))
