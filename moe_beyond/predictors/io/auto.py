"""Loading of fitted predictors by name, whatever their architecture."""

from pathlib import Path
from typing import TypeVar

from moe_beyond.errors import UserError
from moe_beyond.predictors.base import Predictor
from moe_beyond.predictors.io.folder import read_predictor
from moe_beyond.pretrained import find_pretrained

P = TypeVar("P", bound=Predictor)


def from_pretrained(
    name: str | Path,
    revision: str | None = None,
    expected: type[P] = Predictor,  # type: ignore[assignment]
) -> P:
    """Load a fitted predictor, ready to score.

    Args:
        name: Predictor folder, name that `moe-beyond list` prints, or repository of the Hugging Face Hub ``ORG/REPO``.
        revision: Branch, tag or commit of the repository (default: main).
        expected: Class that the predictor must have (default: any predictor).

    Raises:
        UserError: There is no such predictor, the name is ambiguous, or the predictor is damaged or of another class.

    Example:
        >>> from_pretrained("history.deepseek-v2-lite-puffin").architecture
        'history'
    """
    predictor = read_predictor(find_pretrained(name, revision))
    if not isinstance(predictor, expected):
        raise UserError(f"{name}: is a {predictor.architecture}, not a {expected.__name__}")
    return predictor
