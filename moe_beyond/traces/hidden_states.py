"""Hidden states of a trace set, stored in safetensors files next to the shards.

Each shard has one such file with one row per token. In full width, hidden states take a hundred to a thousand times the
memory of the entries, and most readers do not need them. They can be stored as int8, for some layers, and projected to
a smaller width (`moe_beyond.traces.state_projection`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save_file

from moe_beyond.errors import UserError
from moe_beyond.json_fields import SHA256, FieldRule, check_fields, optional, whole
from moe_beyond.safe_text import printable

SUFFIX = ".states.safetensors"
"""End of the file's name, in place of a shard's ``.parquet``."""
SHARD_BYTES = 2**27
"""Bytes of hidden states at which a shard is closed; reading loads a whole shard into memory."""
DTYPES = ("float16", "int8")
"""Types of stored hidden states."""
LARGEST_CODE = 127
"""Largest int8 value in use; the codes are symmetric around 0."""

FORMAT_FIELDS = {
    "dtype": FieldRule(f"one of {', '.join(DTYPES)}", lambda value: value in DTYPES),
    "layers": FieldRule(
        "an ascending list of layers",
        lambda value: (
            isinstance(value, list | tuple)
            and all(type(layer) is int for layer in value)
            and list(value) == sorted(set(value))
            and bool(value)
        ),
    ),
    "projected_from": optional(whole(2, 2**24)),
    "projection_sha256": optional(SHA256),
}

Half = npt.NDArray[np.float16]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class StateFormat:
    """Form in which a trace set stores hidden states.

    Attributes:
        dtype: ``"float16"``, or ``"int8"`` with one scale per token and layer.
        layers: S MoE layers with states, numbered as in the geometry.
        projected_from: Width of the model's hidden states if they are projected to a smaller one; otherwise None.
        projection_sha256: Hash of the file of the projection; None without a projection.
    """

    dtype: str
    layers: tuple[int, ...]
    projected_from: int | None = None
    projection_sha256: str | None = None

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            UserError: A field has a wrong value.
        """
        check_fields(FORMAT_FIELDS, vars(self), "states: ")
        object.__setattr__(self, "layers", tuple(self.layers))
        if (self.projected_from is None) != (self.projection_sha256 is None):
            raise UserError("states: projected_from and projection_sha256 go together; restore the missing field")

    def describe(self, width: int, num_layers: int) -> str:
        """Describe the form in words.

        Args:
            width: Width of the stored states.
            num_layers: Number of MoE layers of the model.
        """
        values = f"{width} of {self.projected_from} values" if self.projected_from else f"{width} values"
        some = f"layers {', '.join(map(str, self.layers))}"
        return f"{self.dtype}, {values}, {'all MoE layers' if len(self.layers) == num_layers else some}"

    def token_bytes(self, width: int) -> int:
        """Return the bytes of a token's hidden states.

        Args:
            width: Width of the stored states.
        """
        return 2 * len(self.layers) * (width + 4 if self.dtype == "int8" else 2 * width)


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states of T tokens at S layers, in the form in which they are stored.

    Attributes:
        router_values: ``(T, S, W)`` float16, or int8 to be multiplied by ``router_scales``; inputs of the routers.
        layer_values: ``(T, S, W)`` float16, or int8 to be multiplied by ``layer_scales``; inputs of the layers.
        router_scales: ``(T, S)`` float32; None for float16 values.
        layer_scales: ``(T, S)`` float32; None for float16 values.
    """

    router_values: npt.NDArray[Any]
    layer_values: npt.NDArray[Any]
    router_scales: Floats | None = None
    layer_scales: Floats | None = None

    @property
    def router_inputs(self) -> Half:
        """Inputs of the routers, ``(T, S, W)`` float16; available when the layer is routed."""
        return _decoded(self.router_values, self.router_scales)

    @property
    def layer_inputs(self) -> Half:
        """Residual stream before each layer's attention, ``(T, S, W)`` float16.

        Available when the previous layer is computed.
        """
        return _decoded(self.layer_values, self.layer_scales)

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.router_values)

    def __getitem__(self, part: slice) -> "HiddenStates":
        """Return the states of a range of tokens, as views."""
        return HiddenStates(*(None if array is None else array[part] for array in vars(self).values()))  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        """Size of all arrays in bytes."""
        return sum(array.nbytes for array in self.arrays().values())

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the stored arrays by their names in the file."""
        arrays = {"router_inputs": self.router_values, "layer_inputs": self.layer_values}
        scales = {"router_scales": self.router_scales, "layer_scales": self.layer_scales}
        return arrays | {name: array for name, array in scales.items() if array is not None}

    def save(self, path: str | Path) -> None:
        """Write the arrays as safetensors.

        Args:
            path: Path of the file.
        """
        save_file({name: np.ascontiguousarray(array) for name, array in self.arrays().items()}, path)


def to_int8(states: HiddenStates) -> HiddenStates:
    """Return float16 states as int8, with one scale per token and layer: the largest absolute value divided by 127.

    Args:
        states: States in float16.
    """
    (router, router_scales), (layer, layer_scales) = map(_coded, (states.router_values, states.layer_values))
    return HiddenStates(router, layer, router_scales, layer_scales)


def _coded(values: Half) -> tuple[npt.NDArray[np.int8], Floats]:
    wide = values.astype(np.float32)
    scales = np.abs(wide).max(-1, initial=0) / np.float32(LARGEST_CODE)
    codes = np.zeros_like(wide)
    np.divide(wide, scales[..., None], out=codes, where=scales[..., None] > 0)
    return np.rint(codes, out=codes).astype(np.int8), scales


def _decoded(values: npt.NDArray[Any], scales: Floats | None) -> Half:
    decoded: Half = values if scales is None else (values * scales[..., None]).astype(np.float16)
    return decoded


def concatenate(parts: Sequence[HiddenStates]) -> HiddenStates:
    """Concatenate hidden states along the tokens.

    Args:
        parts: Hidden states of consecutive tokens, in one form.
    """
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return HiddenStates(*(None if column[0] is None else np.concatenate(column) for column in columns))  # type: ignore[arg-type]


def shape_fault(states: HiddenStates, dtype: str, shape: tuple[int, int, int]) -> str | None:
    """Describe arrays of another type or shape than expected; None without a fault.

    Args:
        states: States to check.
        dtype: Expected type, one of `DTYPES`.
        shape: Expected shape ``(T, S, W)``.
    """
    expected = _expected(dtype, shape)
    found = {name: (array.dtype.name, array.shape) for name, array in states.arrays().items()}
    for name, (kind, size) in expected.items():
        if found.get(name) != (kind, size):
            got = "none" if name not in found else " ".join(map(str, found[name]))
            return f"{name.replace('_', ' ')} must be {kind} {size} (got {got})"
    return None if found.keys() == expected.keys() else f"scales belong to int8 values, and these are {dtype}"


def _expected(dtype: str, shape: tuple[int, int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the type and shape of each array of a file."""
    scaled = ("router_scales", "layer_scales") if dtype == "int8" else ()
    values = dict.fromkeys(("router_inputs", "layer_inputs"), (dtype, shape))
    return {**values, **dict.fromkeys(scaled, ("float32", shape[:2]))}


def load_states(content: bytes, shape: tuple[int, int, int], source: str, dtype: str = "float16") -> HiddenStates:
    """Read a file of `HiddenStates.save`.

    Args:
        content: Content of the file.
        shape: Expected shape ``(T, S, W)``.
        source: Path of the file, for error messages.
        dtype: Expected type, one of `DTYPES` (default: float16).

    Raises:
        UserError: The content is not such a file.
    """
    try:
        arrays = load(content)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:  # TypeError: a type that numpy lacks
        raise UserError(f"{source}: is not a safetensors file that numpy reads ({printable(str(error))})") from error
    found = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
    if found != _expected(dtype, shape):
        with_scales = " with scales" if dtype == "int8" else ""
        raise UserError(
            f"{source}: must hold router_inputs and layer_inputs, {dtype} {shape}{with_scales} (got "
            f"{printable(str(found))})"
        )
    scales = arrays.get("router_scales"), arrays.get("layer_scales")
    if any(each is not None and not (np.isfinite(each) & (each >= 0)).all() for each in scales):
        raise UserError(f"{source}: scales must be finite numbers, at least 0")
    return HiddenStates(arrays["router_inputs"], arrays["layer_inputs"], *scales)
