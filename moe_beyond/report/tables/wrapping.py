"""Tables that fit the terminal without cutting a number."""

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.style import Style
from rich.table import Column, Table
from rich.text import Text

from moe_beyond.safe_text import printable_lines


@dataclass(frozen=True)
class _Width:
    """Width of a table's column in characters, without padding.

    Attributes:
        natural: Width without line breaks.
        cells: Width with line breaks in the heading.
        least: Width with line breaks in the heading and in text cells.
    """

    natural: int
    cells: int
    least: int


class WrappedTable(Table):
    """A table that never cuts a cell or a heading, and shows all text as it is: neither markup nor terminal controls.

    If the table is too wide, it is fitted in this order:

    1. Headings are broken at spaces, then text cells. Numbers are never broken.
    2. Columns continue in further tables below, each with the key columns.
    3. If the key columns and one other column do not fit, each row becomes a list of names and values.

    Args:
        title: Title (default: none).
        keys: Indices of the columns that identify a row (default: the first).
        show_header: Whether columns have headings (default: true).
        min_width: Minimum width of the table in characters, if the terminal is wide enough (default: none).
    """

    def __init__(
        self,
        title: str | None = None,
        keys: Sequence[int] = (0,),
        *,
        show_header: bool = True,
        min_width: int | None = None,
    ) -> None:
        super().__init__(title=title, show_header=show_header, min_width=min_width, caption_justify="left")
        self.keys = tuple(keys)

    def add_row(
        self, *cells: RenderableType | None, style: str | Style | None = None, end_section: bool = False
    ) -> None:
        """Add a row; texts are shown as they are."""
        super().add_row(*(cell and _plain(cell) for cell in cells), style=style, end_section=end_section)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render one table, several tables, or lists."""
        widths = [self._width(console, options, column) for column in self.columns]
        groups = self._groups([width.least for width in widths], options.max_width)
        if groups is None:
            yield from self._lists()
            return
        for number, group in enumerate(groups):
            part = self._part(
                group, _fit_widths([widths[index] for index in group], self._available_width(group, options.max_width))
            )
            title = self.title if number == 0 else "(continued)"
            part.title = title and _plain(title, "table.title")
            part.caption = None if len(groups) > 1 else self.caption and _plain(self.caption, "table.caption")
            yield from super(WrappedTable, part).__rich_console__(console, options)
        if len(groups) > 1 and self.caption:  # at the width of the terminal, not of the last part
            yield _plain(self.caption, "table.caption")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Measure as the full width; rendering decides how columns fit."""
        return Measurement(min(1, options.max_width), options.max_width)

    def _width(self, console: Console, options: ConsoleOptions, column: Column) -> _Width:
        heading = _measured(console, options, column.header) if self.show_header else Measurement(0, 0)
        cells = [_measured(console, options, cell) for cell in column._cells]  # noqa: SLF001  (rich has no public access)
        widest = max((cell.maximum for cell in cells), default=0)
        word = max((cell.minimum for cell in cells), default=0)
        unbroken = widest if column.justify == "right" or column.no_wrap else word
        floor = column.min_width or 0
        natural, whole = max(widest, heading.maximum, floor), max(widest, heading.minimum)
        return _Width(natural, whole, max(unbroken, heading.minimum))

    def _available_width(self, group: Sequence[int], width: int) -> int:
        """Return the width that borders and padding leave for cells."""
        return width - 3 * len(group) - 1

    def _groups(self, least: Sequence[int], width: int) -> list[list[int]] | None:
        """Distribute the columns over tables, in order; None if a column does not fit next to the key columns."""
        columns, groups = range(len(least)), list[list[int]]()
        if self._fits(columns, least, width):
            return [list(columns)]
        for index in sorted(set(columns) - set(self.keys)):
            if groups and self._fits([*groups[-1], index], least, width):
                groups[-1].append(index)
            elif self._fits([*self.keys, index], least, width):
                groups.append([*self.keys, index])
            else:
                return None
        groups = [sorted(group) for group in groups]
        return groups or None

    def _fits(self, group: Sequence[int], least: Sequence[int], width: int) -> bool:
        return sum(least[index] for index in group) <= self._available_width(group, width)

    def _part(self, group: Sequence[int], widths: Sequence[int]) -> "WrappedTable":
        part = copy(self)
        part.columns = [
            replace(
                self.columns[index],
                header=_plain(self.columns[index].header),
                _index=number,
                width=width,
                min_width=None,
                no_wrap=False,
                overflow="fold",
            )
            for number, (index, width) in enumerate(zip(group, widths, strict=True))
        ]
        total_width = sum(widths) + 3 * len(group) + 1
        part.min_width = self.min_width if self.min_width and self.min_width <= total_width else None
        return part

    def _lists(self) -> Iterable[Text]:
        """Yield each row as lines ``name: value``."""
        if self.title:
            yield _plain(self.title)
        names = [" ".join(_plain(column.header).plain.split()) for column in self.columns]
        for row in zip(*(column._cells for column in self.columns), strict=True):  # noqa: SLF001
            lines = (
                f"{name}: {cell}" if name else cell
                for name, cell in zip(names, (_plain(each).plain for each in row), strict=True)
            )
            yield Text("\n".join(["", *lines]), overflow="fold")
        if self.caption:
            yield Text("\n").append_text(_plain(self.caption))


def _measured(console: Console, options: ConsoleOptions, cell: object) -> Measurement:
    """Measure a cell without the terminal's limit: its longest line and its longest word."""
    text = _plain(cell)
    return (
        Measurement.get(console, options.update(width=10**6, max_width=10**6), text)
        if text.plain
        else Measurement(0, 0)
    )


def _plain(cell: object, style: str = "") -> Text:
    """Return a cell, a heading, a title or a caption as text without markup."""
    return cell if isinstance(cell, Text) else Text(printable_lines(str(cell)), style=style)


def _fit_widths(widths: Sequence[_Width], available_width: int) -> list[int]:
    """Narrow the columns with the most spare width, first by breaking headings, then text, until the table fits."""
    fitted = [width.natural for width in widths]
    for bounds in ([width.cells for width in widths], [width.least for width in widths]):
        while sum(fitted) > available_width:
            spare = [width - bound for width, bound in zip(fitted, bounds, strict=True)]
            if max(spare) <= 0:
                break
            fitted[spare.index(max(spare))] -= 1
    return fitted
