from hypothesis import given
from hypothesis import strategies as st

from moe_beyond.predictors.stepping.ring_buffer import RingBuffer


@given(st.integers(1, 5), st.lists(st.integers(0, 1000), max_size=40))
def test_the_last_rows_are_kept_in_order(most: int, values: list[int]) -> None:
    recent = RingBuffer(most, 2)
    for count, value in enumerate(values, 1):
        recent.append([value, -value])
        assert recent.rows.tolist() == [[v, -v] for v in values[:count][-most:]]
