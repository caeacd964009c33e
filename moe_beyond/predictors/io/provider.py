"""Packages that provide predictor classes, by the name that predictor folders record."""

from typing import Any

from moe_beyond.errors import UserError
from moe_beyond.fields import shown
from moe_beyond.predictors.base import Predictor
from moe_beyond.predictors.registry import ARCHITECTURES, predictor_class

THIS_PACKAGE = "moe_beyond"


def provider(predictor: type[Predictor]) -> str:
    """Return the import name of the top-level package that defines a predictor class.

    Args:
        predictor: Class of a predictor.
    """
    return predictor.__module__.partition(".")[0]


def check_provider(architecture: Any, package: Any, source: str) -> None:
    """Check that the registered class of an architecture comes from the package that a file names.

    The file's package is never imported: an architecture must be registered already, by this package, by an installed
    package or by the running program.

    Args:
        architecture: Architecture that the file names.
        package: Package that the file names.
        source: Path of the file, for error messages.

    Raises:
        UserError: The architecture is not registered, or another package provides it.
    """
    if not isinstance(package, str):
        raise UserError(f"{source}: package must be the name of a package (got {shown(package)})")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        if package == THIS_PACKAGE:
            return  # `create` names the near misses
        raise UserError(
            f"{source}: architecture {shown(architecture)} of package {shown(package)} is not registered; install or "
            "import that package"
        )
    if (actual := provider(predictor_class(architecture))) != package:
        raise UserError(
            f"{source}: architecture {architecture} belongs to package {shown(package)}, but here package {actual} "
            "provides it; use an environment with the right package"
        )
