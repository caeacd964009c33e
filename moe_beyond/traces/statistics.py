"""What a trace set looks like: popularity, skew and reuse by layer."""

from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.schema import expert_ids, none_id


def activation_counts(traces: TraceSet, split: str | None = None) -> npt.NDArray[np.int64]:
    """Count how often each expert was chosen.

    Args:
        traces: The trace set.
        split: One split, or all.

    Returns:
        ``(L, E)`` int64.
    """
    layers, experts, _ = traces.geometry.shape()
    counts = np.zeros((layers, experts), np.int64)
    for info in traces.shards(split):
        chosen = expert_ids(traces.read(info).experts, experts)
        for layer in range(layers):
            counts[layer] += np.bincount(chosen[:, layer].ravel(), minlength=experts + 1)[:experts]
    return counts


def reuse(traces: TraceSet, split: str | None = None) -> npt.NDArray[np.float64]:
    """Measure token-to-token reuse: the share of a token's experts that the token before it used in the same layer.

    Args:
        traces: The trace set.
        split: One split, or all.

    Returns:
        ``(L,)`` float64 in [0, 1], over all tokens but each sequence's first; NaN if there are none.
    """
    layers = traces.geometry.num_layers
    shared, used = np.zeros(layers, np.int64), np.zeros(layers, np.int64)
    for trace in traces.traces(split):
        again, all_of_them = reuse_counts(trace.experts)
        shared += again
        used += all_of_them
    shares: npt.NDArray[np.float64] = np.divide(shared, used, out=np.full(layers, np.nan), where=used > 0)
    return shares


def reuse_counts(experts: npt.NDArray[np.integer[Any]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Count, over all tokens but the first, the experts that the token before used in the same layer, and all.

    Args:
        experts: ``(T, L, K)`` ids of one sequence.

    Returns:
        ``(L,)`` int64 both.
    """
    now, before = experts[1:], experts[:-1]
    there = now != none_id(now.dtype)
    shared = ((now[..., :, None] == before[..., None, :]) & there[..., None]).sum((0, 2, 3))
    return shared, there.sum((0, 2))


def normalized_entropy(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return each layer's entropy over the largest possible: 1 where all experts are equally popular.

    Args:
        counts: ``(L, E)`` activations.
    """
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    entropy: npt.NDArray[np.float64] = -(shares * logs).sum(1)
    return entropy / np.log(counts.shape[1]) if counts.shape[1] > 1 else np.ones(len(counts))


def summarize(traces: TraceSet) -> dict[str, Any]:
    """Describe a trace set as JSON-able values.

    Returns:
        Counts (``sequences, tokens, entries, bytes_per_entry``), the ``geometry``, where the text came from, the
        splits, ``token_to_token_reuse`` over all layers, and ``by_layer``: for each MoE layer its index in the model,
        ``popularity`` (each expert's share of the layer's activations), ``busiest_share``, ``unused_experts``,
        ``normalized_entropy`` and ``token_to_token_reuse``.
    """
    manifest = traces.manifest
    counts, reused = activation_counts(traces), reuse(traces)
    entropy = normalized_entropy(counts)
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    entries = manifest.tokens * manifest.geometry.num_layers
    return {
        "sequences": sum(shard.sequences for shard in manifest.shards),
        "tokens": manifest.tokens,
        "entries": entries,
        "bytes_per_entry": round(sum(shard.bytes for shard in manifest.shards) / entries, 4),
        "geometry": manifest.geometry.to_json(),
        "model_id": manifest.model_id,
        "quantization_bits": manifest.quantization_bits,
        "tokenizer": manifest.tokenizer.name,
        "author": manifest.author,
        "source": manifest.source,
        "fingerprint": manifest.fingerprint,
        "splits": manifest.to_json()["splits"],
        "token_to_token_reuse": _rounded(reused.mean()),
        "by_layer": [
            {
                "layer": model_layer,
                "busiest_share": _rounded(shares[layer].max()),
                "unused_experts": int((counts[layer] == 0).sum()),
                "normalized_entropy": _rounded(entropy[layer]),
                "token_to_token_reuse": _rounded(reused[layer]),
                "popularity": [_rounded(share) for share in shares[layer]],
            }
            for layer, model_layer in enumerate(manifest.geometry.moe_layers)
        ],
    }


def _rounded(value: float) -> float | None:
    """Round for reading; None stands for a figure that does not exist, since JSON has no NaN."""
    return None if np.isnan(value) else round(float(value), 6)
