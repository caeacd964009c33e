"""Reading and checking the fields of a ``config.json`` by name."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_beyond.errors import UserError
from moe_beyond.safe_text import shown

MOST_LAYERS = 10_000
MOST_UNITS = 2**24
"""Upper bound on widths, ranks, numbers of heads and vocabularies."""

Layers = tuple[int, ...]


@dataclass(frozen=True)
class Config:
    """The fields of a configuration that are not null.

    Attributes:
        fields: Name -> value of each field.
        source: Path or name of the origin, for error messages.
    """

    fields: Mapping[str, Any]
    source: str

    def __contains__(self, name: str) -> bool:
        """Return whether a field is set."""
        return name in self.fields

    def error(self, message: str) -> UserError:
        """Build an error that starts with the source.

        Args:
            message: Rest of the message.
        """
        return UserError(f"{self.source}: {message}")

    def over(self, defaults: Mapping[str, Any]) -> "Config":
        """Return a configuration in which absent fields have defaults.

        Args:
            defaults: Name -> value of fields that may be absent.
        """
        return Config({**defaults, **self.fields}, self.source)

    def number(
        self, names: str | Iterable[str], *, least: int = 1, most: int = MOST_UNITS, depth: int | None = None
    ) -> int | None:
        """Return a whole number that may have several names; None if all are absent.

        Args:
            names: Possible names of the field; if several are set, they must agree.
            least: Smallest valid number (default: 1).
            most: Largest valid number (default: 2**24).
            depth: Number of layers; if given, a list of that many equal numbers counts as the number.

        Raises:
            UserError: The value is invalid, differs between layers, or two fields contradict each other.
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
        """Return a whole number that must be present.

        Args:
            what: Noun phrase for the error message, such as ``"the hidden size"``.
            names: Possible names of the field; if several are set, they must agree.
            most: Largest valid number (default: 2**24).
            depth: Number of layers; if given, a list of that many equal numbers counts as the number.

        Raises:
            UserError: The field is absent or invalid.
        """
        names = (names,) if isinstance(names, str) else tuple(names)
        if (number := self.number(names, most=most, depth=depth)) is None:
            raise self.error(f"{what} is missing (field {' or '.join(names)})")
        return number

    def index(self, name: str, neutral: int, *, least: int = 0) -> int:
        """Return a layer index or a number of layers.

        Args:
            name: Name of the field.
            neutral: Value if the field is absent.
            least: Smallest valid number (default: 0).

        Raises:
            UserError: The value is invalid.
        """
        number = self.number(name, least=least, most=MOST_LAYERS)
        return neutral if number is None else number

    def per_layer(self, name: str, depth: int, kinds: Mapping[Any, Any]) -> list[Any]:
        """Return a list with one translated value per layer.

        Args:
            name: Name of the field.
            depth: Number of layers.
            kinds: Value -> translation.

        Raises:
            UserError: The value is no list, has another length, or contains an unknown value.
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
            raise self.error(f"{name} must have one value for each of {depth} layers (got {len(value)} values)")
        return [kinds[item] for item in value]

    def layer_list(self, name: str, depth: int) -> Layers:
        """Return a list of layer indices, ascending.

        Args:
            name: Name of the field.
            depth: Number of layers.

        Raises:
            UserError: The value is no list of layer indices.
        """
        value = self.fields[name]
        if not isinstance(value, list) or any(type(item) is not int or not 0 <= item < depth for item in value):
            raise self.error(f"{name} must be a list of layers, 0 to {depth - 1} (got {shown(value)})")
        return tuple(sorted(set(value)))
