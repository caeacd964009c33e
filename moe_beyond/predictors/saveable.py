"""The check that a predictor can be saved and loaded again, made before it is fitted."""

import json

from moe_beyond.errors import UserError
from moe_beyond.predictors.base import Predictor
from moe_beyond.predictors.registry import ARCHITECTURES


def check_saveable(predictor: Predictor) -> None:
    """Refuse a predictor that a folder or checkpoint could not restore.

    Args:
        predictor: Predictor, fitted or not.

    Raises:
        UserError: Its class is not registered, an argument of its constructor is not an attribute, or an argument is
            not a plain JSON value.
    """
    name, cls = getattr(predictor, "architecture", None), type(predictor)
    if not isinstance(name, str):
        raise UserError(f"{cls.__name__}: has no architecture; set the class attribute architecture to its name")
    if name not in ARCHITECTURES or ARCHITECTURES[name] is not cls:
        raise UserError(
            f"{name}: {cls.__module__}.{cls.__name__} is not registered under this name; call "
            "moe_beyond.predictors.registry.register, or add an entry point moe_beyond.predictors"
        )
    try:
        arguments = predictor.arguments()
    except AttributeError as error:
        raise UserError(f"{name}: {error}; keep every argument of the constructor as an attribute") from error
    for argument, value in arguments.items():
        try:
            same = json.loads(json.dumps(value, allow_nan=False)) == value
        except (TypeError, ValueError):
            same = False
        if not same:
            raise UserError(f"{name}: {argument} is not a plain JSON value (got {value!r}); use numbers, text or lists")
