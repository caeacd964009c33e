"""What must hold for every replay."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
from cache_cases import Case, cases
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from moe_beyond.cache import core

few = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)


def hits(case: Case, **changes) -> int:
    return int(replace(case, settings=replace(case.settings, **changes)).replayed().counts[:, core.HITS].sum())


def demands(case: Case) -> list[list[list[set[int]]]]:
    return [[[set(event) for event in token] for token in experts.tolist()] for experts in case.sequences]


@few
@given(cases())
def test_bookkeeping(case: Case):
    accesses, hit, late, missed, demanded, prefetched, useful, wasted = case.replayed().counts.T
    assert (accesses == hit + missed).all()
    assert (late == 0).all()  # everything arrives in time
    assert (demanded == missed).all()
    assert (prefetched == useful + wasted).all()
    assert (useful <= hit).all()
    counted = sum(max(len(experts) - case.settings.warmup_tokens, 0) for experts in case.sequences)
    assert (accesses == counted * case.geometry.top_k).all()


@few
@given(cases(policies=("lru", "lfu"), prefetching=False, longest_warmup=0))
def test_belady_is_the_optimum(case: Case):
    assert hits(case) <= hits(case, policy="belady")


@few
@given(cases())
def test_with_room_for_all_an_expert_misses_once(case: Case):
    full = replace(case.settings, slots=case.geometry.total_experts, prefetch="none", warmup_tokens=0)
    misses = replace(case, settings=full).replayed().counts[:, core.MISSES]
    expected = [
        sum(len(set(experts[:, layer].ravel().tolist())) for experts in case.sequences)
        for layer in range(case.geometry.num_layers)
    ]
    assert misses.tolist() == expected


@few
@given(cases(policies=("lru",), prefetching=False, longest_warmup=0))
def test_lru_with_top_k_slots_a_layer_keeps_the_previous_token(case: Case):
    slots = case.geometry.demand_per_token
    expected = sum(
        len(before[layer] & now[layer])
        for tokens in demands(case)
        for before, now in pairwise(tokens)
        for layer in range(case.geometry.num_layers)
    )
    assert hits(case, slots=slots, scope="per-layer") == expected


@few
@given(cases(longest_warmup=0), st.integers(0, 100))
def test_knowing_the_router_hits_always(case: Case, spare: int):
    """One layer ahead, room for the present event and the next is enough, under every policy."""
    top_k, total = case.geometry.top_k, case.geometry.total_experts
    scope = case.settings.scope
    enough = case.geometry.demand_per_token if scope == "per-layer" else min(2 * top_k, total)
    oracle = []
    for experts, scores in zip(case.sequences, case.scores, strict=True):
        truth = np.zeros_like(scores)
        np.put_along_axis(truth, experts.astype(np.int64), 1, axis=-1)
        oracle.append(truth)
    config = replace(
        case.settings,
        slots=min(enough + spare, total),
        prefetch=f"top{top_k}",
        lookahead="token",
        first_layer_prefetch=True,
    )
    counts = replace(case, settings=config, scores=oracle).replayed().counts.sum(0)
    assert counts[core.HITS] == counts[core.ACCESSES] == sum(experts.size for experts in case.sequences)
    assert counts[core.DEMAND_TRANSFERS] == counts[core.WASTED] == 0


@few
@given(cases(policies=("lru",), prefetching=False))
def test_a_bigger_lru_cache_hits_no_less(case: Case):
    found = [hits(case, slots=slots) for slots in range(case.settings.slots, case.geometry.total_experts + 1)]
    assert found == sorted(found)


@few
@given(cases())
def test_replaying_again_gives_the_same(case: Case):
    assert case.replayed().result() == case.replayed().result()


@few
@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_the_sequences_does_not_matter(case: Case, random):
    order = list(range(len(case.sequences)))
    random.shuffle(order)
    assume(order != sorted(order))
    other = replace(case, sequences=[case.sequences[i] for i in order], scores=[case.scores[i] for i in order])
    assert other.replayed().result() == case.replayed().result()


@few
@given(cases())
def test_the_order_in_which_the_router_names_experts_does_not_matter(case: Case):
    other = replace(case, sequences=[experts[..., ::-1] for experts in case.sequences])
    assert other.replayed().result() == case.replayed().result()
