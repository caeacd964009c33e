"""The tables of ``moe-beyond inspect``."""

from rich.table import Table

from moe_beyond.report.labels import NO_VALUE
from moe_beyond.report.tables.wrapping import WrappedTable
from moe_beyond.traces.analysis.summary import Contrast, TraceSummary
from moe_beyond.traces.copies import describe_copies

MOST_POPULAR = 3
"""Experts per layer in a table."""
LARGEST = 20
"""Rows of the table of a contrast."""
RANKS = 8
"""Ranks of gate weights in a table."""


def inspection_tables(summary: TraceSummary, contrast: Contrast | None = None) -> list[Table]:
    """Return the tables of a trace set.

    Args:
        summary: Result of `moe_beyond.traces.analysis.statistics.summarize`.
        contrast: Result of `moe_beyond.traces.analysis.contrast.contrast_traces` (default: no table of it).

    Returns:
        The whole set, then by layer: popularity; locality and dependence of the next layer; gate weights, if recorded;
        prefill and decode, if sequences have both; and the contrast.
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
    whole = WrappedTable(title="trace set", show_header=False)
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
        "bytes per entry": f"{summary.bytes_per_entry:.2f}",
        **(
            {"hidden states": f"{summary.hidden_states}; {summary.state_bytes_per_entry:,.1f} bytes per entry"}
            if summary.hidden_states
            else {}
        ),
        "splits": ", ".join(f"{name}: {counts['tokens']:,} tokens" for name, counts in summary.splits.items()),
        "exact copies": describe_copies(summary.copies),
        "measured": summary.split or "all splits",
        "token-to-token reuse": _percent(summary.token_to_token_reuse),
        "gate mass of the top-1 expert": f"{sum(heaviest) / len(heaviest):.1%}" if heaviest else NO_VALUE,
        "prefill and decode": f"{phases.prefill_tokens:,} and {phases.decode_tokens:,} tokens of "
        f"{phases.sequences:,} sequences with both phases"
        if phases
        else NO_VALUE,
        "fingerprint": summary.fingerprint[:16],
    }
    for name, value in rows.items():
        whole.add_row(name, value)
    return whole


def _popularity_table(summary: TraceSummary) -> Table:
    geometry = summary.geometry
    table = WrappedTable(title="popularity by layer")
    for name in ("layer", "most popular (share)", "largest share", "unused", "entropy", "reuse"):
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
        f"share: of the layer's activations (uniform: {1 / geometry.num_experts:.1%})\n"
        "entropy: 1 = all experts equally popular\n"
        "reuse: share of a token's experts that the previous token also used "
        f"(chance: {geometry.top_k / geometry.num_experts:.1%})"
    )
    return table


def _locality_table(summary: TraceSummary) -> Table:
    percentiles = list(summary.by_layer[0].reuse_distance.percentiles)
    names = [f"{percent} %\nwithin" for percent in percentiles]
    table = _table(
        "locality and dependence by layer",
        *("layer", "Jaccard", "by\nchance", *names, "last\nuse", "bits of\nnext layer", "depend-\nence"),
    )
    for row in summary.by_layer:
        distance, following = row.reuse_distance, row.next_layer
        table.add_row(
            str(row.layer),
            _format(row.jaccard, ".3f"),
            _format(row.jaccard_by_chance, ".3f"),
            *(_format(distance.percentiles[percent], ",") for percent in percentiles),
            _percent(distance.never_again),
            _format(following.mutual_information if following else None, ".3f"),
            _format(following.dependence if following else None, ".3f"),
        )
    table.caption = (
        "Jaccard: experts that two consecutive tokens share / experts that either uses\n"
        "by chance: the same for independent draws by popularity\n"
        "within: number of tokens within which that percentage of recurring uses recurs\n"
        "last use: share of uses that do not recur in their sequence\n"
        "bits: mutual information of an expert of this layer and one of the next layer; dependence: bits / maximum"
    )
    return table


def _gates_table(summary: TraceSummary) -> Table:
    ranks = min(summary.geometry.top_k, RANKS)
    table = _table("gate mass by layer", "layer", *(f"rank {rank + 1}" for rank in range(ranks)))
    table.add_column("largest mean share")
    for row in summary.by_layer:
        mass = row.gate_mass
        shares = map(_percent, mass.by_rank[:ranks] if mass else [None] * ranks)
        table.add_row(str(row.layer), *shares, _most_popular(mass.popularity) if mass else NO_VALUE)
    table.caption = (
        "rank n: mean share of a token's gate weights that its expert with the n-th largest weight has\n"
        "largest mean share: experts with the largest mean share of gate weights"
    )
    return table


def _phases_table(summary: TraceSummary) -> Table:
    table = _table(
        "prefill and decode by layer",
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
            _format(phases.total_variation_by_chance, ".3f"),
            _most_popular(decode.popularity),
        )
    table.caption = (
        "sequences with both phases only\n"
        "reuse: share of the experts of a phase's token that the previous token also used\n"
        "total variation: distance of the popularities in prefill and decode, from 0 (equal) to 1\n"
        "by chance: the same for two samples from one popularity"
    )
    return table


def _contrast_table(contrast: Contrast) -> Table:
    rows = sorted(contrast.by_expert(), key=lambda row: (-abs(row.z or 0), row.layer, row.expert))
    other, significant = contrast.other, contrast.significant
    table = _table(
        f"the {min(LARGEST, len(rows))} largest differences of selection rates",
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
            _format(row.z, "+.1f"),
            _format(row.z_clustered, "+.1f"),
        )
    table.caption = (
        f"other: {other['traces']}, {other['tokens']:,} tokens of {other['sequences']:,} sequences\n"
        "rate: share of tokens that activate the expert\n"
        "z: assumes independent tokens; z of sequences: assumes independent sequences only\n"
        f"beyond {significant.threshold:.2f} (by chance, any expert passes it in 1 case of 20): {significant.z:,} of "
        f"{len(rows):,} experts by z, {significant.z_clustered:,} by z of sequences"
    )
    return table


def _table(title: str, *headings: str) -> Table:
    table = WrappedTable(title=title)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _most_popular(popularity: list[float]) -> str:
    ranked = sorted(enumerate(popularity), key=lambda pair: (-pair[1], pair[0]))[:MOST_POPULAR]
    return ", ".join(f"{expert} ({share:.1%})" for expert, share in ranked)


def _format(value: float | None, form: str) -> str:
    return NO_VALUE if value is None else format(value, form)


def _percent(share: float | None) -> str:
    return _format(share, ".1%")
