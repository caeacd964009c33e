"""Public names are exported by their packages, without importing torch."""

import importlib
import subprocess
import sys

import pytest

from moe_beyond import predictors

PACKAGES = ("", ".architectures", ".modules", ".stepping", ".io")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_exported(package: str) -> None:
    module = importlib.import_module(f"moe_beyond.predictors{package}")
    for name in module.__all__:
        assert getattr(module, name).__name__ == name if name != "ARCHITECTURES" else predictors.ARCHITECTURES
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = module.no_such_name


def test_a_package_is_imported_without_torch() -> None:
    names = ", ".join(f"moe_beyond.predictors{package}" for package in PACKAGES)
    subprocess.run([sys.executable, "-c", f"import sys, {names}; assert 'torch' not in sys.modules"], check=True)


def test_the_package_exports_every_architecture() -> None:
    assert {architecture.__name__ for architecture in predictors.ARCHITECTURES.values()} <= set(predictors.__all__)
