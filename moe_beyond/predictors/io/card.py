"""A predictor folder's card: what it is, what it was fitted on and how, what it was measured to be worth; limits."""

from pathlib import Path
from typing import Any

from moe_beyond.errors import UserError
from moe_beyond.files import read_json, replacing, write_json
from moe_beyond.geometry import Geometry
from moe_beyond.lookahead import format_lookahead
from moe_beyond.predictors.training_text import Relation, Training, relation_of_figures
from moe_beyond.pretrained import CARD_FILE, CONFIG_FILE

MARKS = {
    Relation.TRAINING: ("**Training text**: the predictor was fitted on this text; expect less on other text.\n",),
    Relation.UNKNOWN: ("**Unknown overlap**: the predictor may have been fitted on this text.\n",),
    Relation.CHOSE: ("This text chose the epoch or calibrated the predictor; expect a little less on other text.\n",),
}
"""Text of a card before figures of text that is not held out."""

BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
"""Between these stands what `record_figures` writes; the rest of a card may be edited by hand."""


def card(summary: str, config: dict[str, Any]) -> str:
    """Write a card.

    Args:
        summary: What the architecture is, in a sentence.
        config: The folder's configuration.
    """
    geometry, training = Geometry.from_json(config["geometry"]), config["training"]
    lookaheads = ", ".join(map(str, config["lookaheads"]))
    shapes = geometry.describe_shape()
    amount = f" ({training['sequences']:,} sequences, {training['tokens']:,} tokens)" if "tokens" in training else ""
    recipe = ", ".join(f"{name} {value}" for name, value in training.get("recipe", {}).items())
    parameters = f"{config['parameters'] / 1e6:.1f} M" if config["parameters"] else "none, it counts"
    states = config.get("hidden_states")
    reads = f"hidden states of the token at hand ({states.replace('_', ' ')})" if states else "ids"
    split = f"split {training.get('split', 'unknown')!r}{amount}"
    split += ", routed by a model that was steered" if training.get("steering") else ""
    bits = f"{training['quantization_bits']:g}-bit " if training.get("quantization_bits") else ""
    return f"""---
library_name: moe-beyond
tags: [moe, expert-prediction, {config["architecture"]}]
---

# {config["architecture"]} for {geometry.model}

It predicts which experts of {geometry.model} ({shapes}) a token is routed to.
{summary}

- Knows: lookahead {lookaheads}; {"causal" if config["causal"] else "sees later tokens"}; a score is there once a layer
  is {config["available"]}. It reads {reads}.
- Fitted on: {training.get("source", "unknown")}, {split}, fingerprint
  `{training.get("fingerprint", "unknown")}`.
- Recipe: {recipe or "unknown"}.
- Parameters: {parameters}. Probabilities: {"" if config["calibration"] else "not "}calibrated.

## Figures

{BEGIN}
{_figures(config)}
{END}

## Use and limits

It is there to say which experts to move to a GPU, and which to keep there, before a token needs them. It does not
choose experts: the model's router does, and a wrong prediction costs time, never quality.

Expert ids hold for this checkpoint of the model, its tokenizer and its {bits}weights alone. On text of another kind
than it was fitted on, and on text that the model writes itself, expect it to do worse.
"""


def record_figures(folder: str | Path, figures: dict[str, Any]) -> None:
    """Put an evaluation into a predictor folder's configuration and card, in place of an earlier one on the same data.

    Args:
        folder: The predictor folder.
        figures: ``source``, ``fingerprint``, ``split``, ``relation``, ``command``, ``metrics`` and ``replay``, as plain
            values. Rows of the last two may have ``intervals``, as an `Evaluation` has them.

    Raises:
        UserError: The card's marks are damaged.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG_FILE)
    key = ("fingerprint", "split")
    earlier = [one for one in config.get("figures", []) if any(one[name] != figures[name] for name in key)]
    config["figures"] = [*earlier, figures]
    before, after = around_figures(folder)
    with replacing(folder / CARD_FILE) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n{_figures(config)}\n{END}{after}", encoding="utf-8")
    write_json(folder / CONFIG_FILE, config)


def around_figures(folder: str | Path) -> tuple[str, str]:
    """Return what a card holds before and after its figures.

    Raises:
        UserError: Its marks are damaged.
    """
    path = Path(folder) / CARD_FILE
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    before, found, rest = text.partition(BEGIN)
    if found and END not in rest:
        raise UserError(f"{path}: has no line {END} after {BEGIN}; figures go between them")
    return (before, rest.partition(END)[2]) if found else (f"{text.rstrip()}\n\n## Figures\n\n", "\n")


def _figures(config: dict[str, Any]) -> str:
    evaluations = config.get("figures", [])
    training = config.get("training")
    return "\n".join(_evaluation(one, training) for one in evaluations) if evaluations else "None recorded yet."


def _evaluation(one: dict[str, Any], training: Training | None) -> str:
    first = one["metrics"][0]
    k, split = first["k"], "" if one["split"] is None else f", split {one['split']}"
    lines = [
        f"\nOn {one['source']}{split} ({first['tokens']:,} tokens), by",
        f"`{one['command']}`:\n",
        *MARKS.get(relation_of_figures(training, one), ()),
        f"| lookahead | recall@{k} (all tokens) | NLL | calibration error | accuracy (per label) | two-class F1 |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['lookahead']} | {_share(row, 'recall_at_k')} | {row['nll']:.2f} | {row['calibration_error']:.2%} "
        f"| {row['accuracy']:.1%} | {row['f1_two_class']:.3f} |"
        for row in one["metrics"]
    ]
    lines += ["\n| slots | strategy | lookahead | hits | bytes moved / demanded |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['budget_slots']:,} ({row['budget_share']:.0%}) | {row['strategy']} | {_lookahead(row)} "
        f"| {_share(row, 'hit_rate')} | {row['bytes_ratio']:.2f}{_ends(row, 'bytes_ratio', '.2f')} |"
        for row in one["replay"]
    ]
    if any("intervals" in row for row in (*one["metrics"], *one["replay"])):
        lines.append("\nIn brackets: 95 % intervals over the sequences measured (bootstrap).")
    return "\n".join(lines)


def _share(row: dict[str, Any], name: str) -> str:
    """Write a share in percent, with its interval if one was recorded."""
    return f"{row[name]:.1%}{_ends(row, name, '.1%')}"


def _ends(row: dict[str, Any], name: str, shape: str) -> str:
    ends = (row.get("intervals") or {}).get(name)
    return "" if ends is None else f" ({format(ends[0], shape)}..{format(ends[1], shape)})"


def _lookahead(row: dict[str, Any]) -> str:
    return "-" if row["predictor"] is None else format_lookahead(row["lookahead"])
