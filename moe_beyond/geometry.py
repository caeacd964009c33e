"""The geometry of an MoE, presets of known models, and memory budgets counted in slots."""

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

from moe_beyond.errors import UserError, unknown
from moe_beyond.files import read_json
from moe_beyond.json_fields import TEXT, check_fields
from moe_beyond.model_config import MOST_EXPERTS, MOST_LAYERS, read_mixture
from moe_beyond.safe_text import shown

CONFIG_FILE, TOKENIZER_FILE = "config.json", "tokenizer.json"
MOST_PARAMS = 10**15
"""Bound on parameters: a thousand times those of today's largest models."""
OPTIONAL = ("outside_params", "kv_values_per_token")
"""Fields of a geometry that may be unknown."""
SIZES = ("expert_bytes", "other_bytes")
"""Fields of a geometry with one number for each MoE layer, that may be unset."""
MOST_BYTES = 2**31 - 1
"""Bound on the stored bytes of one expert, or of the other weights of one layer."""


@dataclass(frozen=True)
class Geometry:
    """The shape of an MoE language model, as far as routing and transfers depend on it.

    Attributes:
        model: Display name of the model.
        moe_layers: Indices of the model's layers with experts, ascending; everywhere else in this package, layer ``l``
            is a position in this list.
        num_experts: Routed experts per MoE layer, E.
        top_k: Experts per token and layer, K.
        params_per_expert: Parameters of one routed expert: its matrices, and its biases if it has any; 0 if only
            ``expert_bytes`` is known.
        other_params_per_layer: Parameters that every token reads in an MoE layer besides its routed experts
            (attention, router, shared experts); an estimate if it was read from a ``config.json``.
        outside_params: Parameters that every step reads outside the MoE layers: dense layers and head (default: None,
            unknown).
        kv_values_per_token: Numbers in the KV cache of all layers per token of context; layers with a sliding window
            are left out (default: None, unknown).
        expert_bytes: Stored bytes of one expert of each MoE layer, where the layers are quantised differently
            (default: None, parameters times bits).
        other_bytes: Stored bytes of each MoE layer besides its routed experts (default: None, parameters times bits).
    """

    model: str
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    params_per_expert: int
    other_params_per_layer: int
    outside_params: int | None = None
    kv_values_per_token: int | None = None
    expert_bytes: tuple[int, ...] | None = None
    other_bytes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check types and bounds.

        Raises:
            UserError: A field has the wrong type, or a number is out of range.
        """
        check_fields({"model": TEXT}, {"model": self.model}, "geometry: ")
        location = f"geometry {shown(self.model)}"
        layers = self.moe_layers
        if not isinstance(layers, tuple) or any(type(layer) is not int for layer in layers):
            raise UserError(f"{location}: moe_layers must be whole numbers (got {shown(layers)})")
        if (
            not layers
            or any(layer >= following for layer, following in pairwise(layers))
            or not 0 <= layers[0] <= layers[-1] < MOST_LAYERS
        ):
            raise UserError(
                f"{location}: moe_layers must be ascending layer indices below {MOST_LAYERS:,} (got {shown(layers)})"
            )
        bounds = {
            "num_experts": (1, MOST_EXPERTS),
            "params_per_expert": (1 if self.expert_bytes is None else 0, MOST_PARAMS),
            "other_params_per_layer": (0, MOST_PARAMS),
        }
        bounds |= {name: (0, MOST_PARAMS) for name in OPTIONAL if getattr(self, name) is not None}
        for name, (least, most) in bounds.items():
            if type(number := getattr(self, name)) is not int or not least <= number <= most:
                raise UserError(
                    f"{location}: {name} must be a whole number of {least} to {most:,} (got {shown(number)})"
                )
        if type(self.top_k) is not int or not 1 <= self.top_k <= self.num_experts:
            raise UserError(
                f"{location}: top_k must be a whole number of 1 to {self.num_experts} (got {shown(self.top_k)})"
            )
        for name, least in (("expert_bytes", 1), ("other_bytes", 0)):
            if (sizes := getattr(self, name)) is not None:
                self._check_sizes(f"{location}: {name}", sizes, least)

    def _check_sizes(self, location: str, sizes: Any, least: int) -> None:
        """Check the bytes of each MoE layer."""
        if not isinstance(sizes, tuple) or len(sizes) != self.num_layers:
            raise UserError(f"{location} must be one number for each of {self.num_layers} layers (got {shown(sizes)})")
        for size in sizes:
            if type(size) is not int or not least <= size <= MOST_BYTES:
                raise UserError(f"{location} must be whole numbers of {least} to {MOST_BYTES:,} (got {shown(size)})")

    @property
    def num_layers(self) -> int:
        """Number of MoE layers, L."""
        return len(self.moe_layers)

    @property
    def total_experts(self) -> int:
        """Number of experts in all layers, L * E."""
        return self.num_layers * self.num_experts

    @property
    def demand_per_token(self) -> int:
        """Number of experts that one token uses, L * K."""
        return self.num_layers * self.top_k

    @property
    def expert_units(self) -> tuple[int, ...]:
        """Size of one expert of each layer in units of a cache, ``(L,)``; 1 if all experts have the same size.

        A unit is the greatest common divisor of the layers' bytes, so that caches count in small whole numbers.
        """
        if self.expert_bytes is None:
            return (1,) * self.num_layers
        unit = math.gcd(*self.expert_bytes)
        return tuple(size // unit for size in self.expert_bytes)

    @property
    def total_units(self) -> int:
        """Size of all experts in units; L * E if all have the same size."""
        return self.num_experts * sum(self.expert_units)

    @property
    def has_one_size(self) -> bool:
        """Whether all experts have the same size."""
        return max(self.expert_units) == 1

    def unit_bytes(self, bits: float) -> Fraction:
        """Return the bytes of one unit: of an expert, if all have the same size.

        Args:
            bits: Bits per expert parameter; not read if ``expert_bytes`` is known.
        """
        if self.expert_bytes is None:
            return self.params_per_expert * Fraction(bits) / 8
        return Fraction(math.gcd(*self.expert_bytes))

    def mean_expert_bytes(self, bits: float) -> Fraction:
        """Return the bytes of an expert, the mean over the layers.

        Args:
            bits: Bits per expert parameter; not read if ``expert_bytes`` is known.
        """
        return self.unit_bytes(bits) * self.total_units / self.total_experts

    def mean_other_bytes(self, bits: float) -> Fraction:
        """Return the bytes of a layer besides its routed experts, the mean over the layers.

        Args:
            bits: Bits per parameter; not read if ``other_bytes`` is known.
        """
        if self.other_bytes is None:
            return self.other_params_per_layer * Fraction(bits) / 8
        return Fraction(sum(self.other_bytes), self.num_layers)

    def shape(self) -> tuple[int, int, int]:
        """Return (L, E, K), which must be equal for a trace set and a predictor."""
        return self.num_layers, self.num_experts, self.top_k

    def describe_shape(self) -> str:
        """Describe the shape for error messages."""
        return f"{self.num_layers} MoE layers x {self.num_experts} experts, top-{self.top_k}"

    def to_json(self) -> dict[str, Any]:
        """Return the plain dictionary that `from_json` reads; fields that are not set are left out."""
        content = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in content.items()}

    @classmethod
    def of(cls, value: "Geometry | Mapping[str, Any]") -> "Geometry":
        """Return a geometry, given a geometry or its dictionary.

        Args:
            value: Geometry, or the dictionary that `to_json` returns.

        Raises:
            UserError: The dictionary is not a geometry.
        """
        return value if isinstance(value, Geometry) else cls.from_json(value)

    @classmethod
    def from_json(cls, content: Mapping[str, Any], *, source: str = "geometry") -> "Geometry":
        """Build a geometry from a dictionary.

        Args:
            content: Dictionary with the fields of a geometry, as `to_json` returns it.
            source: Origin of the dictionary, for error messages (default: ``"geometry"``).

        Raises:
            UserError: A field is missing, unknown or invalid.
        """
        if not isinstance(content, Mapping):
            raise UserError(f"{source}: must be a geometry (got {shown(content)})")
        names = [field.name for field in fields(cls)]
        if missing := [field.name for field in fields(cls) if field.default is MISSING and field.name not in content]:
            raise UserError(f"{source}: {missing[0]} is missing; a geometry has {', '.join(names)}")
        if strange := [name for name in content if name not in names]:
            raise UserError(f"{source}: a geometry has no field {shown(strange[0])}; it has {', '.join(names)}")
        lists = {name: content[name] for name in ("moe_layers", *SIZES) if content.get(name) is not None}
        for name, value in lists.items():
            if not isinstance(value, list | tuple):
                raise UserError(f"{source}: {name} must be a list of whole numbers (got {shown(value)})")
        try:
            return cls(**{**content, **{name: tuple(value) for name, value in lists.items()}})
        except UserError as error:
            raise UserError(f"{source}: {error}") from error


@dataclass(frozen=True)
class Preset:
    """A known model: its geometry, tokenizer and vocabulary.

    Attributes:
        geometry: Geometry of the model.
        tokenizer: Name or folder that `moe_beyond.traces.tokenizers` can load, or None.
        vocab_size: Rows of the model's embedding, possibly more than its tokenizer has tokens; None if unknown.
        hidden_size: Width of the model's hidden state; None if unknown.
    """

    geometry: Geometry
    tokenizer: str | None = None
    vocab_size: int | None = None
    hidden_size: int | None = None


def _preset(
    model: str,
    layers: int,
    experts: int,
    top_k: int,
    width: int,
    expert_width: int,
    other: int,
    head: int,
    kv: int,
    *,
    dense: int = 0,
    first: int = 0,
    biases: int = 0,
    tokenizer: str | None = None,
) -> Preset:
    """Build the preset of a model with three ``width x expert_width`` matrices per expert.

    Args:
        model: Display name of the model.
        layers: Number of MoE layers.
        experts: Routed experts per MoE layer.
        top_k: Experts per token and layer.
        width: Hidden size of the model.
        expert_width: Width of an expert.
        other: Parameters of attention and shared experts per layer.
        head: Rows of the head, one per entry of the vocabulary.
        kv: Numbers in the KV cache per token of context.
        dense: Parameters of the dense layers (default: 0).
        first: Index of the first MoE layer (default: 0).
        biases: Biases per expert (default: 0).
        tokenizer: Name of the tokenizer, or None.
    """
    geometry = Geometry(
        model=model,
        moe_layers=tuple(range(first, first + layers)),
        num_experts=experts,
        top_k=top_k,
        params_per_expert=3 * width * expert_width + biases,
        other_params_per_layer=other + width * experts,
        outside_params=dense + width * head,
        kv_values_per_token=kv,
    )
    return Preset(geometry, tokenizer, hidden_size=width)


def _attention(width: int, heads: int, kv_heads: int, head: int) -> int:
    """Count the parameters of grouped-query attention: query and output maps, key and value maps."""
    return 2 * width * heads * head + 2 * width * kv_heads * head


def _kv(layers: int, kv_heads: int, head: int) -> int:
    """Count the numbers that grouped-query attention keeps per token in all layers: keys and values."""
    return 2 * layers * kv_heads * head


# Layers, experts, top-k, widths and vocabularies are those of each model's published config.json. `other` is attention
# plus shared experts (and DeepSeek-V2's low-rank attention maps: 2048x3072 + 2048x576 + 512x4096 + 2048x2048). Every
# second layer of gpt-oss has a sliding window of 128 tokens, which the KV cache leaves out.
_DEEPSEEK_ATTENTION = 2048 * 3072 + 2048 * 576 + 512 * 4096 + 2048 * 2048
PRESETS: dict[str, Preset] = {
    "deepseek-v2-lite": _preset(
        "DeepSeek-V2-Lite",
        26, 64, 6, 2048, 1408, _DEEPSEEK_ATTENTION + 3 * 2048 * 2816, 102_400, 27 * (512 + 64),
        dense=_DEEPSEEK_ATTENTION + 3 * 2048 * 10944,
        first=1,
        tokenizer="deepseek-v2",
    ),
    "deepseek-moe-16b": _preset(
        "DeepSeek-MoE-16B",
        27, 64, 6, 2048, 1408, _attention(2048, 16, 16, 128) + 3 * 2048 * 2816, 102_400, _kv(28, 16, 128),
        dense=_attention(2048, 16, 16, 128) + 3 * 2048 * 10944,
        first=1,
    ),
    "qwen1.5-moe-a2.7b": _preset(
        "Qwen1.5-MoE-A2.7B",
        24, 60, 4, 2048, 1408, _attention(2048, 16, 16, 128) + 3 * 2048 * 5632, 151_936, _kv(24, 16, 128),
    ),
    "qwen2-57b-a14b": _preset(
        "Qwen2-57B-A14B",
        28, 64, 8, 3584, 2560, _attention(3584, 28, 4, 128) + 3 * 3584 * 20480, 151_936, _kv(28, 4, 128),
    ),
    "qwen3-30b-a3b": _preset(
        "Qwen3-30B-A3B", 48, 128, 8, 2048, 768, _attention(2048, 32, 4, 128), 151_936, _kv(48, 4, 128)
    ),
    "mixtral-8x7b": _preset(
        "Mixtral-8x7B", 32, 8, 2, 4096, 14336, _attention(4096, 32, 8, 128), 32_000, _kv(32, 8, 128)
    ),
    "olmoe-1b-7b": _preset(
        "OLMoE-1B-7B", 16, 64, 8, 2048, 1024, _attention(2048, 16, 16, 128), 50_304, _kv(16, 16, 128)
    ),
    "gpt-oss-20b": _preset(
        "gpt-oss-20b", 24, 32, 4, 2880, 2880, _attention(2880, 64, 8, 64), 201_088, _kv(12, 8, 64), biases=3 * 2880
    ),
    "gpt-oss-120b": _preset(
        "gpt-oss-120b", 36, 128, 4, 2880, 2880, _attention(2880, 64, 8, 64), 201_088, _kv(18, 8, 64), biases=3 * 2880
    ),
    "phi-3.5-moe": _preset(
        "Phi-3.5-MoE", 32, 16, 2, 4096, 6400, _attention(4096, 32, 8, 128), 32_064, _kv(32, 8, 128)
    ),
    "phi-mini-moe": _preset(
        "Phi-mini-MoE", 32, 16, 2, 4096, 960, _attention(4096, 32, 8, 128), 32_064, _kv(32, 8, 128)
    ),
    "granite-3.1-3b-a800m": _preset(
        "Granite-3.1-3B-A800M", 32, 40, 8, 1536, 512, _attention(1536, 24, 8, 64), 49_155, _kv(32, 8, 64)
    ),
    "granite-3.1-1b-a400m": _preset(
        "Granite-3.1-1B-A400M", 24, 32, 8, 1024, 512, _attention(1024, 16, 8, 64), 49_155, _kv(24, 8, 64)
    ),
}  # fmt: skip


def load_preset(name: str) -> Preset:
    """Find a preset by name, or read the folder of a model, its ``config.json``, or a geometry file.

    Args:
        name: Key of `PRESETS`; folder with a Hugging Face ``config.json`` and possibly a ``tokenizer.json``; or JSON
            file with such a configuration or the fields of `Geometry.to_json`.

    Raises:
        UserError: There is no such preset or file, or the file is neither a geometry nor a configuration.
    """
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if folder := path if path.is_dir() else None:
        if not (path := folder / CONFIG_FILE).is_file():
            raise UserError(f"{folder}: has no {CONFIG_FILE}; give the folder of a model, a .json file or a preset")
    elif path.suffix != ".json":
        if path.exists() or len(path.parts) > 1:
            raise UserError(f"{name}: is no model; give a folder with a {CONFIG_FILE}, a .json file, or a model preset")
        raise unknown("model preset", name, PRESETS)
    content = read_json(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: must be a geometry or the {CONFIG_FILE} of a model (got {shown(content)})")
    if "params_per_expert" in content:
        return Preset(Geometry.from_json(content, source=str(path)))
    preset = _preset_of(content, str(path))
    if folder and (folder / TOKENIZER_FILE).is_file():
        return replace(preset, tokenizer=str(folder))
    return preset


def geometry_from_config(config: Mapping[str, Any], *, source: str = "config.json") -> Geometry:
    """Read the geometry from a Hugging Face model configuration.

    Args:
        config: Content of the ``config.json``.
        source: Path of the file, for error messages (default: ``"config.json"``).

    Raises:
        UserError: The configuration has no routed experts, or a field about them is missing, wrong, or not understood
            (`moe_beyond.model_config`).
    """
    return _preset_of(config, source).geometry


def _preset_of(config: Mapping[str, Any], source: str) -> Preset:
    mixture = read_mixture(config, source)
    try:
        geometry = Geometry(
            model=mixture.name,
            moe_layers=mixture.moe_layers,
            num_experts=mixture.num_experts,
            top_k=mixture.top_k,
            params_per_expert=mixture.params_per_expert,
            other_params_per_layer=mixture.other_params_per_layer,
            outside_params=mixture.outside_params,
            kv_values_per_token=mixture.kv_values_per_token,
        )
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return Preset(geometry, vocab_size=mixture.vocab_size, hidden_size=mixture.hidden_size)


_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_BUDGET = re.compile(r"(?P<number>\d{1,18}(?:\.\d{1,18})?)\s*(?P<unit>%|B|[KMG]i?B)?", re.ASCII)


@dataclass(frozen=True)
class Budget:
    """A memory budget for experts.

    Attributes:
        slots: Number of slots, from 1 to L * E; rounded down at the mean size of an expert where layers differ.
        bytes: Exact bytes where layers differ; None if all experts have the same size, or the budget is in slots.
    """

    slots: int
    bytes: int | None = None


def budget_slots(budget: str | int, geometry: Geometry, bits: float = 16.0) -> int:
    """Convert a memory budget to a number of slots, as `parse_budget` does.

    Args:
        budget: Text of the budget, or number of slots.
        geometry: Geometry of the model.
        bits: Bits per expert parameter (default: 16).

    Returns:
        Number of slots, from 1 to L * E.

    Raises:
        UserError: The budget is malformed, too small for one expert, or larger than all experts.

    Example:
        >>> geometry = PRESETS["deepseek-v2-lite"].geometry
        >>> [budget_slots(b, geometry) for b in ("10%", "166", "2.9GB", "2.7GiB")]
        [166, 166, 167, 167]
    """
    return parse_budget(budget, geometry, bits).slots


def parse_budget(budget: str | int, geometry: Geometry, bits: float = 16.0) -> Budget:
    """Read a memory budget.

    Args:
        budget: Share of all experts (``"10%"``, rounded down), number of slots (``"166"``), or memory (``"2.9GB"``,
            ``"2.7GiB"``: decimal or binary bytes, divided by the bytes of one expert). A slot holds an expert of mean
            size where layers differ.
        geometry: Geometry of the model.
        bits: Bits per expert parameter; not read if the geometry has bytes (default: 16).

    Raises:
        UserError: The budget is malformed, too small for one expert, or larger than all experts.
    """
    expert = geometry.mean_expert_bytes(bits)
    size: Fraction | None = None
    written = f"budget {shown(budget)}"
    match = _BUDGET.fullmatch(str(budget).strip()) if isinstance(budget, str) or abs(budget) < 10**18 else None
    if match is None:
        raise UserError(f"{written} cannot be read; write 10%, 166 (slots), 2.9GB or 2.7GiB")
    number, unit = match["number"], match["unit"]
    if unit is None:
        if "." in number and Fraction(number) * geometry.total_experts >= 1:
            raise UserError(f"{written}: a number of slots is whole; {_budget_hint(number)}")
        slots = int(Fraction(number))
    elif unit == "%" and Fraction(number) > 100:
        raise UserError(f"{written} is more than all {geometry.total_experts} experts; write 100%")
    elif unit == "%":
        size = Fraction(number) * geometry.total_experts * expert / 100
    else:
        size = Fraction(number) * _BYTES[unit]
    if size is not None:
        slots = math.floor(size / expert)
    if slots < 1:
        least = geometry.top_k  # one layer needs as many slots at once
        share = Fraction(100 * least, geometry.total_experts)
        needed = geometry.top_k * max(geometry.expert_units) * geometry.unit_bytes(bits)
        raise UserError(
            f"{written} is too small for one expert of {geometry.model}; a token needs {least} per layer: write "
            f"{least} (slots), which is {_rounded_up(share)}% or {_rounded_up(needed / 10**6)}MB"
        )
    if slots > geometry.total_experts:
        raise UserError(f"{written} is {slots} slots, more than all {geometry.total_experts} experts; write 100%")
    return Budget(slots, None if size is None or geometry.has_one_size else math.floor(size))


def _budget_hint(number: str) -> str:
    """Return the likely meaning of a number with a fraction, and the other forms of a budget.

    Example:
        >>> _budget_hint("0.1")
        'write 10% for that share of all experts, 166 for slots, or 2.9GB for bytes'
        >>> _budget_hint("2.0")
        'write 2% for a share of all experts, 2 for slots, or 2.9GB for bytes'
    """
    value = Fraction(number)
    share, noun = (value * 100, "that share") if value <= 1 else (value, "a share")
    slots = int(value) if value.denominator == 1 else 166
    return f"write {float(share):.15g}% for {noun} of all experts, {slots} for slots, or 2.9GB for bytes"


def _rounded_up(number: Fraction) -> str:
    """Round a number up to three digits.

    Example:
        >>> _rounded_up(Fraction(100, 1664)), _rounded_up(Fraction(2, 1000)), _rounded_up(Fraction(1234))
        ('0.0601', '0.00200', '1240')
    """
    digits = 2 - math.floor(math.log10(number))
    up = math.ceil(number * Fraction(10) ** digits)
    return f"{float(up / Fraction(10) ** digits):.{max(digits, 0)}f}"
