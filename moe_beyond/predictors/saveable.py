"""Check that a predictor can be saved and loaded again, before it is fitted."""

import inspect
import json
import textwrap
from typing import Any

import torch

from moe_beyond.errors import UserError
from moe_beyond.predictors.base import BASE_ARGUMENTS, Predictor
from moe_beyond.predictors.registry import ARCHITECTURES
from moe_beyond.safe_text import shown


def check_saveable(predictor: Predictor) -> None:
    """Check that a predictor folder or checkpoint can rebuild a predictor from its arguments and weights.

    Args:
        predictor: Predictor, fitted or not. Neither it nor the state of random generators changes.

    Raises:
        UserError: The class is not registered. Or an argument is not annotated, has no attribute of the same name, or
            is not a plain JSON value. Or the rebuilt predictor has other arguments, another information set, or other
            state-dict keys or shapes.
    """
    name, cls = getattr(predictor, "architecture", None), type(predictor)
    if not isinstance(name, str):
        raise UserError(f"{cls.__name__}: has no architecture; set the class attribute architecture to its name")
    if name not in ARCHITECTURES or ARCHITECTURES[name] is not cls:
        raise UserError(
            f"{name}: {cls.__module__}.{cls.__name__} is not registered under this name; call "
            "moe_beyond.predictors.registry.register, or add an entry point moe_beyond.predictors"
        )
    _check_parameters(cls, name)
    try:
        arguments = predictor.arguments()
    except AttributeError as error:
        raise UserError(f"{name}: {error}; keep every argument of the constructor as an attribute") from error
    for argument, value in arguments.items():
        if not _is_json(value):
            raise UserError(
                f"{name}: {argument} is not a plain JSON value (got {shown(value)}); use numbers, text or lists"
            )
    _check_twin(predictor, arguments)


def _check_parameters(cls: type[Predictor], name: str) -> None:
    """Check the constructor's parameters: geometry and vocabulary size first, then named and annotated ones."""
    parameters = list(inspect.signature(cls).parameters.values())
    if tuple(parameter.name for parameter in parameters[:2]) != BASE_ARGUMENTS:
        raise UserError(f"{name}: its first constructor arguments must be {' and '.join(BASE_ARGUMENTS)}; rename them")
    for parameter in parameters[2:]:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UserError(f"{name}: constructor argument {parameter} has no fixed name; list each argument")
        if parameter.annotation is parameter.empty:
            raise UserError(f"{name}: constructor argument {parameter.name} has no type; annotate it")


def _is_json(value: Any) -> bool:
    """Return whether JSON keeps a value and its type."""
    try:
        copy = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return False
    return type(copy) is type(value) and bool(copy == value)


def _check_twin(predictor: Predictor, arguments: dict[str, Any]) -> None:
    """Check that the arguments rebuild an equal predictor, which accepts the predictor's weights."""
    name = predictor.architecture
    with torch.random.fork_rng(devices=[]):
        twin = type(predictor)(predictor.geometry, predictor.vocab_size, **arguments)
    for argument, rebuilt in twin.arguments().items():
        if rebuilt != arguments[argument]:
            raise UserError(
                f"{name}: {argument} is rebuilt as {shown(rebuilt)} (got {shown(arguments[argument])}); keep each "
                "argument unchanged in the attribute of its name"
            )
    if twin.information != predictor.information:
        raise UserError(f"{name}: its information set is rebuilt differently; derive it from the arguments only")
    try:
        twin.load_state_dict(predictor.state_dict(), strict=True)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 240)
        raise UserError(
            f"{name}: the rebuilt predictor has other weights ({reason}); derive them from the arguments"
        ) from error
