"""A card as the Hub shows it: the local card, with metadata before its prose and how to use it after."""

import textwrap
from typing import TypeVar

import yaml
from huggingface_hub import DatasetCard, ModelCard

from moe_beyond.errors import UserError

TAGS = ("moe-beyond", "moe", "mixture-of-experts")
BEGIN, END = "<!-- from the Hub -->", "<!-- end of from the Hub -->"
"""Between these stands what a push adds to the prose; a card that was pulled is pushed again without piling up."""

Card = TypeVar("Card", ModelCard, DatasetCard)


def read_card(kind: type[Card], text: str, source: str) -> Card:
    """Read a card.

    Args:
        kind: Which the Hub takes it for.
        text: The card; without metadata it gets empty ones.
        source: The file, for error messages.

    Raises:
        UserError: Its metadata cannot be read.
    """
    try:
        return kind(text if text.lstrip().startswith("---") else f"---\n{{}}\n---\n\n{text}")
    except (yaml.YAMLError, ValueError, TypeError) as error:
        reason = textwrap.shorten(str(error), 160)
        raise UserError(f"{source}: its metadata, between the lines ---, cannot be read ({reason})") from error


def add_tags(card: ModelCard | DatasetCard, *tags: str) -> None:
    """Add tags to those that a card has."""
    found = card.data.get("tags") or []
    card.data["tags"] = list(dict.fromkeys([*([found] if isinstance(found, str) else found), *TAGS, *tags]))


def add_usage(card: ModelCard | DatasetCard, usage: str) -> None:
    """Put how to use what is published after a card's prose, in place of what an earlier push put there."""
    before, found, rest = card.text.partition(BEGIN)
    after = rest.partition(END)[2].strip() if found else ""
    parts = [before.rstrip(), f"{BEGIN}\n{usage.strip()}\n{END}", after]
    card.text = "\n\n".join(part for part in parts if part) + "\n"
