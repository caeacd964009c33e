"""What `moe-beyond inspect` shows."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from moe_beyond.traces.steering import Steering

MOST_POPULAR = 3


def inspection_tables(summary: dict[str, Any]) -> list[Table]:
    """Lay out what `moe_beyond.traces.statistics.summarize` returned: the set as a whole, then layer by layer."""
    geometry = summary["geometry"]
    whole = Table(title="trace set", show_header=False)
    layers = geometry["moe_layers"]
    rows = {
        "model": summary["model_id"],
        "geometry": f"{len(layers)} MoE layers ({layers[0]}..{layers[-1]}) x {geometry['num_experts']} experts, "
        f"top-{geometry['top_k']}",
        "text": f"{summary['source']} (author: {summary['author']})",
        **({"steered": str(Steering.from_json(summary["steering"], source="steering"))} if summary["steering"] else {}),
        "sequences": f"{summary['sequences']:,}",
        "tokens": f"{summary['tokens']:,}",
        "entries": f"{summary['entries']:,}",
        "bytes an entry": f"{summary['bytes_per_entry']:.2f}",
        "splits": ", ".join(f"{name}: {counts['tokens']:,} tokens" for name, counts in summary["splits"].items()),
        "token-to-token reuse": _percent(summary["token_to_token_reuse"]),
        "fingerprint": summary["fingerprint"][:16],
    }
    for name, value in rows.items():
        whole.add_row(name, escape(value))
    by_layer = Table(title="by layer")
    for name in ("layer", "most popular (share)", "busiest", "unused", "entropy", "reuse"):
        by_layer.add_column(name, justify="left" if name.startswith("most") else "right")
    for row in summary["by_layer"]:
        ranked = sorted(enumerate(row["popularity"]), key=lambda pair: (-pair[1], pair[0]))[:MOST_POPULAR]
        by_layer.add_row(
            str(row["layer"]),
            ", ".join(f"{expert} ({share:.1%})" for expert, share in ranked),
            f"{row['busiest_share']:.1%}",
            str(row["unused_experts"]),
            f"{row['normalized_entropy']:.3f}",
            _percent(row["token_to_token_reuse"]),
        )
    by_layer.caption = (
        f"share: of the layer's activations (uniform: {1 / geometry['num_experts']:.1%}); entropy: 1 = all experts "
        f"equally popular; reuse: experts of a token that the token before used too "
        f"(chance: {geometry['top_k'] / geometry['num_experts']:.1%})"
    )
    return [whole, by_layer]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
