"""Projections of hidden states to a smaller width, stored with the states that they made.

Every stored state is the product of its layer's matrix with the model's state. A predictor that was fitted on such
states keeps the matrices, and projects the states of a running model itself.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from moe_beyond.errors import UserError
from moe_beyond.safe_text import printable

PROJECTION_FILE = "projection.safetensors"

Half = npt.NDArray[np.float16]


@dataclass(frozen=True)
class StateProjection:
    """Projections from D to W values, for S layers.

    Attributes:
        router_inputs: ``(S, W, D)`` float16, matrices of the router inputs, with orthonormal rows.
        layer_inputs: ``(S, W, D)`` float16, matrices of the layer inputs, with orthonormal rows.
    """

    router_inputs: Half
    layer_inputs: Half

    def at(self, position: int) -> tuple[Half, Half]:
        """Return the matrices ``(W, D)`` of router input and layer input.

        Args:
            position: Index of the layer among the S layers.
        """
        return self.router_inputs[position], self.layer_inputs[position]

    @cached_property
    def content(self) -> bytes:
        """Content of the file that `load_projection` reads."""
        return bytes(
            save({name: np.ascontiguousarray(getattr(self, name)) for name in ("router_inputs", "layer_inputs")})
        )

    @cached_property
    def sha256(self) -> str:
        """Hash of the file."""
        return hashlib.sha256(self.content).hexdigest()


def load_projection(content: bytes, shape: tuple[int, int, int], source: str) -> StateProjection:
    """Read the file of a projection.

    Args:
        content: Content of the file.
        shape: Expected shape ``(S, W, D)``.
        source: Path of the file, for error messages.

    Raises:
        UserError: The content is not such a file.
    """
    try:
        arrays = load(content)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:  # TypeError: a type that numpy lacks
        raise UserError(f"{source}: is not a safetensors file of projections ({printable(str(error))})") from error
    found = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
    if found != dict.fromkeys(("router_inputs", "layer_inputs"), ("float16", shape)):
        raise UserError(
            f"{source}: must hold router_inputs and layer_inputs, float16 {shape} (got {printable(str(found))})"
        )
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise UserError(f"{source}: must hold only finite numbers")
    return StateProjection(**arrays)
