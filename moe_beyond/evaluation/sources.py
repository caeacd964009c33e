"""Where an evaluation's scores come from: a predictor, computed in the batches that `test` reads; or a folder."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from moe_beyond.datamodules.traces import whole_sequences
from moe_beyond.errors import UserError
from moe_beyond.lookahead import Lookahead
from moe_beyond.predictors.base import Predictor
from moe_beyond.predictors.folder import check_fits, load_predictor, read_config
from moe_beyond.predictors.scores import ScoresFolder
from moe_beyond.published import checkpoints_folder
from moe_beyond.traces.reader import TraceSet

Scored = tuple[npt.NDArray[np.integer], npt.NDArray[np.float32]]
"""A sequence's experts ``(T, L, K)`` and its scores ``(T, H, L, E)``."""


@dataclass(frozen=True)
class ScoreSource:
    """Scores of a trace set's sequences.

    Attributes:
        name: What tables call it.
        lookaheads: What the H slices of the scores are.
        causal: Whether the scores ignore later tokens.
        sequences: Yields every sequence of a split (None: of all) with its scores.
    """

    name: str
    lookaheads: tuple[Lookahead, ...]
    causal: bool
    sequences: Callable[[TraceSet, str | None], Iterator[Scored]]


def from_predictor(predictor: Predictor, name: str, *, tokenizer_sha256: str | None = None) -> ScoreSource:
    """Score with a predictor.

    Args:
        predictor: Ready to score.
        name: What to call it.
        tokenizer_sha256: Hash of the tokenizer it was fitted with, if known; traces of another are refused.
    """

    def sequences(traces: TraceSet, split: str | None) -> Iterator[Scored]:
        check_fits(predictor, traces.manifest, traces.folder, tokenizer_sha256)
        with torch.inference_mode():
            for batch in whole_sequences(traces, split):
                probabilities = predictor.probabilities(predictor(batch)).numpy()
                for row, length in enumerate(batch.lengths.tolist()):
                    yield batch.experts[row, :length].numpy(), probabilities[row, :length]

    return ScoreSource(name, predictor.information.lookaheads, predictor.information.causal, sequences)


def from_predictor_folder(folder: str | Path) -> ScoreSource:
    """Score with a predictor folder.

    Raises:
        UserError: It is not a predictor folder, or is damaged.
    """
    predictor = load_predictor(folder)
    tokenizer = read_config(folder).get("training", {}).get("tokenizer") or {}
    published = Path(folder).resolve().parent == checkpoints_folder().resolve()
    name = Path(folder).name if published else predictor.architecture
    return from_predictor(predictor, name, tokenizer_sha256=tokenizer.get("sha256"))


def from_scores_folder(folder: str | Path) -> ScoreSource:
    """Read scores that `predict` wrote, or another program.

    Raises:
        UserError: It is not a scores folder.
    """
    stored = ScoresFolder(folder)

    def sequences(traces: TraceSet, split: str | None) -> Iterator[Scored]:
        if stored.geometry.shape() != traces.geometry.shape():
            raise UserError(
                f"{folder}: scores are for {stored.geometry.describe_shape()}, "
                f"but {traces.folder} has {traces.geometry.describe_shape()}"
            )
        if stored.traces != traces.manifest.fingerprint:
            raise UserError(f"{folder}: scores were made for another trace set than {traces.folder}; predict again")
        for trace in traces.traces(split):
            yield trace.experts, stored.scores(trace.sequence_id, len(trace))

    return ScoreSource(stored.predictor, stored.lookaheads, stored.causal, sequences)
