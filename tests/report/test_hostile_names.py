"""Names that control a terminal, look like markup or reorder text: tables and pages show them, and obey nothing."""

from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from moe_beyond.report.html.build import _template
from moe_beyond.report.html.page import Section
from moe_beyond.report.html.svg import Axis, Line, line_chart
from moe_beyond.report.tables.wrapping import WrappedTable
from moe_beyond.safe_text import UNPRINTABLE, printable, printable_lines

NAMES = [
    "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "a\r\nmoe-beyond: error: fake", "[/foo] [bold", "[red]x[/red]", "\x9b2J",
    "\u202ereversed", "half \ud800", "nul \x00", ":smile:", "<script>alert(1)</script>", "'\"><img src=x onerror=a>",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [20, 60, 120])
def test_a_table_shows_any_name_as_text(name: str, width: int) -> None:
    table = WrappedTable(title=name)
    table.add_column(name)
    table.add_column("count", justify="right")
    table.add_row(name, "1")
    table.caption = name
    file = StringIO()
    Console(file=file, width=width, force_terminal=False).print(table)
    text = file.getvalue()
    assert UNPRINTABLE.search(text.replace("\n", "")) is None
    text.encode()
    shown = printable(name.split("\n")[0])
    assert shown.split()[0][:8] in text


@given(st.text(st.characters(), max_size=30))
def test_printable_text_is_one_line_that_any_terminal_can_show(text: str) -> None:
    shown = printable(text)
    assert UNPRINTABLE.search(shown) is None
    shown.encode()
    assert printable(shown) == shown
    assert printable_lines(text).count("\n") == text.count("\n")


@pytest.mark.parametrize("name", NAMES)
def test_a_page_shows_any_name_as_text(name: str) -> None:
    section = Section("x", name, prose=(name,), facts=[(name, name)], listing=(name, f"a\n  {name}\n"))
    page = _template().render(
        version="0", title=name, lead=name, warnings=[name], keys=[], verdict=name, conditions=name,
        measured={name: name}, sections=[section],
    )  # fmt: skip
    page.encode()
    body = page.partition("<body>")[2]
    assert "<script" not in body
    assert "<img" not in body
    assert UNPRINTABLE.search(body.replace("\n", "")) is None
    assert "a\n  " in body  # a listing keeps its lines


def test_a_chart_shows_any_name_as_text() -> None:
    for name in NAMES:
        axis = Axis(name, 0, 1, (0, 1))
        chart = line_chart(name, axis, axis, [Line(name, ((0, 0), (1, 1)), "s0", (name, name))])
        chart.encode()
        assert "<script" not in chart
        assert UNPRINTABLE.search(chart.replace("\n", "")) is None
