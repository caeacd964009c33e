"""The registry of predictor architectures; configs and predictor folders name one of these, never an import path.

Another package adds its predictor by an entry point, under the architecture's name:

```toml
[project.entry-points."moe_beyond.predictors"]
most_recent = "moe_beyond_example.predictor:MostRecent"

[project.entry-points."moe_beyond.tasks"]
most_recent = "moe_beyond_example.task:MostRecentTask"
```

A notebook calls `register` instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.registry import Registry
from moe_beyond.safe_text import brief

if TYPE_CHECKING:  # torch takes seconds, and help lists the names
    from moe_beyond.predictors.base import Predictor

P = TypeVar("P", bound="type[Predictor]")

PACKAGE = __name__.partition(".")[0]
"""Import name of this package."""
CLASSES = {
    "popularity": "Popularity",
    "token_table": "TokenTable",
    "eamc": "Eamc",
    "history": "History",
    "naive_bayes": "NaiveBayes",
    "row_encoder": "RowEncoder",
    "token_causal": "TokenCausal",
    "cross_layer": "CrossLayer",
    "hybrid": "Hybrid",
    "next_gate": "NextGate",
    "layer_mlp": "LayerMlp",
    "pre_attention": "PreAttention",
}
"""Class names of this package's architectures; each class is in ``architectures/NAME.py``."""
ARCHITECTURES: Registry[type[Predictor]] = Registry(
    "predictor architecture",
    "moe_beyond.predictors",
    {name: f"{PACKAGE}.predictors.architectures.{name}:{cls}" for name, cls in CLASSES.items()},
)
"""Predictor classes by the name of their architecture."""


def register(predictor: P) -> P:
    """Add a predictor class for this process, under its ``architecture``; use it as a decorator.

    Raises:
        UserError: Another class has this name.
    """
    ARCHITECTURES.register(predictor.architecture, predictor)
    return predictor


def create(
    architecture: str,
    geometry: Geometry,
    vocab_size: int,
    *,
    source: str = "predictor",
    package: str = PACKAGE,
    **arguments: Any,
) -> Predictor:
    """Build an unfitted predictor from the values in a file.

    Args:
        architecture: Name of the architecture.
        geometry: Shape of the model.
        vocab_size: Number of token ids of the tokenizer.
        source: File that holds the values, for error messages (default: ``"predictor"``).
        package: Import name of the package that provides the architecture (default: this package).
        **arguments: Further arguments of the constructor.

    Raises:
        UserError: The architecture is not registered, another package provides it, or the arguments are wrong.
    """
    try:
        if architecture not in ARCHITECTURES and package != PACKAGE:
            raise UserError(f"{architecture} is a predictor of package {package}, which is not installed; install it")
        if package != (provider := ARCHITECTURES.package(architecture)):
            raise UserError(f"{architecture} is a predictor of package {package} (got {provider}'s); remove {provider}")
        return ARCHITECTURES[architecture](geometry, vocab_size, **arguments)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:  # torch's errors about wrong sizes
        raise UserError(f"{source}: {architecture}: {brief(error)}") from error
