"""The section on the popularity of experts."""

import itertools

import numpy as np
import numpy.typing as npt

from moe_beyond.geometry import Geometry
from moe_beyond.report.html.page import Chart, Section, Table
from moe_beyond.report.html.svg import HEAT_EDGES, heat_map, shade_sample
from moe_beyond.report.labels import NO_VALUE
from moe_beyond.traces.analysis.statistics import normalized_entropy

MOST_POPULAR = 3
"""Experts per layer in the table."""


def experts_section(
    counts: npt.NDArray[np.int64], reused: npt.NDArray[np.float64], geometry: Geometry, tokens: int
) -> Section:
    """Show the popularity of every expert.

    Args:
        counts: Activations of each expert, ``(L, E)``.
        reused: Share of a token's experts that the previous token also used, ``(L,)``; NaN without such tokens.
        geometry: Geometry of the model.
        tokens: Number of tokens in the traces.
    """
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    entropy = normalized_entropy(counts)
    rows = []
    for n, layer in enumerate(geometry.moe_layers):
        popular = sorted(range(geometry.num_experts), key=lambda e: (-counts[n, e], e))[:MOST_POPULAR]
        rows.append(
            [
                str(layer),
                ", ".join(f"{expert} ({shares[n, expert]:.1%})" for expert in popular),
                str(int((counts[n] == 0).sum())),
                f"{entropy[n]:.3f}",
                NO_VALUE if np.isnan(reused[n]) else f"{reused[n]:.1%}",
            ]
        )
    ranges = ["never used", f"below {HEAT_EDGES[0]:g}"]
    ranges += [f"{low:g} to {high:g}" for low, high in itertools.pairwise(HEAT_EDGES)]
    ranges.append(f"{HEAT_EDGES[-1]:g} and more")
    picture = heat_map(
        f"Popularity of {geometry.num_experts} experts in each of {geometry.num_layers} layers",
        shares * geometry.num_experts,
        geometry.moe_layers,
    )
    return Section(
        "experts",
        "Expert popularity",
        prose=[
            f"Share of a layer's activations by expert over {tokens:,} tokens, as a multiple of the uniform share "
            f"({1 / geometry.num_experts:.1%})."
        ],
        wide=[Chart("Popularity by layer and expert", picture, "One row per model layer, one column per expert.")],
        shades=[(shade_sample(f"q{shade}"), text) for shade, text in enumerate(ranges)],
        folded=[
            Table(
                "Table: popularity by layer",
                "Most popular: expert id (share of the layer's activations). Entropy: 1 if all experts are equally "
                "popular. Reuse: share of a token's experts that the previous token also used "
                f"(by chance: {geometry.top_k / geometry.num_experts:.1%}).",
                ["layer", "most popular (share)", "never used", "entropy", "reuse"],
                [rows],
                texts=[1],
            )
        ],
    )
