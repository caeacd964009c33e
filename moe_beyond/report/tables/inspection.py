"""What `moe-beyond inspect` shows."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from moe_beyond.report.tables.fitted import FittedTable
from moe_beyond.traces.copies import describe_copies
from moe_beyond.traces.steering import Steering

MOST_POPULAR = 3
LARGEST = 20
"""Experts that a contrast's table shows."""
RANKS = 8
"""Ranks of gate weights that a table shows."""


def inspection_tables(summary: dict[str, Any]) -> list[Table]:
    """Lay out what `moe_beyond.traces.analysis.statistics.summarize` returned.

    Args:
        summary: That; and under ``contrast``, if it is there, what `moe_beyond.traces.analysis.contrast.contrast` did.

    Returns:
        The set as a whole, then layer by layer: popularity; locality, and dependence of the next layer; gate weights,
        where they were recorded; prefill against decode, where sequences have both; and the contrast.
    """
    tables = [_whole_table(summary), _popularity_table(summary), _locality_table(summary)]
    if any(row["gate_mass"] for row in summary["by_layer"]):
        tables.append(_gates_table(summary))
    if summary["phases"]:
        tables.append(_phases_table(summary))
    if "contrast" in summary:
        tables.append(_contrast_table(summary["contrast"]))
    return tables


def _whole_table(summary: dict[str, Any]) -> Table:
    geometry, phases = summary["geometry"], summary["phases"]
    whole = FittedTable(title="trace set", show_header=False)
    layers = geometry["moe_layers"]
    heaviest = [row["gate_mass"]["by_rank"][0] for row in summary["by_layer"] if row["gate_mass"]]
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
        "exact copies": describe_copies(summary["copies"]),
        "measured": summary["split"] or "all splits",
        "token-to-token reuse": _percent(summary["token_to_token_reuse"]),
        "gate mass of the top expert": f"{sum(heaviest) / len(heaviest):.1%}" if heaviest else "-",
        "prefill and decode": f"{phases['prefill_tokens']:,} and {phases['decode_tokens']:,} tokens of "
        f"{phases['sequences']:,} sequences that have both"
        if phases
        else "-",
        "fingerprint": summary["fingerprint"][:16],
    }
    for name, value in rows.items():
        whole.add_row(name, escape(value))
    return whole


def _popularity_table(summary: dict[str, Any]) -> Table:
    geometry = summary["geometry"]
    table = FittedTable(title="by layer")
    for name in ("layer", "most popular (share)", "busiest", "unused", "entropy", "reuse"):
        table.add_column(name, justify="left" if name.startswith("most") else "right")
    for row in summary["by_layer"]:
        table.add_row(
            str(row["layer"]),
            _most_popular(row["popularity"]),
            f"{row['busiest_share']:.1%}",
            str(row["unused_experts"]),
            f"{row['normalized_entropy']:.3f}",
            _percent(row["token_to_token_reuse"]),
        )
    table.caption = (
        f"share: of the layer's activations (uniform: {1 / geometry['num_experts']:.1%}); entropy: 1 = all experts "
        f"equally popular; reuse: experts of a token that the token before used too "
        f"(chance: {geometry['top_k'] / geometry['num_experts']:.1%})"
    )
    return table


def _locality_table(summary: dict[str, Any]) -> Table:
    percentiles = list(summary["by_layer"][0]["reuse_distance"]["percentiles"])
    names = [f"{percent} %\nagain in" for percent in percentiles]
    table = _table(
        "locality and dependence by layer",
        *("layer", "Jaccard", "by\nchance", *names, "never\nagain", "bits of\nnext layer", "depend-\nence"),
    )
    for row in summary["by_layer"]:
        distance, following = row["reuse_distance"], row["next_layer"]
        table.add_row(
            str(row["layer"]),
            _or_dash(row["jaccard"], ".3f"),
            _or_dash(row["jaccard_by_chance"], ".3f"),
            *(_or_dash(distance["percentiles"][percent], ",") for percent in percentiles),
            _percent(distance["never_again"]),
            *(_or_dash(following and following[name], ".3f") for name in ("mutual_information", "dependence")),
        )
    table.caption = (
        "Jaccard: experts that a token and the one before both use, over those that any of them does; by chance: of "
        "independent draws by popularity; again in: of the uses that come again, so many percent do within so many "
        "tokens; never again: uses that are an expert's last in their sequence; bits: mutual information of an expert "
        "of this layer and one of the next; dependence: over the most it could be"
    )
    return table


def _gates_table(summary: dict[str, Any]) -> Table:
    ranks = min(summary["geometry"]["top_k"], RANKS)
    table = _table("gate mass by layer", "layer", *(f"rank {rank + 1}" for rank in range(ranks)))
    table.add_column("heaviest (share)")
    for row in summary["by_layer"]:
        mass = row["gate_mass"] or {"by_rank": [None] * ranks, "popularity": []}
        shares = map(_percent, mass["by_rank"][:ranks])
        table.add_row(str(row["layer"]), *shares, _most_popular(mass["popularity"]) or "-")
    table.caption = (
        "rank: the share of a token's gate weights that its heaviest, second heaviest, ... expert has, on average; "
        "heaviest: the experts with the largest mean share"
    )
    return table


def _phases_table(summary: dict[str, Any]) -> Table:
    table = _table(
        "prefill against decode by layer",
        *("layer", "entropy\nprefill", "\ndecode", "reuse\nprefill", "\ndecode", "total\nvariation", "by\nchance"),
    )
    table.add_column("most popular in decode (share)")
    for row in summary["by_layer"]:
        phases = row["phases"]
        prefill, decode = phases["prefill"], phases["decode"]
        table.add_row(
            str(row["layer"]),
            f"{prefill['normalized_entropy']:.3f}",
            f"{decode['normalized_entropy']:.3f}",
            _percent(prefill["token_to_token_reuse"]),
            _percent(decode["token_to_token_reuse"]),
            f"{phases['total_variation']:.3f}",
            _or_dash(phases["total_variation_by_chance"], ".3f"),
            _most_popular(decode["popularity"]),
        )
    table.caption = (
        "of sequences that have both phases; reuse: experts of a phase's token that the token before used too; total "
        "variation: the share of a layer's choices that one phase spends on other experts; by chance: of two samples "
        "of one popularity"
    )
    return table


def _contrast_table(found: dict[str, Any]) -> Table:
    names = ("rate", "other_rate", "difference", "standard_error", "z", "z_of_sequences")
    rows = [
        {"layer": row["layer"], "expert": expert, **{name: row[name][expert] for name in names}}
        for row in found["by_layer"]
        for expert in range(len(row["z"]))
    ]
    rows.sort(key=lambda row: (-abs(row["z"] or 0), row["layer"], row["expert"]))
    other, noise = found["other"], found["beyond_noise"]
    table = _table(
        f"the {min(LARGEST, len(rows))} activation rates that differ most",
        *("layer", "expert", "rate", "other\nrate", "difference", "standard\nerror", "z", "z of\nsequences"),
    )
    for row in rows[:LARGEST]:
        table.add_row(
            str(row["layer"]),
            str(row["expert"]),
            *(f"{row[name]:.2%}" for name in ("rate", "other_rate")),
            f"{row['difference']:+.2%}",
            f"{row['standard_error']:.2%}",
            *(_or_dash(row[name], "+.1f") for name in ("z", "z_of_sequences")),
        )
    table.caption = (
        f"other: {escape(other['traces'])}, {other['tokens']:,} tokens of {other['sequences']:,} sequences; rate: "
        "share of tokens that activate the expert; z: as if tokens were independent; z of sequences: as if only "
        f"sequences were; beyond {noise['threshold']:.2f}, which chance has any expert pass in 1 case of 20, are "
        f"{noise['z']:,} of {len(rows):,} experts by z and {noise['z_of_sequences']:,} by z of sequences"
    )
    return table


def _table(title: str, *headings: str) -> Table:
    table = FittedTable(title=title)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _most_popular(popularity: list[float]) -> str:
    ranked = sorted(enumerate(popularity), key=lambda pair: (-pair[1], pair[0]))[:MOST_POPULAR]
    return ", ".join(f"{expert} ({share:.1%})" for expert, share in ranked)


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _percent(share: float | None) -> str:
    return _or_dash(share, ".1%")
