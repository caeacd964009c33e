"""The shape of a mixture of experts, presets of known models, and memory budgets counted in experts."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from moe_beyond.errors import UserError, unknown
from moe_beyond.files import read_json


@dataclass(frozen=True)
class Geometry:
    """The shape of an MoE language model, as far as routing and transfers depend on it.

    Attributes:
        model: A name for people.
        moe_layers: Indices of the model's layers that hold experts, ascending; layer ``l`` everywhere else in
            this package counts along this list.
        num_experts: Routed experts per MoE layer, E.
        top_k: Experts a token is routed to in a layer, K.
        params_per_expert: Parameters of one routed expert.
        other_params_per_layer: Parameters that every token reads in an MoE layer besides its routed experts
            (attention, router, shared experts).
    """

    model: str
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    params_per_expert: int
    other_params_per_layer: int

    def __post_init__(self) -> None:
        """Check that the numbers describe a mixture of experts."""
        if not self.moe_layers or list(self.moe_layers) != sorted(set(self.moe_layers)):
            raise UserError(f"geometry {self.model!r}: moe_layers must be ascending layer indices")
        if not 1 <= self.top_k <= self.num_experts:
            raise UserError(f"geometry {self.model!r}: top_k {self.top_k} is not within 1..{self.num_experts}")
        if self.params_per_expert < 1 or self.other_params_per_layer < 0:
            raise UserError(f"geometry {self.model!r}: an expert has parameters, and other parameters are not negative")

    @property
    def num_layers(self) -> int:
        """MoE layers, L."""
        return len(self.moe_layers)

    @property
    def total_experts(self) -> int:
        """Experts of the whole model, L * E."""
        return self.num_layers * self.num_experts

    @property
    def demand_per_token(self) -> int:
        """Experts that one token needs, L * K."""
        return self.num_layers * self.top_k

    def shape(self) -> tuple[int, int, int]:
        """Return (L, E, K): what a trace and a predictor must agree on."""
        return self.num_layers, self.num_experts, self.top_k

    def describe_shape(self) -> str:
        """Name the shape in words, for error messages."""
        return f"{self.num_layers} MoE layers x {self.num_experts} experts, top-{self.top_k}"

    def to_json(self) -> dict[str, Any]:
        """Return the plain dictionary that `from_json` reads."""
        return {**asdict(self), "moe_layers": list(self.moe_layers)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], *, source: str = "geometry") -> "Geometry":
        """Build a geometry from what `to_json` returned.

        Args:
            content: The dictionary.
            source: Where it came from, for error messages.

        Raises:
            UserError: A field is missing, unknown, or no geometry's.
        """
        try:
            return cls(**{**content, "moe_layers": tuple(content["moe_layers"])})
        except (KeyError, TypeError) as error:
            raise UserError(f"{source}: fields of the geometry are missing or unknown ({error})") from error
        except UserError as error:
            raise UserError(f"{source}: {error}") from error


@dataclass(frozen=True)
class Preset:
    """A known model: its geometry, and the tokenizer of its traces.

    Attributes:
        geometry: The shape.
        tokenizer: A name that `moe_beyond.traces.vocabulary` can load, or None.
    """

    geometry: Geometry
    tokenizer: str | None = None


def _preset(
    model: str,
    layers: int,
    experts: int,
    top_k: int,
    width: int,
    expert_width: int,
    other: int,
    *,
    first: int = 0,
    tokenizer: str | None = None,
) -> Preset:
    """Describe a model whose experts are three ``width x expert_width`` matrices and whose last ``layers`` are MoE."""
    geometry = Geometry(
        model=model,
        moe_layers=tuple(range(first, first + layers)),
        num_experts=experts,
        top_k=top_k,
        params_per_expert=3 * width * expert_width,
        other_params_per_layer=other + width * experts,
    )
    return Preset(geometry, tokenizer)


def _attention(width: int, heads: int, kv_heads: int, head: int) -> int:
    """Parameters of grouped-query attention: the query and output maps, the key and value maps."""
    return 2 * width * heads * head + 2 * width * kv_heads * head


# Layers, experts, top-k and widths are those of each model's published config.json. `other` is attention plus shared
# experts (and DeepSeek-V2's low-rank attention maps: 2048x3072 + 2048x576 + 512x4096 + 2048x2048).
PRESETS: dict[str, Preset] = {
    "deepseek-v2-lite": _preset(
        "DeepSeek-V2-Lite",
        26, 64, 6, 2048, 1408,
        2048 * 3072 + 2048 * 576 + 512 * 4096 + 2048 * 2048 + 3 * 2048 * 2816,
        first=1,
        tokenizer="deepseek-v2",
    ),
    "deepseek-moe-16b": _preset(
        "DeepSeek-MoE-16B", 27, 64, 6, 2048, 1408, _attention(2048, 16, 16, 128) + 3 * 2048 * 2816, first=1
    ),
    "qwen1.5-moe-a2.7b": _preset(
        "Qwen1.5-MoE-A2.7B", 24, 60, 4, 2048, 1408, _attention(2048, 16, 16, 128) + 3 * 2048 * 5632
    ),
    "qwen2-57b-a14b": _preset(
        "Qwen2-57B-A14B", 28, 64, 8, 3584, 2560, _attention(3584, 28, 4, 128) + 3 * 3584 * 20480
    ),
    "qwen3-30b-a3b": _preset("Qwen3-30B-A3B", 48, 128, 8, 2048, 768, _attention(2048, 32, 4, 128)),
    "mixtral-8x7b": _preset("Mixtral-8x7B", 32, 8, 2, 4096, 14336, _attention(4096, 32, 8, 128)),
    "olmoe-1b-7b": _preset("OLMoE-1B-7B", 16, 64, 8, 2048, 1024, _attention(2048, 16, 16, 128)),
    "gpt-oss-20b": _preset(
        "gpt-oss-20b", 24, 32, 4, 2880, 2880, _attention(2880, 64, 8, 64)
    ),
    "gpt-oss-120b": _preset(
        "gpt-oss-120b", 36, 128, 4, 2880, 2880, _attention(2880, 64, 8, 64)
    ),
    "phi-3.5-moe": _preset("Phi-3.5-MoE", 32, 16, 2, 4096, 6400, _attention(4096, 32, 8, 128)),
    "phi-mini-moe": _preset("Phi-mini-MoE", 32, 16, 2, 4096, 960, _attention(4096, 32, 8, 128)),
    "granite-3.1-3b-a800m": _preset(
        "Granite-3.1-3B-A800M", 32, 40, 8, 1536, 512, _attention(1536, 24, 8, 64)
    ),
    "granite-3.1-1b-a400m": _preset(
        "Granite-3.1-1B-A400M", 24, 32, 8, 1024, 512, _attention(1024, 16, 8, 64)
    ),
}  # fmt: skip


def load_preset(name: str) -> Preset:
    """Find a preset by name, or read a geometry from a JSON file or a Hugging Face ``config.json``.

    Args:
        name: A key of `PRESETS`, or the path of a JSON file that holds either `Geometry.to_json` fields or a Hugging
            Face model configuration.

    Raises:
        UserError: No preset has that name and no such file can be read as either.
    """
    if name in PRESETS:
        return PRESETS[name]
    if not name.endswith(".json"):
        raise unknown("model preset", name, PRESETS)
    content = read_json(name)
    if not isinstance(content, Mapping):
        raise UserError(f"{name}: is neither a geometry nor a model's config.json")
    if "params_per_expert" in content:
        return Preset(Geometry.from_json(content, source=name))
    return Preset(geometry_from_config(content, source=name))


def _first(config: Mapping[str, Any], *names: str) -> Any:
    """Return the first of ``names`` that the configuration sets; a dotted name looks inside."""
    for name in names:
        value: Any = config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    return None


def geometry_from_config(config: Mapping[str, Any], *, source: str = "config.json") -> Geometry:
    """Read the geometry out of a Hugging Face model configuration.

    The field names differ by architecture; those of the mixtures of experts in transformers 5 are covered.

    Args:
        config: The configuration as a dictionary.
        source: Where it came from, for error messages.

    Raises:
        UserError: The configuration names no routed experts.
    """
    if isinstance(config.get("text_config"), Mapping):
        config = config["text_config"]
    experts = _first(
        config, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "ffn_config.moe_num_experts"
    )
    top_k = _first(
        config, "num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts", "ffn_config.moe_top_k"
    )
    if experts is None or top_k is None:
        raise UserError(f"{source}: names no routed experts; is this a mixture-of-experts model?")
    width = _first(config, "hidden_size", "d_model", "n_embd")
    expert_width = _first(
        config, "moe_intermediate_size", "expert_ffn_hidden_size", "ffn_config.ffn_hidden_size", "intermediate_size"
    )
    depth = _first(config, "num_hidden_layers", "n_layers")
    if None in (width, expert_width, depth):
        raise UserError(f"{source}: hidden size, expert width or number of layers is missing")
    numbers = {"experts": experts, "top-k": top_k, "hidden size": width, "expert width": expert_width, "layers": depth}
    for what, number in numbers.items():
        if not isinstance(number, int):
            raise UserError(f"{source}: the number for {what} is {number!r}, not a whole number")
    shared = _first(config, "shared_expert_intermediate_size", "shared_intermediate_size") or expert_width * (
        _first(config, "n_shared_experts", "moe_num_shared_experts", "num_shared_experts") or 0
    )
    return Geometry(
        model=str(_first(config, "_name_or_path", "name_or_path", "model_type") or source),
        moe_layers=_moe_layers(config, depth),
        num_experts=experts,
        top_k=top_k,
        params_per_expert=3 * width * expert_width,
        other_params_per_layer=_attention_of(config, width) + 3 * width * shared + width * experts,
    )


def _attention_of(config: Mapping[str, Any], width: int) -> int:
    """Parameters of a layer's attention: grouped-query, or with DeepSeek's low-rank maps (arXiv 2405.04434, 2.1)."""
    heads = _first(config, "num_attention_heads", "n_heads") or 1
    rank = _first(config, "kv_lora_rank")
    if rank is None:
        head = _first(config, "head_dim") or width // heads
        return _attention(width, heads, _first(config, "num_key_value_heads") or heads, head)
    plain, rotary, value = (
        _first(config, name) or 0 for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    query_rank = _first(config, "q_lora_rank")
    query = heads * (plain + rotary)
    queries = width * query if query_rank is None else query_rank * (width + query)
    keys_and_values = width * (rank + rotary) + rank * heads * (plain + value)
    return int(queries + keys_and_values + heads * value * width)


def _moe_layers(config: Mapping[str, Any], depth: int) -> tuple[int, ...]:
    """Tell which layers hold experts, from whichever of the known fields the configuration uses."""
    if (types := _first(config, "mlp_layer_types")) is not None:
        return tuple(i for i, kind in enumerate(types) if kind == "sparse")
    if (layers := _first(config, "moe_layers")) is not None:
        return tuple(layers)
    if isinstance(mask := _first(config, "moe_layer_freq"), list):
        return tuple(layer for layer, sparse in enumerate(mask) if sparse)
    if (every := _first(config, "interleave_moe_layer_step")) is not None:  # Llama 4 counts layers from one
        return tuple(range(every - 1, depth, every))
    first = _first(config, "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index") or 0
    step = _first(config, "decoder_sparse_step", "moe_layer_freq", "moe_layer_interval", "expert_layer_period") or 1
    dense = set(_first(config, "mlp_only_layers") or ())
    if _first(config, "decoder_sparse_step"):  # Qwen counts layers from one
        return tuple(i for i in range(depth) if (i + 1) % step == 0 and i not in dense)
    offset = _first(config, "expert_layer_offset") or 0
    return tuple(i for i in range(first, depth) if (i - offset) % step == 0)


_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_BUDGET = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>%|B|[KMG]i?B)?", re.ASCII)


def budget_slots(budget: str | int, geometry: Geometry, bits: float = 16.0) -> int:
    """Count the expert slots that a memory budget pays for.

    Args:
        budget: ``"10%"`` (floor of the share of all experts), ``"166"`` (slots), or ``"2.9GB"`` / ``"2.7GiB"``
            (decimal or binary bytes, divided by the bytes of one expert).
        geometry: The model.
        bits: Bits per expert parameter.

    Returns:
        Slots, between 1 and L * E.

    Raises:
        UserError: The budget cannot be read, pays for no expert, or is larger than all experts.

    Example:
        >>> geometry = PRESETS["deepseek-v2-lite"].geometry
        >>> [budget_slots(b, geometry) for b in ("10%", "166", "2.9GB", "2.7GiB")]
        [166, 166, 167, 167]
    """
    match = _BUDGET.fullmatch(str(budget).strip())
    if match is None:
        raise UserError(f"budget {budget!r} cannot be read; write 10%, 166 (slots), 2.9GB or 2.7GiB")
    number, unit = match["number"], match["unit"]
    if unit is None:
        if "." in number:
            raise UserError(f"budget {budget!r}: a number of slots is whole; write {number}% for a share")
        slots = int(number)
    elif unit == "%" and Fraction(number) > 100:
        raise UserError(f"budget {budget!r} is more than all {geometry.total_experts} experts")
    elif unit == "%":
        slots = math.floor(Fraction(number) * geometry.total_experts / 100)
    else:
        slots = math.floor(Fraction(number) * _BYTES[unit] * 8 / (geometry.params_per_expert * Fraction(bits)))
    if slots < 1:
        raise UserError(f"budget {budget!r} holds no expert of {geometry.model}")
    if slots > geometry.total_experts:
        raise UserError(f"budget {budget!r} is {slots} slots, more than all {geometry.total_experts} experts")
    return slots
