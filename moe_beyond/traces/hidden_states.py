"""Hidden states of a trace set, stored in safetensors files next to the shards.

Each shard has one such file, in float16 with one row per token. Hidden states take about a hundred times the memory of
the entries, and most readers do not need them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save_file

from moe_beyond.errors import UserError
from moe_beyond.safe_text import printable

SUFFIX = ".states.safetensors"
"""End of the file's name, in place of a shard's ``.parquet``."""
SHARD_BYTES = 2**27
"""Bytes of hidden states at which a shard is closed; reading loads a whole shard into memory."""

States = npt.NDArray[np.float16]


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states of T tokens at L layers.

    Attributes:
        router_inputs: ``(T, L, D)`` float16, input of the layer's router; available when the layer is routed.
        layer_inputs: ``(T, L, D)`` float16, the residual stream before the layer's attention; available when the
            previous layer is computed.
    """

    router_inputs: States
    layer_inputs: States

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.router_inputs)

    def __getitem__(self, part: slice) -> "HiddenStates":
        """Return the states of a range of tokens, as views."""
        return HiddenStates(self.router_inputs[part], self.layer_inputs[part])

    @property
    def nbytes(self) -> int:
        """Size of both arrays in bytes."""
        return self.router_inputs.nbytes + self.layer_inputs.nbytes

    def save(self, path: str | Path) -> None:
        """Write both arrays as safetensors.

        Args:
            path: Path of the file.
        """
        arrays = {"router_inputs": self.router_inputs, "layer_inputs": self.layer_inputs}
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)


def concatenate(parts: Sequence[HiddenStates]) -> HiddenStates:
    """Concatenate hidden states along the tokens.

    Args:
        parts: Hidden states of consecutive tokens.
    """
    return HiddenStates(
        np.concatenate([part.router_inputs for part in parts]), np.concatenate([part.layer_inputs for part in parts])
    )


def load_states(content: bytes, shape: tuple[int, int, int], source: str) -> HiddenStates:
    """Read a file of `HiddenStates.save`.

    Args:
        content: Content of the file.
        shape: Expected shape ``(T, L, D)``.
        source: Path of the file, for error messages.

    Raises:
        UserError: The content is not such a file.
    """
    try:
        arrays = load(content)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:  # TypeError: a type that numpy lacks
        raise UserError(f"{source}: is not a safetensors file that numpy reads ({printable(str(error))})") from error
    arrays_found = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
    if arrays_found != dict.fromkeys(("router_inputs", "layer_inputs"), ("float16", shape)):
        content_found = printable(str(arrays_found))
        raise UserError(f"{source}: must hold router_inputs and layer_inputs, float16 {shape} (got {content_found})")
    return HiddenStates(arrays["router_inputs"], arrays["layer_inputs"])
