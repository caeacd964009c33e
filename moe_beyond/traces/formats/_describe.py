"""Descriptions of formats in ``moe-beyond import --help``."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """A format of recordings, described so that a stranger can write it.

    Attributes:
        summary: The tool that writes it, and its files.
        fields: Its fields and the files next to it, one line each.
        example: Three lines of a recording.
    """

    summary: str
    fields: tuple[str, ...]
    example: tuple[str, ...]

    def describe(self, name: str) -> list[str]:
        """Return the lines of help."""
        lines = (*(f"  {field}" for field in self.fields), "  example:", *(f"    {line}" for line in self.example))
        return [f"{name}: {self.summary}", *lines]
