"""Where an evaluation's scores come from: a predictor, computed in the batches that `test` reads; or a folder."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moe_beyond.datamodules.traces import whole_sequences
from moe_beyond.errors import UserError
from moe_beyond.evaluation.score_store import ScoresFolder
from moe_beyond.geometry import Geometry
from moe_beyond.lookahead import Lookahead
from moe_beyond.predictors.base import Predictor
from moe_beyond.predictors.batch import collate
from moe_beyond.predictors.io.folder import check_fits, load_predictor, read_config
from moe_beyond.predictors.training_text import Training
from moe_beyond.pretrained import checkpoint_folders, list_pretrained, pretrained_folder, shipped_folder
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.trace import Trace

Scored = tuple[Trace, npt.NDArray[np.float32]]
"""A sequence and its scores ``(T, H, L, E)``."""


@dataclass(frozen=True)
class ScoreSource:
    """Scores of a trace set's sequences.

    Attributes:
        name: What tables call it.
        lookaheads: What the H slices of the scores are.
        causal: Whether the scores ignore later tokens.
        available: Whether a score exists once a layer is ``"routed"``, or only once it is ``"computed"``.
        sequences: Yields every sequence of a split (None: of all) with its scores; given true, in the traces' order.
        training: Record of the text that the predictor was fitted on; None where there is none.
    """

    name: str
    lookaheads: tuple[Lookahead, ...]
    causal: bool
    available: str
    sequences: Callable[[TraceSet, str | None, bool], Iterator[Scored]]
    training: Training | None = None


def from_predictor(predictor: Predictor, name: str, *, tokenizer_sha256: str | None = None) -> ScoreSource:
    """Score with a predictor.

    Args:
        predictor: Ready to score.
        name: What to call it.
        tokenizer_sha256: Hash of the tokenizer it was fitted with, if known; traces of another are refused.
    """

    def sequences(traces: TraceSet, split: str | None, in_order: bool = False) -> Iterator[Scored]:
        check_fits(predictor, traces.manifest, traces.folder, tokenizer_sha256)
        reading, read = traces.traces(split), dict[str, Trace]()
        states = predictor.information.hidden_states is not None
        # By length within a shard, which pads least; or, where order matters, each alone.
        alone = (collate([trace]) for trace in traces.traces(split, hidden_states=states))
        batches = alone if in_order else whole_sequences(traces, split, hidden_states=states)
        with torch.inference_mode():
            for batch in batches:
                probabilities = predictor.probabilities(predictor(batch)).numpy()
                for row, sequence_id in enumerate(batch.sequence_ids):
                    while sequence_id not in read:
                        trace = next(reading)
                        read[trace.sequence_id] = trace
                    trace = read.pop(sequence_id)
                    yield trace, probabilities[row, : len(trace)]

    known = predictor.information
    return ScoreSource(name, known.lookaheads, known.causal, known.available, sequences, predictor.fitted_on)


def from_predictor_folder(folder: str | Path) -> ScoreSource:
    """Score with a predictor folder.

    Raises:
        UserError: It is not a predictor folder, or is damaged.
    """
    predictor = load_predictor(folder)
    tokenizer = read_config(folder).get("training", {}).get("tokenizer") or {}
    name = name_of_folder(folder, predictor.architecture)
    return from_predictor(predictor, name, tokenizer_sha256=tokenizer.get("sha256"))


def name_of_folder(folder: str | Path, architecture: str) -> str:
    """Return what tables call a predictor: its published name, or else its architecture."""
    published = Path(folder).resolve().parent in checkpoint_folders()
    return Path(folder).name if published else architecture


def from_scores_folder(folder: str | Path) -> ScoreSource:
    """Read scores that `predict` wrote, or another program.

    Raises:
        UserError: It is not a scores folder.
    """
    stored = ScoresFolder(folder)

    def sequences(traces: TraceSet, split: str | None, in_order: bool = False) -> Iterator[Scored]:
        if stored.geometry.shape() != traces.geometry.shape():
            raise UserError(
                f"{folder}: scores are for {stored.geometry.describe_shape()}, "
                f"but {traces.folder} has {traces.geometry.describe_shape()}"
            )
        if stored.traces != traces.manifest.fingerprint:
            raise UserError(f"{folder}: scores were made for another trace set than {traces.folder}; predict again")
        for trace in traces.traces(split):
            yield trace, stored.scores(trace.sequence_id, len(trace))

    return ScoreSource(stored.predictor, stored.lookaheads, stored.causal, stored.available, sequences, stored.training)


def published_for(architecture: str, traces: TraceSet) -> Path | None:
    """Find the published predictor of an architecture that was fitted for these traces' model and tokenizer.

    Returns:
        The folder of the first by name; None if there is none.
    """
    for name in list_pretrained():
        folder = shipped_folder(name)
        if name.split(".")[0] == architecture and _is_for(read_config(folder), traces):
            return pretrained_folder(name)
    return None


def published_source(architecture: str, traces: TraceSet) -> ScoreSource | None:
    """Score with the published predictor of an architecture for these traces, if there is one."""
    folder = published_for(architecture, traces)
    return None if folder is None else from_predictor_folder(folder)


def _is_for(config: dict[str, Any], traces: TraceSet) -> bool:
    """Expert ids hold for one checkpoint of a model, token ids for one tokenizer."""
    training, manifest = config.get("training", {}), traces.manifest
    tokenizer = training.get("tokenizer") or {}
    known = manifest.tokenizer
    return (
        training.get("model_id") == manifest.model_id
        and Geometry.from_json(config["geometry"]).shape() == manifest.geometry.shape()
        and (tokenizer.get("name"), tokenizer.get("sha256")) == (known.name, known.sha256)
    )
