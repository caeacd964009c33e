"""Public names are exported by their packages, without importing torch."""

import subprocess
import sys

from moe_beyond import predictors

PACKAGES = ("", ".architectures", ".modules", ".stepping", ".io")


def test_a_package_is_imported_without_torch() -> None:
    names = ", ".join(f"moe_beyond.predictors{package}" for package in PACKAGES)
    subprocess.run([sys.executable, "-c", f"import sys, {names}; assert 'torch' not in sys.modules"], check=True)


def test_the_package_exports_every_architecture() -> None:
    assert {architecture.__name__ for architecture in predictors.ARCHITECTURES.values()} <= set(predictors.__all__)
