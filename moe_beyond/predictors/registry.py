"""The predictors this package knows, by name: configs and predictor folders name one of these, never an import path."""

import importlib
from typing import Any

from moe_beyond.errors import UserError, unknown
from moe_beyond.fields import brief
from moe_beyond.geometry import Geometry
from moe_beyond.predictors.base import Predictor

ARCHITECTURES: dict[str, str] = {
    "popularity": "Popularity",
    "token_table": "TokenTable",
    "eamc": "Eamc",
    "history": "History",
    "naive_bayes": "NaiveBayes",
    "row_encoder": "RowEncoder",
    "token_causal": "TokenCausal",
    "cross_layer": "CrossLayer",
    "next_gate": "NextGate",
    "layer_mlp": "LayerMlp",
    "pre_attention": "PreAttention",
}
"""Name -> class, in the module of that name; a module is imported only when its predictor is asked for."""


def predictor_class(architecture: str) -> type[Predictor]:
    """Return the class of an architecture.

    Raises:
        UserError: There is no such architecture.
    """
    if architecture not in ARCHITECTURES:
        raise unknown("predictor architecture", architecture, ARCHITECTURES)
    module = importlib.import_module(f"moe_beyond.predictors.architectures.{architecture}")
    found: type[Predictor] = getattr(module, ARCHITECTURES[architecture])
    return found


def create(
    architecture: str, geometry: Geometry, vocab_size: int, *, source: str = "predictor", **arguments: Any
) -> Predictor:
    """Build an unfitted predictor out of what a file says.

    Args:
        architecture: Its name.
        geometry: The model's shape.
        vocab_size: Ids of the tokenizer.
        source: The file, for error messages.
        **arguments: Of the constructor.

    Raises:
        UserError: There is no such architecture, or its arguments are not such.
    """
    try:
        return predictor_class(architecture)(geometry, vocab_size, **arguments)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:  # whatever torch makes of a wrong size
        raise UserError(f"{source}: {architecture}: {brief(error)}") from error
