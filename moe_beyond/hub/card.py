"""Cards for the Hub: the local card, with added metadata before its text and a usage section after it."""

import textwrap
from typing import TypeVar

import yaml
from huggingface_hub import DatasetCard, ModelCard

from moe_beyond.errors import UserError

TAGS = ("moe-beyond", "moe", "mixture-of-experts")
BEGIN, END = "<!-- from the Hub -->", "<!-- end of from the Hub -->"
"""Markers of the usage section; a second push replaces the section of the first."""

Card = TypeVar("Card", ModelCard, DatasetCard)


def read_card(kind: type[Card], text: str, source: str) -> Card:
    """Parse a card.

    Args:
        kind: Class of the card: model or data set.
        text: Text of the card; missing metadata is read as empty.
        source: File name for error messages.

    Raises:
        UserError: The metadata cannot be read.
    """
    try:
        return kind(text if text.lstrip().startswith("---") else f"---\n{{}}\n---\n\n{text}")
    except (yaml.YAMLError, ValueError, TypeError) as error:
        reason = textwrap.shorten(str(error), 160)
        raise UserError(
            f"{source}: the metadata between the lines --- cannot be read ({reason}); correct it"
        ) from error


def add_tags(card: ModelCard | DatasetCard, *tags: str) -> None:
    """Add tags to a card's metadata, next to its own."""
    own = card.data.get("tags") or []
    card.data["tags"] = list(dict.fromkeys([*([own] if isinstance(own, str) else own), *TAGS, *tags]))


def add_usage(card: ModelCard | DatasetCard, usage: str) -> None:
    """Add a usage section after a card's text; it replaces the section of an earlier push."""
    before, marker, rest = card.text.partition(BEGIN)
    after = rest.partition(END)[2].strip() if marker else ""
    parts = [before.rstrip(), f"{BEGIN}\n{usage.strip()}\n{END}", after]
    card.text = "\n\n".join(part for part in parts if part) + "\n"
