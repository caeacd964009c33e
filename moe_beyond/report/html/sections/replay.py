"""The section on replays without a device: hit rate and bytes over budgets."""

from collections.abc import Callable, Sequence

from moe_beyond.report.html.page import Chart, Section, Table
from moe_beyond.report.html.strategies import at_summary_budget
from moe_beyond.report.html.svg import SERIES, Line, fit_axis, format_number, format_percent, line_chart
from moe_beyond.report.labels import BASELINES, BYTES_AXIS, DEMAND_RATIO_DEFINITION, NO_VALUE, score_lookahead
from moe_beyond.simulator import Result

WHOLE_FROM = 1000
"""Tokens per second from which no decimal is shown."""

DEMAND_RATIO = f"{DEMAND_RATIO_DEFINITION.capitalize()}."


def replay_section(results: Sequence[Result]) -> Section:
    """Show hit rate and bytes over budgets, and against each other.

    Args:
        results: Results of all replays; those on devices are ignored.
    """
    results = [result for result in results if result.device is None]
    charts = [
        budget_chart("Hit rate by budget", "hit rate", results, lambda r: r.hit_rate, format_percent,
                     "Higher is better. LRU and Belady transfer experts only on demand."),
        budget_chart("Bytes by budget", BYTES_AXIS, results, lambda r: r.bytes_ratio, format_number,
                     "Lower is better. At 1 there is one transfer per access, prefetches included."),
        _frontier_chart(results),
    ]  # fmt: skip
    shown = at_summary_budget(results)
    first = shown[0]
    budget = "smallest budget that holds the experts of one token" if first.demand_ratio >= 1 else "largest budget"
    prefetches = f" Prefetches use lookahead {score_lookahead(first)}." if first.prefetch != "none" else ""
    return Section(
        "replay",
        "Replay under a memory budget",
        prose=[
            f"The traces hold {first.accesses:,} accesses; an access is one expert demanded by a token in a layer. The "
            "budget is the share of all experts that fit into the cache. Left of the vertical line, the cache cannot "
            f"hold the experts of one token.{prefetches} The summary and the first table show the {budget}."
        ],
        charts=charts,
        tables=[_results_table(shown)],
        folded=[_results_table(results, every=True)],
    )


def budget_chart(
    title: str,
    unit: str,
    results: Sequence[Result],
    value: Callable[[Result], float | None],
    format_tick: Callable[[float], str],
    caption: str,
    marks: Sequence[tuple[float, str]] = (),
) -> Chart:
    """Draw a value over budgets, one line per strategy.

    Args:
        title: Title of the chart.
        unit: Name and unit of the value.
        results: Results of several strategies and budgets.
        value: Returns the value of a result; None leaves the point out.
        format_tick: Formats ticks of the value.
        caption: Caption of the chart.
        marks: ``(budget share, text)`` of vertical lines, next to that of one token's experts.
    """
    lines = _strategy_lines(results, lambda result: (result.budget_share, value(result)))
    values = [y for line in lines for _, y in line.points]
    shares = [x for line in lines for x, _ in line.points]
    one_token = results[0].budget_share / results[0].demand_ratio
    x = fit_axis("budget, share of all experts", [0.0, *shares], format_tick=format_percent, low=0)
    y = fit_axis(unit, values, format_tick=format_tick, low=0, high=1 if format_tick is format_percent else None)
    picture = line_chart(f"{title}: {unit} by budget", x, y, lines, marks=[(one_token, "one token"), *marks])
    return Chart(title, picture, caption)


def _frontier_chart(results: Sequence[Result]) -> Chart:
    lines = [  # from the largest budget, with the fewest bytes, to the smallest: names are at the right
        Line(line.name, line.points[::-1], line.style, line.tooltips[::-1])
        for line in _strategy_lines(results, lambda result: (result.bytes_ratio, result.hit_rate))
    ]
    x = fit_axis(BYTES_AXIS, [x for line in lines for x, _ in line.points], low=0)
    y = fit_axis("hit rate", (), format_tick=format_percent, low=0, high=1)
    return Chart(
        "Hit rate by bytes",
        line_chart("Hit rate by bytes transferred", x, y, lines),
        "Up and to the left is better. Each line connects the budgets of one strategy. Without prefetching, each hit "
        "saves one transfer, so those lines coincide.",
    )


def _strategy_lines(results: Sequence[Result], point: Callable[[Result], tuple[float, float | None]]) -> list[Line]:
    """Return one line per strategy through its budgets; points without a value are left out."""
    results = [result for result in results if result.policy != "all_resident"]
    compared = list(dict.fromkeys(result.strategy for result in results if result.strategy not in BASELINES))
    by_strategy: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: result.budget_slots):
        if point(result)[1] is not None:
            by_strategy.setdefault(result.strategy, []).append(result)
    lines = []
    for strategy, row in by_strategy.items():
        baseline = BASELINES.get(strategy)
        name = strategy if baseline is None else baseline.name
        style = SERIES[compared.index(strategy)] if baseline is None else baseline.css_class
        points = tuple((x, y) for x, y in map(point, row) if y is not None)
        lines.append(Line(name, points, style, tuple(map(_tooltip, row))))
    return lines


def _tooltip(result: Result) -> str:
    text = (
        f"{result.budget_slots:,} slots ({result.budget_share:.1%}): hit rate {result.hit_rate:.1%}, "
        f"bytes {result.bytes_ratio:.2f}"
    )
    return text if result.tokens_per_second is None else f"{text}, {format_speed(result)} tokens/s"


def _results_table(results: Sequence[Result], *, every: bool = False) -> Table:
    return Table(
        f"{'Table: h' if every else 'H'}it rate and bytes {budget_phrase(results[0], every)}",
        "Bytes: transferred / demanded. Prefetched: transfers before demand. Wasted: prefetched experts that no token "
        f"used in time.{f' {DEMAND_RATIO}' if every else ''}",
        headings(every, "hit rate", "bytes", "prefetched", "wasted"),
        rows_by_budget(
            results,
            every,
            lambda r: [
                f"{r.hit_rate:.1%}", f"{r.bytes_ratio:.2f}", f"{r.prefetch_transfers:,}", f"{r.wasted_prefetches:,}"
            ],
        ),
    )  # fmt: skip


def headings(every: bool, *names: str) -> list[str]:
    """Return the headings of a table of results; with budget columns if it has every budget."""
    return ["strategy", *(["slots (share)", "demand ratio"] if every else []), *names, "lookahead"]


def rows_by_budget(
    results: Sequence[Result], every: bool, cells: Callable[[Result], list[str]]
) -> list[list[list[str]]]:
    """Return the rows of a table of results, one group per budget.

    Args:
        results: Results to show.
        every: Whether the table has every budget, and columns for it.
        cells: Returns the cells between the budget and the lookahead.
    """
    groups: dict[int, list[list[str]]] = {}
    for result in results:
        budget = _budget_cells(result) if every else ()
        row = [result.strategy, *budget, *cells(result), score_lookahead(result)]
        groups.setdefault(result.budget_slots, []).append(row)
    return list(groups.values())


def _budget_cells(result: Result) -> tuple[str, str]:
    mark = "" if result.fits_device else ", does not fit"
    return f"{result.budget_slots:,} ({result.budget_share:.1%}){mark}", f"{result.demand_ratio:.2f}"


def budget_phrase(result: Result, every: bool) -> str:
    """Return the budget of a table for its title."""
    if every:
        return "at every budget"
    return f"at {result.budget_slots:,} slots ({result.budget_share:.1%}), demand ratio {result.demand_ratio:.2f}"


def format_speed(result: Result) -> str:
    """Format tokens per second: one decimal below 1,000, none from there on."""
    value = result.tokens_per_second
    return NO_VALUE if value is None else f"{value:,.0f}" if value >= WHOLE_FROM else f"{value:.1f}"
