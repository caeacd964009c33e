"""No table cuts a figure or a heading, however narrow the terminal."""

import io
import re
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
from _helpers.common import tiny_traces
from _helpers.scoring import seer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from moe_beyond.evaluation.engine import evaluate
from moe_beyond.evaluation.results import CheckpointEvaluation, Evaluation
from moe_beyond.evaluation.sizing import SizingResult, parse_target
from moe_beyond.evaluation.strategies import grid, with_baselines
from moe_beyond.geometry import load_preset
from moe_beyond.metrics import FIGURES, LookaheadMetrics
from moe_beyond.pretrained import pretrained_figures
from moe_beyond.report.tables.devices import device_rows, devices_tables
from moe_beyond.report.tables.inspection import inspection_tables
from moe_beyond.report.tables.intervals import intervals_tables
from moe_beyond.report.tables.pretrained import pretrained_tables
from moe_beyond.report.tables.results import checkpoints_table, metrics_table, results_table
from moe_beyond.report.tables.sizing import sizing_table
from moe_beyond.report.tables.wrapping import WrappedTable
from moe_beyond.simulator import ReplaySettings
from moe_beyond.simulator.devices import DEVICES, load_device
from moe_beyond.traces.analysis.contrast import contrast_traces
from moe_beyond.traces.analysis.statistics import summarize
from moe_beyond.traces.analysis.summary import GateMass, LayerPhases, PhaseCounts, PhaseSummary

WIDE = 400
NUMBER = re.compile(r"[+-]?\d[\d.,]*%?")
WORD = re.compile(r"[\w.,%@/+-]+")


def text_of(table: Table, width: int) -> str:
    said = io.StringIO()
    Console(width=width, file=said).print(table)
    return said.getvalue()


@cache
def whole(table: Table) -> str:
    return text_of(table, WIDE)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Table]:
    """One of every kind, with the longest names and figures that they may have."""
    traces = tiny_traces(tmp_path_factory.mktemp("tables") / "a", sequences=8)
    other = tiny_traces(tmp_path_factory.mktemp("tables") / "b", sequences=8, seed=1)
    geometry, source = traces.geometry, seer("seer", (1, 2))
    device = load_device("rtx4060-laptop")
    found: dict[str, Table] = {}
    for name, common in (("timed", ReplaySettings(32, device=device)), ("untimed", ReplaySettings(32))):
        asked = grid(common, [8, 16], ["lru", "belief"], ["top2,p>0.125"], source, [1, 2])
        results = evaluate(traces, with_baselines(asked, common, geometry), sources=[source]).results
        big = {"tokens_per_second": 64285.7, "stall_ms_per_token": 12345.6} if name == "timed" else {}
        large = replace(results[0], prefetch_transfers=123_456_789, wasted_prefetches=98_765_432, lookahead=0, **big)
        found[f"replay, {name}"] = results_table([large, *results[1:]], geometry)
    sized = evaluate(
        traces, with_baselines(asked, common, geometry), sources=[source], measure=source, bootstrap_draws=100
    )
    found |= {f"intervals: {t.title}": t for t in intervals_tables(sized.metrics, sized.results, 100)}
    figures = {**dict.fromkeys(FIGURES, 0.98765), "nll": 123.45}
    row = LookaheadMetrics(lookahead=1, k=6, tokens=1_234_567, by_layer=(), reliability=(), causal=False, **figures)
    rows = [replace(row, lookahead=lookahead) for lookahead in (1, 2, 3, "next")]
    found["metrics"] = metrics_table(rows)
    checkpoints = [
        CheckpointEvaluation(f"epoch={n}-step={n}00000.ckpt", n, 100_000 * n, Evaluation(rows, results))
        for n in (9, 10)
    ]
    found["checkpoints"] = checkpoints_table(checkpoints, geometry)
    sizings = [
        SizingResult("clairvoyant prefetch", results[0], "link: 12.34 GB/s is too slow"),
        SizingResult("lru", results[1], None),
    ]
    found["plan"] = sizing_table(sizings, parse_target("90%"), geometry, 123_456_789)
    summary, difference = summarize(traces), contrast_traces(traces, other)
    # The name of a temporary folder has digits of its own.
    difference = replace(difference, other={**difference.other, "traces": "traces/other"})
    popularity = [0.5, 0.25, 0.125, 0.125]
    phase = PhaseSummary(0.98765, 0.12345, popularity)
    phases, gate_mass = LayerPhases(phase, phase, 0.1, 0.2), GateMass([0.6, 0.4], popularity)
    summary = replace(
        summary,
        phases=PhaseCounts(1_234, 123_456, 234_567),
        by_layer=tuple(replace(layer, phases=phases, gate_mass=gate_mass) for layer in summary.by_layer),
    )
    found |= {f"inspection: {table.title}": table for table in inspection_tables(summary, difference)}
    preset = load_preset("deepseek-v2-lite").geometry
    rows = device_rows([load_device(name) for name in DEVICES], preset, 16.0)
    found |= {f"devices: {table.title}": table for table in devices_tables(rows, preset, 16.0)}
    found |= {f"pretrained: {table.title}": table for table in pretrained_tables(pretrained_figures())}
    return found


def lost(pattern: re.Pattern[str], table: Table, width: int) -> Counter[str]:
    """Words of a table at full width that are missing or cut at a given width."""
    return Counter(pattern.findall(whole(table))) - Counter(pattern.findall(text_of(table, width)))


@settings(max_examples=3, deadline=None)
@given(width=st.integers(80, 140))
@example(80)
@example(100)
def test_every_word_and_figure_is_there_in_full(tables: dict[str, Table], width: int) -> None:
    for name, table in tables.items():
        assert not lost(WORD, table, width), name
        said = text_of(table, width)
        assert "…" not in said, name
        assert max(map(len, said.splitlines())) <= width, name
        for line in said.splitlines():  # a column without width would have nothing between its lines
            assert "┳┳" not in line, name
            assert "││" not in line, name


@settings(max_examples=3, deadline=None)
@given(width=st.integers(24, 79))
@example(40)
def test_every_figure_is_there_on_a_narrow_terminal(tables: dict[str, Table], width: int) -> None:
    for name, table in tables.items():
        if not name.startswith("pretrained"):  # names of 41 characters hold digits, and have to be broken
            assert not lost(NUMBER, table, width), name
        assert "…" not in text_of(table, width), name
        assert max(map(len, text_of(table, width).splitlines())) <= width, name


def small() -> WrappedTable:
    table = WrappedTable("t", keys=(1,))
    table.add_column("a figure", justify="right")
    table.add_column("name")
    table.add_column("b", justify="right")
    table.add_row("1234.5", "long name", "12.5%")
    table.caption = "the end"
    return table


def test_headings_break_before_names_and_columns_continue_below() -> None:
    def cells(width: int) -> list[list[str]]:
        lines = [line for line in text_of(small(), width).splitlines() if line[0] in "┃│"]
        return [[cell.strip() for cell in re.split("[┃│]", line)[1:-1]] for line in lines]

    assert cells(33) == [["a figure", "name", "b"], ["1234.5", "long name", "12.5%"]]
    assert cells(30) == [["a", "", ""], ["figure", "name", "b"], ["1234.5", "long name", "12.5%"]]
    assert cells(25)[-2:] == [["1234.5", "long", "12.5%"], ["", "name", ""]]
    assert cells(20) == [
        ["a", ""], ["figure", "name"], ["1234.5", "long"], ["", "name"],
        ["name", "b"], ["long", "12.5%"], ["name", ""],
    ]  # fmt: skip
    said = text_of(small(), 20)
    assert said.count("(continued)") == 1
    assert said.rstrip().endswith("the end")


def test_a_terminal_too_narrow_for_columns_gets_lists() -> None:
    assert text_of(small(), 10) == "t\n\na figure: \n1234.5\nname: long\nname\nb: 12.5%\n\nthe end\n"


def test_a_wide_table_is_laid_out_as_rich_does_it() -> None:
    """A table that fits is laid out as by rich."""
    table = small()
    plain = Table(title=table.title, caption=table.caption, caption_justify="left")
    for column in table.columns:
        plain.add_column(column.header, justify=column.justify)
    plain.add_row("1234.5", "long name", "12.5%")
    assert text_of(table, 120) == text_of(plain, 120)
