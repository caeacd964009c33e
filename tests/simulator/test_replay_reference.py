"""Replay against the plain reference: every counter of every layer, and every time."""

import pytest
from _helpers.cache_cases import Case, cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_beyond.cache.policies import POLICIES


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_counts_and_times(policy: str, data: st.DataObject):
    case: Case = data.draw(cases(policies=(policy,)))
    assert case.outcome() == case.reference()


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), share=st.sampled_from([0.3, 0.8, 1.0]), seed=st.integers(0, 99))
def test_slots_without_an_expert_demand_nothing(policy: str, data: st.DataObject, share: float, seed: int):
    case: Case = data.draw(cases(policies=(policy,))).with_holes(share, seed)
    assert case.outcome() == case.reference()
