"""Online updates: scores that are corrected by the routing of served tokens, with a state of bounded size.

A correction is added to the logits of a layer's scores. It is the sum of two rows of a table: the row of the token's
id, and the row of its id and the id before. Once the layer is routed, each row takes a step against the gradient of the
sigmoid cross-entropy: rate times (corrected score - selected). A row has a second part for scores of lookahead
``"next"``, which correct the following token. The scores of all other lookaheads share the first part, whose step reads
the smallest of them.

Corrections for a token read what earlier tokens were routed to, in this sequence and in those before it. The same
sequences in the same order give the same table. Contexts share a fixed number of rows by a hash. A context keeps its
row as long as it comes at least as often as the others that the hash gives the same row, which have no correction.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from moe_beyond.compiling import compiled
from moe_beyond.errors import UserError
from moe_beyond.files import parse_json, replacing
from moe_beyond.json_fields import build
from moe_beyond.predictors.base import Predictor
from moe_beyond.predictors.stepper import Stepper
from moe_beyond.safe_text import brief, shown
from moe_beyond.safetensors_header import read_header

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

FORMAT_VERSION = 1
METADATA = "moe_beyond_online"
"""Field of a state file's metadata."""
LEAST_SCORE = 1e-6
"""Bound of scores away from 0 and 1, so that their logits are finite."""
ID_MASK = 2**31 - 1
"""Bits of a token id that distinguish contexts."""
MOST_VISITS = 16
"""Bound of a row's visits, so that a context that no longer comes loses its row."""
ROWS = 2
"""Rows that correct a token."""
TENSORS = ("keys", "visits", "values")
"""Arrays of the table that a state file has, those rows with a context."""
REMEDY = "give another file, or start a new one"


@dataclass(frozen=True)
class OnlineSettings:
    """Settings of online updates; the defaults were chosen on text that small-moe generated.

    Attributes:
        id_rate: Rate of the row of a token id (default: 0.2).
        pair_rate: Rate of the row of a token id and the id before (default: 0.7).
        bound: Largest absolute value of a correction in a row (default: 4).
        contexts: Number of rows (default: 8192).
    """

    id_rate: float = 0.2
    pair_rate: float = 0.7
    bound: float = 4.0
    contexts: int = 8192

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UserError: A number is out of range.
        """
        for name in ("id_rate", "pair_rate", "bound"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise UserError(f"online updates: {name} must be a number of at least 0 (got {shown(value)})")
        if type(self.contexts) is not int or not 1 <= self.contexts <= 2**24:
            raise UserError(f"online updates: contexts must be from 1 to 2**24 (got {shown(self.contexts)})")

    @property
    def rates(self) -> Floats:
        """Rates ``(2,)`` of the two rows."""
        return np.array([self.id_rate, self.pair_rate], np.float32)


class OnlineUpdates:
    """Table of corrections for one predictor, which changes while sequences are read.

    Args:
        predictor: Fitted predictor whose scores are corrected.
        settings: Rates and sizes (default: `OnlineSettings`).

    Attributes:
        predictor: Predictor whose scores are corrected.
        settings: Rates and sizes.
        values: Corrections of logits, ``(contexts, G, L, E)`` float32; G is 2 with lookahead ``"next"``, otherwise 1.
        keys: Context of each row, ``(contexts,)`` int64; 0 for none.
        visits: Visits of each row's context minus those of contexts without a row, ``(contexts,)`` int64.

    Raises:
        UserError: The predictor reads hidden states.

    Example:
        >>> from moe_beyond.predictors import OnlineUpdates, from_pretrained
        >>> updates = OnlineUpdates(from_pretrained("history.deepseek-v2-lite-puffin"))
        >>> stepper = updates.stepper()
    """

    def __init__(self, predictor: Predictor, settings: OnlineSettings | None = None) -> None:
        if predictor.information.hidden_states:
            raise UserError(
                f"online updates: {predictor.architecture} reads hidden states, and only predictors of ids are "
                "updated; leave online updates out, or give such a predictor"
            )
        self.predictor, self.settings = predictor, settings or OnlineSettings()
        self._lookaheads = predictor.information.lookaheads
        layers, experts, _ = predictor.geometry.shape()
        parts = 1 + ("next" in self._lookaheads)
        self.values: Floats = np.zeros((self.settings.contexts, parts, layers, experts), np.float32)
        self.keys, self.visits = np.zeros((2, self.settings.contexts), np.int64)

    def copy(self) -> Self:
        """Return updates that start with this table and change their own copy."""
        twin = type(self)(self.predictor, self.settings)
        used = np.flatnonzero(self.keys)  # memory of other rows is never taken
        for name in TENSORS:
            getattr(twin, name)[used] = getattr(self, name)[used]
        return twin

    def correct(self, token_ids: npt.ArrayLike, experts: npt.ArrayLike, scores: Floats) -> Floats:
        """Correct the scores of the next sequence, token by token, and update the table.

        Args:
            token_ids: Token ids ``(T,)``.
            experts: Expert ids ``(T, L, K)``; ids outside of 0 .. E-1 are padding.
            scores: Scores ``(T, H, L, E)`` of the predictor.

        Returns:
            Corrected scores ``(T, H, L, E)`` float32, equal to those of a stepper.
        """
        corrected = np.empty_like(scores, np.float32)
        following = self._lookaheads.index("next") if "next" in self._lookaheads else -1
        _correct_sequence(
            np.ascontiguousarray(scores, np.float32),
            np.ascontiguousarray(token_ids, np.int64),
            np.ascontiguousarray(experts, np.int64),
            first_of(self._lookaheads),
            following,
            self.values,
            self.keys,
            self.visits,
            self.settings.rates,
            np.float32(self.settings.bound),
            corrected,
        )
        return corrected

    def stepper(self) -> "OnlineStepper":
        """Return a stepper whose scores are corrected, and which updates the table.

        Raises:
            UserError: The predictor reads later tokens, which do not exist while decoding.
        """
        return OnlineStepper(self)

    def save(self, path: str | Path) -> None:
        """Write the table to a safetensors file.

        Args:
            path: File to write or to replace.

        Raises:
            UserError: The path is a folder.
        """
        if Path(path).is_dir():
            raise UserError(f"{path}: is a folder; name a file for online updates")
        used = np.flatnonzero(self.keys)
        content = {
            "format_version": FORMAT_VERSION,
            "predictor": predictor_sha256(self.predictor),
            "settings": asdict(self.settings),
        }
        tensors = {name: getattr(self, name)[used] for name in TENSORS}
        with replacing(path) as temporary:
            save_file(tensors, temporary, {METADATA: json.dumps(content)})

    @classmethod
    def load(cls, path: str | Path, predictor: Predictor) -> Self:
        """Read a table, which continues exactly.

        Args:
            path: File that `save` wrote.
            predictor: Predictor that the table belongs to.

        Raises:
            UserError: The file is no table, is damaged, or belongs to another predictor.
        """
        path = Path(path)
        tensors, metadata = read_header(path)
        content = _metadata(metadata, path)
        if content["predictor"] != predictor_sha256(predictor):
            raise UserError(f"{path}: online updates of another predictor than {predictor.architecture}; {REMEDY}")
        try:
            updates = cls(predictor, build(OnlineSettings, content["settings"], "settings"))
        except UserError as error:
            raise UserError(f"{path}: {error}; {REMEDY}") from error
        rows = tensors["keys"].shape[0] if "keys" in tensors and tensors["keys"].shape else 0
        expected = {"keys": ("I64", (rows,)), "visits": ("I64", (rows,))}
        expected["values"] = ("F32", (rows, *updates.values.shape[1:]))
        if {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()} != expected:
            raise UserError(f"{path}: its tensors have other shapes or types than those of the predictor; {REMEDY}")
        stored = load_file(path)
        places = np.array([_place(int(key), updates.settings.contexts) for key in stored["keys"]], np.int64)
        in_range = (stored["keys"] > 0).all() and (abs(stored["visits"] - MOST_VISITS // 2) <= MOST_VISITS // 2).all()
        if not in_range or len(np.unique(places)) != rows:
            raise UserError(f"{path}: its contexts contradict one another; {REMEDY}")
        if not (np.abs(stored["values"]) <= np.float32(updates.settings.bound)).all():  # neither are NaNs
            raise UserError(f"{path}: its corrections are not finite or exceed their bound; {REMEDY}")
        for name in TENSORS:
            getattr(updates, name)[places] = stored[name]
        return updates


class OnlineStepper(Stepper):
    """A predictor's stepper with corrected scores; the table outlives `reset`.

    Args:
        updates: Table of corrections, which the stepper changes.
    """

    def __init__(self, updates: OnlineUpdates) -> None:
        self._updates, self._settings = updates, updates.settings
        lookaheads, layers = updates.predictor.information.lookaheads, updates.predictor.geometry.num_layers
        self._ahead = max((each for each in lookaheads if isinstance(each, int)), default=0)
        self._reach = layers if "token" in lookaheads else min(self._ahead, layers)  # scored when a token starts
        self._rates, self._bound = self._settings.rates, np.float32(self._settings.bound)
        self._inner = updates.predictor.stepper()
        super().__init__(updates.predictor)

    def _reset(self) -> None:
        self._inner.reset()
        self._previous, self._tokens = -1, 0
        self._rows, self._rows_before = np.full((2, ROWS), -1, np.int64)
        # Corrected scores of the current token, and of lookahead "next" for the run that follows; NaN where unknown.
        self._current, self._following, self._scores = np.full((3, *self._shape[:2]), np.nan, np.float32)

    def _start_token(self, token_id: int) -> None:
        self._inner.observe_token(token_id)
        token_id &= ID_MASK
        table, scores = self._updates, self._inner.scores()
        _find_rows(token_id, self._previous, table.values, table.keys, table.visits, self._rows, self._rows_before)
        self._scores = self._scores.copy() if self._tokens else scores.copy()
        self._current[:] = np.nan
        _publish(scores, 0, self._reach, table.values, self._rows, 0, self._current, self._scores)
        self._previous, self._tokens = token_id, self._tokens + 1

    def _route(self, layer: int, experts: npt.NDArray[np.int64], state: npt.NDArray[np.float32] | None) -> None:
        self._inner.observe_layer(layer, experts, state)
        self._scores = self._scores.copy()  # arrays returned by `scores` before stay unchanged
        _step_layer(
            layer, self._ahead, experts, self._inner.scores(), self._updates.values, self._rows, self._rows_before,
            self._rates, self._bound, self._current, self._following, self._scores,
        )  # fmt: skip

    def scores(self) -> npt.NDArray[np.float32]:
        """Return the corrected probabilities ``(L, E)`` of each layer's next run; NaN if no score is available."""
        return self._scores


def first_of(lookaheads: tuple[int | str, ...]) -> int:
    """Return the index of the lookahead that a layer's last score before its routing has; -1 if there is none.

    Args:
        lookaheads: Lookaheads of a predictor.
    """
    layers_ahead = [each for each in lookaheads if isinstance(each, int)]
    last = min(layers_ahead) if layers_ahead else "token"
    return lookaheads.index(last) if last in lookaheads else -1


def predictor_sha256(predictor: Predictor) -> str:
    """Return a hash of everything that determines a predictor's scores."""
    calibration = predictor.calibration and predictor.calibration.to_json()
    described = (predictor.architecture, predictor.geometry.to_json(), predictor.arguments(), calibration)
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, weights in predictor.state_dict().items():
        digest.update(f"{name} {weights.dtype} {tuple(weights.shape)}".encode())
        digest.update(weights.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _metadata(metadata: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the description in a state file's header.

    Raises:
        UserError: There is none, or it is of another format.
    """
    if METADATA not in metadata:
        raise UserError(f"{path}: is no file of online updates; {REMEDY}")
    content = parse_json(str(metadata[METADATA]).encode(), path)
    if not isinstance(content, dict) or set(content) != {"format_version", "predictor", "settings"}:
        raise UserError(f"{path}: its description is damaged (got {brief(content)}); {REMEDY}")
    if content["format_version"] != FORMAT_VERSION:
        version = shown(content["format_version"])
        raise UserError(f"{path}: online updates of format {version}; this package reads {FORMAT_VERSION}; {REMEDY}")
    return content


@compiled
def _place(key: int | np.int64, contexts: int) -> int:
    """Return the place of a context among the rows."""
    mixed = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
    return int((mixed >> np.uint64(32)) % np.uint64(contexts))


@compiled
def _find_rows(
    token_id: int, previous: int, values: Floats, keys: Ints, visits: Ints, rows: Ints, rows_before: Ints
) -> None:
    """Find the rows of a token, -1 for a context without one; a context that gets a row starts with zeros."""
    rows_before[:] = rows
    own = np.int64(token_id) & ID_MASK
    for place in range(ROWS):
        before = 1 if previous < 0 else (np.int64(previous) & (ID_MASK >> 1)) + 2
        key = own + 1 if place == 0 else (before << 32) + own + 1
        row = _place(key, len(keys))
        rows[place] = row
        if keys[row] == key:
            visits[row] = min(visits[row] + 1, MOST_VISITS)
        elif visits[row] > 0:
            visits[row] -= 1
            rows[place] = -1
        else:
            keys[row], visits[row] = key, 1
            values[row] = 0
            for other in range(ROWS):  # the token before may have lost its row
                if rows_before[other] == row:
                    rows_before[other] = -1


@compiled
def _correct(scores: Floats, values: Floats, rows: Ints, part: int, layer: int, corrected: Floats) -> None:
    """Correct the scores ``(E,)`` of a layer."""
    for expert in range(len(scores)):
        score = min(max(scores[expert], np.float32(LEAST_SCORE)), np.float32(1 - LEAST_SCORE))
        logit = math.log(score / (1 - score))
        for row in rows:
            if row >= 0:
                logit += values[row, part, layer, expert]
        corrected[expert] = 1 / (1 + math.exp(-logit))


@compiled
def _update(
    values: Floats,
    rows: Ints,
    part: int,
    layer: int,
    corrected: Floats,
    experts: Ints,
    rates: Floats,
    bound: np.float32,
) -> None:
    """Move the rows of a routed layer against the gradient of the cross-entropy of its corrected scores ``(E,)``."""
    for expert in range(len(corrected)):
        error = corrected[expert]
        for selected in experts:
            if selected == expert:
                error -= np.float32(1)
        for place in range(ROWS):
            if rows[place] >= 0:
                value = values[rows[place], part, layer, expert] - rates[place] * error
                values[rows[place], part, layer, expert] = min(max(value, -bound), bound)


@compiled
def _correct_sequence(
    scores: Floats, token_ids: Ints, experts: Ints, first: int, following: int, values: Floats, keys: Ints,
    visits: Ints, rates: Floats, bound: np.float32, corrected: Floats,
) -> None:  # fmt: skip
    """Correct a sequence, as `OnlineStepper` does.

    The score of lookahead ``"next"`` for the first token follows no layer of a token, and stays as it is.
    """
    tokens, lookaheads, layers, _ = scores.shape
    rows, rows_before = np.full(ROWS, -1), np.full(ROWS, -1)
    for token in range(tokens):
        previous = token_ids[token - 1] & ID_MASK if token else -1
        _find_rows(token_ids[token], previous, values, keys, visits, rows, rows_before)
        for layer in range(layers):
            routed = experts[token, layer]
            for ahead in range(lookaheads):
                if ahead != following:
                    _correct(scores[token, ahead, layer], values, rows, 0, layer, corrected[token, ahead, layer])
            if first >= 0:
                _update(values, rows, 0, layer, corrected[token, first, layer], routed, rates, bound)
            if following < 0:
                continue
            if token == 0:
                corrected[0, following, layer] = scores[0, following, layer]
            else:
                _update(values, rows_before, 1, layer, corrected[token, following, layer], routed, rates, bound)
            if token + 1 < tokens:
                next_run = corrected[token + 1, following, layer]
                _correct(scores[token + 1, following, layer], values, rows, 1, layer, next_run)


@compiled
def _publish(
    scores: Floats, begin: int, end: int, values: Floats, rows: Ints, part: int, kept: Floats, published: Floats
) -> None:
    """Correct the scores of some layers that are available, and keep them for the update."""
    for layer in range(begin, min(end, len(scores))):
        if np.isnan(scores[layer, 0]):
            kept[layer] = np.nan
        else:
            _correct(scores[layer], values, rows, part, layer, kept[layer])
        published[layer] = kept[layer]


@compiled
def _step_layer(
    layer: int, ahead: int, experts: Ints, scores: Floats, values: Floats, rows: Ints, rows_before: Ints,
    rates: Floats, bound: np.float32, current: Floats, following: Floats, published: Floats,
) -> None:  # fmt: skip
    """Update the table by a routed layer, then correct the scores ``(L, E)`` that became available."""
    if not np.isnan(current[layer, 0]):
        _update(values, rows, 0, layer, current[layer], experts, rates, bound)
    if not np.isnan(following[layer, 0]):
        _update(values, rows_before, 1, layer, following[layer], experts, rates, bound)
    current[layer] = np.nan
    _publish(scores, layer + 1, layer + 1 + ahead, values, rows, 0, current, published)
    _publish(scores, layer, layer + 1, values, rows, values.shape[1] - 1, following, published)
