"""Weights of the routers of a recorded model, which turn hidden states into expert scores."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save_file

from moe_beyond.errors import UserError
from moe_beyond.json_fields import TEXT
from moe_beyond.safe_text import printable, shown

ROUTERS_FILE = "routers.safetensors"
OPTIONAL = ("bias", "selection_bias")

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Routers:
    """The routers of all MoE layers.

    A router selects the K experts with the largest scores, unless the model limits the selection to groups of experts.

    Attributes:
        weight: ``(L, E, D)`` float32; logits are its product with the router's input.
        scoring: Name of the function that turns logits into scores, a key of
            `moe_beyond.router_activations.ROUTER_ACTIVATIONS`.
        bias: ``(L, E)`` float32, added to the logits, or None.
        selection_bias: ``(L, E)`` float32, added to the scores only for the selection, or None.
    """

    weight: Floats
    scoring: str
    bias: Floats | None = None
    selection_bias: Floats | None = None

    def save(self, path: str | Path) -> None:
        """Write the weights as safetensors.

        Args:
            path: Path of the file.
        """
        arrays = {name: array for name in ("weight", *OPTIONAL) if (array := getattr(self, name)) is not None}
        save_file({n: np.ascontiguousarray(a, np.float32) for n, a in arrays.items()}, path, {"scoring": self.scoring})


def load_routers(content: bytes, shape: tuple[int, int, int], source: str) -> Routers:
    """Read a file of `Routers.save`.

    Args:
        content: Content of the file.
        shape: Expected shape ``(L, E, D)``.
        source: Path of the file, for error messages.

    Raises:
        UserError: The content is not such a file.
    """
    try:
        arrays = load(content)
        scoring = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["scoring"]
    except (SafetensorError, KeyError, ValueError, TypeError) as error:  # TypeError: a type that numpy lacks
        raise UserError(f"{source}: is not a safetensors file of routers ({printable(str(error))})") from error
    shapes = {name: array.shape for name, array in arrays.items()}
    expected = {"weight": shape} | {name: shape[:2] for name in OPTIONAL if name in arrays}
    if shapes != expected:
        raise UserError(f"{source}: must hold routers of shape {shape} (got {printable(str(shapes))})")
    for name, array in arrays.items():
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise UserError(f"{source}: {name} must hold only finite numbers")
    if not TEXT.accepts(scoring):
        raise UserError(f"{source}: scoring must be a name (got {shown(scoring)})")
    return Routers(**{name: np.asarray(array, np.float32) for name, array in arrays.items()}, scoring=scoring)
