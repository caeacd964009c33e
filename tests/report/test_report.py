"""Tables and plots show the values of their results."""

import io
from dataclasses import replace

import numpy as np
import pytest
from _helpers.common import TINY
from _helpers.scoring import seer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from moe_beyond.evaluation.engine import evaluate
from moe_beyond.evaluation.results import Unavailable
from moe_beyond.evaluation.sizing import SizingResult, parse_target
from moe_beyond.evaluation.strategies import grid, with_baselines
from moe_beyond.metrics import FIGURES, LookaheadMetrics
from moe_beyond.report.labels import score_lookahead, strategy_label
from moe_beyond.report.plots.files import TIMELINE_TOKEN, replay_plots
from moe_beyond.report.tables.intervals import intervals_tables
from moe_beyond.report.tables.results import results_table, unavailable_lines
from moe_beyond.report.tables.sizing import sizing_table
from moe_beyond.simulator import ReplaySettings, Result
from moe_beyond.simulator.devices import load_device
from moe_beyond.traces.reader import TraceSet

DEVICE = load_device("rtx3060,link_gb_per_s=0.003,memory_gb_per_s=0.02")
SOURCE = seer("seer", (1, 2))


def text_of(table: Table, width: int = 200) -> str:
    said = io.StringIO()
    Console(width=width, file=said).print(table)
    return said.getvalue()


def replayed(traces: TraceSet, slots: list[int], timed: bool) -> tuple[list[ReplaySettings], list[Result]]:
    common = ReplaySettings(32, device=DEVICE if timed else None)
    asked = grid(common, slots, ["lru"], ["top2"], SOURCE, [2])
    lines = with_baselines(asked, common, TINY)
    return lines, evaluate(traces, lines, sources=[SOURCE]).results


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


AHEAD = "lru + top2, seer, lookahead 2"
LINES = [AHEAD, "LRU", "Belady (optimum without prefetching)", "best static choice (selected in hindsight)"]
TIMED_LINES = [*LINES, "clairvoyant prefetch (knows the future)"]


@pytest.mark.parametrize("timed", [False, True])
def test_pictures_draw_every_strategy(trace_set: TraceSet, timed: bool) -> None:
    lines, results = replayed(trace_set, [16, 8, 24], timed)
    drawn = replay_plots(trace_set, lines, results, [SOURCE], None, None)
    assert list(drawn) == ["budgets", "frontier", "layers", *["timeline"] * timed]
    names = TIMED_LINES if timed else LINES
    curves, frontier = drawn["budgets"], drawn["frontier"]
    assert legend(curves) == legend(frontier) == names
    assert len(curves.axes) == (3 if timed else 2)
    figures = ["hit_rate", "bytes_ratio", "tokens_per_second"]
    for axes, field in zip(curves.axes, figures, strict=False):
        plotted = [line for line in axes.get_lines() if len(line.get_xdata()) == 3]
        assert len(plotted) == len(names)
        for line, name in zip(plotted, names, strict=True):
            points = sorted((r.budget_share, getattr(r, field)) for r in results if strategy_label(r) == name)
            scale = 100 if field == "hit_rate" else 1
            np.testing.assert_allclose(line.get_xdata(), [100 * share for share, _ in points])
            np.testing.assert_allclose(line.get_ydata(), [scale * value for _, value in points])
    # By layer, at the smallest budget.
    heat = drawn["layers"].axes[0]
    assert [label.get_text() for label in heat.get_yticklabels()] == names
    assert [label.get_text() for label in heat.get_xticklabels()] == ["1", "2", "3", "4"]
    smallest = [r for r in results if r.budget_slots == 8]
    rates = [[100 * layer["hit_rate"] for layer in result.per_layer] for result in smallest]
    np.testing.assert_allclose(heat.get_images()[0].get_array(), rates)
    assert "8 slots" in drawn["layers"].get_suptitle()


def test_a_timeline_shows_the_first_strategys_token(trace_set: TraceSet) -> None:
    lines, results = replayed(trace_set, [8], True)
    figure = replay_plots(trace_set, lines, results, [SOURCE], None, None)["timeline"]
    assert figure.get_suptitle() == f"lru + top2, 8 slots, {DEVICE.name}: token {TIMELINE_TOKEN}"
    bars = {bar.get_label(): bar.get_paths() for bar in figure.axes[0].collections}
    assert set(bars) == {"compute", "stall", "demand transfer", "prefetch"}
    assert 8 <= len(bars["compute"]) <= 8 + len(bars["stall"])  # two per layer, and one after a stall between experts
    assert bars["prefetch"]

    def milliseconds(name: str) -> float:
        return sum(path.vertices[:, 0].max() - path.vertices[:, 0].min() for path in bars[name])

    # Computing and stalls fill the time of the token. At the full bandwidth weights take 2.8 ms, and a launch 55 us.
    assert milliseconds("compute") == pytest.approx(2.8 / 0.8 + 4 * 0.055)
    assert milliseconds("compute") + milliseconds("stall") == pytest.approx(figure.axes[0].get_xlim()[1])


def test_only_tables_of_a_device_have_times(trace_set: TraceSet) -> None:
    for timed in (False, True):
        _, results = replayed(trace_set, [8], timed)
        said = text_of(results_table(results, TINY))
        assert ("tok/s" in said, "p95" in said, f"timing model of {DEVICE.name}" in said) == (timed,) * 3
        for result in results:
            rows = [[cell.strip() for cell in line.split("│")] for line in said.splitlines()]
            [row] = [row for row in rows if result.strategy in row]
            assert {f"{result.hit_rate:.1%}", f"{result.bytes_ratio:.2f}"} <= set(row)
            if timed:
                assert {f"{result.tokens_per_second:.1f}", f"{result.stall_ms_per_token:.1f}"} <= set(row)


def test_a_pipes_table_cuts_no_figure_off(trace_set: TraceSet) -> None:
    """120 columns hold it, with the longest mark and tens of thousands of tokens a second."""
    _, results = replayed(trace_set, [8], True)
    fast = replace(results[0], tokens_per_second=64285.7, lookahead=0, causal=False, wasted_prefetches=1_234_567)
    said = text_of(results_table([fast, *results[1:]], TINY), 120)
    assert "…" not in said
    assert "64285.7" in said


def result_of(traces: TraceSet, **changes: object) -> Result:
    return replace(replayed(traces, [8], False)[1][0], **changes)


def test_leaks_are_marked(trace_set: TraceSet) -> None:
    assert score_lookahead(result_of(trace_set)) == "2"
    assert score_lookahead(result_of(trace_set, lookahead=None)) == "all"
    for leak, words in (({"lookahead": 0}, "reads the router's input"), ({"causal": False}, "sees later tokens")):
        result = result_of(trace_set, **leak)
        assert "(LEAK" in score_lookahead(result)
        assert f"LEAK: the predictor {words}" in " ".join(text_of(results_table([result], TINY)).split())
    assert "(LEAK" in score_lookahead(result_of(trace_set, lookahead=None, causal=False))


@pytest.mark.parametrize(("lookaheads", "prefetch", "asked"), [((0,), "none", None), ((0, 1), "top2", 1)])
def test_a_policy_that_reads_the_routers_input_is_marked(
    trace_set: TraceSet, lookaheads: tuple[int, ...], prefetch: str, asked: int | None
) -> None:
    """The policy belief reads every lookahead, whichever the prefetcher uses."""
    source = seer("seer", lookaheads)
    settings = grid(ReplaySettings(32), [8], ["belief"], [prefetch], source, [asked] if asked else [])
    [result] = evaluate(trace_set, settings, sources=[source]).results
    assert "LEAK" in text_of(results_table([result], TINY))


def test_unavailable_strategies_and_bottlenecks_are_shown(trace_set: TraceSet) -> None:
    missing = [Unavailable("a", "needs x"), Unavailable("b", "needs y")]
    assert unavailable_lines(missing) == ["a: not available: needs x", "b: not available: needs y"]
    fits, fails = result_of(trace_set, hit_rate=0.9123, budget_slots=16), result_of(trace_set, hit_rate=0.5)
    sizings = [SizingResult("late", fails, "link: too slow"), SizingResult("good", fits, None)]
    said = text_of(sizing_table(sizings, parse_target("90%"), TINY, 2e9))
    good, late = [line for line in said.splitlines() if "│ good" in line or "│ late" in line]  # what works first
    assert [word in good for word in ("good", "16 (", "32.00", "91.2%")] == [True] * 4
    assert [word in late for word in ("late", "none", "at best 50.0%", "link: too slow")] == [True] * 4
    assert "GB = 1e9 bytes" in " ".join(said.split())
    small = text_of(sizing_table(sizings, parse_target("90%"), TINY, 2e6))
    assert "32.00" in next(line for line in small.splitlines() if "│ good" in line)
    assert "MB = 1e6 bytes" in " ".join(small.split())


def test_intervals_mark_leaks(trace_set: TraceSet) -> None:
    result = result_of(trace_set, lookahead=0, intervals={"hit_rate": (0.1, 0.2)})
    row = LookaheadMetrics(
        lookahead=0, k=2, tokens=1, by_layer=(), reliability=(), intervals={"recall_at_k": [0.4, 0.6]},
        **dict.fromkeys(FIGURES, 0.5),
    )  # fmt: skip
    metrics = [row]
    assert [text_of(table).count("0 (LEAK)") for table in intervals_tables(metrics, [result], 100)] == [1, 1]
