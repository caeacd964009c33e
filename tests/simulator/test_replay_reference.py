"""Replay against the plain reference: every counter of every layer, and every time."""

import numpy as np
import pytest
from _helpers.cache_cases import Case, cases, small_geometry
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_beyond.cache.misses import MISSES
from moe_beyond.cache.policies import POLICIES
from moe_beyond.simulator import ReplaySettings
from moe_beyond.usage_profile import UsageProfile, default_hazard


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_counts_and_times(policy: str, data: st.DataObject):
    case: Case = data.draw(cases(policies=(policy,), handlings=MISSES))
    assert case.outcome() == case.reference()


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), share=st.sampled_from([0.3, 0.8, 1.0]), seed=st.integers(0, 99))
def test_slots_without_an_expert_demand_nothing(policy: str, data: st.DataObject, share: float, seed: int):
    case: Case = data.draw(cases(policies=(policy,), handlings=MISSES)).with_holes(share, seed)
    assert case.outcome() == case.reference()


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "belady_bypass"])  # it counts experts
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_layers_that_differ_in_bytes(policy: str, data: st.DataObject):
    case: Case = data.draw(cases(policies=(policy,), handlings=MISSES, mixed=True))
    assert case.outcome() == case.reference()


@pytest.mark.parametrize("policy", ["lru", "lfu", "lfu_in_cache", "lfru", "class_lru"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32 - 1),
    layers=st.integers(1, 3),
    scope=st.sampled_from(["global", "per-layer"]),
    prefetch=st.sampled_from(["none", "oracle"]),
    chunk=st.sampled_from([0, 0, 5]),
)
def test_policies_that_keep_residents_in_order(
    policy: str, seed: int, layers: int, scope: str, prefetch: str, chunk: int
):
    """Long sequences of uneven use: counts spread over many buckets, and uses over all classes."""
    rng, experts, top_k = np.random.default_rng(seed), 8, 2
    slots = layers * int(rng.integers(top_k, experts))
    bias = rng.gumbel(size=(layers, experts)) * rng.choice([0.0, 1.0, 3.0])
    keys = rng.gumbel(size=(int(rng.integers(20, 90)), layers, experts)) + bias
    case = Case(
        small_geometry(layers, experts, top_k),
        ReplaySettings(slots, policy=policy, scope=scope, prefetch=prefetch, prefill_chunk=chunk),
        sequences=[np.argsort(-keys, axis=-1)[..., :top_k].astype(np.uint8)],
        scores=[np.zeros((len(keys), 0, layers, experts), np.float32)],
        decode_starts=[len(keys) // 2],
        profile=UsageProfile(np.full((layers, experts), top_k / experts), default_hazard()),
        ticks=(0, 0, 0, 0, 0),
    )
    assert case.outcome() == case.reference()
