"""Contract tests for predictors and policies, for this package and for packages that add their own.

Example:
```python
from moe_beyond.testing import check_predictor
from moe_beyond_example.predictor import MostRecent

def test_most_recent():
    check_predictor(MostRecent)
```
"""

from typing import TYPE_CHECKING

from moe_beyond.exports import lazy_exports

if TYPE_CHECKING:
    from moe_beyond.testing.policies import check_policy
    from moe_beyond.testing.predictors import check_predictor

__all__ = ["check_policy", "check_predictor"]

_MODULES = {"check_policy": "policies", "check_predictor": "predictors"}

__getattr__, __dir__ = lazy_exports(__name__, _MODULES)
