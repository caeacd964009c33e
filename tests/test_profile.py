import numpy as np

from moe_beyond.usage_profile import AGE_EDGES, RATE_EDGES, default_hazard


def test_rates_are_spaced_evenly_in_ratio():
    np.testing.assert_allclose(RATE_EDGES[0], 0.045)
    np.testing.assert_allclose(RATE_EDGES[-1], 0.3)
    np.testing.assert_allclose(np.diff(np.log(RATE_EDGES)), np.log(0.3 / 0.045) / 6)


def test_the_default_table_by_hand():
    table = default_hazard()
    assert table.shape == (len(AGE_EDGES) + 1, len(RATE_EDGES) + 1) == (8, 8)
    assert table.dtype == np.float64
    np.testing.assert_allclose(table[0, [0, 7]], [0.036 * 0.825, 0.35 * 0.825])  # never used
    np.testing.assert_allclose(table[1, 7], 0.35 * 1.8)  # by the token before
    middle = 0.045 * (0.3 / 0.045) ** 0.25  # of the second bucket of rates
    np.testing.assert_allclose(table[[2, 7], 2], [1.07 * middle, 0.64 * middle])
    assert (np.diff(table, axis=1) > 0).all()
    assert table.min() >= 1e-3
    assert table.max() <= 0.95


def test_the_default_table_is_a_new_one_each_time():
    default_hazard()[:] = 0
    assert default_hazard().all()
