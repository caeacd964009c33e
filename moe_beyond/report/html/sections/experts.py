"""The part of a page that says which experts are used how much."""

import itertools

import numpy as np
import numpy.typing as npt

from moe_beyond.geometry import Geometry
from moe_beyond.report.html.model import NOTHING, Chart, Section, Table
from moe_beyond.report.html.svg import HEAT_EDGES, heat_map, swatch
from moe_beyond.traces.analysis.statistics import normalized_entropy

HOTTEST = 3
"""Experts that the table names, of each layer."""


def experts_section(
    counts: npt.NDArray[np.int64], reused: npt.NDArray[np.float64], geometry: Geometry, tokens: int
) -> Section:
    """Show which experts are used how much.

    Args:
        counts: ``(L, E)``, how often each was chosen.
        reused: ``(L,)``, the share of a token's experts that the token before used too; NaN where there is no pair.
        geometry: The model.
        tokens: Of the traces.
    """
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    entropy = normalized_entropy(counts)
    rows = []
    for n, layer in enumerate(geometry.moe_layers):
        hottest = sorted(range(geometry.num_experts), key=lambda e: (-counts[n, e], e))[:HOTTEST]
        rows.append(
            [
                str(layer),
                ", ".join(f"{expert} ({shares[n, expert]:.1%})" for expert in hottest),
                str(int((counts[n] == 0).sum())),
                f"{entropy[n]:.3f}",
                NOTHING if np.isnan(reused[n]) else f"{reused[n]:.1%}",
            ]
        )
    words = ["never used", f"below {HEAT_EDGES[0]:g}"]
    words += [f"{low:g} to {high:g}" for low, high in itertools.pairwise(HEAT_EDGES)]
    words.append(f"{HEAT_EDGES[-1]:g} and more")
    picture = heat_map(
        f"How often each of {geometry.num_experts} experts was chosen in each of {geometry.num_layers} layers",
        shares * geometry.num_experts,
        geometry.moe_layers,
    )
    return Section(
        "experts",
        "Which experts are hot",
        prose=[
            f"How often each expert was chosen by the {tokens:,} tokens, as a multiple of an even share "
            f"({1 / geometry.num_experts:.1%} of a layer's choices)."
        ],
        wide=[Chart("Popularity, layer by expert", picture, "A row a model layer, a column an expert.")],
        shades=[(swatch(f"q{shade}"), said) for shade, said in enumerate(words)],
        folded=[
            Table(
                "Popularity by layer, as a table",
                "Entropy: 1 where all experts are equally popular; reuse: experts of a token that "
                f"the token before used too (by chance {geometry.top_k / geometry.num_experts:.1%}).",
                ["layer", "hottest (share)", "never used", "entropy", "reuse"],
                [rows],
                texts=[1],
            )
        ],
    )
