"""Registries: the implementations of one kind by name, of this package and of packages that add their own."""

from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from moe_beyond.errors import UserError, unknown
from moe_beyond.safe_text import brief

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Implementations of one kind by name; a module is imported when its entry is first read.

    Names come from three places: this package, calls of `register`, and the entry points of installed packages.
    Nothing else is ever imported, so a file that names an implementation can only choose among these.

    Args:
        kind: Noun for error messages, such as ``"policy"``.
        group: Entry-point group in which installed packages add theirs, such as ``"moe_beyond.policies"``; None: no
            group.
        builtin: Name -> ``"module:attribute"``, or ``"module"`` where the module itself is the implementation.

    Example:
        >>> registry = Registry("number", None, {"pi": "math:pi"})
        >>> registry["pi"], list(registry)
        (3.141592653589793, ['pi'])
        >>> registry.register("two", 2)
        >>> registry["two"], registry.package("pi")
        (2, 'math')
    """

    def __init__(self, kind: str, group: str | None, builtin: Mapping[str, str]) -> None:
        self.kind = kind
        self.group = group
        self._builtin = {name: EntryPoint(name, target, group or "") for name, target in builtin.items()}
        self._registered: dict[str, T] = {}
        self._installed: dict[str, EntryPoint] | None = None

    def register(self, name: str, implementation: T) -> None:
        """Add an implementation for this process.

        Args:
            name: Name in options, configs and files.
            implementation: Class, function or module; the same one may be registered again.

        Raises:
            UserError: Another implementation has the name, or the name is no plain word.
        """
        if not name.replace("_", "").replace("-", "").replace(".", "").isalnum():
            raise UserError(f"register: a {self.kind} name has letters, digits, '_', '-' and '.' (got {name!r})")
        if name in self and self._registered.get(name) is not implementation:
            raise UserError(f"register: there is already a {self.kind} {name!r}; choose another name")
        self._registered[name] = implementation

    def package(self, name: str) -> str:
        """Return the import name of the top-level package that provides an implementation.

        Args:
            name: A registered name.

        Raises:
            UserError: There is no such name.
        """
        if name in self._registered:
            implementation: Any = self._registered[name]
            module = getattr(implementation, "__module__", None) or getattr(implementation, "__name__", "")
        else:
            module = self._entry_point(name).module
        return str(module).partition(".")[0]

    def __getitem__(self, name: str) -> T:
        """Return an implementation; its module is imported."""
        if name in self._registered:
            return self._registered[name]
        entry = self._entry_point(name)
        try:
            implementation: T = entry.load()
        except (ImportError, AttributeError) as error:
            package = entry.module.partition(".")[0]
            if package == __package__:
                raise
            raise UserError(
                f"{self.kind} {name}: package {package} cannot be imported ({brief(error)}); mend or remove it"
            ) from error
        return implementation

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names: built in, registered, installed."""
        return iter(dict.fromkeys((*self._builtin, *self._registered, *self._entry_points())))

    def __len__(self) -> int:
        """Return the number of names."""
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        """Return whether there is an implementation of this name; nothing is imported."""
        return name in self._builtin or name in self._registered or name in self._entry_points()

    def _entry_point(self, name: str) -> EntryPoint:
        """Return where a name that was not registered by a call is defined."""
        if name not in self:
            raise unknown(self.kind, name, self)
        if name in self._builtin and name in self._entry_points():
            package = self._entry_points()[name].module.partition(".")[0]
            raise UserError(f"{self.kind} {name}: package {package} has one of the same name; remove that package")
        return self._builtin.get(name) or self._entry_points()[name]

    def _entry_points(self) -> dict[str, EntryPoint]:
        """Return the entry points of installed packages, by name, read once."""
        if self._installed is None:
            entries = sorted(entry_points(group=self.group), key=lambda entry: entry.name) if self.group else []
            self._installed = {entry.name: entry for entry in entries}
        return self._installed
