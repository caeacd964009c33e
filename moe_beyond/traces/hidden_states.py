"""Hidden states of a trace set: what a model computed on the way to each entry, in safetensors beside the entries.

A shard's lie in a file of their own, float16, a row a token: they are some hundred times as large as the entries, and
most readers do without.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save_file

from moe_beyond.errors import UserError
from moe_beyond.fields import printable

SUFFIX = ".states.safetensors"
"""Of the file beside a shard, in place of ``.parquet``."""
SHARD_BYTES = 2**27
"""A shard with hidden states is closed once they take so much: it is in memory as a whole when it is read."""

States = npt.NDArray[np.float16]


@dataclass(frozen=True)
class HiddenStates:
    """States of T tokens at L layers.

    Attributes:
        router_inputs: ``(T, L, D)`` float16, what the layer's router read: known when the layer is routed.
        layer_inputs: ``(T, L, D)`` float16, the residual stream before the layer's attention: known when the layer
            before it is computed.
    """

    router_inputs: States
    layer_inputs: States

    def __len__(self) -> int:
        """Tokens."""
        return len(self.router_inputs)

    def __getitem__(self, part: slice) -> "HiddenStates":
        """Return some tokens' states, as views."""
        return HiddenStates(self.router_inputs[part], self.layer_inputs[part])

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""
        return self.router_inputs.nbytes + self.layer_inputs.nbytes

    def save(self, path: str | Path) -> None:
        """Write them as safetensors."""
        arrays = {"router_inputs": self.router_inputs, "layer_inputs": self.layer_inputs}
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)


def concatenate(parts: Sequence[HiddenStates]) -> HiddenStates:
    """Put states of tokens one after the other."""
    return HiddenStates(
        np.concatenate([part.router_inputs for part in parts]), np.concatenate([part.layer_inputs for part in parts])
    )


def load_states(content: bytes, shape: tuple[int, int, int], source: str) -> HiddenStates:
    """Read what `HiddenStates.save` wrote.

    Args:
        content: The file.
        shape: ``(T, L, D)`` that it must have.
        source: Where it came from, for error messages.

    Raises:
        UserError: It is no such file.
    """
    try:
        arrays = load(content)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:  # the latter of types that numpy lacks
        raise UserError(f"{source}: is not a safetensors file that numpy reads ({printable(str(error))})") from error
    found = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
    if found != dict.fromkeys(("router_inputs", "layer_inputs"), ("float16", shape)):
        names = printable(str(found))
        raise UserError(f"{source}: holds {names}, not router_inputs and layer_inputs of {shape} float16")
    return HiddenStates(arrays["router_inputs"], arrays["layer_inputs"])
