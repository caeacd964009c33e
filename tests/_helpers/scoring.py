"""Scores and usage profiles for tests of replays: noisy foresight, as a source and as folders."""

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from moe_beyond.evaluation.score_store import writing_scores
from moe_beyond.evaluation.sources import Scored, ScoreSource
from moe_beyond.lookahead import Lookahead
from moe_beyond.predictors.architectures.history import History
from moe_beyond.predictors.batch import collate
from moe_beyond.predictors.io.folder import save_predictor
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.trace import Trace


def foresight(trace: Trace, slices: int, num_experts: int, name: str = "seer") -> np.ndarray:
    """Return scores ``(T, H, L, E)`` that find about four in five of the experts, the same ones in each call."""
    rng = np.random.default_rng(zlib.crc32(f"{name} {trace.sequence_id}".encode()))
    used = np.zeros((*trace.experts.shape[:2], num_experts))
    np.put_along_axis(used, trace.experts.astype(np.int64), 1.0, axis=-1)
    noise = rng.random((len(trace), slices, *used.shape[1:]))
    return np.where(noise < 0.2, 1 - used[:, None], used[:, None] * 0.8 + noise * 0.2).astype(np.float32)


def seer(name: str = "seer", lookaheads: Sequence[Lookahead] = (1,), *, backwards: bool = False) -> ScoreSource:
    """Return a source of `foresight`; ``backwards`` reverses the traces unless their order is required."""

    def sequences(traces: TraceSet, split: str | None, in_order: bool = False) -> Iterator[Scored]:
        found = list(traces.traces(split))
        for trace in found[::-1] if backwards and not in_order else found:
            yield trace, foresight(trace, len(lookaheads), traces.geometry.num_experts, name)

    return ScoreSource(name, tuple(lookaheads), True, sequences)


def scores_folder(
    folder: Path, traces: TraceSet, lookaheads: Sequence[Lookahead] = (1,), *, causal: bool = True
) -> str:
    """Write `foresight` as a scores folder and return its path."""
    with writing_scores(
        folder,
        geometry=traces.geometry,
        lookaheads=lookaheads,
        predictor="seer",
        traces=traces.manifest.fingerprint,
        causal=causal,
    ) as writer:
        for trace in traces.traces():
            writer.write(trace.sequence_id, foresight(trace, len(lookaheads), traces.geometry.num_experts))
    return str(folder)


def history_folder(folder: Path, traces: TraceSet, **training: object) -> str:
    """Fit a history predictor, which is also a usage profile, on the traces; return its path."""
    predictor = History(traces.geometry, traces.manifest.tokenizer.vocab_size)
    predictor.partial_fit(collate(list(traces.traces("train"))))
    save_predictor(predictor, folder, {"fingerprint": traces.manifest.fingerprint, **training})
    return str(folder)
