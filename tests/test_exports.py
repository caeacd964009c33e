"""Every package exports its public names: they can be read, and `dir` lists them, lazy ones too."""

import pkgutil
from importlib import import_module

import pytest

import moe_beyond

PACKAGES = [
    "moe_beyond",
    *(module.name for module in pkgutil.walk_packages(moe_beyond.__path__, "moe_beyond.") if module.ispkg),
]
"""Import names of all packages."""


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_name_is_listed_and_can_be_read(name: str) -> None:
    package = import_module(name)
    names = getattr(package, "__all__", ())
    assert set(names) <= set(dir(package))
    assert all(getattr(package, public) is not None for public in names)
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'no_such_name'"):
        _ = package.no_such_name
