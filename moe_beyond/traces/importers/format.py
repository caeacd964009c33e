"""What ``moe-beyond import --help`` says about a format."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """A format of recordings, described so that a stranger can write it.

    Attributes:
        summary: What writes it, and which files it is.
        fields: Its fields, or what lies next to it, a line each.
        example: Three lines of it.
    """

    summary: str
    fields: tuple[str, ...]
    example: tuple[str, ...]

    def describe(self, name: str) -> list[str]:
        """Return the lines of help."""
        lines = (*(f"  {field}" for field in self.fields), "  example:", *(f"    {line}" for line in self.example))
        return [f"{name}: {self.summary}", *lines]
