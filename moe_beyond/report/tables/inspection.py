"""What `moe-beyond inspect` shows."""

from rich.markup import escape
from rich.table import Table

from moe_beyond.report.tables.fitted import FittedTable
from moe_beyond.traces.analysis.summary import Contrast, TraceSummary
from moe_beyond.traces.copies import describe_copies

MOST_POPULAR = 3
LARGEST = 20
"""Experts that a contrast's table shows."""
RANKS = 8
"""Ranks of gate weights that a table shows."""


def inspection_tables(summary: TraceSummary, contrast: Contrast | None = None) -> list[Table]:
    """Lay out the statistics of a trace set.

    Args:
        summary: Result of `moe_beyond.traces.analysis.statistics.summarize`.
        contrast: Result of `moe_beyond.traces.analysis.contrast.contrast_traces` (default: no table of it).

    Returns:
        The set as a whole, then layer by layer: popularity; locality, and dependence of the next layer; gate weights,
        where they were recorded; prefill against decode, where sequences have both; and the contrast.
    """
    tables = [_whole_table(summary), _popularity_table(summary), _locality_table(summary)]
    if any(row.gate_mass for row in summary.by_layer):
        tables.append(_gates_table(summary))
    if summary.phases:
        tables.append(_phases_table(summary))
    if contrast is not None:
        tables.append(_contrast_table(contrast))
    return tables


def _whole_table(summary: TraceSummary) -> Table:
    geometry, phases = summary.geometry, summary.phases
    whole = FittedTable(title="trace set", show_header=False)
    layers = geometry.moe_layers
    heaviest = [row.gate_mass.by_rank[0] for row in summary.by_layer if row.gate_mass]
    rows = {
        "model": summary.model_id,
        "geometry": f"{len(layers)} MoE layers ({layers[0]}..{layers[-1]}) x {geometry.num_experts} experts, "
        f"top-{geometry.top_k}",
        "text": f"{summary.source} (author: {summary.author})",
        **({"steered": str(summary.steering)} if summary.steering else {}),
        "sequences": f"{summary.sequences:,}",
        "tokens": f"{summary.tokens:,}",
        "entries": f"{summary.entries:,}",
        "bytes an entry": f"{summary.bytes_per_entry:.2f}",
        "splits": ", ".join(f"{name}: {counts['tokens']:,} tokens" for name, counts in summary.splits.items()),
        "exact copies": describe_copies(summary.copies),
        "measured": summary.split or "all splits",
        "token-to-token reuse": _percent(summary.token_to_token_reuse),
        "gate mass of the top expert": f"{sum(heaviest) / len(heaviest):.1%}" if heaviest else "-",
        "prefill and decode": f"{phases.prefill_tokens:,} and {phases.decode_tokens:,} tokens of "
        f"{phases.sequences:,} sequences that have both"
        if phases
        else "-",
        "fingerprint": summary.fingerprint[:16],
    }
    for name, value in rows.items():
        whole.add_row(name, escape(value))
    return whole


def _popularity_table(summary: TraceSummary) -> Table:
    geometry = summary.geometry
    table = FittedTable(title="by layer")
    for name in ("layer", "most popular (share)", "busiest", "unused", "entropy", "reuse"):
        table.add_column(name, justify="left" if name.startswith("most") else "right")
    for row in summary.by_layer:
        table.add_row(
            str(row.layer),
            _most_popular(row.popularity),
            f"{row.busiest_share:.1%}",
            str(row.unused_experts),
            f"{row.normalized_entropy:.3f}",
            _percent(row.token_to_token_reuse),
        )
    table.caption = (
        f"share: of the layer's activations (uniform: {1 / geometry.num_experts:.1%}); entropy: 1 = all experts "
        f"equally popular; reuse: experts of a token that the token before used too "
        f"(chance: {geometry.top_k / geometry.num_experts:.1%})"
    )
    return table


def _locality_table(summary: TraceSummary) -> Table:
    percentiles = list(summary.by_layer[0].reuse_distance.percentiles)
    names = [f"{percent} %\nagain in" for percent in percentiles]
    table = _table(
        "locality and dependence by layer",
        *("layer", "Jaccard", "by\nchance", *names, "never\nagain", "bits of\nnext layer", "depend-\nence"),
    )
    for row in summary.by_layer:
        distance, following = row.reuse_distance, row.next_layer
        table.add_row(
            str(row.layer),
            _or_dash(row.jaccard, ".3f"),
            _or_dash(row.jaccard_by_chance, ".3f"),
            *(_or_dash(distance.percentiles[percent], ",") for percent in percentiles),
            _percent(distance.never_again),
            _or_dash(following.mutual_information if following else None, ".3f"),
            _or_dash(following.dependence if following else None, ".3f"),
        )
    table.caption = (
        "Jaccard: experts that a token and the one before both use, over those that any of them does; by chance: of "
        "independent draws by popularity; again in: of the uses that come again, so many percent do within so many "
        "tokens; never again: uses that are an expert's last in their sequence; bits: mutual information of an expert "
        "of this layer and one of the next; dependence: over the most it could be"
    )
    return table


def _gates_table(summary: TraceSummary) -> Table:
    ranks = min(summary.geometry.top_k, RANKS)
    table = _table("gate mass by layer", "layer", *(f"rank {rank + 1}" for rank in range(ranks)))
    table.add_column("heaviest (share)")
    for row in summary.by_layer:
        mass = row.gate_mass
        shares = map(_percent, mass.by_rank[:ranks] if mass else [None] * ranks)
        table.add_row(str(row.layer), *shares, _most_popular(mass.popularity) if mass else "-")
    table.caption = (
        "rank: the share of a token's gate weights that its heaviest, second heaviest, ... expert has, on average; "
        "heaviest: the experts with the largest mean share"
    )
    return table


def _phases_table(summary: TraceSummary) -> Table:
    table = _table(
        "prefill against decode by layer",
        *("layer", "entropy\nprefill", "\ndecode", "reuse\nprefill", "\ndecode", "total\nvariation", "by\nchance"),
    )
    table.add_column("most popular in decode (share)")
    for row in summary.by_layer:
        if (phases := row.phases) is None:
            continue
        prefill, decode = phases.prefill, phases.decode
        table.add_row(
            str(row.layer),
            f"{prefill.normalized_entropy:.3f}",
            f"{decode.normalized_entropy:.3f}",
            _percent(prefill.token_to_token_reuse),
            _percent(decode.token_to_token_reuse),
            f"{phases.total_variation:.3f}",
            _or_dash(phases.total_variation_by_chance, ".3f"),
            _most_popular(decode.popularity),
        )
    table.caption = (
        "of sequences that have both phases; reuse: experts of a phase's token that the token before used too; total "
        "variation: the share of a layer's choices that one phase spends on other experts; by chance: of two samples "
        "of one popularity"
    )
    return table


def _contrast_table(contrast: Contrast) -> Table:
    rows = sorted(contrast.by_expert(), key=lambda row: (-abs(row.z or 0), row.layer, row.expert))
    other, significant = contrast.other, contrast.significant
    table = _table(
        f"the {min(LARGEST, len(rows))} activation rates that differ most",
        *("layer", "expert", "rate", "other\nrate", "difference", "standard\nerror", "z", "z of\nsequences"),
    )
    for row in rows[:LARGEST]:
        table.add_row(
            str(row.layer),
            str(row.expert),
            f"{row.rate:.2%}",
            f"{row.other_rate:.2%}",
            f"{row.difference:+.2%}",
            f"{row.standard_error:.2%}",
            _or_dash(row.z, "+.1f"),
            _or_dash(row.z_clustered, "+.1f"),
        )
    table.caption = (
        f"other: {escape(other['traces'])}, {other['tokens']:,} tokens of {other['sequences']:,} sequences; rate: "
        "share of tokens that activate the expert; z: as if tokens were independent; z of sequences: as if only "
        f"sequences were; beyond {significant.threshold:.2f}, which chance has any expert pass in 1 case of 20, are "
        f"{significant.z:,} of {len(rows):,} experts by z and {significant.z_clustered:,} by z of sequences"
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
