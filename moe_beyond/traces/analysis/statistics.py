"""What a trace set looks like: popularity, skew, locality and dependence by layer.

The reuse distance of an expert's use is the number of tokens until the same layer uses it again in the same sequence: 1
where the next token does. Every use but a sequence's first of an expert ends one such distance, so those that come
again are counted by the second use, and as many uses are never followed by another as there are first uses. (A stack
distance, as of LRU, would count distinct experts in between instead of tokens.)

The Jaccard index of two neighbouring tokens is the number of experts that both use over the number that any uses: s of
2K - s, where s are shared. Beside it stands what chance gives: its mean over two tokens which each draw K experts by
the layer's activation rates alone, every expert by itself with its rate, draws of more or fewer than K being rejected
(rejective sampling: Hajek, Annals of Mathematical Statistics 35, 1964).

The total variation distance of prefill and decode is half the sum over experts of the absolute difference of their
popularities: the share of a layer's choices that one phase spends on other experts. Two samples always differ; what
chance gives is the expected distance of two samples, as many tokens as there are, that share one popularity and whose
tokens are independent. A text's are not, so a distance a little above it says nothing.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.traces.analysis.counts import DECODE, PREFILL, RoutingCounts, count_routing
from moe_beyond.traces.analysis.dependence import layer_dependence
from moe_beyond.traces.analysis.rounding import rounded
from moe_beyond.traces.reader import TraceSet

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

PERCENTILES = (25, 50, 75, 90, 99)
"""Of reuse distances."""


def normalized_entropy(counts: Integers) -> Floats:
    """Return each layer's entropy over the largest possible: 1 where all experts are equally popular.

    Args:
        counts: ``(L, E)`` activations.
    """
    shares = _shares(counts)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    entropy: Floats = -(shares * logs).sum(1)
    return entropy / np.log(counts.shape[1]) if counts.shape[1] > 1 else np.ones(len(counts))


def reuse(overlaps: npt.NDArray[Any], followers: npt.NDArray[Any]) -> Floats:
    """Return token-to-token reuse: the share of a token's experts that the token before it used in the same layer.

    Args:
        overlaps: ``(L, K + 1)``, how many tokens share 0..K experts with the one before.
        followers: ``(L,)``, how many experts those tokens use.

    Returns:
        ``(L,)`` in [0, 1]; NaN where no token comes after another.
    """
    return _over(overlaps @ np.arange(overlaps.shape[1]), followers)


def jaccard(overlaps: npt.NDArray[Any]) -> Floats:
    """Return the mean Jaccard index of neighbouring tokens' sets of K experts.

    Args:
        overlaps: ``(L, K + 1)``, how many tokens share 0..K experts with the one before.

    Returns:
        ``(L,)`` in [0, 1]; NaN where no token comes after another.
    """
    shared = np.arange(overlaps.shape[1])
    return _over(overlaps @ (shared / (2 * shared[-1] - shared)), overlaps.sum(1))


def jaccard_by_chance(activations: Integers, top_k: int) -> Floats:
    """Return the mean Jaccard index of two tokens that draw K experts each by the layer's activation rates alone.

    Args:
        activations: ``(L, E)``, each row's sum K times the tokens.
        top_k: K.

    Returns:
        ``(L,)`` in [0, 1].
    """
    rates = top_k * _shares(activations)
    # How probable it is that of the experts so far the tokens draw so many, so many, and so many in common.
    chances = np.zeros((len(rates), *[top_k + 1] * 3))
    chances[:, 0, 0, 0] = 1
    for rate in rates.T[..., None, None, None]:
        before, one = chances, rate * (1 - rate)
        chances = (1 - rate) ** 2 * before
        chances[:, 1:] += one * before[:, :-1]
        chances[:, :, 1:] += one * before[:, :, :-1]
        chances[:, 1:, 1:, 1:] += rate**2 * before[:, :-1, :-1, :-1]
    return jaccard(chances[:, -1, -1])


def distance_percentiles(distances: Integers) -> dict[str, int | None]:
    """Return the reuse distances within which so many percent of those uses come again that come again at all.

    Args:
        distances: ``(longest sequence,)``, how many uses come so many tokens after the last one; at 0, first uses.

    Returns:
        ``"50"`` -> the median, in tokens, and so on for `PERCENTILES`; None where no expert is used again.
    """
    again = distances[1:].cumsum()
    if not len(again) or not again[-1]:
        return {str(percent): None for percent in PERCENTILES}
    ranks = [-(-int(again[-1]) * percent // 100) for percent in PERCENTILES]
    return {
        str(percent): int(np.searchsorted(again, rank)) + 1 for percent, rank in zip(PERCENTILES, ranks, strict=True)
    }


def used_again_within(distances: Integers) -> dict[str, float]:
    """Return the share of all uses whose expert is used again within 1, 2, 4, ... tokens, up to the longest distance.

    Args:
        distances: ``(longest sequence,)``, how many uses come so many tokens after the last one; at 0, first uses.
    """
    longest = len(distances) - 1
    again, uses = np.append(0, distances[1:].cumsum()), max(distances.sum(), 1)
    within = [2**power for power in range(max(longest - 1, 0).bit_length() + 1)]
    return {str(tokens): rounded(again[min(tokens, longest)] / uses) for tokens in within}


def total_variation(prefill: Integers, decode: Integers, top_k: int) -> tuple[Floats, Floats]:
    """Return how far the popularities of two phases are apart, and how far chance alone would have them.

    Args:
        prefill: ``(L, E)`` activations of one phase.
        decode: ``(L, E)`` activations of the other.
        top_k: K.

    Returns:
        Two times ``(L,)`` in [0, 1].
    """
    totals = (np.maximum(phase.sum(1, keepdims=True), 1) for phase in (prefill, decode))
    read, written = totals
    apart = np.abs(prefill / read - decode / written).sum(1) / 2
    # A share of choices is a rate over K, and the mean of |normal| is sqrt(2 / pi) of its deviation.
    rates = top_k * (prefill + decode) / (read + written)
    deviations = np.sqrt(np.maximum(rates * (1 - rates), 0) / top_k * (1 / read + 1 / written))
    return apart, np.sqrt(2 / np.pi) * deviations.sum(1) / 2


def summarize(
    traces: TraceSet, split: str | None = None, *, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Describe a trace set as JSON-able values, in one pass over it.

    Args:
        traces: The trace set.
        split: One split, or all.
        progress: Called with how many tokens are done, and of how many.

    Returns:
        Counts (``sequences, tokens, entries, bytes_per_entry``), the ``geometry``, where the text came from, the
        splits and their exact ``copies``, the ``split`` that was measured, ``token_to_token_reuse`` over all layers;
        ``phases``, how many sequences have both a prefill and a decode phase and their tokens, None where none has;
        ``dependence``, ``(L, L)``, of every layer on every other, or on its neighbours alone where the model is so
        large that counts of all pairs would not fit; and ``by_layer``, for each MoE layer its index in the model and

        - ``popularity`` (each expert's share of the layer's activations), ``busiest_share``, ``unused_experts``,
          ``normalized_entropy``;
        - ``token_to_token_reuse``, ``jaccard`` and ``jaccard_by_chance``;
        - ``reuse_distance``: ``percentiles``, ``never_again`` (share of uses) and ``within`` (share of uses that come
          again within so many tokens);
        - ``next_layer``: ``mutual_information`` in bits and ``dependence`` (see
          `moe_beyond.traces.analysis.dependence`), None for the last;
        - ``gate_mass``, None where no gate weights are: ``by_rank`` (the mean share of a token's gate weights that its
          heaviest, second heaviest, ... expert has) and ``popularity`` (each expert's mean share);
        - ``phases``, None where no sequence has both: of those sequences, for ``prefill`` and ``decode`` each
          ``popularity``, ``normalized_entropy`` and ``token_to_token_reuse`` (by the phase of the later token), and
          ``total_variation`` with ``total_variation_by_chance`` between them.

        None stands for a figure that does not exist, such as the reuse of sequences of a single token, or, of a layer
        where slots hold no expert, what assumes K experts a token: Jaccard indices, dependence, and what chance gives.

    Raises:
        UserError: There is no such split, it has no tokens, or a shard is damaged.
    """
    manifest = traces.manifest
    counts = count_routing(traces, split, progress=progress)
    bits, dependence = layer_dependence(counts)
    reused = reuse(counts.overlaps, counts.followers)
    known = reused[~np.isnan(reused)]
    entries = counts.tokens * manifest.geometry.num_layers
    prefill, decode, _ = counts.phase_tokens.tolist()
    by_layer = zip(
        manifest.geometry.moe_layers,
        _popularity(counts),
        _locality(counts),
        _next_layer(bits, dependence),
        _gate_mass(counts),
        _phases(counts),
        strict=True,
    )
    return {
        "sequences": counts.sequences,
        "tokens": counts.tokens,
        "entries": entries,
        "bytes_per_entry": round(sum(shard.bytes for shard in traces.shards(split)) / entries, 4),
        "geometry": manifest.geometry.to_json(),
        "model_id": manifest.model_id,
        "quantization_bits": manifest.quantization_bits,
        "tokenizer": manifest.tokenizer.name,
        "author": manifest.author,
        "source": manifest.source,
        "steering": manifest.steering and manifest.steering.to_json(),
        "fingerprint": manifest.fingerprint,
        "splits": manifest.to_json()["splits"],
        "copies": traces.copies(),
        "split": split,
        "token_to_token_reuse": rounded(known.mean() if len(known) else np.nan),
        "phases": {"sequences": counts.divided_sequences, "prefill_tokens": prefill, "decode_tokens": decode}
        if decode
        else None,
        "dependence": rounded(dependence),
        "by_layer": [
            {"layer": layer, **popular, **local, "next_layer": following, "gate_mass": gates, "phases": phases}
            for layer, popular, local, following, gates, phases in by_layer
        ],
    }


def _popularity(counts: RoutingCounts) -> list[dict[str, Any]]:
    shares = _shares(counts.activations)
    entropy = normalized_entropy(counts.activations)
    return [
        {
            "busiest_share": rounded(shares[layer].max()),
            "unused_experts": int((shares[layer] == 0).sum()),
            "normalized_entropy": rounded(entropy[layer]),
            "popularity": rounded(shares[layer]),
        }
        for layer in range(len(shares))
    ]


def _locality(counts: RoutingCounts) -> list[dict[str, Any]]:
    reused = reuse(counts.overlaps, counts.followers)
    alike = np.where(counts.full, jaccard(counts.overlaps), np.nan)
    by_chance = np.where(counts.full, jaccard_by_chance(counts.activations, counts.geometry.top_k), np.nan)
    return [
        {
            "token_to_token_reuse": rounded(reused[layer]),
            "jaccard": rounded(alike[layer]),
            "jaccard_by_chance": rounded(by_chance[layer]),
            "reuse_distance": {
                "percentiles": distance_percentiles(distances),
                "never_again": rounded(distances[0] / distances.sum() if distances.any() else np.nan),
                "within": used_again_within(distances),
            },
        }
        for layer, distances in enumerate(counts.distances)
    ]


def _next_layer(bits: Floats, dependence: Floats) -> list[dict[str, Any] | None]:
    neighbours = zip(np.diagonal(bits, 1), np.diagonal(dependence, 1), strict=True)
    return [*({"mutual_information": rounded(told), "dependence": rounded(share)} for told, share in neighbours), None]


def _gate_mass(counts: RoutingCounts) -> list[dict[str, Any] | None]:
    return [
        {"by_rank": rounded(ranks / tokens), "popularity": rounded(mass / tokens)} if tokens else None
        for tokens, ranks, mass in zip(counts.weighed_tokens, counts.gate_ranks, counts.gate_mass, strict=True)
    ]


def _phases(counts: RoutingCounts) -> list[dict[str, Any] | None]:
    if not counts.divided_sequences:
        return [None] * counts.geometry.num_layers
    names = {"prefill": PREFILL, "decode": DECODE}
    activations = {name: counts.phase_activations[phase] for name, phase in names.items()}
    entropy = {name: normalized_entropy(chosen) for name, chosen in activations.items()}
    reused = {name: reuse(counts.phase_overlaps[phase], counts.phase_followers[phase]) for name, phase in names.items()}
    apart, by_chance = total_variation(activations["prefill"], activations["decode"], counts.geometry.top_k)
    by_chance = np.where(counts.full, by_chance, np.nan)
    return [
        {
            **{
                name: {
                    "normalized_entropy": rounded(entropy[name][layer]),
                    "token_to_token_reuse": rounded(reused[name][layer]),
                    "popularity": rounded(_shares(activations[name])[layer]),
                }
                for name in names
            },
            "total_variation": rounded(apart[layer]),
            "total_variation_by_chance": rounded(by_chance[layer]),
        }
        for layer in range(counts.geometry.num_layers)
    ]


def _shares(counts: Integers) -> Floats:
    """Return each expert's share of its layer's activations; zeros where there are none."""
    shares: Floats = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return shares


def _over(sums: npt.NDArray[Any], counts: npt.NDArray[Any]) -> Floats:
    """Return means; NaN of nothing."""
    means: Floats = np.divide(sums, counts, out=np.full(counts.shape, np.nan), where=counts > 0)
    return means
