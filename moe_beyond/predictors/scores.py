"""Scores on disk: a folder of safetensors shards, one tensor a sequence, and an index."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moe_beyond.errors import UserError
from moe_beyond.files import is_earlier_result, read_json, replacing_folder, write_json
from moe_beyond.geometry import Geometry
from moe_beyond.lookahead import Lookahead, parse_lookahead

FORMAT_VERSION = 1
INDEX_FILE = "scores.json"
VALUES_PER_SHARD = 64 * 2**20


class ScoresWriter:
    """Collects scores into shards; made by `writing_scores`."""

    def __init__(self, folder: Path) -> None:
        """Start in an existing folder."""
        self._folder = folder
        self._pending: dict[str, npt.NDArray[np.float32]] = {}
        self.files: dict[str, str] = {}
        self._shards = 0

    def write(self, sequence_id: str, scores: npt.NDArray[np.float32]) -> None:
        """Add a sequence's ``(T, H, L, E)`` float32 scores.

        Raises:
            UserError: The sequence was written before.
        """
        if sequence_id in self.files:
            raise UserError(f"scores of sequence {sequence_id!r} were written already")
        self._pending[sequence_id] = np.ascontiguousarray(scores, np.float32)
        self.files[sequence_id] = f"scores-{self._shards:05d}.safetensors"
        if sum(s.size for s in self._pending.values()) >= VALUES_PER_SHARD:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as a shard."""
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
    available: str = "routed",
    training: Mapping[str, Any] | None = None,
) -> Iterator[ScoresWriter]:
    """Write a scores folder, which appears, whole, when the block ends without an error.

    Args:
        folder: The folder to make.
        geometry: The shape of the model.
        lookaheads: What the H slices are.
        predictor: What to call the predictor in tables.
        traces: Fingerprint of the trace set.
        causal: Whether the scores ignore later tokens.
        available: Whether a score exists once a layer is ``"routed"``, or only once it is ``"computed"``.
        training: What is recorded of the predictor's training text, if anything.
    """
    ours = is_earlier_result(folder, INDEX_FILE, "scores-*.safetensors")
    with replacing_folder(folder, overwrite=ours) as temporary:
        writer = ScoresWriter(temporary)
        yield writer
        writer.flush()
        index: Mapping[str, Any] = {
            "format_version": FORMAT_VERSION,
            "predictor": predictor,
            "lookaheads": list(lookaheads),
            "causal": causal,
            "available": available,
            "geometry": geometry.to_json(),
            "traces": traces,
            "training": training and dict(training),
            "files": writer.files,
        }
        write_json(temporary / INDEX_FILE, index)


class ScoresFolder:
    """A scores folder opened for reading.

    Args:
        folder: The folder.

    Raises:
        UserError: It is not a scores folder of this format.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / INDEX_FILE).exists():
            raise UserError(f"{folder}: is not a scores folder (it has no {INDEX_FILE})")
        path = self.folder / INDEX_FILE
        index = read_json(path)
        try:
            if index["format_version"] != FORMAT_VERSION:
                raise UserError(f"scores format {index['format_version']!r}; this package reads {FORMAT_VERSION}")
            self.predictor = str(index["predictor"])
            self.lookaheads: tuple[Lookahead, ...] = tuple(parse_lookahead(h) for h in index["lookaheads"])
            self.causal = bool(index["causal"])
            self.available = str(index["available"])
            if self.available not in ("routed", "computed"):
                raise UserError(f"available is {self.available!r}, neither 'routed' nor 'computed'")
            self.geometry = Geometry.from_json(index["geometry"])
            self.traces = str(index["traces"])
            training = index.get("training")
            self.training: dict[str, Any] | None = training if isinstance(training, dict) else None
            self._files: dict[str, str] = dict(index["files"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: a field is missing or wrong ({error})") from error
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def scores(self, sequence_id: str, tokens: int) -> npt.NDArray[np.float32]:
        """Read one sequence's ``(T, H, L, E)`` float32 scores.

        Args:
            sequence_id: Which.
            tokens: How many tokens it has, T.

        Raises:
            UserError: It is not there, or has another shape, or holds something that is no probability.
        """
        if sequence_id not in self._files:
            raise UserError(f"{self.folder}: has no scores for sequence {sequence_id!r}")
        path = self.folder / self._files[sequence_id]
        try:
            with safe_open(path, framework="numpy") as file:
                found: npt.NDArray[np.float32] = file.get_tensor(sequence_id)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from error
        expected = (tokens, len(self.lookaheads), *self.geometry.shape()[:2])
        if found.shape != expected:
            raise UserError(f"{path}: scores of {sequence_id!r} have shape {found.shape}, expected {expected}")
        if not np.isfinite(found).all() or found.min() < 0 or found.max() > 1:
            raise UserError(f"{path}: scores of {sequence_id!r} are not all finite and within 0..1")
        return found
