"""Contract tests for predictors and policies, for this package and for packages that add their own.

Example:
```python
from moe_beyond.testing import check_predictor
from moe_beyond_example.predictor import MostRecent

def test_most_recent():
    check_predictor(MostRecent)
```
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_beyond.testing.policies import check_policy  # type: ignore[import-untyped,unused-ignore]
    from moe_beyond.testing.predictors import check_predictor

__all__ = ["check_policy", "check_predictor"]

_MODULES = {"check_policy": "policies", "check_predictor": "predictors"}


def __getattr__(name: str) -> Any:
    """Import a check when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
