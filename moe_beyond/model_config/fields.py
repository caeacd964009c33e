"""The fields of a ``config.json``, read by name and checked."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_beyond.errors import UserError
from moe_beyond.fields import shown

MOST_LAYERS = 10_000
MOST_UNITS = 2**24
"""Bound on widths, ranks, numbers of heads and vocabularies."""

Layers = tuple[int, ...]


@dataclass(frozen=True)
class Config:
    """The fields of a configuration that are not null, read by name and checked.

    Attributes:
        fields: The fields.
        source: Path or name of the origin, for error messages.
    """

    fields: Mapping[str, Any]
    source: str

    def __contains__(self, name: str) -> bool:
        """Tell whether a field is set."""
        return name in self.fields

    def error(self, message: str) -> UserError:
        """Build the error for something in this configuration."""
        return UserError(f"{self.source}: {message}")

    def over(self, defaults: Mapping[str, Any]) -> "Config":
        """Return these fields, and defaults for those that are absent."""
        return Config({**defaults, **self.fields}, self.source)

    def number(
        self, names: str | Iterable[str], *, least: int = 1, most: int = MOST_UNITS, depth: int | None = None
    ) -> int | None:
        """Return a whole number that a configuration may call by several names; None where all are absent.

        Args:
            names: The names. Where several are set, they must agree.
            least: The smallest number that makes sense.
            most: The largest.
            depth: Number of layers. Given, a list of that many equal numbers counts as the number.

        Raises:
            UserError: It is no such number, differs by layer, or two of the names contradict each other.
        """
        numbers: dict[str, int] = {}
        for name in (names,) if isinstance(names, str) else names:
            if name not in self.fields:
                continue
            value = self.fields[name]
            if depth is not None and isinstance(value, list) and value:
                if len(value) != depth or any(type(item) is not int for item in value):
                    raise self.error(f"{name} must be one number, or {depth}, one per layer (got {shown(value)})")
                if len(set(value)) > 1:
                    raise self.error(f"{name} differs by layer (got {shown(value)}); a geometry has one for all layers")
                value = value[0]
            if type(value) is not int or not least <= value <= most:
                raise self.error(f"{name} must be a whole number of {least} to {most} (got {shown(value)})")
            numbers[name] = value
        if len(set(numbers.values())) > 1:
            raise self.error(f"{' and '.join(f'{name} {number}' for name, number in numbers.items())} contradict")
        return next(iter(numbers.values()), None)

    def required(
        self, what: str, names: str | Iterable[str], *, most: int = MOST_UNITS, depth: int | None = None
    ) -> int:
        """Return a number as `number` does that must be there.

        Raises:
            UserError: It is absent, or no such number.
        """
        names = (names,) if isinstance(names, str) else tuple(names)
        if (number := self.number(names, most=most, depth=depth)) is None:
            raise self.error(f"{what} is missing (field {' or '.join(names)})")
        return number

    def index(self, name: str, neutral: int, *, least: int = 0) -> int:
        """Return a number about layers; ``neutral`` where it is absent."""
        number = self.number(name, least=least, most=MOST_LAYERS)
        return neutral if number is None else number

    def per_layer(self, name: str, depth: int, kinds: Mapping[Any, Any]) -> list[Any]:
        """Return a list of one value per layer, translated.

        Args:
            name: The field.
            depth: Number of layers.
            kinds: By value, what it means.

        Raises:
            UserError: It is no list, of another length, or a value is not among ``kinds``.
        """
        value = self.fields[name]
        if not isinstance(value, list | str):
            raise self.error(f"{name} must be a list (got {shown(value)})")
        for item in value:
            if not isinstance(item, str | int) or item not in kinds:
                raise self.error(
                    f"{name} has {shown(item)}, which is not understood; known: {', '.join(map(str, kinds))}"
                )
        if len(value) != depth:
            raise self.error(f"{name} is of {len(value)} layers, but the model has {depth}")
        return [kinds[item] for item in value]

    def layer_list(self, name: str, depth: int) -> Layers:
        """Return a list of layer indices, ascending.

        Raises:
            UserError: It is no such list, or the model has no such layer.
        """
        value = self.fields[name]
        if not isinstance(value, list) or any(type(item) is not int or not 0 <= item < depth for item in value):
            raise self.error(f"{name} must be a list of layers, 0 to {depth - 1} (got {shown(value)})")
        return tuple(sorted(set(value)))
