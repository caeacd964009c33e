"""The parts of a page: sections with text, facts, charts and tables."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: Title in a few words.
        caption: Definitions of the columns.
        headings: Column headings; the first column names the rows.
        groups: Groups of rows, separated by a line; a row is a list of cells, the first cell is its name.
        texts: Indices of text columns after the first; text is aligned to the left, numbers to the right.
    """

    title: str
    caption: str
    headings: Sequence[str]
    groups: Sequence[Sequence[Sequence[str]]]
    texts: Sequence[int] = ()


@dataclass(frozen=True)
class Chart:
    """A picture with its title and caption."""

    title: str
    picture: Markup
    caption: str = ""


@dataclass(frozen=True)
class KeyFigure:
    """A number of the summary.

    Attributes:
        name: Name of the number, with its lookahead or strategy.
        value: The formatted number.
        context: Baselines and conditions that the number must be read with.
    """

    name: str
    value: str
    context: str


@dataclass(frozen=True)
class Section:
    """A section of a page, with its parts in the order of the page.

    Attributes:
        name: Anchor of links.
        title: Heading of the section.
        prose: Paragraphs, in order.
        facts: Names and values.
        charts: Small charts, in a grid.
        wide: Charts at full width, scrolled on narrow screens.
        shades: Legend of a heat map: a sample of each shade and its text.
        tables: Tables that are always visible.
        folded: Tables that a click opens.
        listing: Title and text of a preformatted listing that a click opens.
    """

    name: str
    title: str
    prose: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
    charts: Sequence[Chart] = ()
    wide: Sequence[Chart] = ()
    shades: Sequence[tuple[Markup, str]] = ()
    tables: Sequence[Table] = ()
    folded: Sequence[Table] = ()
    listing: tuple[str, str] | None = None
