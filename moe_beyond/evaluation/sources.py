"""Sources of scores (predictors and scores folders), and usage profiles of fitted predictors.

Functions that compute with a predictor import torch themselves: a replay without a predictor does not need it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_beyond.errors import UserError
from moe_beyond.evaluation.score_store import ScoresFolder
from moe_beyond.geometry import Geometry
from moe_beyond.lookahead import Lookahead
from moe_beyond.messages import notify
from moe_beyond.pretrained import WEIGHTS_FILE, checkpoint_folders, list_pretrained, pretrained_folder, shipped_folder
from moe_beyond.traces.manifest import Manifest
from moe_beyond.traces.reader import Part, TraceSet
from moe_beyond.traces.schema import expert_ids
from moe_beyond.traces.trace import Trace
from moe_beyond.usage_profile import UsageProfile

if TYPE_CHECKING:
    from moe_beyond.predictors.base import Predictor
    from moe_beyond.predictors.online import OnlineUpdates
    from moe_beyond.predictors.training_text import TrainingRecord

Scored = tuple[Trace, npt.NDArray[np.float32]]
"""A sequence and its scores ``(T, H, L, E)``."""


def _fits(traces: TraceSet) -> None:
    """Accept every trace set."""


@dataclass(frozen=True)
class ScoreSource:
    """Scores of a trace set's sequences.

    Attributes:
        name: Name in tables and results.
        lookaheads: Lookaheads of the H slices of the scores.
        causal: Whether the scores ignore later tokens.
        sequences: Function from a trace set, a part of it and a flag to every sequence with its scores; the flag keeps
            the order of the traces. Workers receive it, so it is a function or an object of a module.
        training: Record of the predictor's training text; None without a record (default: None).
        check: Function that raises a `UserError` if the source does not fit a trace set (default: none does).
        note: Note for tables about what the scores read besides the sequence (default: None).
    """

    name: str
    lookaheads: tuple[Lookahead, ...]
    causal: bool
    sequences: Callable[[TraceSet, Part, bool], Iterator[Scored]]
    training: TrainingRecord | None = None
    check: Callable[[TraceSet], None] = _fits
    note: str | None = None


def from_predictor(predictor: Predictor, name: str, *, tokenizer_sha256: str | None = None) -> ScoreSource:
    """Score with a predictor.

    Args:
        predictor: Fitted predictor to score with.
        name: Name in tables and results.
        tokenizer_sha256: Hash of the tokenizer of the training text; traces of another tokenizer are an error
            (default: unknown).
    """
    information, scores = predictor.information, _Predicted(predictor, tokenizer_sha256)
    return ScoreSource(
        name,
        information.lookaheads,
        information.causal,
        scores,
        predictor.fitted_on,
        scores.check,
    )


@dataclass(frozen=True)
class _Predicted:
    """Scores of a predictor, as `ScoreSource.sequences`; a class, because a worker cannot receive a closure."""

    predictor: Predictor
    tokenizer_sha256: str | None

    def check(self, traces: TraceSet) -> None:
        """Refuse a trace set that the predictor does not fit."""
        from moe_beyond.predictors.io.folder import check_fits, check_projection

        check_fits(self.predictor, traces.manifest, traces.folder, self.tokenizer_sha256)
        check_projection(self.predictor, traces)

    def __call__(self, traces: TraceSet, part: Part, in_order: bool = False) -> Iterator[Scored]:
        # Whoever has a predictor has imported torch; the imports are here for replays without one.
        import torch

        from moe_beyond.datamodules.traces import whole_sequences
        from moe_beyond.predictors.batch import collate

        self.check(traces)
        predictor = self.predictor
        reading, read = traces.traces(part), dict[str, Trace]()
        states = bool(predictor.information.hidden_states)
        # Batches of similar length need the least padding; in order, every batch is one sequence.
        single = (collate([trace]) for trace in traces.traces(part, hidden_states=states))
        batches = single if in_order else whole_sequences(traces, part, hidden_states=states)
        with torch.inference_mode():
            for batch in batches:
                probabilities = predictor.probabilities(predictor(batch)).numpy()
                for row, sequence_id in enumerate(batch.sequence_ids):
                    while sequence_id not in read:
                        trace = next(reading)
                        read[trace.sequence_id] = trace
                    trace = read.pop(sequence_id)
                    yield trace, probabilities[row, : len(trace)]


@dataclass
class _Online:
    """Scores of a predictor with online updates, as `ScoreSource.sequences`; each call starts with the same table."""

    predicted: _Predicted
    start: OnlineUpdates
    end: OnlineUpdates | None = field(default=None, init=False)

    def __call__(self, traces: TraceSet, part: Part, in_order: bool = False) -> Iterator[Scored]:
        updates = self.start.copy()
        for trace, scores in self.predicted(traces, part, True):
            experts = expert_ids(trace.experts, traces.geometry.num_experts)
            yield trace, updates.correct(trace.token_ids, experts, scores)
        self.end = updates


STARTED = "starts with stored corrections; text that they were learned on is not held out"


def with_online(source: ScoreSource, state: str | Path | None = None) -> ScoreSource:
    """Correct the scores of a predictor by online updates, sequence after sequence, in the order of the traces.

    Args:
        source: Source of a predictor's scores.
        state: File with the table to start with, if it exists (default: an empty table).

    Raises:
        UserError: The source reads stored scores, or the file belongs to another predictor or is damaged.
    """
    from moe_beyond.predictors.online import OnlineUpdates

    if not isinstance(source.sequences, _Predicted):
        raise UserError(f"--online: corrects the scores of a predictor (got those of {source.name}); give a predictor")
    predictor = source.sequences.predictor
    exists = state is not None and Path(state).exists()
    updates = OnlineUpdates.load(state, predictor) if state is not None and exists else OnlineUpdates(predictor)
    sequences, note = _Online(source.sequences, updates), STARTED if exists else None
    return replace(source, name=f"{source.name} online", sequences=sequences, note=note)


def save_online(source: ScoreSource, state: str | Path) -> None:
    """Write the table of `with_online` as it is after all sequences.

    Args:
        source: Source of `with_online`.
        state: File to write or to replace.

    Raises:
        UserError: No strategy has read the scores.
    """
    assert isinstance(source.sequences, _Online), "only scores with online updates have a table"
    if source.sequences.end is None:
        raise UserError(f"{state}: was not written, because no strategy reads scores; give another policy or prefetch")
    source.sequences.end.save(state)


def from_predictor_folder(folder: str | Path) -> ScoreSource:
    """Score with a predictor folder.

    Raises:
        UserError: The folder is no predictor folder, or is damaged.
    """
    from moe_beyond.predictors.io.folder import read_config, read_predictor

    predictor = read_predictor(folder)
    tokenizer = read_config(folder).get("training", {}).get("tokenizer") or {}
    name = name_of_folder(folder, predictor.architecture)
    return from_predictor(predictor, name, tokenizer_sha256=tokenizer.get("sha256"))


def name_of_folder(folder: str | Path, architecture: str) -> str:
    """Return the name of a predictor in tables: the name of a pretrained one, otherwise the architecture."""
    pretrained = Path(folder).resolve().parent in checkpoint_folders()
    return Path(folder).name if pretrained else architecture


def from_scores_folder(folder: str | Path) -> ScoreSource:
    """Read stored scores.

    Raises:
        UserError: The folder is no scores folder.
    """
    stored = ScoresFolder(folder)
    scores = _Stored(stored)
    return ScoreSource(
        stored.predictor,
        stored.lookaheads,
        stored.causal,
        scores,
        stored.training,
        scores.check,
    )


@dataclass(frozen=True)
class _Stored:
    """Scores of a folder, as `ScoreSource.sequences`."""

    stored: ScoresFolder

    def check(self, traces: TraceSet) -> None:
        """Refuse a trace set that the scores are not for."""
        stored, folder = self.stored, self.stored.folder
        if stored.geometry.shape() != traces.geometry.shape():
            raise UserError(
                f"{folder}: scores are for {stored.geometry.describe_shape()}, "
                f"but {traces.folder} has {traces.geometry.describe_shape()}; predict again"
            )
        if stored.traces != traces.manifest.fingerprint:
            raise UserError(f"{folder}: scores were made for another trace set than {traces.folder}; predict again")

    def __call__(self, traces: TraceSet, part: Part, in_order: bool = False) -> Iterator[Scored]:
        self.check(traces)
        for trace in traces.traces(part):
            yield trace, self.stored.scores(trace.sequence_id, len(trace))


def pretrained_for(architecture: str, traces: TraceSet) -> Path | None:
    """Find the pretrained predictor of an architecture that was fitted for the model and tokenizer of a trace set.

    Returns:
        Its folder, the first by name whose weights are installed; a notice names the predictors before it. None
        without such a predictor.

    Raises:
        NotInstalledError: There are such predictors, but no weights of any.
    """
    from moe_beyond.predictors.io.folder import read_config

    names = [name for name in list_pretrained() if name.split(".")[0] == architecture]
    fitting = [name for name in names if _is_for(read_config(shipped_folder(name)), traces)]
    installed = [name for name in fitting if (shipped_folder(name) / WEIGHTS_FILE).is_file()]
    if not installed:
        return pretrained_folder(fitting[0]) if fitting else None
    if missing := fitting[: fitting.index(installed[0])]:
        notify(f"{', '.join(missing)}: its weights are not installed; {installed[0]} is used")
    return pretrained_folder(installed[0])


def pretrained_source(architecture: str, traces: TraceSet) -> ScoreSource | None:
    """Score with the pretrained predictor of an architecture for these traces; None without such a predictor."""
    folder = pretrained_for(architecture, traces)
    return None if folder is None else from_predictor_folder(folder)


def load_profile(folder: str | Path, manifest: Manifest, location: str) -> UsageProfile:
    """Load the usage profile of a fitted ``history`` or ``popularity`` predictor.

    Args:
        folder: Predictor folder to read.
        manifest: Description of the trace set, or of the running model, that the profile is used on.
        location: Path of the trace set, or name of the model, for error messages.

    Raises:
        UserError: The predictor has no profile, or does not fit.
    """
    from moe_beyond.predictors.architectures.popularity import Popularity
    from moe_beyond.predictors.io.folder import check_fits, read_predictor

    predictor = read_predictor(folder)
    if not isinstance(predictor, Popularity):
        raise UserError(
            f"{folder}: a profile is a fitted history or popularity predictor (got {predictor.architecture}); "
            "name another predictor"
        )
    check_fits(predictor, manifest, location)
    return predictor.profile()


def _is_for(config: dict[str, Any], traces: TraceSet) -> bool:
    """Compare model and tokenizer: expert ids are valid for one checkpoint, token ids for one tokenizer."""
    training, manifest = config.get("training", {}), traces.manifest
    tokenizer = training.get("tokenizer") or {}
    return (
        training.get("model_id") == manifest.model_id
        and Geometry.from_json(config["geometry"]).shape() == manifest.geometry.shape()
        and (tokenizer.get("name"), tokenizer.get("sha256")) == (manifest.tokenizer.name, manifest.tokenizer.sha256)
    )
