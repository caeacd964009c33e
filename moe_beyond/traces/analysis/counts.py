"""One pass over a trace set that counts what its statistics need, shard by shard.

What is kept grows with the model and with the longest sequence, not with the number of tokens.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_beyond.compiling import compiled
from moe_beyond.geometry import Geometry
from moe_beyond.traces.reader import Shard, TraceSet
from moe_beyond.traces.schema import expert_ids

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

PREFILL, DECODE, UNDIVIDED = range(3)
"""Phases of a token: before ``decode_start`` and from there on, where that lies inside its sequence; or neither."""
MOST_PAIR_COUNTS = 2**27
"""How many counts, of 8 bytes, of pairs of layers may take memory; where there are more, only neighbours are paired."""


@dataclass
class RoutingCounts:
    """What was counted.

    Attributes:
        geometry: The model's shape.
        sequences: How many.
        divided_sequences: How many of them have both a prefill and a decode phase.
        phase_tokens: ``(3,)``, tokens by phase.
        phase_activations: ``(3, L, E)``, how often each expert was chosen, by phase.
        phase_overlaps: ``(3, L, K + 1)``, how many tokens share 0..K experts with the token before, by the later
            one's phase.
        phase_followers: ``(3, L)``, how many experts tokens use that come after another, by their phase.
        distances: ``(L, longest sequence)``, how many uses of experts come so many tokens after the same expert's last
            use in the sequence; at 0, first uses.
        pairs: (l, m), l < m -> ``(E, E)``, how many tokens use an expert in layer l and another in layer m.
        weighed_tokens: ``(L,)``, how many tokens have gate weights that are not all zero.
        gate_ranks: ``(L, K)``, the sum of their largest, second largest, ... share of a token's gate mass.
        gate_mass: ``(L, E)``, the sum of each expert's shares.
    """

    geometry: Geometry
    sequences: int
    divided_sequences: int
    phase_tokens: Integers
    phase_activations: Integers
    phase_overlaps: Integers
    phase_followers: Integers
    distances: Integers
    pairs: dict[tuple[int, int], Integers]
    weighed_tokens: Integers
    gate_ranks: Floats
    gate_mass: Floats

    @classmethod
    def none(cls, geometry: Geometry, *, layer_pairs: bool) -> "RoutingCounts":
        """Begin with nothing.

        Args:
            geometry: The model's shape.
            layer_pairs: Whether to count pairs of layers.
        """
        layers, experts, top_k = geometry.shape()
        pairs = list(itertools.combinations(range(layers), 2)) if layer_pairs else []
        if len(pairs) * experts**2 > MOST_PAIR_COUNTS:
            pairs = list(itertools.pairwise(range(layers)))
        return cls(
            geometry=geometry,
            sequences=0,
            divided_sequences=0,
            phase_tokens=np.zeros(3, np.int64),
            phase_activations=np.zeros((3, layers, experts), np.int64),
            phase_overlaps=np.zeros((3, layers, top_k + 1), np.int64),
            phase_followers=np.zeros((3, layers), np.int64),
            distances=np.zeros((layers, 1), np.int64),
            pairs={pair: np.zeros((experts, experts), np.int64) for pair in pairs},
            weighed_tokens=np.zeros(layers, np.int64),
            gate_ranks=np.zeros((layers, top_k)),
            gate_mass=np.zeros((layers, experts)),
        )

    @property
    def activations(self) -> Integers:
        """``(L, E)``, how often each expert was chosen."""
        found: Integers = self.phase_activations.sum(0)
        return found

    @property
    def overlaps(self) -> Integers:
        """``(L, K + 1)``, how many tokens share 0..K experts with the token before."""
        found: Integers = self.phase_overlaps.sum(0)
        return found

    @property
    def followers(self) -> Integers:
        """``(L,)``, how many experts tokens use that come after another."""
        found: Integers = self.phase_followers.sum(0)
        return found

    @property
    def tokens(self) -> int:
        """All tokens."""
        return int(self.phase_tokens.sum())

    @property
    def full(self) -> npt.NDArray[np.bool_]:
        """``(L,)``, whether every token uses K experts there; not where slots of a layer hold none."""
        found: npt.NDArray[np.bool_] = self.activations.sum(1) == self.tokens * self.geometry.top_k
        return found


def count_routing(
    traces: TraceSet,
    split: str | None = None,
    *,
    layer_pairs: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> RoutingCounts:
    """Count a split, or all of a set.

    Args:
        traces: The trace set.
        split: One split, or all.
        layer_pairs: Whether to count which experts of two layers go together, which takes most of the time.
        progress: Called with how many tokens are done, and of how many.

    Raises:
        UserError: There is no such split, or a shard is damaged.
    """
    found = RoutingCounts.none(traces.geometry, layer_pairs=layer_pairs)
    shards = traces.shards(split)
    for info in shards:
        _add(found, traces.read(info))
        if progress is not None:
            progress(found.tokens, sum(shard.tokens for shard in shards))
    return found


def _add(found: RoutingCounts, shard: Shard) -> None:
    lengths = np.diff(shard.offsets)
    found.sequences += len(shard)
    divided = (shard.decode_starts > 0) & (shard.decode_starts < lengths)
    found.divided_sequences += int(divided.sum())
    read, written = int(shard.decode_starts[divided].sum()), int((lengths - shard.decode_starts)[divided].sum())
    found.phase_tokens += np.array([read, written, int(lengths.sum()) - read - written])
    longer = max(int(lengths.max(initial=1)) - found.distances.shape[1], 0)
    found.distances = np.pad(found.distances, ((0, 0), (0, longer)))
    by_layer = shard.experts.transpose(1, 0, 2).copy()  # a layer's choices side by side are read fastest
    for layer, chosen in enumerate(by_layer):
        _follow(
            chosen,
            shard.offsets,
            shard.decode_starts,
            found.phase_activations[:, layer],
            found.phase_overlaps[:, layer],
            found.phase_followers[:, layer],
            found.distances[layer],
        )
    for (first, second), counts in found.pairs.items():
        _pair(by_layer[first], by_layer[second], counts)
    if shard.gate_weights is not None:
        _weigh(found, by_layer, shard.gate_weights)


@compiled
def _follow(
    chosen: npt.NDArray[np.integer],
    offsets: Integers,
    decode_starts: npt.NDArray[np.int32],
    activations: Integers,
    overlaps: Integers,
    followers: Integers,
    distances: Integers,
) -> None:
    """Follow a layer's experts through each sequence.

    Args:
        chosen: ``(tokens, K)``.
        offsets: ``(sequences + 1,)``, where sequences begin and end.
        decode_starts: ``(sequences,)``.
        activations: ``(3, E)``, added to.
        overlaps: ``(3, K + 1)``, added to.
        followers: ``(3,)``, added to.
        distances: ``(longest,)``, added to.
    """
    last = np.empty(activations.shape[1], np.int64)
    for row in range(len(offsets) - 1):
        begin, end = offsets[row], offsets[row + 1]
        decode = begin + decode_starts[row]
        last[:] = -1
        for token in range(begin, end):
            phase = UNDIVIDED
            if begin < decode < end:
                phase = PREFILL if token < decode else DECODE
            used = shared = 0
            for place in range(chosen.shape[1]):
                expert = chosen[token, place]
                if not 0 <= expert < len(last):
                    continue  # the slot holds none
                before = last[expert]
                distance = 0 if before < 0 else token - before
                distances[distance] += 1
                shared += distance == 1
                activations[phase, expert] += 1
                last[expert] = token
                used += 1
            if token > begin:
                overlaps[phase, shared] += 1
                followers[phase] += used


@compiled
def _pair(first: npt.NDArray[np.integer], second: npt.NDArray[np.integer], counts: Integers) -> None:
    """Count which experts of two layers, each ``(tokens, K)``, tokens use together; add to ``(E, E)``."""
    experts = len(counts)
    for token in range(len(first)):
        for one in first[token]:
            for other in second[token]:
                if 0 <= one < experts and 0 <= other < experts:
                    counts[one, other] += 1


def _weigh(found: RoutingCounts, by_layer: npt.NDArray[np.integer], gates: npt.NDArray[np.float16]) -> None:
    """Add each token's gate weights, as shares of their sum: routers differ in what that is."""
    for layer, chosen in enumerate(by_layer):
        weights = gates[:, layer].astype(np.float64)
        mass = weights.sum(1)
        weighed = mass > 0  # half precision may have rounded all of them to zero
        shares = weights[weighed] / mass[weighed, None]
        found.weighed_tokens[layer] += len(shares)
        found.gate_ranks[layer] += np.sort(shares, axis=1)[:, ::-1].sum(0)
        experts = found.gate_mass.shape[1]
        ids = expert_ids(chosen[weighed], experts)
        found.gate_mass[layer] += np.bincount(ids.ravel(), shares.ravel(), minlength=experts + 1)[:experts]
