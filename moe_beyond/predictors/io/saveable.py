"""Check that a predictor can be saved, before hours of training."""

import inspect
import json
from typing import Any

import torch

from moe_beyond.errors import UserError
from moe_beyond.fields import shown
from moe_beyond.predictors.base import BASE_ARGUMENTS, Predictor
from moe_beyond.predictors.io.folder import load_weights
from moe_beyond.predictors.registry import ARCHITECTURES, create, predictor_class


def check_saveable(predictor: Predictor) -> None:
    """Check that a predictor folder can rebuild a predictor from its architecture, arguments and weights.

    Args:
        predictor: Predictor to check. Its weights and the state of random generators do not change.

    Raises:
        UserError: The class is not registered. Or an argument is not annotated, has no attribute of the same name, or
            is not JSON-serialisable. Or the rebuilt predictor has other arguments, another information set, or other
            state-dict keys or shapes.
    """
    where = f"{type(predictor).__name__} cannot be saved"
    architecture = getattr(predictor, "architecture", None)
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise UserError(f"{where}: its architecture is not registered (got {shown(architecture)}); register the class")
    if predictor_class(architecture) is not type(predictor):
        raise UserError(f"{where}: architecture {architecture!r} is registered for another class; choose another name")
    _check_signature(predictor, where)
    arguments = predictor.arguments()
    for name, value in arguments.items():
        if not _is_json(value):
            raise UserError(
                f"{where}: argument {name!r} does not survive JSON (got {shown(value)}); store numbers, strings, "
                "booleans, None, or lists and dictionaries of them"
            )
    with torch.random.fork_rng(devices=[]):
        twin = create(architecture, predictor.geometry, predictor.vocab_size, source=where, **arguments)
    if (rebuilt := twin.arguments()) != arguments:
        name = next(name for name, value in arguments.items() if rebuilt[name] != value)
        raise UserError(
            f"{where}: argument {name!r} is rebuilt as {shown(rebuilt[name])} (got {shown(arguments[name])}); keep "
            "each argument unchanged in the attribute of its name"
        )
    if twin.information != predictor.information:
        raise UserError(f"{where}: its information set is rebuilt differently; derive it from the arguments only")
    load_weights(twin, predictor.state_dict(), where)


def _check_signature(predictor: Predictor, where: str) -> None:
    """Check the constructor's parameters: geometry and vocabulary size first, then named and annotated ones."""
    parameters = list(inspect.signature(type(predictor)).parameters.values())
    if tuple(parameter.name for parameter in parameters[:2]) != BASE_ARGUMENTS:
        raise UserError(f"{where}: the first constructor arguments must be {' and '.join(BASE_ARGUMENTS)}; rename them")
    for parameter in parameters[2:]:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UserError(f"{where}: constructor argument {parameter} has no fixed name; list each argument")
        if parameter.annotation is parameter.empty:
            raise UserError(f"{where}: constructor argument {parameter.name!r} has no type; annotate it")


def _is_json(value: Any) -> bool:
    """Return whether JSON keeps a value and its type."""
    try:
        copy = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return False
    return type(copy) is type(value) and bool(copy == value)
