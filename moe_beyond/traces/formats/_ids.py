"""What every importer checks of expert ids and layers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.traces.schema import experts_dtype


def checked_ids(ids: npt.NDArray[Any], geometry: Geometry, where: Callable[..., str]) -> npt.NDArray[Any]:
    """Check expert ids, and store them as a trace does.

    Args:
        ids: ``(..., K)`` whole numbers, one entry a row.
        geometry: The model's shape.
        where: Given an entry's indices, says where it stands, for error messages.

    Raises:
        UserError: An id is none of the model's, or an entry has one twice.
    """
    if len(outside := np.argwhere((ids < 0) | (ids >= geometry.num_experts))):
        *entry, place = outside[0].tolist()
        raise UserError(
            f"{where(*entry)}: expert id {ids[*entry, place]} is out of range 0..{geometry.num_experts - 1}"
        )
    if len(twice := np.argwhere((np.diff(np.sort(ids, axis=-1), axis=-1) == 0).any(axis=-1))):
        raise UserError(f"{where(*twice[0].tolist())}: an expert is listed twice")
    narrow: npt.NDArray[Any] = ids.astype(experts_dtype(geometry))
    return narrow


def check_layers(found: npt.NDArray[Any], geometry: Geometry, where: object) -> None:
    """Check that a recording has the model's MoE layers.

    Args:
        found: Its layers as the model counts them, ascending.
        geometry: The model's shape.
        where: What has them, for the error message.

    Raises:
        UserError: It has others.
    """
    if tuple(found) != geometry.moe_layers:
        raise UserError(
            f"{where}: has layers {_span(found)}, but {geometry.model}'s MoE layers are {_span(geometry.moe_layers)}"
        )


def _span(layers: Any) -> str:
    return f"{layers[0]}..{layers[-1]} ({len(layers)})"
