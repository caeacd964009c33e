"""Lines on standard error."""

import sys

from moe_beyond.safe_text import printable
from moe_beyond.urls import without_secrets


def notify(line: str) -> None:
    """Print a line on standard error, safe for a terminal and without the secrets of URLs."""
    print(printable(without_secrets(line)), file=sys.stderr)


def print_error(error: Exception | str) -> None:
    """Print the line of an error."""
    notify(f"moe-beyond: error: {error}")
