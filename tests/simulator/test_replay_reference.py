"""Replay against the plain reference: every counter of every layer, and every time."""

import pytest
from cache_cases import Case, cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_beyond.cache.policies import POLICIES


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_counts_and_times(policy: str, data: st.DataObject):
    case: Case = data.draw(cases(policies=(policy,)))
    assert case.outcome() == case.reference()
