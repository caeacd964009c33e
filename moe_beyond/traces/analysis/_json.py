"""Conversion of measured numbers to JSON values."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


def rounded(values: npt.ArrayLike) -> Any:
    """Round to six decimals, and replace NaN by None because JSON has no NaN.

    Args:
        values: A number, or an array of any shape.

    Returns:
        A float or None, or nested lists of them.

    Example:
        >>> rounded(1 / 3), rounded([[0.5, float("nan")]])
        (0.333333, [[0.5, None]])
    """
    values = np.asarray(values, np.float64)
    if values.ndim:
        return [rounded(value) for value in values]
    return None if np.isnan(values) else round(float(values), 6)


def plain(value: Any) -> Any:
    """Turn nested dataclasses into dictionaries that JSON can hold.

    An object with a method ``to_json`` is replaced by the result of that method.

    Args:
        value: A dataclass, mapping, sequence or plain value.

    Example:
        >>> plain({25: (1, None)})
        {'25': [1, None]}
    """
    if hasattr(value, "to_json"):
        return value.to_json()
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value
