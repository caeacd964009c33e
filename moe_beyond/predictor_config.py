"""The fields of a predictor folder's ``config.json``, checked whenever the file is read or written."""

from collections.abc import Iterable, Mapping
from string import hexdigits
from typing import Any

from moe_beyond.errors import UserError
from moe_beyond.files import SEAL, check_seal
from moe_beyond.json_fields import (
    FINITE,
    FLAG,
    OBJECT,
    SCALAR,
    SHA256,
    TEXT,
    TOKENIZER_FIELDS,
    FieldRule,
    check_fields,
    check_known,
    check_present,
    optional,
    whole,
)
from moe_beyond.lookahead import NAMED_LOOKAHEADS
from moe_beyond.safe_text import shown

FORMAT_VERSION = 1
MOST_LOOKAHEADS = 10_000
"""Bound on lookaheads: that on the layers of a geometry."""

COUNT = whole(0, 2**48)
LOOKAHEAD = FieldRule(
    f"{', '.join(map(repr, NAMED_LOOKAHEADS))} or a number of layers",
    lambda value: value in NAMED_LOOKAHEADS or whole(0, MOST_LOOKAHEADS).accepts(value),
)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(FINITE.accepts, value))


def _is_intervals(value: Any) -> bool:
    """Return whether a value is an object of pairs of numbers, in which an object of pairs may be nested."""
    return OBJECT.accepts(value) and all(
        _is_pair(each) or (OBJECT.accepts(each) and all(map(_is_pair, each.values()))) for each in value.values()
    )


USES = ("chose the epoch of", "calibrated", "chose the epoch of and calibrated")
"""Verb phrases for the influence of a text that the predictor was not fitted on."""
INTERVALS = FieldRule("an object of pairs of numbers", _is_intervals)
LIST = FieldRule("a list", lambda value: isinstance(value, list))
ANY = FieldRule("any value", lambda value: True)
ROWS = FieldRule("a list with at least one row", lambda value: isinstance(value, list) and bool(value))

PREDICTOR = {
    "architecture": TEXT,
    "package": TEXT,
    "arguments": OBJECT,
    "geometry": OBJECT,
    "vocab_size": whole(1, 2**24),
    "training": OBJECT,
}
"""Fields that rebuild a predictor, in a folder and in a checkpoint."""
FIELDS = PREDICTOR | {
    "lookaheads": FieldRule(
        f"a list of {', '.join(map(repr, NAMED_LOOKAHEADS))} and numbers of layers",
        lambda value: isinstance(value, list) and bool(value) and all(map(LOOKAHEAD.accepts, value)),
    ),
    "causal": FLAG,
    "hidden_states": LIST,
    "activation": TEXT,
    "parameters": COUNT,
    "calibration": optional(OBJECT),
    "tool_version": TEXT,
    "sha256": SHA256,
}
TRAINING = {
    "fingerprint": optional(TEXT),
    "split": optional(TEXT),
    "model_id": TEXT,
    "quantization_bits": optional(FINITE),
    "source": TEXT,
    "tokenizer": optional(OBJECT),  # of `TOKENIZER_FIELDS`
    "sequences": COUNT,
    "tokens": COUNT,
    "recipe": OBJECT,
    "texts": FieldRule("hexadecimal digits", lambda value: isinstance(value, str) and not value.strip(hexdigits)),
    "use": FieldRule(" or ".join(map(repr, USES)), lambda value: value in USES),
    "steering": optional(OBJECT),
    "hidden_states": optional(TEXT),
    "seen": LIST,
    "validation": optional(OBJECT),
}
"""Fields of a training record, all of which may be absent."""
RECIPE = dict.fromkeys(("seed", "epochs", "tokens per batch", "tokens per segment"), optional(whole(-1, 2**63)))
"""Fields of a recipe; a task may add further ones, each a `SCALAR`."""
FIGURES = {
    "source": TEXT,
    "fingerprint": TEXT,
    "split": optional(TEXT),
    "command": TEXT,
    "metrics": ROWS,
    "replay": LIST,
}
METRICS_ROW = {"lookahead": LOOKAHEAD, "k": whole(1, 2**24), "tokens": COUNT, "causal": FLAG} | dict.fromkeys(
    ("recall_at_k", "nll", "calibration_error", "accuracy", "f1_two_class"), FINITE
)
MORE_METRICS = dict.fromkeys(
    ("f1", "f1_micro", "f1_macro", "average_precision", "exact_match", "gate_mass_at_k"), optional(FINITE)
)
"""Fields of a row of metrics that may be absent."""
REPLAY_ROW = {
    "strategy": TEXT,
    "predictor": optional(TEXT),
    "lookahead": optional(LOOKAHEAD),
    "leaks": FLAG,
    "causal": FLAG,
    "budget_slots": COUNT,
} | dict.fromkeys(("budget_share", "hit_rate", "bytes_ratio"), FINITE)


def check_config(config: Any, source: str) -> dict[str, Any]:
    """Return the configuration of a predictor folder, after checking its fields.

    Args:
        config: Content of the file.
        source: Path of the file, for error messages.

    Raises:
        UserError: The content is no configuration of this format, a field is missing, unknown or wrong, or it was
            edited without its hash.
    """
    if not isinstance(config, dict) or "architecture" not in config or "format_version" not in config:
        raise UserError(f"{source}: is not the configuration of a predictor")
    version = config["format_version"]
    if type(version) is not int or version != FORMAT_VERSION:
        raise UserError(f"{source}: format version {shown(version)}; this package reads {FORMAT_VERSION}")
    try:
        check_known({**FIELDS, **dict.fromkeys(("format_version", "figures", SEAL), ANY)}, config)
        check_present(FIELDS, config)
        check_fields({"model": TEXT}, {"model": None, **config["geometry"]}, "geometry: ")
        check_training(config["training"])
        for figures in _objects(config.get("figures", []), "figures"):
            _check_figures(figures)
    except UserError as error:
        raise UserError(f"{source}: {error}; save the predictor again") from error
    if SEAL in config:
        check_seal(config, source, "restore the file; if you edited it, remove that field")
    return config


def check_training(training: Mapping[str, Any]) -> None:
    """Check the record of a predictor's training text.

    Args:
        training: Training record to check.

    Raises:
        UserError: A field of the record is wrong.
    """
    texts = _objects(training.get("seen", []), "training: seen")
    if training.get("validation") is not None:
        texts = [*texts, *_objects([training["validation"]], "training: validation")]
    for record in (training, *texts):
        check_known(TRAINING, record, "training: ")
        if ("sequences" in record) != ("tokens" in record):
            raise UserError("training: field 'sequences' or 'tokens' is missing; a record has both or none")
        check_known(TOKENIZER_FIELDS, record.get("tokenizer") or {}, "training: tokenizer: ")
        recipe = record.get("recipe", {})
        check_known({**dict.fromkeys(recipe, SCALAR), **RECIPE}, recipe, "training: recipe: ")


def _check_figures(figures: Mapping[str, Any]) -> None:
    check_present(FIGURES, figures, "figures: ")
    check_known({**FIGURES, "relation": TEXT}, figures, "figures: ")
    for kind, rules, more in (("metrics", METRICS_ROW, MORE_METRICS), ("replay", REPLAY_ROW, {})):
        for row in _objects(figures[kind], f"figures: {kind}"):
            check_present(rules, row, f"figures: {kind}: ")
            check_known({**rules, **more, "intervals": optional(INTERVALS)}, row, f"figures: {kind}: ")


def _objects(content: Any, location: str) -> Iterable[Mapping[str, Any]]:
    """Return a list, after checking that it holds objects only."""
    if not isinstance(content, list) or not all(map(OBJECT.accepts, content)):
        raise UserError(f"{location} must be a list of objects (got {shown(content)})")
    return content
