"""Least squares with coefficients from 0."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_beyond.validation.least_squares import non_negative, robust, robust_mean


def test_a_negative_coefficient_is_left_out():
    # y = 3 x + 4 - 0.5 z: without z, the best line is found on the others.
    columns = np.array([[1, 1, 0], [2, 1, 0], [3, 1, 0], [4, 1, 1]], float)
    target = columns @ [3, 4, -0.5]
    found = non_negative(columns, target)
    assert found[2] == 0
    assert found[:2] == pytest.approx(np.linalg.lstsq(columns[:, :2], target, rcond=None)[0])


def test_equal_columns_are_one():
    columns = np.array([[2, 1], [4, 2], [6, 3]], float)
    assert non_negative(columns, columns[:, 0] * 5).tolist() == pytest.approx([5, 0])


def test_no_column_explains_a_negative_target():
    assert non_negative(np.ones((3, 2)), np.array([-1.0, -2, -3])).tolist() == [0, 0]


@settings(max_examples=100)
@given(seed=st.integers(0, 2**32 - 1), columns=st.integers(1, 3), rows=st.integers(4, 12))
def test_no_other_coefficients_are_better(seed: int, columns: int, rows: int):
    """The error is convex in the coefficients: no step from the optimum within the allowed ones reduces it."""
    rng = np.random.default_rng(seed)
    matrix, target = rng.random((rows, columns)), rng.normal(size=rows)
    found = non_negative(matrix, target)
    assert (found >= 0).all()

    def error(coefficients: np.ndarray) -> float:
        return float(((matrix @ coefficients - target) ** 2).sum())

    for column in range(columns):
        for step in (1e-4, -1e-4):
            other = found.copy()
            other[column] = max(0.0, other[column] + step)
            assert error(other) >= error(found) - 1e-9


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**32 - 1),
    rate=st.floats(1e-10, 1e-8),
    fixed=st.floats(0, 0.1),
    slow=st.integers(0, 2),
)
def test_a_rate_and_a_fixed_cost_are_found_beside_slow_tokens(seed: int, rate: float, fixed: float, slow: int):
    rng = np.random.default_rng(seed)
    columns = np.stack([rng.uniform(1e7, 1e8, 64), np.ones(64)], axis=1)
    target = columns @ [rate, fixed]
    target[:slow] += 5
    found = robust(columns, target)
    assert columns @ found == pytest.approx(columns @ [rate, fixed], rel=1e-6)


def test_a_few_slow_tokens_do_not_move_the_mean_and_many_do():
    values = np.ones(50)
    values[[3, 17]] = 100  # two of five blocks
    assert robust_mean(values) == 1
    values[::5] = 6
    assert robust_mean(values) == pytest.approx(2)
