"""The results of `summarize` and `contrast`: frozen dataclasses, and the JSON of `moe-beyond inspect`.

Numbers are rounded to six decimals. A value that does not exist is None, such as the reuse of sequences of a single
token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from moe_beyond.geometry import Geometry
from moe_beyond.traces.analysis._json import plain
from moe_beyond.traces.steering import Steering


@dataclass(frozen=True)
class ReuseDistance:
    """Distances between uses of an expert in one layer.

    Attributes:
        percentiles: Percent -> distance in tokens, among the uses that are followed by another use of the expert.
        never_again: Share of uses that are the last use of their expert in their sequence.
        within: Distance in tokens (1, 2, 4, ...) -> share of all uses that are followed by another within it.
    """

    percentiles: Mapping[int, int | None]
    never_again: float | None
    within: Mapping[int, float]


@dataclass(frozen=True)
class NextLayer:
    """Dependence between the experts of one layer and those of the next.

    Attributes:
        mutual_information: Mutual information in bits, corrected for the number of tokens.
        dependence: Mutual information divided by its maximum, in [0, 1].
    """

    mutual_information: float | None
    dependence: float | None


@dataclass(frozen=True)
class GateMass:
    """Shares of the gate weights in one layer.

    Attributes:
        by_rank: ``[K]``, mean share of a token's heaviest, second heaviest, ... expert.
        popularity: ``[E]``, mean share of each expert.
    """

    by_rank: list[float]
    popularity: list[float]


@dataclass(frozen=True)
class PhaseSummary:
    """Routing of one layer in one phase.

    Attributes:
        normalized_entropy: Entropy of the popularity divided by its maximum, in [0, 1].
        token_to_token_reuse: Share of a token's experts that the token before used.
        popularity: ``[E]``, each expert's share of the layer's activations.
    """

    normalized_entropy: float
    token_to_token_reuse: float | None
    popularity: list[float]


@dataclass(frozen=True)
class LayerPhases:
    """Prefill and decode of one layer, over the sequences that have both phases.

    Attributes:
        prefill: Routing of the prompt's tokens.
        decode: Routing of the generated tokens.
        total_variation: Total variation distance of the two popularities, in [0, 1].
        total_variation_by_chance: Expected distance of two samples of one popularity.
    """

    prefill: PhaseSummary
    decode: PhaseSummary
    total_variation: float
    total_variation_by_chance: float | None


@dataclass(frozen=True)
class LayerSummary:
    """Routing of one MoE layer.

    Attributes:
        layer: Index of the layer in the model.
        busiest_share: Popularity of the most popular expert.
        unused_experts: Number of experts without an activation.
        normalized_entropy: Entropy of the popularity divided by its maximum, in [0, 1].
        popularity: ``[E]``, each expert's share of the layer's activations.
        token_to_token_reuse: Share of a token's experts that the token before used.
        jaccard: Mean Jaccard index of neighbouring tokens' expert sets; None if an entry has padding.
        jaccard_by_chance: Expected Jaccard index of independent tokens; None if an entry has padding.
        reuse_distance: Distances between uses of an expert.
        next_layer: Dependence of the next MoE layer; None for the last.
        gate_mass: Shares of the gate weights; None if none were recorded.
        phases: Prefill and decode; None if no sequence has both.
    """

    layer: int
    busiest_share: float
    unused_experts: int
    normalized_entropy: float
    popularity: list[float]
    token_to_token_reuse: float | None
    jaccard: float | None
    jaccard_by_chance: float | None
    reuse_distance: ReuseDistance
    next_layer: NextLayer | None
    gate_mass: GateMass | None
    phases: LayerPhases | None


@dataclass(frozen=True)
class PhaseCounts:
    """Number of sequences that have both phases, and their tokens.

    Attributes:
        sequences: Number of sequences with a prefill and a decode phase.
        prefill_tokens: Their tokens before ``decode_start``.
        decode_tokens: Their tokens from ``decode_start`` on.
    """

    sequences: int
    prefill_tokens: int
    decode_tokens: int


@dataclass(frozen=True)
class TraceSummary:
    """Statistics of a trace set.

    Attributes:
        sequences: Number of sequences.
        tokens: Number of tokens.
        entries: Number of (token, MoE layer) pairs.
        bytes_per_entry: Stored bytes per entry.
        hidden_states: Form of the hidden states; None if none were recorded.
        state_bytes_per_entry: Stored bytes of hidden states per entry; None if none were recorded.
        geometry: Shape of the model.
        model_id: Model that routed.
        quantization_bits: Bits per parameter with which the model ran; None if unknown.
        tokenizer: Name of the tokenizer.
        author: Author of the text, as in `moe_beyond.traces.manifest.Manifest`.
        source: Origin of the prompts.
        steering: Experts that were forced on or off; None if none were.
        fingerprint: Fingerprint of the trace set.
        splits: Split -> its numbers of ``sequences`` and ``tokens``.
        copies: Split -> its numbers of exact copies, as in `moe_beyond.traces.copies.count_copies`.
        split: The split that was measured; None for all.
        token_to_token_reuse: Mean over layers of the share of a token's experts that the token before used.
        phases: Sequences with a prefill and a decode phase; None if there are none.
        dependence: ``[L, L]``, dependence of every layer on every other. Only neighbours have values if the counts of
            all pairs would not fit into memory.
        by_layer: The MoE layers, in the model's order.
    """

    sequences: int
    tokens: int
    entries: int
    bytes_per_entry: float
    hidden_states: str | None
    state_bytes_per_entry: float | None
    geometry: Geometry
    model_id: str
    quantization_bits: float | None
    tokenizer: str
    author: str
    source: str
    steering: Steering | None
    fingerprint: str
    splits: Mapping[str, Mapping[str, int]]
    copies: Mapping[str, Mapping[str, int]]
    split: str | None
    token_to_token_reuse: float | None
    phases: PhaseCounts | None
    dependence: list[list[float | None]]
    by_layer: tuple[LayerSummary, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the values as a plain dictionary."""
        return _to_json(self)


@dataclass(frozen=True)
class Significance:
    """Numbers of experts that differ by more than chance explains.

    Attributes:
        threshold: Absolute ``z`` that some expert exceeds by chance in one case of twenty (Bonferroni).
        z: Number of experts whose ``z`` exceeds it.
        z_clustered: Number of experts whose ``z_clustered`` exceeds it.
    """

    threshold: float
    z: int
    z_clustered: int


@dataclass(frozen=True)
class LayerContrast:
    """Activation rates of one MoE layer in two trace sets.

    Attributes:
        layer: Index of the layer in the model.
        rate: ``[E]``, share of tokens that activate each expert.
        other_rate: ``[E]``, the same share in the other set.
        difference: ``[E]``, ``rate - other_rate``.
        standard_error: ``[E]``, standard error of the difference if tokens are independent.
        z: ``[E]``, difference divided by its standard error; None if that is 0.
        z_clustered: ``[E]``, difference divided by a standard error that assumes only independent sequences; None if
            that is 0 or unknown.
    """

    layer: int
    rate: list[float]
    other_rate: list[float]
    difference: list[float]
    standard_error: list[float]
    z: list[float | None]
    z_clustered: list[float | None]


@dataclass(frozen=True)
class ExpertContrast:
    """Activation rates of one expert in two trace sets; the fields are those of `LayerContrast`."""

    layer: int
    expert: int
    rate: float
    other_rate: float
    difference: float
    standard_error: float
    z: float | None
    z_clustered: float | None


@dataclass(frozen=True)
class Contrast:
    """Differences of selection rates between two trace sets of one model.

    Attributes:
        other: The other set: its folder as ``traces``, and `moe_beyond.traces.reader.TraceSet.describe`.
        significant: Numbers of experts that differ significantly.
        by_layer: The MoE layers, in the model's order.
    """

    other: Mapping[str, Any]
    significant: Significance
    by_layer: tuple[LayerContrast, ...]

    def by_expert(self) -> list[ExpertContrast]:
        """Return one row per expert, layer by layer."""
        names = [field.name for field in fields(LayerContrast)[1:]]
        return [
            ExpertContrast(row.layer, expert, *values)
            for row in self.by_layer
            for expert, values in enumerate(zip(*(getattr(row, name) for name in names), strict=True))
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the values as a plain dictionary."""
        return _to_json(self)


def _to_json(result: TraceSummary | Contrast) -> dict[str, Any]:
    return {field.name: plain(getattr(result, field.name)) for field in fields(result)}
