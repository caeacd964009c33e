"""Relation of measured text to a predictor's training text, decided here for every command."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING, Any

from moe_beyond.errors import UserError
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.texts import Hashes, count_shared, text_hashes

if TYPE_CHECKING:
    from moe_beyond.predictors.base import Predictor

TrainingRecord = Mapping[str, Any]
"""Entry ``training`` of a predictor's configuration: `TraceSet.describe` of the training split, and ``texts``, a sketch
of the hashes of its texts. Entry ``seen`` (or ``validation``) describes other text that influenced the predictor."""


class Relation(StrEnum):
    """Relation of measured text to a predictor, from the best to the worst."""

    HELD_OUT = "held-out"
    UNKNOWN = "unknown overlap"
    TUNING = "chose the epoch or calibrated"
    TRAINING = "training text"


_ORDER = list(Relation)


@dataclass(frozen=True)
class Note:
    """Relation of measured text to one predictor.

    Attributes:
        relation: Relation of the text to the predictor.
        sentence: The evidence in one sentence; empty for held-out text.
    """

    relation: Relation
    sentence: str = ""


@dataclass(frozen=True)
class MeasuredText:
    """The measured text.

    Attributes:
        split: Name of the split; None for all splits.
        notes: Relation to each predictor whose training is relevant.
        split_reason: Reason for the choice of the split if the user chose none; empty otherwise.
    """

    split: str | None
    notes: tuple[Note, ...] = ()
    split_reason: str = ""

    @property
    def relation(self) -> Relation:
        """The worst relation of all predictors."""
        return _worst(self.notes)

    @property
    def lines(self) -> list[str]:
        """Sentences to print with the figures."""
        return list(dict.fromkeys(filter(None, [self.split_reason, *(note.sentence for note in self.notes)])))

    def to_json(self) -> dict[str, Any]:
        """Return JSON-serialisable values, as ``--json`` writes them."""
        relation = {"relation": str(self.relation), "notes": self.lines} if self.notes else {}
        return {"split": self.split, **relation}


def measured_text(
    traces: TraceSet, split: str | None, fitted: Iterable[tuple[str, TrainingRecord | None]]
) -> MeasuredText:
    """Choose the split to measure, and determine its relation to the predictors.

    Without a split, if only some splits are training text, the best other split is chosen.

    Args:
        traces: Trace set to measure.
        split: Split that the user chose, or None.
        fitted: Name and training record of each predictor; None if nothing was recorded.

    Raises:
        UserError: The trace set has no such split, or a training record is damaged.
    """
    predictors, manifest = list(fitted), traces.manifest
    traces.shards(split)  # checks that the split exists
    hashes = cache(lambda split: text_hashes(traces, split))

    def notes(splits: Sequence[str]) -> tuple[Note, ...]:
        return tuple(_note(name, record, traces, splits, hashes) for name, record in predictors)

    if split is not None:
        return MeasuredText(split, notes([split]))
    by_split = {name: notes([name]) for name in manifest.splits}
    relations = {name: _worst(split_notes) for name, split_notes in by_split.items()}
    others = [name for name, relation in relations.items() if relation is not Relation.TRAINING]
    if len(others) in (0, len(relations)):
        return MeasuredText(None, notes(manifest.splits))
    best = min(others, key=lambda name: _ORDER.index(relations[name]))
    training = [name for name in relations if name not in others]
    names = ", ".join(dict.fromkeys(name for name, _ in predictors))
    reason = f"measured on split {best}: {_splits(training)} is training text of {names}; use --split to choose another"
    return MeasuredText(best, by_split[best], reason)


def _note(
    name: str,
    training: TrainingRecord | None,
    traces: TraceSet,
    splits: Sequence[str],
    hashes: Callable[[str], list[Hashes]],
) -> Note:
    """Compare splits of a trace set with the training text of a predictor."""
    if not training:
        return Note(Relation.UNKNOWN, f"the training text of {name} is not recorded: this may be the same text")
    if overlap := _overlap(training, traces, splits, hashes):
        return Note(Relation.TRAINING, f"{name} was fitted on {overlap}: expect less on other text")
    for text in _tuning_texts(training):
        if overlap := _overlap(text, traces, splits, hashes):
            return Note(Relation.TUNING, f"{overlap} {text['use']} {name}: expect a little less on other text")
    same_set = training.get("fingerprint") == traces.manifest.fingerprint
    if same_set and "validation" not in training and "seen" not in training:
        return Note(
            Relation.TUNING,
            f"{_splits(splits)} belongs to the trace set that {name} was fitted on: if it chose the epoch or "
            "calibrated the predictor, expect a little less on other text",
        )
    if not same_set and "texts" not in training and training.get("source") == traces.manifest.source:
        return Note(
            Relation.UNKNOWN, f"{name} was fitted on the same source ({training['source']}): this may be the same text"
        )
    return Note(Relation.HELD_OUT)


def _overlap(
    text: TrainingRecord, traces: TraceSet, splits: Sequence[str], hashes: Callable[[str], list[Hashes]]
) -> str:
    """Describe the overlap of measured splits with a recorded text; return an empty string if none is found."""
    if text.get("fingerprint") == traces.manifest.fingerprint and text.get("split") in (None, *splits):
        split = text.get("split")
        return "this set" if split is None else f"split {split} of this set"
    if not isinstance(sketch := text.get("texts"), str):
        return ""
    count = sum(len(hashes(split)) for split in splits)
    try:
        shared = [count_shared(sketch, hashes(split)) for split in splits]
    except ValueError as error:
        raise UserError(f"a predictor's training record is damaged: texts ({error})") from error
    total, exact = sum(number for number, _ in shared), all(exact for _, exact in shared)
    return f"{'' if exact else 'at least '}{total:,} of these {count:,} texts" if total else ""


def _tuning_texts(training: TrainingRecord) -> list[TrainingRecord]:
    """Return the other text that influenced a predictor, each with its use, such as ``calibrated``."""
    if isinstance(seen := training.get("seen"), list):
        return [text for text in seen if isinstance(text, Mapping) and "use" in text]
    validation = training.get("validation")
    return [{**validation, "use": "validates"}] if isinstance(validation, Mapping) else []


def record_uses(
    training: TrainingRecord, uses: Sequence[str], borrowed: Sequence[TrainingRecord] = ()
) -> dict[str, Any]:
    """Return a training record in which the uses of the validation text replace ``validation``.

    Args:
        training: Training record of a fit.
        uses: Verb phrases that precede the predictor's name, such as ``"chose the epoch of"``. Empty if the validation
            split did not influence the predictor, and so is held out.
        borrowed: Other text that influenced the predictor, such as the text of a borrowed calibration.
    """
    others = {name: value for name, value in training.items() if name != "validation"}
    validation = training.get("validation")
    used = [{**validation, "use": " and ".join(uses)}] if uses and isinstance(validation, Mapping) else []
    return {**others, "seen": [*used, *borrowed]}


def calibration_texts(lender: Predictor) -> list[TrainingRecord]:
    """Return the text that calibrated a predictor, for the record of a predictor that borrows its calibration.

    Args:
        lender: Predictor with a calibration.
    """
    training = lender.fitted_on or {}
    texts = [text for text in _tuning_texts(training) if "calibrated" in text["use"]]
    return [{**text, "use": "calibrated"} for text in texts]


def relation_of_figures(training: TrainingRecord | None, figures: Mapping[str, Any]) -> Relation:
    """Return the relation of the text of recorded figures, also if the figures do not record it.

    Args:
        training: Training record of the predictor.
        figures: One evaluation, as `moe_beyond.predictors.io.card.record_figures` writes it.
    """
    if figures.get("relation") in _ORDER:
        return Relation(figures["relation"])
    record = training or {}
    if record.get("fingerprint") is not None and record["fingerprint"] == figures.get("fingerprint"):
        return Relation.TRAINING if figures.get("split") in (None, record.get("split")) else Relation.TUNING
    return Relation.HELD_OUT


def mark_relation(source: str, relation: Relation) -> str:
    """Return the name of a text, with its relation in brackets unless it is held out.

    Args:
        source: Name of the text.
        relation: Relation of the text to the predictor.
    """
    return source if relation is Relation.HELD_OUT else f"{source} ({relation.upper()})"


def _worst(notes: Iterable[Note]) -> Relation:
    return max((note.relation for note in notes), key=_ORDER.index, default=Relation.HELD_OUT)


def _splits(names: Sequence[str]) -> str:
    return f"split {' and '.join(names)}"
