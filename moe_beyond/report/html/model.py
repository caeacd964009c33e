"""What a page is made of."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

NOTHING = "-"
"""Stands in a table where there is no figure."""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: What it shows, in a few words.
        caption: How to read it.
        headings: Of the columns; the first names the rows.
        groups: Rows that belong together, each a list of cells, the first its name.
        texts: Columns that hold words, besides the first: they stand to the left, numbers to the right.
    """

    title: str
    caption: str
    headings: Sequence[str]
    groups: Sequence[Sequence[Sequence[str]]]
    texts: Sequence[int] = ()


@dataclass(frozen=True)
class Chart:
    """A picture with its heading and what to see in it."""

    title: str
    picture: Markup
    caption: str = ""


@dataclass(frozen=True)
class Key:
    """A figure of the summary: what it is, its value, and what it stands beside."""

    name: str
    value: str
    beside: str


@dataclass(frozen=True)
class Section:
    """A part of the page: prose, then facts, charts and tables, then tables that are folded away.

    Attributes:
        name: Where links lead.
        title: Its heading.
        prose: Paragraphs.
        facts: Names and values.
        charts: Small ones, side by side.
        wide: Charts as wide as they are, scrolled where there is no room.
        tables: In sight.
        folded: Behind a line that opens them.
        listing: Text as it is, its title first, folded away too.
        shades: Samples of a heat map's shades, with what each stands for.
    """

    name: str
    title: str
    prose: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
    charts: Sequence[Chart] = ()
    wide: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    folded: Sequence[Table] = ()
    listing: tuple[str, str] | None = None
    shades: Sequence[tuple[Markup, str]] = ()
