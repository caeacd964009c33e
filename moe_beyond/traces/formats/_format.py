"""The definition of a format, from which the command line, its help and its completion follow."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_beyond.traces.reader import TraceSet


@dataclass(frozen=True)
class Option:
    """An option of `moe-beyond import` that only some formats have.

    Attributes:
        name: Keyword of the reader; ``sequence_tokens`` becomes ``--sequence-tokens``.
        type: Type of the value.
        metavar: Placeholder of the value in help.
        help: Description of the value and its default.
    """

    name: str
    type: type
    metavar: str
    help: str

    @property
    def flag(self) -> str:
        """The option on the command line."""
        return f"--{self.name.replace('_', '-')}"


WORKERS = Option("workers", int, "N", "processes that read the files; the trace set is the same (default: 1)")
"""Option of formats of many files."""


@dataclass(frozen=True)
class Format:
    """A file format of another tool, with a reader, a writer or both.

    Attributes:
        summary: The tool and its files, in one line.
        reader: Turns a recording into a trace set, with the arguments of `import_recording` after its first; None if
            the format cannot be read. `recording_reader` makes one of a function that returns a `Recording`.
        writer: Writes a trace set, given the set, the output path and the name of a split or None; None if the format
            cannot be written.
        fields: Fields of a recording and files next to it, one line each, for the help of `moe-beyond import`.
        example: Three lines of a recording.
        options: Further keywords of the reader.
        describes_model: Whether a recording describes its model, so that the reader's preset may be None (default:
            False).
    """

    summary: str
    reader: "Callable[..., TraceSet] | None" = None
    writer: "Callable[..., None] | None" = None
    fields: tuple[str, ...] = ()
    example: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()
    describes_model: bool = False

    def describe(self, name: str) -> list[str]:
        """Return the lines of help.

        Args:
            name: Name of the format.
        """
        example = ("  example:", *(f"    {line}" for line in self.example)) if self.example else ()
        return [f"{name}: {self.summary}", *(f"  {field}" for field in self.fields), *example]
