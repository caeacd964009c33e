"""Registries: who may add an implementation, and what is imported when."""

import sys
from pathlib import Path

import pytest

from moe_beyond.errors import UserError
from moe_beyond.registry import Registry

GROUP = "moe_beyond.policies"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages in which two packages declare entry points."""
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nown = theirs:own\nbroken = theirs:gone\npi = theirs:own\n")
    (tmp_path / "theirs.py").write_text("own = 7\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("theirs", None)


def test_an_installed_package_is_imported_when_its_entry_is_read(site: Path) -> None:
    registry = Registry("policy", GROUP, {"pi": "math:pi"})
    assert list(registry) == ["pi", "broken", "own"]
    assert "theirs" not in sys.modules
    assert registry.package("own") == "theirs"
    assert "theirs" not in sys.modules
    assert registry["own"] == 7


def test_a_package_that_cannot_be_imported_is_named(site: Path) -> None:
    with pytest.raises(UserError, match=r"^policy broken: package theirs cannot be imported \(.*gone.*\); mend"):
        Registry("policy", GROUP, {})["broken"]


def test_a_name_with_two_meanings_is_refused(site: Path) -> None:
    with pytest.raises(UserError, match=r"^policy pi: package theirs has one of the same name"):
        Registry("policy", GROUP, {"pi": "math:pi"})["pi"]


def test_a_registered_implementation_is_found_and_never_replaced() -> None:
    registry: Registry[int] = Registry("number", None, {"pi": "math:pi"})
    two = 2
    registry.register("two", two)
    registry.register("two", two)
    assert registry["two"] == 2
    for name in ("two", "pi"):
        with pytest.raises(UserError, match=f"there is already a number '{name}'"):
            registry.register(name, 3)
    with pytest.raises(UserError, match="got 'a/b'"):
        registry.register("a/b", 3)


def test_an_unknown_name_says_the_nearest() -> None:
    with pytest.raises(UserError, match=r"^unknown policy 'lro'; did you mean 'lru'\?$"):
        Registry("policy", None, {"lru": "math"})["lro"]
