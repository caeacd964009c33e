"""The tables of pretrained predictors: ``moe-beyond list``, and the zoo table of ``checkpoints/README.md``."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from moe_beyond.predictors.training_text import mark_relation, relation_of_figures
from moe_beyond.report.labels import BASELINES, BYTES_DEFINITION, NO_VALUE
from moe_beyond.report.tables.wrapping import WrappedTable

NOT_EVALUATED = "no evaluation recorded"
SHOWN_BASELINES = ("lru", "belady")
DIGITS = 8
"""Digits of a hash that identify a trace set or weights in a table."""
RECALL, SLOTS, HITS = "lookahead: recall@k, %", "slots", "hit rate @ bytes"
"""Headings that both tables have."""


@dataclass(frozen=True)
class _Row:
    """One predictor measured on one text, as text cells.

    Attributes:
        measured_on: Source of the text, `NOT_EVALUATED` if there is none.
        fingerprint: Fingerprint of the measured trace set; empty if there is none.
        recall: Recall by lookahead, or only the lookaheads if nothing was measured.
        slots: Smallest budget of the recorded replays.
        best: Hit rate @ bytes of the best strategy with the predictor.
        baselines: Hit rate @ bytes of `SHOWN_BASELINES` at the same budget.
    """

    predictor: dict[str, Any]
    measured_on: str
    fingerprint: str
    recall: str
    slots: str
    best: str
    baselines: tuple[str, ...]


def pretrained_tables(predictors: Sequence[dict[str, Any]]) -> list[Table]:
    """Return one table per trace set that predictors were evaluated on, with the baselines last.

    Args:
        predictors: Result of `moe_beyond.pretrained.pretrained_figures`.
    """
    by_text: dict[str, list[_Row]] = {}
    for row in _rows(predictors):
        by_text.setdefault(row.measured_on, []).append(row)
    tables: list[Table] = []
    for source, rows in by_text.items():
        subtitle = source if source == NOT_EVALUATED else f"evaluated on {source}"
        table = WrappedTable(title=f"pretrained predictors, {subtitle}", min_width=len(subtitle) + 25)
        table.add_column("name", no_wrap=True)
        table.add_column("MB", justify="right")
        table.add_column(RECALL)
        table.add_column(SLOTS, justify="right")
        table.add_column(HITS, justify="right")
        for row in rows:
            table.add_row(row.predictor["name"], _megabytes(row.predictor), row.recall, row.slots, row.best)
        table.add_section()
        measured = dict.fromkeys((row.slots, row.baselines) for row in rows if row.slots != NO_VALUE)
        for slots, baselines in measured:
            for name, figures in zip(SHOWN_BASELINES, baselines, strict=True):
                table.add_row(name, NO_VALUE, NO_VALUE, slots, figures)
        tables.append(table)
    if tables:
        tables[-1].caption = (
            f"{BYTES_DEFINITION}\n"
            "hit rate: highest among the recorded strategies with bytes of at most 1.00, at the smallest budget"
        )
    return tables


def pretrained_markdown(predictors: Sequence[dict[str, Any]], marks: dict[str, str]) -> str:
    """Return a table in Markdown: one row per predictor and text, with the version of predictor and trace sets.

    Args:
        predictors: Result of `moe_beyond.pretrained.pretrained_figures`.
        marks: Text after the names of predictors, by name.
    """
    headings = (
        *("name", "model", "version, weights", "MB", "fitted on, traces", "measured on, traces"),
        *(RECALL, SLOTS, HITS),
        *(BASELINES[name].name for name in SHOWN_BASELINES),
    )
    lines = [headings, ("---",) * len(headings)]
    for row in _rows(predictors):
        training, name = row.predictor["training"], row.predictor["name"]
        lines.append(
            (
                f"`{name}`{marks.get(name, '')}",
                row.predictor["model"],
                f"{row.predictor['version']}, {_code(row.predictor['sha256'])}",
                _megabytes(row.predictor),
                f"{training['source']}, {_code(training['fingerprint'])}",
                f"{row.measured_on}, {_code(row.fingerprint)}",
                *(row.recall, row.slots, row.best, *row.baselines),
            )
        )
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _rows(predictors: Sequence[dict[str, Any]]) -> Iterator[_Row]:
    for predictor in predictors:
        for figures in predictor["figures"]:
            recall = ", ".join(f"{row['lookahead']}: {100 * row['recall_at_k']:.1f}" for row in figures["metrics"])
            split = "" if figures["split"] is None else f", split {figures['split']}"
            source = mark_relation(f"{figures['source']}{split}", relation_of_figures(predictor["training"], figures))
            yield _Row(predictor, source, figures["fingerprint"], recall, *_hits(figures["replay"]))
        if not predictor["figures"]:
            lookaheads = ", ".join(map(str, predictor["lookaheads"]))
            missing = (NO_VALUE,) * len(SHOWN_BASELINES)
            yield _Row(predictor, NOT_EVALUATED, "", lookaheads, NO_VALUE, NO_VALUE, missing)


def _megabytes(predictor: dict[str, Any]) -> str:
    size = predictor["bytes"]
    return f"{size / 1e6:.1f}" if size >= 1e5 else f"{size / 1e6:.2f}"


def _hits(replay: Sequence[dict[str, Any]]) -> tuple[str, str, tuple[str, ...]]:
    """Return the slots, and the hit rate @ bytes of the best strategy with the predictor and of the baselines."""
    rows = [row for row in replay if row["predictor"] is not None and row["bytes_ratio"] <= 1]
    if not rows:
        return NO_VALUE, NO_VALUE, (NO_VALUE,) * len(SHOWN_BASELINES)
    slots = min(row["budget_slots"] for row in rows)
    best = max((row for row in rows if row["budget_slots"] == slots), key=lambda row: row["hit_rate"])
    plain = {row["strategy"]: row for row in replay if row["budget_slots"] == slots and row["predictor"] is None}
    return f"{slots:,}", _at(best), tuple(_at(plain.get(name)) for name in SHOWN_BASELINES)


def _at(row: dict[str, Any] | None) -> str:
    return NO_VALUE if row is None else f"{row['hit_rate']:.1%} @ {row['bytes_ratio']:.2f}"


def _code(digits: str | None) -> str:
    return f"`{digits[:DIGITS]}`" if digits else NO_VALUE
