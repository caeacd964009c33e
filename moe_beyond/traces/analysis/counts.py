"""Counts for the statistics of a trace set, collected in one pass, shard by shard.

Memory grows with the model and with the longest sequence, not with the number of tokens.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from moe_beyond.compiling import compiled
from moe_beyond.geometry import Geometry
from moe_beyond.traces.manifest import ShardInfo
from moe_beyond.traces.reader import Facts, TraceSet
from moe_beyond.traces.schema import expert_ids
from moe_beyond.traces.shard import Shard
from moe_beyond.workers import map_in_order

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

PREFILL, DECODE, SINGLE_PHASE = range(3)
"""Phase of a token: before or after the ``decode_start`` of its sequence, or in a sequence with only one phase."""
MAX_PAIR_COUNTS = 2**27
"""Largest number of pair counts (8 bytes each) in memory; beyond it, only neighbouring layers are paired."""


@dataclass
class RoutingCounts:
    """Counts of the routing in a trace set.

    Attributes:
        geometry: Shape of the model.
        sequences: Number of sequences.
        divided_sequences: Number of sequences with a prefill and a decode phase.
        phase_tokens: ``(3,)``, tokens by phase.
        phase_activations: ``(3, L, E)``, activations of each expert, by phase.
        phase_overlaps: ``(3, L, K + 1)``, number of tokens that share 0..K experts with the token before, by the phase
            of the later token.
        phase_non_initial_uses: ``(3, L)``, number of experts used by tokens that follow another token, by their phase.
        distances: ``(L, longest sequence)``, number of uses by the distance in tokens from the expert's last use in the
            sequence; index 0 counts first uses.
        pairs: (l, m), l < m -> ``(E, E)``, number of tokens that use an expert in layer l and another in layer m.
        weighed_tokens: ``(L,)``, number of tokens with gate weights that are not all zero.
        gate_ranks: ``(L, K)``, sum over tokens of the largest, second largest, ... share of the token's gate weights.
        gate_mass: ``(L, E)``, sum over tokens of each expert's share of the token's gate weights.
    """

    geometry: Geometry
    sequences: int
    divided_sequences: int
    phase_tokens: Integers
    phase_activations: Integers
    phase_overlaps: Integers
    phase_non_initial_uses: Integers
    distances: Integers
    pairs: dict[tuple[int, int], Integers]
    weighed_tokens: Integers
    gate_ranks: Floats
    gate_mass: Floats

    @classmethod
    def zeros(cls, geometry: Geometry, *, layer_pairs: bool) -> "RoutingCounts":
        """Return counts that are all zero.

        Args:
            geometry: Shape of the model.
            layer_pairs: Whether to count pairs of layers.
        """
        layers, experts, top_k = geometry.shape()
        pairs = list(itertools.combinations(range(layers), 2)) if layer_pairs else []
        if len(pairs) * experts**2 > MAX_PAIR_COUNTS:
            pairs = list(itertools.pairwise(range(layers)))
        return cls(
            geometry=geometry,
            sequences=0,
            divided_sequences=0,
            phase_tokens=np.zeros(3, np.int64),
            phase_activations=np.zeros((3, layers, experts), np.int64),
            phase_overlaps=np.zeros((3, layers, top_k + 1), np.int64),
            phase_non_initial_uses=np.zeros((3, layers), np.int64),
            distances=np.zeros((layers, 1), np.int64),
            pairs={pair: np.zeros((experts, experts), np.int64) for pair in pairs},
            weighed_tokens=np.zeros(layers, np.int64),
            gate_ranks=np.zeros((layers, top_k)),
            gate_mass=np.zeros((layers, experts)),
        )

    def extend(self, later: "RoutingCounts") -> None:
        """Add the counts of later sequences of the same model."""
        longest = max(self.distances.shape[1], later.distances.shape[1])
        for counts in (self, later):
            counts.distances = np.pad(counts.distances, ((0, 0), (0, longest - counts.distances.shape[1])))
        for each in fields(self):
            if each.name == "pairs":
                for pair, counts_of_pair in later.pairs.items():
                    self.pairs[pair] += counts_of_pair
            elif each.name != "geometry":
                setattr(self, each.name, getattr(self, each.name) + getattr(later, each.name))

    @property
    def activations(self) -> Integers:
        """``(L, E)``, activations of each expert."""
        total: Integers = self.phase_activations.sum(0)
        return total

    @property
    def overlaps(self) -> Integers:
        """``(L, K + 1)``, number of tokens that share 0..K experts with the token before."""
        total: Integers = self.phase_overlaps.sum(0)
        return total

    @property
    def non_initial_uses(self) -> Integers:
        """``(L,)``, number of experts used by tokens that follow another token."""
        total: Integers = self.phase_non_initial_uses.sum(0)
        return total

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self.phase_tokens.sum())

    @property
    def all_top_k(self) -> npt.NDArray[np.bool_]:
        """``(L,)``, whether every token uses K experts there; False if an entry has padding."""
        result: npt.NDArray[np.bool_] = self.activations.sum(1) == self.tokens * self.geometry.top_k
        return result


def count_routing(
    traces: TraceSet,
    split: str | None = None,
    *,
    layer_pairs: bool = True,
    progress: Callable[[int, int], None] | None = None,
    workers: int = 1,
) -> RoutingCounts:
    """Count the routing of a trace set.

    Args:
        traces: The trace set.
        split: Name of a split (default: all splits).
        layer_pairs: Whether to count pairs of experts in two layers, which takes most of the time.
        progress: Called with the number of counted tokens and their total.
        workers: Number of processes that share the shards (default: 1).

    Raises:
        UserError: The split does not exist, or a shard is damaged.
    """
    counts = RoutingCounts.zeros(traces.geometry, layer_pairs=layer_pairs)
    shards = traces.shards(split)
    parts = map_in_order(_count, (traces, layer_pairs), shards, min(workers, len(shards)))
    for info, (part, facts) in zip(shards, parts, strict=True):
        traces.compare(info, facts)
        counts.extend(part)
        if progress is not None:
            progress(counts.tokens, sum(shard.tokens for shard in shards))
    return counts


def _count(inputs: tuple[TraceSet, bool], info: ShardInfo) -> tuple[RoutingCounts, Facts]:
    """Count one shard, and return its facts."""
    traces, layer_pairs = inputs
    counts = RoutingCounts.zeros(traces.geometry, layer_pairs=layer_pairs)
    _add(counts, traces.read(info))
    [(_, facts)] = traces.facts((info,))
    return counts, facts


def _add(counts: RoutingCounts, shard: Shard) -> None:
    lengths = np.diff(shard.offsets)
    counts.sequences += len(shard)
    divided = (shard.decode_starts > 0) & (shard.decode_starts < lengths)
    counts.divided_sequences += int(divided.sum())
    prefill, decode = int(shard.decode_starts[divided].sum()), int((lengths - shard.decode_starts)[divided].sum())
    counts.phase_tokens += np.array([prefill, decode, int(lengths.sum()) - prefill - decode])
    longer = max(int(lengths.max(initial=1)) - counts.distances.shape[1], 0)
    counts.distances = np.pad(counts.distances, ((0, 0), (0, longer)))
    by_layer = shard.experts.transpose(1, 0, 2).copy()  # contiguous layers are read fastest
    for layer, experts in enumerate(by_layer):
        _follow(
            experts,
            shard.offsets,
            shard.decode_starts,
            counts.phase_activations[:, layer],
            counts.phase_overlaps[:, layer],
            counts.phase_non_initial_uses[:, layer],
            counts.distances[layer],
        )
    for (first, second), pair_counts in counts.pairs.items():
        _pair(by_layer[first], by_layer[second], pair_counts)
    if shard.gate_weights is not None:
        _weigh(counts, by_layer, shard.gate_weights)


@compiled
def _follow(
    experts: npt.NDArray[np.integer],
    offsets: Integers,
    decode_starts: npt.NDArray[np.int32],
    activations: Integers,
    overlaps: Integers,
    non_initial_uses: Integers,
    distances: Integers,
) -> None:
    """Follow the experts of a layer through each sequence, and add to the counts in place.

    Args:
        experts: ``(tokens, K)``, expert ids of the layer.
        offsets: ``(sequences + 1,)``, first token of each sequence, and the end of the last.
        decode_starts: ``(sequences,)``, number of tokens before the decode phase of each sequence.
        activations: ``(3, E)``, activations by phase.
        overlaps: ``(3, K + 1)``, number of tokens by phase and by experts shared with the token before.
        non_initial_uses: ``(3,)``, experts used by tokens that follow another, by phase.
        distances: ``(longest,)``, uses by distance from the expert's last use.
    """
    last = np.empty(activations.shape[1], np.int64)
    for row in range(len(offsets) - 1):
        begin, end = offsets[row], offsets[row + 1]
        decode = begin + decode_starts[row]
        last[:] = -1
        for token in range(begin, end):
            phase = SINGLE_PHASE
            if begin < decode < end:
                phase = PREFILL if token < decode else DECODE
            used = shared = 0
            for rank in range(experts.shape[1]):
                expert = experts[token, rank]
                if not 0 <= expert < len(last):
                    continue  # padding
                before = last[expert]
                distance = 0 if before < 0 else token - before
                distances[distance] += 1
                shared += distance == 1
                activations[phase, expert] += 1
                last[expert] = token
                used += 1
            if token > begin:
                overlaps[phase, shared] += 1
                non_initial_uses[phase] += used


@compiled
def _pair(first: npt.NDArray[np.integer], second: npt.NDArray[np.integer], counts: Integers) -> None:
    """Count pairs of experts that tokens use in two layers.

    Args:
        first: ``(tokens, K)``, expert ids of one layer.
        second: ``(tokens, K)``, expert ids of the other layer.
        counts: ``(E, E)``, number of tokens per pair; added to in place.
    """
    experts = len(counts)
    for token in range(len(first)):
        for expert in first[token]:
            for other in second[token]:
                if 0 <= expert < experts and 0 <= other < experts:
                    counts[expert, other] += 1


def _weigh(counts: RoutingCounts, by_layer: npt.NDArray[np.integer], gates: npt.NDArray[np.float16]) -> None:
    """Add each token's gate weights as shares of their sum, because routers scale that sum differently."""
    for layer, layer_experts in enumerate(by_layer):
        weights = gates[:, layer].astype(np.float64)
        mass = weights.sum(1)
        positive = mass > 0  # half precision may have rounded all weights of a token to zero
        shares = weights[positive] / mass[positive, None]
        counts.weighed_tokens[layer] += len(shares)
        counts.gate_ranks[layer] += np.sort(shares, axis=1)[:, ::-1].sum(0)
        experts = counts.gate_mass.shape[1]
        ids = expert_ids(layer_experts[positive], experts)
        counts.gate_mass[layer] += np.bincount(ids.ravel(), shares.ravel(), minlength=experts + 1)[:experts]
