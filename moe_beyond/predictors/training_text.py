"""How the text that a predictor is measured on relates to its training text: decided here, for every command."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING, Any

from moe_beyond.errors import UserError
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.texts import count_shared, text_hashes

if TYPE_CHECKING:
    from moe_beyond.predictors.base import Predictor

Training = Mapping[str, Any]
"""Entry ``training`` of a predictor's configuration: `TraceSet.describe` of the training split, ``texts`` (a sketch of
its hashes), and ``seen`` or ``validation``, other text that shaped the predictor."""


class Relation(StrEnum):
    """Relation of measured text to a predictor, from the best to the worst."""

    HELD_OUT = "held-out"
    UNKNOWN = "unknown overlap"
    CHOSE = "chose the epoch or calibrated"
    TRAINING = "training text"


_ORDER = list(Relation)


@dataclass(frozen=True)
class Note:
    """Relation of measured text to one predictor, and the evidence in one sentence; empty for held-out text."""

    relation: Relation
    sentence: str = ""


@dataclass(frozen=True)
class MeasuredText:
    """The measured text.

    Attributes:
        split: The split, or None for all.
        notes: One for each predictor whose training is relevant.
        chosen: Why the split was chosen, where nobody named one; empty otherwise.
    """

    split: str | None
    notes: tuple[Note, ...] = ()
    chosen: str = ""

    @property
    def relation(self) -> Relation:
        """The worst relation of all predictors."""
        return _worst(self.notes)

    @property
    def lines(self) -> list[str]:
        """Sentences to print with the figures."""
        return list(dict.fromkeys(filter(None, [self.chosen, *(note.sentence for note in self.notes)])))

    def to_json(self) -> dict[str, Any]:
        """Return plain values, as ``--json`` writes them."""
        relation = {"relation": str(self.relation), "notes": self.lines} if self.notes else {}
        return {"split": self.split, **relation}


def measured_text(traces: TraceSet, split: str | None, fitted: Iterable[tuple[str, Training | None]]) -> MeasuredText:
    """Settle which split is measured, and how it relates to the predictors.

    Without a split, and where some splits are training text and others are not, the best of the others is chosen.

    Args:
        traces: The trace set.
        split: The split that the user named, or None.
        fitted: Name and training record of each predictor; None where nothing was recorded.

    Raises:
        UserError: There is no such split, or a record is damaged.
    """
    predictors, manifest = list(fitted), traces.manifest
    traces.shards(split)  # refuses a split that is not there
    hashes = cache(lambda split: text_hashes(traces, split))

    def notes(splits: Sequence[str]) -> tuple[Note, ...]:
        return tuple(_note(name, record, traces, splits, hashes) for name, record in predictors)

    if split is not None:
        return MeasuredText(split, notes([split]))
    by_split = {name: notes([name]) for name in manifest.splits}
    relations = {name: _worst(of_split) for name, of_split in by_split.items()}
    others = [name for name, relation in relations.items() if relation is not Relation.TRAINING]
    if len(others) in (0, len(relations)):
        return MeasuredText(None, notes(manifest.splits))
    best = min(others, key=lambda name: _ORDER.index(relations[name]))
    fitted_on = [name for name in relations if name not in others]
    names = ", ".join(dict.fromkeys(name for name, _ in predictors))
    chosen = f"measured on split {best}: {_splits(fitted_on)} is training text of {names}; --split measures another"
    return MeasuredText(best, by_split[best], chosen)


def _note(name: str, training: Training | None, traces: TraceSet, splits: Sequence[str], hashes: Any) -> Note:
    """Compare splits of a trace set with what a predictor was fitted on."""
    if not training:
        return Note(Relation.UNKNOWN, f"what {name} was fitted on is not recorded: this may be the same text")
    if note := _same_text(training, traces, splits, hashes, f"{name} was fitted on"):
        return Note(Relation.TRAINING, f"{note}: expect less on other text")
    for text in _other_text(training):
        if note := _same_text(text, traces, splits, hashes, ""):
            return Note(Relation.CHOSE, f"{note.strip()} {text['use']} {name}: expect a little less on other text")
    same_set = training.get("fingerprint") == traces.manifest.fingerprint
    if same_set and "validation" not in training and "seen" not in training:
        return Note(
            Relation.CHOSE,
            f"{_splits(splits)} is of the set that {name} was fitted on: if it chose the epoch or calibrated the "
            "predictor, expect a little less on other text",
        )
    if not same_set and "texts" not in training and training.get("source") == traces.manifest.source:
        return Note(
            Relation.UNKNOWN, f"{name} was fitted on the same source ({training['source']}): this may be the same text"
        )
    return Note(Relation.HELD_OUT)


def _same_text(text: Training, traces: TraceSet, splits: Sequence[str], hashes: Any, what: str) -> str:
    """Say how measured splits and a recorded text are the same; nothing where they are not known to be."""
    if text.get("fingerprint") == traces.manifest.fingerprint and text.get("split") in (None, *splits):
        split = text.get("split")
        return f"{what} {'this set' if split is None else f'split {split} of this set'}"
    if not isinstance(written := text.get("texts"), str):
        return ""
    count = sum(len(hashes(split)) for split in splits)
    try:
        shared = [count_shared(written, hashes(split)) for split in splits]
    except ValueError as error:
        raise UserError(f"a predictor's training record is damaged: texts ({error})") from error
    total, exact = sum(number for number, _ in shared), all(exact for _, exact in shared)
    return f"{what} {'' if exact else 'at least '}{total:,} of these {count:,} texts" if total else ""


def _other_text(training: Training) -> list[Training]:
    """Return the other text that shaped a predictor, each with how under ``use``."""
    if isinstance(seen := training.get("seen"), list):
        return [text for text in seen if isinstance(text, Mapping) and "use" in text]
    validation = training.get("validation")
    return [{**validation, "use": "validates"}] if isinstance(validation, Mapping) else []


def recorded_uses(training: Training, uses: Sequence[str], lent: Sequence[Training] = ()) -> dict[str, Any]:
    """Record, in place of ``validation``, the uses of that text.

    Args:
        training: A fit's record.
        uses: Verb phrases that go before the predictor's name, such as ``"chose the epoch of"``; empty where the
            validation split shaped nothing, and so is held out.
        lent: Other text that shaped the predictor: what calibrated the one that lent its calibration.
    """
    others = {name: value for name, value in training.items() if name != "validation"}
    validation = training.get("validation")
    own = [{**validation, "use": " and ".join(uses)}] if uses and isinstance(validation, Mapping) else []
    return {**others, "seen": [*own, *lent]}


def seen_by(lender: "Predictor") -> list[Training]:
    """Return the text that calibrated a predictor, for the record of one that borrows its calibration."""
    training = lender.fitted_on or {}
    texts = [text for text in _other_text(training) if "calibrated" in text["use"]]
    return [{**text, "use": "calibrated"} for text in texts]


def relation_of_figures(training: Training | None, figures: Mapping[str, Any]) -> Relation:
    """Return the relation of the text of recorded figures, also where the figures do not record it.

    Args:
        training: The predictor's training record.
        figures: One evaluation that `moe_beyond.predictors.io.card.record_figures` wrote.
    """
    if figures.get("relation") in _ORDER:
        return Relation(figures["relation"])
    record = training or {}
    if record.get("fingerprint") is not None and record["fingerprint"] == figures.get("fingerprint"):
        return Relation.TRAINING if figures.get("split") in (None, record.get("split")) else Relation.CHOSE
    return Relation.HELD_OUT


def marked(source: str, relation: Relation) -> str:
    """Name a source of text, with a mark where a predictor was fitted on it or shaped by it."""
    return source if relation is Relation.HELD_OUT else f"{source} ({relation.upper()})"


def _worst(notes: Iterable[Note]) -> Relation:
    return max((note.relation for note in notes), key=_ORDER.index, default=Relation.HELD_OUT)


def _splits(names: Sequence[str]) -> str:
    return f"split {' and '.join(names)}"
