"""The section with the definitions of all numbers, and their limits."""

from collections.abc import Sequence
from typing import Any

from moe_beyond.report.html.page import Section
from moe_beyond.traces.reader import TraceSet

AUTHORS = {
    "dataset": "The model read this text as a prompt; it did not write it",
    "model": "The model wrote this text",
    "mixed": "The model read a part of this text as a prompt and wrote the other part",
}


def caveats_section(
    traces: TraceSet, config: dict[str, Any], *, warmup_tokens: int, devices: Sequence[str], profile: str | None
) -> Section:
    """Define the numbers of the page and state their limits.

    Args:
        traces: Measured trace set.
        config: Configuration of the predictor, with its ``lookaheads``.
        warmup_tokens: Tokens at the start of each sequence that replays do not count.
        devices: Names of the devices.
        profile: Pretrained history predictor that ``belief`` reads as usage profile; None if there is none.
    """
    manifest, geometry = traces.manifest, traces.geometry
    k, experts = geometry.top_k, geometry.num_experts
    author = AUTHORS.get(manifest.author, f"Author of this text: {manifest.author}")
    warmup = f"The first {warmup_tokens:,} tokens of each are replayed but not counted. " if warmup_tokens else ""
    facts = {
        "recall@k": f"Share of the {k} experts selected by the router that are among the {k} experts with the highest "
        "scores, averaged over tokens and layers. Accuracy per label is not shown: predicting no expert at all is "
        f"{1 - k / experts:.1%} accurate.",
        "lookahead": f"When a score becomes available. {' '.join(_lookaheads(config['lookaheads']))}",
        "text": f"{author}. Routing depends on the text: expect lower values on other domains and on text that the "
        "model writes.",
        "hit rate": "Share of accesses whose expert is in the cache when its layer starts. Each sequence starts with "
        f"an empty cache. Each token is one step, prompt tokens included. {warmup}"
        "Replays without a device ignore time: every prefetch arrives before its layer.",
        "bytes": "Transferred bytes divided by demanded bytes; prefetches count. At 1.00 there is one transfer per "
        "access. A strategy with a higher hit rate can be slower if it transfers more bytes.",
        "baselines": "Belady, the best static choice and clairvoyant prefetch know these traces in advance; no runtime "
        "does. Belady is optimal among strategies without prefetching that admit every demanded expert. "
        "The best static choice never changes its experts. Clairvoyant prefetch is close to the optimum, but no bound.",
        "belief": (
            f"The policy also reads usage statistics of training text ({profile})."
            if profile
            else "No pretrained history exists for this model and tokenizer. The policy uses a table counted on "
            "another model, and treats all experts as equally popular."
        ),
        "speed": f"Computed by a timing model, not measured ({', '.join(devices)}). The model has one interconnect "
        "with bandwidth, latency and a queue. Computing reads weights and KV cache at a share of the memory's nominal "
        "bandwidth, and each layer has a fixed cost. Dense layers, head and KV cache count if the geometry has their "
        "sizes. Speeds are forecasts; a run measures.",
        "validity": "Expert ids are specific to this checkpoint of the model, its tokenizer and its quantisation.",
        "output": "Predictions never change the model's output: the router selects the experts. A wrong prediction "
        "only costs time.",
    }
    if not devices:
        del facts["speed"]
    return Section("limits", "Definitions and limits", facts=list(facts.items()))


def _lookaheads(lookaheads: Sequence[int | str]) -> list[str]:
    """Return a sentence for each kind of lookahead that a predictor has."""
    ahead = [str(lookahead) for lookahead in lookaheads if isinstance(lookahead, int) and lookahead > 0]
    sentences = []
    if ahead:
        sentences.append(f"{', '.join(ahead)}: as soon as the layer that many layers earlier is routed.")
    if "computed" in lookaheads:
        sentences.append("computed: as soon as the previous layer is computed; for the first layer, before it.")
    if 0 in lookaheads:
        sentences.append("0 (LEAK): from the router's own input, which exists only when the router decides.")
    if "token" in lookaheads:
        sentences.append("token: before the token's first layer, for all layers.")
    if "next" in lookaheads:
        sentences.append(
            "next: as soon as the layer is routed for the previous token. The next token's id is still unknown, so "
            "such scores decide which experts to keep, not which to prefetch."
        )
    return sentences
