"""The predictors this package knows, by name: configs and predictor folders name one of these, never an import path."""

import importlib
from typing import Any

from moe_beyond.errors import UserError, unknown
from moe_beyond.geometry import Geometry
from moe_beyond.predictors.base import Predictor

ARCHITECTURES: dict[str, str] = {
    "token_table": "TokenTable",
    "row_encoder": "RowEncoder",
    "cross_layer": "CrossLayer",
}
"""Name -> class, in the module of that name; a module is imported only when its predictor is asked for."""


def predictor_class(architecture: str) -> type[Predictor]:
    """Return the class of an architecture.

    Raises:
        UserError: There is no such architecture.
    """
    if architecture not in ARCHITECTURES:
        raise unknown("predictor architecture", architecture, ARCHITECTURES)
    module = importlib.import_module(f"moe_beyond.predictors.{architecture}")
    found: type[Predictor] = getattr(module, ARCHITECTURES[architecture])
    return found


def create(architecture: str, geometry: Geometry, vocab_size: int, **arguments: Any) -> Predictor:
    """Build an unfitted predictor.

    Raises:
        UserError: There is no such architecture, or it has no such argument.
    """
    try:
        return predictor_class(architecture)(geometry, vocab_size, **arguments)
    except TypeError as error:
        raise UserError(f"predictor {architecture!r}: {error}") from error
