"""The parts of a page that say what predictions are worth: hits and bytes over budgets, and time on devices."""

from collections.abc import Callable, Sequence

from moe_beyond.evaluation.strategies import CLAIRVOYANT
from moe_beyond.geometry import Geometry
from moe_beyond.report.html.model import NOTHING, Chart, Section, Table
from moe_beyond.report.html.strategies import at_headline
from moe_beyond.report.html.svg import SERIES, Line, axis, line_chart, number, percent
from moe_beyond.report.tables.results import scores_words
from moe_beyond.simulator import Result
from moe_beyond.simulator.devices import Device, device_slots

REFERENCES = {
    "lru": ("LRU", "lru"),
    "belady": ("Belady", "belady"),
    "static_hindsight": ("best fixed", "fixed"),
    CLAIRVOYANT: ("clairvoyant", "clairvoyant"),
}
"""Strategies that others stand beside: their name in a chart, and their line's style."""
WHOLE_FROM = 1000
WORTH_SAYING = 0.01
"""Speeds less than this share apart count as equal."""
SLOTS_BY_DEMAND = "Slots / demand: below 1 not even one token's experts fit."


def worth_section(results: Sequence[Result]) -> Section:
    """Show hits and bytes over budgets, and against each other."""
    plain = [result for result in results if result.device is None]
    charts = [
        _over_budgets("Hits by budget", "hit rate", plain, lambda r: r.hit_rate, percent,
                      "Up is better. LRU and Belady move experts on demand alone."),
        _over_budgets("Bytes by budget", "bytes moved / demanded", plain, lambda r: r.bytes_ratio, number,
                      "Down is better: 1 moves one expert for every access, prefetches counted."),
        _frontier(plain),
    ]  # fmt: skip
    shown = at_headline(plain)
    first = shown[0]
    enough = first.demand_ratio >= 1
    asked = f"Prefetches ask by lookahead {scores_words(first)}. " if first.prefetch != "none" else ""
    which = "the smallest budget that holds the experts of a token" if enough else "the largest budget"
    return Section(
        "worth",
        "What it is worth under a memory budget",
        prose=[
            f"Replays over {first.accesses:,} accesses, an expert that a token demands in a layer each. The budget is "
            "the experts that fit, of all layers together; below one token's experts (the upright line) a cache cannot "
            f"even hold what a single token needs. {asked}The table below is at {which}; so is the summary."
        ],
        charts=charts,
        tables=[_results_table(shown)],
        folded=[_results_table(plain, every=True)],
    )


def time_section(results: Sequence[Result], devices: Sequence[Device], geometry: Geometry, bits: float) -> Section:
    """Show tokens a second and stalls on each device.

    Args:
        results: Of all replays.
        devices: On which.
        geometry: The model.
        bits: Bits per parameter.
    """
    charts, tables = [], []
    for device in devices:
        timed = [result for result in results if result.device == device.name]
        resident = next(result for result in timed if result.policy == "all_resident")
        caption = (
            f"Link {device.link_gb_per_s:g} GB/s, memory {device.memory_gb:g} GB at {device.memory_gb_per_s:g} GB/s. "
            f"With all experts resident it would be {speed(resident)} tokens/s."
        )
        full = (device_slots(device, geometry, bits) / geometry.total_experts, f"{device.memory_gb:g} GB full")
        charts.append(
            _over_budgets(device.name, "tokens/s", timed, lambda r: r.tokens_per_second, number, caption, marks=[full])
        )
        tables.append(_times_table([*at_headline(timed), resident], device))
    return Section(
        "time",
        "What it is worth in time",
        prose=[
            "The same strategies with a clock. A prefetch takes time on the link, and what comes late is waited for, "
            "so hits are fewer than above. Speeds are an upper bound: MoE layers only. A vertical line marks where "
            "experts fill the device's memory (next to the MoE layers' other weights, and an eighth kept free), if it "
            "is within the budgets shown; budgets beyond it are marked.",
            *verdicts(results),
        ],
        charts=charts,
        tables=tables,
        folded=[
            _times_table([r for r in results if r.device == device.name], device, every=True) for device in devices
        ],
    )


def _name_and_style(result: Result, strategies: Sequence[str]) -> tuple[str, str]:
    if result.strategy in REFERENCES:
        return REFERENCES[result.strategy]
    return result.strategy, SERIES[strategies.index(result.strategy)]


def _lines(
    results: Sequence[Result], point: Callable[[Result], tuple[float, float | None]], told: Callable[[Result], str]
) -> list[Line]:
    """Gather each strategy's points over budgets."""
    results = [result for result in results if result.policy != "all_resident"]
    strategies = list(dict.fromkeys(r.strategy for r in results if r.strategy not in REFERENCES))
    found: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: result.budget_slots):
        if point(result)[1] is not None:
            found.setdefault(result.strategy, []).append(result)
    lines = []
    for line in found.values():
        name, style = _name_and_style(line[0], strategies)
        points = tuple((x, y) for x, y in map(point, line) if y is not None)
        lines.append(Line(name, points, style, tuple(map(told, line))))
    return lines


def _told(result: Result) -> str:
    words = (
        f"{result.budget_slots:,} slots ({result.budget_share:.1%}): {result.hit_rate:.1%} hits, "
        f"{result.bytes_ratio:.2f} bytes"
    )
    return words if result.tokens_per_second is None else f"{words}, {speed(result)} tokens/s"


def _over_budgets(
    title: str,
    unit: str,
    results: Sequence[Result],
    value: Callable[[Result], float | None],
    words: Callable[[float], str],
    caption: str,
    marks: Sequence[tuple[float, str]] = (),
) -> Chart:
    lines = _lines(results, lambda result: (result.budget_share, value(result)), _told)
    values = [y for line in lines for _, y in line.points]
    shares = [x for line in lines for x, _ in line.points]
    one_token = results[0].budget_share / results[0].demand_ratio
    x = axis("experts that fit, of all", [0.0, *shares], words=percent, low=0)
    y = axis(unit, values, words=words, low=0, high=1 if words is percent else None)
    picture = line_chart(f"{title}: {unit} by experts that fit", x, y, lines, marks=[(one_token, "one token"), *marks])
    return Chart(title, picture, caption)


def _frontier(results: Sequence[Result]) -> Chart:
    lines = [  # from the largest budget, which moves least, to the smallest: names stand at the right
        Line(line.name, line.points[::-1], line.style, line.told[::-1])
        for line in _lines(results, lambda result: (result.bytes_ratio, result.hit_rate), _told)
    ]
    x = axis("bytes moved / demanded", [x for line in lines for x, _ in line.points], low=0)
    picture = line_chart("Hit rate by bytes moved", x, axis("hit rate", (), words=percent, low=0, high=1), lines)
    return Chart(
        "Hits for bytes",
        picture,
        "Up and to the left is better; each line goes through its budgets. Without prefetch "
        "every hit saves a transfer: those lines coincide.",
    )


def _groups(results: Sequence[Result]) -> list[list[Result]]:
    found: dict[int, list[Result]] = {}
    for result in results:
        found.setdefault(result.budget_slots, []).append(result)
    return list(found.values())


def _rows(results: Sequence[Result], every: bool, cells: Callable[[Result], list[str]]) -> list[list[list[str]]]:
    """Lay out results, a group a budget; with their budget, unless all have one."""
    return [
        [[r.strategy, *([*_budget(r)] if every else []), *cells(r), _lookahead(r)] for r in group]
        for group in _groups(results)
    ]


def _budget(result: Result) -> tuple[str, str]:
    mark = "" if result.fits_device else ", too many"
    return f"{result.budget_slots:,} ({result.budget_share:.1%}){mark}", f"{result.demand_ratio:.2f}"


def _lookahead(result: Result) -> str:
    return NOTHING if result.predictor is None else scores_words(result)


def _headings(every: bool, *names: str) -> list[str]:
    return ["strategy", *(["slots (share)", "slots / demand"] if every else []), *names, "lookahead"]


def _results_table(results: Sequence[Result], *, every: bool = False) -> Table:
    """Lay out results without time, of every budget or of one."""
    rows = _rows(
        results,
        every,
        lambda r: [
            f"{r.hit_rate:.1%}", f"{r.bytes_ratio:.2f}", f"{r.prefetch_transfers:,}", f"{r.wasted_prefetches:,}"
        ],
    )  # fmt: skip
    return Table(
        f"Hits and bytes {_where(results[0], every)}",
        "Bytes: moved over demanded; prefetched and wasted: transfers ahead of demand, and those of them that nothing "
        f"came to need. {SLOTS_BY_DEMAND}",
        _headings(every, "hits", "bytes", "prefetched", "wasted"),
        rows,
    )


def _times_table(results: Sequence[Result], device: Device, *, every: bool = False) -> Table:
    """Lay out results on a device, of every budget or of one."""
    rows = _rows(
        results,
        every,
        lambda r: [
            f"{r.hit_rate:.1%}",
            f"{r.bytes_ratio:.2f}",
            speed(r),
            *(NOTHING if time is None else f"{time:.1f}" for time in (r.stall_ms_per_token, r.token_ms_p95)),
            f"{r.late_hits / max(r.accesses, 1):.1%}",
        ],
    )
    return Table(
        f"{device.name} {_where(results[0], every)}",
        "Stall and p95 in milliseconds a token; late: asked for, and not there when needed; all_resident has all "
        f"slots. {_memory(results[0])}{SLOTS_BY_DEMAND} The device's numbers come from: {device.source or 'not said'}.",
        _headings(every, "hits", "bytes", "tokens/s", "stall, ms", "p95, ms", "late"),
        rows,
    )


def _memory(result: Result) -> str:
    """Say what a device has room for, where that is not all."""
    return f"Room for {result.device_slots:,} experts; more are too many. " if result.device_slots else ""


def verdicts(results: Sequence[Result]) -> list[str]:
    """Say in a sentence for each device whether prefetching pays there, at the budget of the summary.

    The fastest strategy that prefetches with the predictor is compared with the fastest that does not prefetch: LRU, or
    a policy that reads the same scores.
    """
    found = []
    for device in dict.fromkeys(result.device for result in results if result.device is not None):
        shown = at_headline([result for result in results if result.device == device])
        prefetching = [result for result in shown if result.predictor is not None and result.prefetch != "none"]
        without = [result for result in shown if result.prefetch == "none" and _is_online(result)]
        if prefetching and any(result.tokens_per_second for result in without):
            found.append(_verdict(_fastest(prefetching), _fastest(without)))
    return found


def _is_online(result: Result) -> bool:
    """Tell what a runtime could do from references that know the future."""
    return result.predictor is not None or result.strategy == "lru"


def _fastest(results: Sequence[Result]) -> Result:
    return max(results, key=lambda result: result.tokens_per_second or 0.0)


def _verdict(best: Result, without: Result) -> str:
    assert best.tokens_per_second is not None
    assert without.tokens_per_second is not None
    gain = best.tokens_per_second / without.tokens_per_second - 1
    name = "LRU" if without.strategy == "lru" else without.strategy
    speeds = f"{best.strategy} makes {speed(best)} tokens/s where {name} without prefetch makes {speed(without)}"
    where = f"On {best.device}, with {best.budget_slots:,} slots, prefetching"
    if gain >= WORTH_SAYING:
        return f"{where} pays: {speeds} ({gain:+.0%})."
    if gain <= -WORTH_SAYING:
        return f"{where} does not pay, it costs: {speeds} ({gain:+.0%})."
    return f"{where} does not pay: {speeds}, within {WORTH_SAYING:.0%} of each other."


def _where(result: Result, every: bool) -> str:
    """Name the budget of a table."""
    if every:
        return "at every budget"
    return f"at {result.budget_slots:,} slots ({result.budget_share:.1%}), slots / demand {result.demand_ratio:.2f}"


def speed(result: Result) -> str:
    """Write tokens per second: with one decimal below 1,000, as whole numbers from there on."""
    value = result.tokens_per_second
    return NOTHING if value is None else f"{value:,.0f}" if value >= WHOLE_FROM else f"{value:.1f}"
