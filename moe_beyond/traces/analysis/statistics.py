"""Statistics of a trace set: popularity, skew, locality and dependence by layer.

The reuse distance of an expert's use is the number of tokens until the same layer uses the expert again in the same
sequence. It is 1 if the next token does. Every use except an expert's first in a sequence ends one such distance, so
reused experts are counted at their second use. The number of uses without a later one equals the number of first uses.
(A stack distance, as of LRU, would count distinct experts in between instead of tokens.)

The Jaccard index of two neighbouring tokens is the number of experts that both use divided by the number that either
uses: s / (2K - s) for s shared experts. The value by chance is its mean over two independent tokens. Each expert is
drawn independently with its selection rate, and draws of more or fewer than K experts are rejected (rejective
sampling: Hajek, Annals of Mathematical Statistics 35, 1964).

The total variation distance of prefill and decode is half the sum over experts of the absolute difference of their
popularities. It is the share of a layer's choices that one phase spends on other experts. Two samples always differ:
the value by chance is the expected distance of two samples of the same sizes that share one popularity and have
independent tokens. The tokens of a text are not independent, so a distance slightly above it is no evidence.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.traces.analysis._json import rounded
from moe_beyond.traces.analysis.counts import DECODE, PREFILL, RoutingCounts, count_routing
from moe_beyond.traces.analysis.dependence import layer_dependence
from moe_beyond.traces.analysis.summary import (
    GateMass,
    LayerPhases,
    LayerSummary,
    NextLayer,
    PhaseCounts,
    PhaseSummary,
    ReuseDistance,
    TraceSummary,
)
from moe_beyond.traces.reader import TraceSet

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

PERCENTILES = (25, 50, 75, 90, 99)
"""Percentiles of the reuse distance."""


def normalized_entropy(counts: Integers) -> Floats:
    """Return each layer's entropy divided by its maximum: 1 if all experts are equally popular.

    Args:
        counts: ``(L, E)`` activations.
    """
    shares = _shares(counts)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    entropy: Floats = -(shares * logs).sum(1)
    return entropy / np.log(counts.shape[1]) if counts.shape[1] > 1 else np.ones(len(counts))


def reuse(overlaps: npt.NDArray[Any], non_initial_uses: npt.NDArray[Any]) -> Floats:
    """Return token-to-token reuse: the share of a token's experts that the token before used in the same layer.

    Args:
        overlaps: ``(L, K + 1)``, number of tokens that share 0..K experts with the token before.
        non_initial_uses: ``(L,)``, number of experts used by tokens that follow another token.

    Returns:
        ``(L,)`` in [0, 1]; NaN if no token follows another.
    """
    return _means(overlaps @ np.arange(overlaps.shape[1]), non_initial_uses)


def jaccard(overlaps: npt.NDArray[Any]) -> Floats:
    """Return the mean Jaccard index of neighbouring tokens' sets of K experts.

    Args:
        overlaps: ``(L, K + 1)``, number of tokens that share 0..K experts with the token before.

    Returns:
        ``(L,)`` in [0, 1]; NaN if no token follows another.
    """
    shared = np.arange(overlaps.shape[1])
    return _means(overlaps @ (shared / (2 * shared[-1] - shared)), overlaps.sum(1))


def jaccard_by_chance(activations: Integers, top_k: int) -> Floats:
    """Return the mean Jaccard index of two independent tokens that draw K experts each by the layer's rates.

    Args:
        activations: ``(L, E)`` activations; each row sums to K times the number of tokens.
        top_k: Experts per entry, K.

    Returns:
        ``(L,)`` in [0, 1].
    """
    rates = top_k * _shares(activations)
    # Probability, over the experts so far, of the numbers drawn by each token and by both.
    chances = np.zeros((len(rates), *[top_k + 1] * 3))
    chances[:, 0, 0, 0] = 1
    for rate in rates.T[..., None, None, None]:
        before, only_one = chances, rate * (1 - rate)
        chances = (1 - rate) ** 2 * before
        chances[:, 1:] += only_one * before[:, :-1]
        chances[:, :, 1:] += only_one * before[:, :, :-1]
        chances[:, 1:, 1:, 1:] += rate**2 * before[:, :-1, :-1, :-1]
    return jaccard(chances[:, -1, -1])


def distance_percentiles(distances: Integers) -> dict[int, int | None]:
    """Return percentiles of the reuse distance, among the uses that are followed by another.

    Args:
        distances: ``(longest sequence,)``, number of uses by the distance in tokens from the last; index 0 counts
            first uses.

    Returns:
        50 -> the median in tokens, and so on for `PERCENTILES`; None if no expert is used again.
    """
    again = distances[1:].cumsum()
    if not len(again) or not again[-1]:
        return dict.fromkeys(PERCENTILES)
    ranks = [-(-int(again[-1]) * percent // 100) for percent in PERCENTILES]
    return {percent: int(np.searchsorted(again, rank)) + 1 for percent, rank in zip(PERCENTILES, ranks, strict=True)}


def used_again_within(distances: Integers) -> dict[int, float]:
    """Return the share of uses followed by another within 1, 2, 4, ... tokens, up to the longest distance.

    Args:
        distances: ``(longest sequence,)``, number of uses by the distance in tokens from the last; index 0 counts
            first uses.
    """
    longest = len(distances) - 1
    again, uses = np.append(0, distances[1:].cumsum()), max(distances.sum(), 1)
    within = [2**power for power in range(max(longest - 1, 0).bit_length() + 1)]
    return {tokens: rounded(again[min(tokens, longest)] / uses) for tokens in within}


def total_variation(prefill: Integers, decode: Integers, top_k: int) -> tuple[Floats, Floats]:
    """Return the total variation distance of two phases' popularities, and the distance expected by chance.

    Args:
        prefill: ``(L, E)`` activations of one phase.
        decode: ``(L, E)`` activations of the other phase.
        top_k: Experts per entry, K.

    Returns:
        Measured and expected distance, each ``(L,)`` in [0, 1].
    """
    prefill_total, decode_total = (np.maximum(phase.sum(1, keepdims=True), 1) for phase in (prefill, decode))
    distance = np.abs(prefill / prefill_total - decode / decode_total).sum(1) / 2
    # A share of choices is a rate divided by K, and the mean of |normal| is sqrt(2 / pi) of its deviation.
    rates = top_k * (prefill + decode) / (prefill_total + decode_total)
    deviations = np.sqrt(np.maximum(rates * (1 - rates), 0) / top_k * (1 / prefill_total + 1 / decode_total))
    return distance, np.sqrt(2 / np.pi) * deviations.sum(1) / 2


def summarize(
    traces: TraceSet,
    split: str | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    workers: int = 1,
) -> TraceSummary:
    """Compute the statistics of a trace set in one pass.

    Args:
        traces: The trace set.
        split: Name of a split (default: all splits).
        progress: Called with the number of counted tokens and their total.
        workers: Number of processes that share the shards (default: 1).

    Raises:
        UserError: The split does not exist or has no tokens, or a shard is damaged.
    """
    manifest = traces.manifest
    counts = count_routing(traces, split, progress=progress, workers=workers)
    bits, dependence = layer_dependence(counts)
    reuse_by_layer = reuse(counts.overlaps, counts.non_initial_uses)
    defined = reuse_by_layer[~np.isnan(reuse_by_layer)]
    entries = counts.tokens * manifest.geometry.num_layers
    prefill, decode, _ = counts.phase_tokens.tolist()
    return TraceSummary(
        sequences=counts.sequences,
        tokens=counts.tokens,
        entries=entries,
        bytes_per_entry=round(sum(shard.bytes for shard in traces.shards(split)) / entries, 4),
        hidden_states=manifest.states_description,
        state_bytes_per_entry=round(sum(shard.states_bytes for shard in traces.shards(split)) / entries, 4)
        if manifest.states
        else None,
        geometry=manifest.geometry,
        model_id=manifest.model_id,
        quantization_bits=manifest.quantization_bits,
        tokenizer=manifest.tokenizer.name,
        author=manifest.author,
        source=manifest.source,
        steering=manifest.steering,
        fingerprint=manifest.fingerprint,
        splits=manifest.counts(),
        copies=traces.copies(),
        split=split,
        token_to_token_reuse=rounded(defined.mean() if len(defined) else np.nan),
        phases=PhaseCounts(counts.divided_sequences, prefill, decode) if decode else None,
        dependence=rounded(dependence),
        by_layer=_layer_summaries(counts, bits, dependence),
    )


def _layer_summaries(counts: RoutingCounts, bits: Floats, dependence: Floats) -> tuple[LayerSummary, ...]:
    shares, entropy = _shares(counts.activations), normalized_entropy(counts.activations)
    reuse_by_layer = reuse(counts.overlaps, counts.non_initial_uses)
    similarity = np.where(counts.all_top_k, jaccard(counts.overlaps), np.nan)
    by_chance = np.where(counts.all_top_k, jaccard_by_chance(counts.activations, counts.geometry.top_k), np.nan)
    next_layer, gate_mass, phases = _next_layer(bits, dependence), _gate_mass(counts), _phases(counts)
    return tuple(
        LayerSummary(
            layer=model_layer,
            busiest_share=rounded(shares[layer].max()),
            unused_experts=int((shares[layer] == 0).sum()),
            normalized_entropy=rounded(entropy[layer]),
            popularity=rounded(shares[layer]),
            token_to_token_reuse=rounded(reuse_by_layer[layer]),
            jaccard=rounded(similarity[layer]),
            jaccard_by_chance=rounded(by_chance[layer]),
            reuse_distance=_reuse_distance(counts.distances[layer]),
            next_layer=next_layer[layer],
            gate_mass=gate_mass[layer],
            phases=phases[layer],
        )
        for layer, model_layer in enumerate(counts.geometry.moe_layers)
    )


def _reuse_distance(distances: Integers) -> ReuseDistance:
    return ReuseDistance(
        percentiles=distance_percentiles(distances),
        never_again=rounded(distances[0] / distances.sum() if distances.any() else np.nan),
        within=used_again_within(distances),
    )


def _next_layer(bits: Floats, dependence: Floats) -> list[NextLayer | None]:
    neighbours = zip(np.diagonal(bits, 1), np.diagonal(dependence, 1), strict=True)
    return [*(NextLayer(rounded(information), rounded(share)) for information, share in neighbours), None]


def _gate_mass(counts: RoutingCounts) -> list[GateMass | None]:
    return [
        GateMass(rounded(ranks / tokens), rounded(mass / tokens)) if tokens else None
        for tokens, ranks, mass in zip(counts.weighed_tokens, counts.gate_ranks, counts.gate_mass, strict=True)
    ]


def _phases(counts: RoutingCounts) -> list[LayerPhases] | list[None]:
    if not counts.divided_sequences:
        return [None] * counts.geometry.num_layers
    prefill, decode = _phase(counts, PREFILL), _phase(counts, DECODE)
    distance, by_chance = total_variation(
        counts.phase_activations[PREFILL], counts.phase_activations[DECODE], counts.geometry.top_k
    )
    by_chance = np.where(counts.all_top_k, by_chance, np.nan)
    return [
        LayerPhases(prefill[layer], decode[layer], rounded(distance[layer]), rounded(by_chance[layer]))
        for layer in range(counts.geometry.num_layers)
    ]


def _phase(counts: RoutingCounts, phase: int) -> list[PhaseSummary]:
    """Describe one phase, layer by layer."""
    activations = counts.phase_activations[phase]
    columns = (
        normalized_entropy(activations),
        reuse(counts.phase_overlaps[phase], counts.phase_non_initial_uses[phase]),
        _shares(activations),
    )
    return [PhaseSummary(*map(rounded, row)) for row in zip(*columns, strict=True)]


def _shares(counts: Integers) -> Floats:
    """Return each expert's share of its layer's activations; zeros for a layer without activations."""
    shares: Floats = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return shares


def _means(sums: npt.NDArray[Any], counts: npt.NDArray[Any]) -> Floats:
    """Divide sums by counts; NaN for a count of 0."""
    means: Floats = np.divide(sums, counts, out=np.full(counts.shape, np.nan), where=counts > 0)
    return means
