"""Stored weights: compared with the predictor before memory is taken, then loaded and checked."""

from collections.abc import Iterator, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.predictors.base import Predictor
from moe_beyond.predictors.registry import create
from moe_beyond.safe_text import brief, shown

OWN_PARAMETERS = tuple(signature(create).parameters)
"""Parameters of `create`, which no argument of an architecture may replace."""


def build(config: Mapping[str, Any], weights: Mapping[str, Tensor], source: str, weights_source: str) -> Predictor:
    """Build a predictor and load its weights.

    A twin without memory is built and loaded first, so that a small file cannot ask for a large predictor.

    Args:
        config: Fields `moe_beyond.predictor_config.PREDICTOR`, checked.
        weights: Tensor of each state-dict key.
        source: Path of the file with the fields, for error messages.
        weights_source: Path of the file with the weights, for error messages.

    Returns:
        The predictor in evaluation mode, on the CPU.

    Raises:
        UserError: The architecture is not registered, an argument is wrong, or the weights do not fit or are damaged.
    """
    twin_of(config, {name: weight.to("meta") for name, weight in weights.items()}, source, weights_source)
    predictor = _create(config, source)
    load_weights(predictor, weights, weights_source)
    return predictor.eval()


def twin_of(config: Mapping[str, Any], weights: Mapping[str, Tensor], source: str, weights_source: str) -> Predictor:
    """Build a predictor on the device ``meta``, which has shapes and no memory, and load weights of that device.

    Args:
        config: Fields `moe_beyond.predictor_config.PREDICTOR`, checked.
        weights: Tensor of each state-dict key, on the device ``meta``.
        source: Path of the file with the fields, for error messages.
        weights_source: Path of the file with the weights, for error messages.

    Raises:
        UserError: The architecture is not registered, an argument is wrong, or the weights do not fit.
    """
    with torch.device("meta"):
        twin = _create(config, source)
        _load(twin, weights, weights_source)
    return twin


def load_weights(predictor: Predictor, weights: Mapping[str, Tensor], source: str) -> None:
    """Load weights into a predictor; keys, shapes and kinds of numbers must match exactly.

    Args:
        predictor: Predictor to change.
        weights: Tensor of each state-dict key.
        source: Path of the file, for error messages.

    Raises:
        UserError: A key is missing or unknown, a shape or kind of number differs, a number is not finite or out of
            range.
    """
    _load(predictor, weights, source)
    for name, loaded in predictor.state_dict().items():
        if loaded.is_floating_point():
            if not bool(loaded.isfinite().all()):
                raise UserError(f"{source}: {name} must hold only finite numbers; fit the predictor again")
        elif loaded.numel() and not torch.equal(loaded.to(torch.int64), weights[name].to(torch.int64)):
            raise UserError(f"{source}: {name} exceeds the range of {loaded.dtype}; save the predictor again")
    for name, fault in _faults(predictor):
        raise UserError(f"{source}: {f'{name}: ' if name else ''}{fault}; fit the predictor again")


def _create(config: Mapping[str, Any], source: str) -> Predictor:
    arguments = config["arguments"]
    if reserved := [name for name in arguments if name in OWN_PARAMETERS]:
        raise UserError(f"{source}: arguments: {shown(reserved[0])} is no argument of an architecture; remove it")
    geometry = Geometry.from_json(config["geometry"], source=source)
    names = {"source": source, "package": config["package"]}
    predictor = create(config["architecture"], geometry, config["vocab_size"], **names, **arguments)
    if missing := [name for name in predictor.arguments() if name not in arguments]:
        raise UserError(f"{source}: arguments: {missing[0]} is missing; save the predictor again")
    return predictor


def _load(predictor: Predictor, weights: Mapping[str, Tensor], source: str) -> None:
    """Load weights and compare the kinds of their numbers; values may be absent."""
    try:
        predictor.load_state_dict(weights, strict=True)
    except (RuntimeError, TypeError) as error:  # TypeError: a number in place of a table
        raise UserError(f"{source}: the weights do not match a {predictor.architecture} ({brief(error)})") from error
    for name, loaded in predictor.state_dict().items():
        if _kind(loaded) != (kind := _kind(weights[name])):
            raise UserError(
                f"{source}: {name} must hold {_kind(loaded)} numbers (got {kind}); save the predictor again"
            )


def _kind(tensor: Tensor) -> str:
    """Return the kind of a tensor's numbers."""
    if tensor.is_complex():
        return "complex"
    if tensor.is_floating_point():
        return "floating-point"
    return "truth" if tensor.dtype == torch.bool else "whole"


def _faults(predictor: Predictor) -> Iterator[tuple[str, str]]:
    """Yield the name and the fault of every module whose weights no fit can give."""
    for name, module in predictor.named_modules():
        describe = getattr(module, "weights_fault", None)
        if describe is not None and (fault := describe()) is not None:
            yield name, fault
