"""Replay against the plain reference."""

from cache_cases import Case, cases
from hypothesis import HealthCheck, given, settings


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_every_counter_of_every_layer(case: Case):
    assert case.replayed().counts.tolist() == case.reference_counts()
