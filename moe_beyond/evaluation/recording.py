"""Figures of an evaluation in the configuration and the card of a predictor folder."""

from pathlib import Path
from typing import Any

from moe_beyond.errors import UserError
from moe_beyond.evaluation.run import ReplayOutcome
from moe_beyond.predictors.io.card import around_figures, record_figures
from moe_beyond.predictors.training_text import MeasuredText, Relation

REPLAY_FIELDS = (
    *("strategy", "predictor", "lookahead", "leaks", "causal"),
    *("budget_slots", "budget_share", "hit_rate", "bytes_ratio", "intervals"),
)
"""Fields of a result that a card shows."""


def check_recordable(folder: Path, text: MeasuredText, *, training_text: bool = False) -> None:
    """Check that a folder can record figures of a text, before they are computed.

    Args:
        folder: Predictor folder to write to.
        text: Split, and relation of its text to the predictors.
        training_text: Whether text that the predictor was, or may have been, fitted on is allowed (default: False).

    Raises:
        UserError: The card has no place for figures, or the text is not allowed.
    """
    around_figures(folder)  # raises if the card has no place for figures
    if text.relation in (Relation.TRAINING, Relation.UNKNOWN) and not training_text:
        why = next(note.sentence for note in text.notes if note.relation is text.relation)
        raise UserError(f"--record: {why}; measure other text, or add --record-training-text, which marks the figures")


def record_outcome(folder: Path, outcome: ReplayOutcome, command: str) -> None:
    """Write the figures of an evaluation into a predictor folder.

    Args:
        folder: Predictor folder to write to.
        outcome: Outcome of `run_evaluation`.
        command: Command line that prints the figures.

    Raises:
        UserError: The card has no place for figures.
    """
    manifest = outcome.replay.traces.manifest
    figures: dict[str, Any] = {
        "source": manifest.source,
        "fingerprint": manifest.fingerprint,
        "split": outcome.measured_on.split,
        "relation": str(outcome.measured_on.relation),
        "command": command,
        "metrics": [row.summary() for row in outcome.metrics],
        "replay": [
            {name: value for name, value in result.to_json().items() if name in REPLAY_FIELDS}
            for result in outcome.results
        ],
    }
    record_figures(folder, figures)
