"""Card of a predictor folder: its inputs, training text, recipe, recorded figures and limits."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_beyond.errors import UserError
from moe_beyond.files import read_json, read_text, replacing, sealed, write_json
from moe_beyond.geometry import Geometry
from moe_beyond.lookahead import format_lookahead
from moe_beyond.predictor_config import check_config
from moe_beyond.predictors.training_text import Relation, TrainingRecord, relation_of_figures
from moe_beyond.pretrained import CARD_FILE, CONFIG_FILE

if TYPE_CHECKING:
    from moe_beyond.predictors.base import Predictor

MARKS = {
    Relation.TRAINING: ("**Training text**: the predictor was fitted on this text; expect less on other text.\n",),
    Relation.UNKNOWN: ("**Unknown overlap**: the predictor may have been fitted on this text.\n",),
    Relation.TUNING: ("This text chose the epoch or calibrated the predictor; expect a little less on other text.\n",),
}
"""Text that a card prints before figures of text that is not held out."""

BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
"""Lines around the figures that `record_figures` writes; the other parts of a card may be edited by hand."""


def card(predictor: "Predictor", config: dict[str, Any]) -> str:
    """Return the text of a card.

    Args:
        predictor: Predictor whose class describes it in its first line.
        config: Configuration of its folder.
    """
    summary = next(iter((type(predictor).__doc__ or "").splitlines()), "")
    reads_ids = predictor.information.token_ids or not predictor.information.hidden_states
    geometry, training = Geometry.from_json(config["geometry"]), config["training"]
    lookaheads = ", ".join(map(str, config["lookaheads"]))
    shape = geometry.describe_shape()
    amount = f" ({training['sequences']:,} sequences, {training['tokens']:,} tokens)" if "tokens" in training else ""
    recipe = ", ".join(f"{name} {value}" for name, value in training.get("recipe", {}).items())
    parameters = f"{config['parameters'] / 1e6:.1f} M" if config["parameters"] else "none (fitted by counting)"
    states = " and ".join(config["hidden_states"]).replace("_", " ")
    form = f"; recorded as {training['hidden_states']}" if training.get("hidden_states") else ""
    inputs = ["ids"] * reads_ids + [f"hidden states of the current token ({states}{form})"] * bool(states)
    split = f"split {training.get('split', 'unknown')!r}{amount}"
    split += ", routed by a steered model" if training.get("steering") else ""
    bits = f"{training['quantization_bits']:g}-bit " if training.get("quantization_bits") else ""
    return f"""---
library_name: moe-beyond
tags: [moe, expert-prediction, {config["architecture"]}]
---

# {config["architecture"]} for {geometry.model}

This predictor predicts which experts of {geometry.model} ({shape}) a token is routed to.
{summary}

- Inputs: {", ".join(inputs)}; {"causal" if config["causal"] else "reads later tokens"}.
- Scores: lookahead {lookaheads}.
- Fitted on: {training.get("source", "unknown")}, {split}, fingerprint
  `{training.get("fingerprint", "unknown")}`.
- Recipe: {recipe or "unknown"}.
- Parameters: {parameters}. Probabilities: {"" if config["calibration"] else "not "}calibrated.

## Figures

{BEGIN}
{_figures(config)}
{END}

## Use and limits

Use it to decide which experts to move to a GPU, and which to keep there, before a token needs them. The model's router
still selects the experts, so a wrong prediction costs time and never changes the output.

Expert ids are valid only for this checkpoint of the model, its tokenizer and its {bits}weights. Expect lower figures on
other kinds of text, and on text that the model generates.
"""


def record_figures(folder: str | Path, figures: dict[str, Any]) -> None:
    """Record an evaluation in a predictor folder's configuration and card; it replaces an earlier one on the same data.

    Args:
        folder: Path of the predictor folder.
        figures: ``source``, ``fingerprint``, ``split``, ``relation``, ``command``, ``metrics`` and ``replay`` as
            JSON-serialisable values. Rows of the last two may have ``intervals``, as in an `Evaluation`.

    Raises:
        UserError: The configuration or a figure is wrong, or the card has a line `BEGIN` but no line `END`.
    """
    folder = Path(folder)
    path = str(folder / CONFIG_FILE)
    config = check_config(read_json(path), path)
    key = ("fingerprint", "split")
    others = [other for other in config.get("figures", []) if any(other[name] != figures[name] for name in key)]
    config = sealed({**config, "figures": [*others, figures]})
    check_config(config, path)
    text = card_with_figures(folder, config)
    write_json(path, config)  # first, because the figures of the card are made from it
    with replacing(folder / CARD_FILE) as temporary:
        temporary.write_text(text, encoding="utf-8")


def card_with_figures(folder: str | Path, config: dict[str, Any]) -> str:
    """Return the text of a folder's card with the figures of a configuration.

    Args:
        folder: Path of the predictor folder.
        config: Configuration of the predictor.

    Raises:
        UserError: The card has a line `BEGIN` but no line `END`.
    """
    before, after = around_figures(folder)
    return f"{before}{BEGIN}\n{_figures(config)}\n{END}{after}"


def around_figures(folder: str | Path) -> tuple[str, str]:
    """Return the text of a card before and after its figures.

    Args:
        folder: Path of the predictor folder.

    Raises:
        UserError: The card is no text, or has a line `BEGIN` but no line `END`.
    """
    path = Path(folder) / CARD_FILE
    text = read_text(path) if path.exists() else ""
    before, begin, after = text.partition(BEGIN)
    if begin and END not in after:
        raise UserError(f"{path}: has no line {END} after {BEGIN}; add it where the figures end")
    return (before, after.partition(END)[2]) if begin else (f"{text.rstrip()}\n\n## Figures\n\n", "\n")


def _figures(config: dict[str, Any]) -> str:
    evaluations = config.get("figures", [])
    training = config.get("training")
    return "\n".join(_evaluation(figures, training) for figures in evaluations) if evaluations else "None recorded yet."


def _evaluation(figures: dict[str, Any], training: TrainingRecord | None) -> str:
    first = figures["metrics"][0]
    k, split = first["k"], "" if figures["split"] is None else f", split {figures['split']}"
    lines = [
        f"\nOn {figures['source']}{split} ({first['tokens']:,} tokens), by",
        f"`{figures['command']}`:\n",
        *MARKS.get(relation_of_figures(training, figures), ()),
        f"| lookahead | recall@{k} (all tokens) | NLL | calibration error | accuracy (per label) | two-class F1 |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['lookahead']} | {_share(row, 'recall_at_k')} | {row['nll']:.2f} | {row['calibration_error']:.2%} "
        f"| {row['accuracy']:.1%} | {row['f1_two_class']:.1%} |"
        for row in figures["metrics"]
    ]
    lines += ["\n| slots | strategy | lookahead | hit rate | bytes transferred / demanded |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['budget_slots']:,} ({row['budget_share']:.0%}) | {row['strategy']} | {_lookahead(row)} "
        f"| {_share(row, 'hit_rate')} | {row['bytes_ratio']:.2f}{_ends(row, 'bytes_ratio', '.2f')} |"
        for row in figures["replay"]
    ]
    if any("intervals" in row for row in (*figures["metrics"], *figures["replay"])):
        lines.append("\nIn brackets: 95 % intervals over the sequences measured (bootstrap).")
    return "\n".join(lines)


def _share(row: dict[str, Any], name: str) -> str:
    """Format a share in percent, with its interval if the row has one."""
    return f"{row[name]:.1%}{_ends(row, name, '.1%')}"


def _ends(row: dict[str, Any], name: str, shape: str) -> str:
    ends = (row.get("intervals") or {}).get(name)
    return "" if ends is None else f" ({format(ends[0], shape)}..{format(ends[1], shape)})"


def _lookahead(row: dict[str, Any]) -> str:
    return "-" if row["predictor"] is None else format_lookahead(row["lookahead"])
