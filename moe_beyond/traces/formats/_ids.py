"""Checks of expert ids and layers that all readers share."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.traces.schema import experts_dtype


def checked_ids(ids: npt.NDArray[Any], geometry: Geometry, location: Callable[..., str]) -> npt.NDArray[Any]:
    """Check expert ids, and convert them to the type of a trace.

    Args:
        ids: ``(..., K)`` whole numbers.
        geometry: Shape of the model.
        location: Function that turns the indices of an entry into its place in the recording, for error messages.

    Raises:
        UserError: An id is out of range, or occurs twice in an entry.
    """
    if len(outside := np.argwhere((ids < 0) | (ids >= geometry.num_experts))):
        *entry, rank = outside[0].tolist()
        raise UserError(
            f"{location(*entry)}: expert id {ids[*entry, rank]} is out of range 0..{geometry.num_experts - 1}"
        )
    if len(twice := np.argwhere((np.diff(np.sort(ids, axis=-1), axis=-1) == 0).any(axis=-1))):
        raise UserError(f"{location(*twice[0].tolist())}: an expert occurs twice in one entry")
    narrow: npt.NDArray[Any] = ids.astype(experts_dtype(geometry))
    return narrow


def check_layers(layers: npt.NDArray[Any], geometry: Geometry, location: object) -> None:
    """Check that a recording has the model's MoE layers.

    Args:
        layers: Layers of the recording, counted over all layers of the model, ascending.
        geometry: Shape of the model.
        location: Place of the layers in the recording, for error messages.

    Raises:
        UserError: The layers differ.
    """
    if tuple(layers) != geometry.moe_layers:
        raise UserError(
            f"{location}: has layers {_span(layers)}, but {geometry.model}'s MoE layers are "
            f"{_span(geometry.moe_layers)}; give the model of the recording"
        )


def _span(layers: Any) -> str:
    return f"{layers[0]}..{layers[-1]} ({len(layers)})"
