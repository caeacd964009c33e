"""What must hold for every replay."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from _helpers import cache_cases
from _helpers.cache_cases import TICK, Case, cases, ticking
from _helpers.common import QUICK_POLICIES
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from moe_beyond.cache.counters import Counter
from moe_beyond.cache.policies import POLICIES
from moe_beyond.cache.steps import EventRecord
from moe_beyond.simulator import Replay
from moe_beyond.simulator.sequence import ReplaySequence

few = settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


@pytest.fixture(autouse=True, scope="module", params=["quick", pytest.param("others", marks=pytest.mark.slow)])
def _policies(request: pytest.FixtureRequest) -> Iterator[None]:
    """Draw the policies of the quick tests; with the slow tests, draw the others."""
    names = QUICK_POLICIES if request.param == "quick" else sorted(set(POLICIES) - set(QUICK_POLICIES))
    cache_cases.drawn_policies[:] = names
    yield
    cache_cases.drawn_policies[:] = QUICK_POLICIES


def hits(case: Case, **changes) -> int:
    return int(case.changed(**changes).replayed().counts()[:, Counter.HITS].sum())


def watched(case: Case, number: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Times and counts of the events of a sequence, and the log of the link."""
    replaying = Replay(case.geometry, case.settings, case.profile)
    scores = case.scores[number] if case.settings.lookaheads else None
    return replaying.watch(ReplaySequence(case.geometry, case.sequences[number], scores, case.decode_starts[number]))


@few
@given(cases())
def test_bookkeeping(case: Case):
    accesses, hit, late, missed, demanded, prefetched, useful, wasted, on_host = case.replayed().counts().T
    assert not on_host.any()
    assert (accesses == hit + late + missed).all()
    assert (demanded == missed).all()
    assert (useful + wasted <= prefetched).all()
    if case.settings.warmup_tokens == 0:
        # A prefetch ends as useful (there when demanded), as a late hit (then still on the link, or in the queue, which
        # its demand takes it out of), or as wasted. After a warm-up a late hit may be of an uncounted prefetch.
        assert (prefetched == useful + late + wasted).all()


@few
@given(cases(plain=True, timed=False))
def test_an_event_of_one_token_has_k_accesses(case: Case):
    tokens = sum(map(len, case.sequences))
    assert (case.replayed().counts()[:, Counter.ACCESSES] == tokens * case.geometry.top_k).all()


@few
@given(cases(without=("belady_bypass",), prefetches=("none",), timed=False))
def test_belady_is_the_optimum(case: Case):
    case = case.changed(warmup_tokens=0, warm_start=False)
    assert hits(case) <= hits(case, policy="belady_bypass")
    case = case.with_room()  # which experts share a wave depends on the hits
    assert hits(case) <= hits(case, policy="belady") <= hits(case, policy="belady_bypass")


@few
@given(cases(policies=("lru", "belady", "belady_bypass"), prefetches=("none",), scopes=("global",), timed=False))
def test_more_slots_hit_no_less(case: Case):
    case = case.changed(warmup_tokens=0, warm_start=False).with_room()
    found = [hits(case, slots=slots) for slots in range(case.settings.slots, case.geometry.total_experts + 1)]
    assert found == sorted(found)


@few
@given(cases(plain=True, prefetches=("none",)))
def test_with_room_for_all_an_expert_misses_once(case: Case):
    misses = case.changed(slots=case.geometry.total_experts, quotas=None).replayed().counts()[:, Counter.MISSES]
    expected = [
        sum(len(set(experts[:, layer].ravel().tolist())) for experts in case.sequences)
        for layer in range(case.geometry.num_layers)
    ]
    assert misses.tolist() == expected


@few
@given(
    cases(without=("belady_bypass",), prefetches=("oracle",), timed=False)
    | cases(plain=True, prefetches=("oracle",), timed=False)
)
def test_the_oracle_on_an_instant_link_hits_always(case: Case):
    total = case.with_room().replayed().counts().sum(0)
    assert total[Counter.HITS] == total[Counter.ACCESSES]
    assert total[Counter.DEMAND_TRANSFERS] == 0


@few
@given(cases(without=("belady_bypass",), prefetches=("oracle",)) | cases(plain=True, prefetches=("oracle",)))
def test_the_oracle_on_an_enormous_link_hits_always_and_never_stalls(case: Case):
    enormous = replace(ticking(1), link_gb_per_s=1e12, link_latency_us=0.0)
    replaying = case.with_room().changed(device=enormous).replayed()
    total = replaying.counts().sum(0)
    assert total[Counter.HITS] == total[Counter.ACCESSES]
    assert all(abs(part[:, 0]).max(initial=0) < 1e-12 for part in replaying.times.stall_compute)


@few
@given(cases(prefetches=("none",)))
def test_a_fast_interconnect_stalls_less_and_half_of_all_times_is_half_of_the_stall(case: Case):
    slow, linked, fast = (case.with_ticks(*ticks).outcome() for ticks in ((8, 2, 4), (4, 2, 4), (4, 1, 2)))
    assert slow.counts == linked.counts == fast.counts
    assert [(stall / 2, computing / 2) for stall, computing in slow.spent] == fast.spent
    for (stall, computing), (less, same) in zip(slow.spent, linked.spent, strict=True):
        assert less <= stall
        assert same == computing
    assert slow.busy / 2 == linked.busy == fast.busy


@few
@given(cases(timed=True))
def test_with_one_tier_the_link_is_busy_for_every_transfer(case: Case):
    transfer, other, expert, _, _ = case.ticks
    outcome = case.changed(warmup_tokens=0).with_ticks(transfer, other, expert).outcome()
    counts = np.array(outcome.counts).sum(0)
    assert outcome.busy == (counts[Counter.DEMAND_TRANSFERS] + counts[Counter.PREFETCH_TRANSFERS]) * transfer * TICK


@few
@given(cases(plain=True, timed=True), st.sampled_from([0, 2, 5]), st.integers(0, 4))
def test_the_log_of_the_link(case: Case, flash: int, host_slots: int):
    """One copy and one read at a time; reads of experts that left host memory; and events that wait for experts."""
    transfer, other, expert, _, _ = case.ticks
    case = replace(case, sequences=case.sequences[:1], scores=case.scores[:1], decode_starts=case.decode_starts[:1])
    case = case.with_ticks(transfer, other, expert, flash, host_slots)
    outcome = case.outcome()
    counts = np.array(outcome.counts).sum(0)
    spans, log = watched(case)
    layers, experts, _ = case.geometry.shape()
    at_first = [layer * experts + expert for expert in range(experts) for layer in range(layers)][:host_slots]
    host: OrderedDict[int, None] = OrderedDict.fromkeys([] if case.settings.cold_host else at_first[::-1])
    read_until = 0.0
    for number, begins, ends, _ in log:
        if flash and number not in host:
            assert begins >= read_until
            read_until = begins + TICK * flash
            assert ends >= read_until + TICK * transfer
        else:
            assert ends - begins == TICK * transfer
        host[number] = None
        host.move_to_end(number)
        if len(host) > host_slots:
            host.popitem(last=False)
    assert len(log) == counts[Counter.DEMAND_TRANSFERS] + counts[Counter.PREFETCH_TRANSFERS]
    assert outcome.busy == len(log) * TICK * transfer
    assert (np.diff(np.sort(log[:, 2])) >= TICK * transfer).all()
    routed, ready, through = spans[:, : EventRecord.HITS].T
    begun = np.concatenate([[0.0], through[:-1]])
    demanded = case.geometry.top_k * expert * TICK
    assert (routed - begun == other * TICK).all()
    stalls = spans[:, EventRecord.STALL]
    assert (through - routed - stalls == demanded).all()
    assert ((through >= ready) & (ready >= routed)).all()
    assert stalls.sum() == sum(stall for stall, _ in outcome.spent)
    on_demand = log[log[:, 3] == 0]
    assert (
        np.isin(on_demand[:, 2], ready).any() or len(on_demand) == 0
    )  # events are ready when their last transfer ends


@few
@given(
    cases(
        without=("belady", "belady_bypass"), prefetches=("scored", "adaptive", "moe_infinity"), plain=True, timed=True
    ),
    st.data(),
)
def test_nothing_depends_on_what_is_not_known_yet(case: Case, data: st.DataObject):
    length, layers, _ = case.sequences[0].shape
    token, layer = data.draw(st.integers(0, length - 1)), data.draw(st.integers(0, layers - 1))
    now = token * layers + layer
    experts, scores = case.sequences[0].copy(), case.scores[0].copy()
    late = np.arange(length * layers).reshape(length, layers) > now
    experts[late] = np.sort((experts[late] + 1) % case.geometry.num_experts)  # what is routed later
    for place, lookahead in enumerate(case.settings.lookaheads):
        ahead = 1 if lookahead == "computed" else lookahead if isinstance(lookahead, int) else layers
        for later in range(layers):
            known = later - ahead < layer or (ahead == 0 and later == layer)  # when layer `layer` of `token` is routed
            first = token + (lookahead == "next" and later <= layer) + 1 if known else token
            scores[first:, place, later] = 1 - scores[first:, place, later]
    other = replace(case, sequences=[experts], scores=[scores])
    (spans, log), (others, other_log) = watched(case), watched(other)
    assert (spans[:now] == others[:now]).all()
    routed = spans[now, 0]
    assert (spans[now, :2] == others[now, :2]).all()
    assert log[log[:, 1] < routed].tolist() == other_log[other_log[:, 1] < routed].tolist()


@few
@given(cases())
def test_sequences_go_alone_where_none_goes_with_them(case: Case):
    alone = replace(case, sequences=case.sequences[:1], scores=case.scores[:1], decode_starts=case.decode_starts[:1])
    expected = alone.changed(batch_size=1, carry_over=False).outcome()
    assert alone.changed(batch_size=3, carry_over=False).outcome() == expected
    assert alone.changed(batch_size=1, carry_over=True).outcome() == expected


@few
@given(cases())
def test_chunks_of_one_token_change_nothing(case: Case):
    assert case.changed(prefill_chunk=0, window=1).outcome() == case.changed(prefill_chunk=1, window=1).outcome()


@few
@given(cases(), st.integers(1, 4))
def test_a_window_of_decode_is_a_chunk_of_prefill(case: Case, size: int):
    slots = {"slots": case.geometry.total_experts, "quotas": None, "scope": "global", "batch_size": 1}
    windows = case.changed(**slots, prefill_chunk=0, window=size)
    chunks = replace(case.changed(**slots, prefill_chunk=size, window=1), decode_starts=[99] * len(case.sequences))
    assert windows.outcome() == chunks.outcome()


@few
@given(cases())
def test_replaying_again_gives_the_same(case: Case):
    assert case.replayed().result() == case.replayed().result()


@few
@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_the_sequences_does_not_matter(case: Case, random):
    case = case.changed(batch_size=1, carry_over=False)
    order = list(range(len(case.sequences)))
    random.shuffle(order)
    assume(order != sorted(order))
    other = replace(
        case,
        sequences=[case.sequences[i] for i in order],
        scores=[case.scores[i] for i in order],
        decode_starts=[case.decode_starts[i] for i in order],
    )
    assert other.outcome().counts == case.outcome().counts
    assert sorted(other.outcome().spent) == sorted(case.outcome().spent)


@few
@given(cases())
def test_the_order_in_which_the_router_names_experts_does_not_matter(case: Case):
    other = replace(case, sequences=[experts[..., ::-1] for experts in case.sequences])
    assert other.outcome() == case.outcome()


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_result_may_be_asked_for_at_any_time(policy: str, data: st.DataObject):
    """Also of a cache that is carried over, whose prefetches may still be of use."""
    case: Case = data.draw(cases(policies=(policy,))).changed(batch_size=1, warmup_tokens=0)
    replaying = Replay(case.geometry, case.settings, case.profile, case.stream())
    for experts, scores, start in zip(case.sequences, case.scores, case.decode_starts, strict=True):
        replaying.add(experts, scores if case.settings.lookaheads else None, start)
        counts = replaying.counts()
        assert (
            counts[:, Counter.PREFETCH_TRANSFERS]
            == counts[:, [Counter.USEFUL_PREFETCHES, Counter.LATE_HITS, Counter.WASTED_PREFETCHES]].sum(1)
        ).all()
    assert counts.tolist() == case.outcome().counts


@few
@given(cases())
def test_the_events_of_a_sequence_sum_to_its_counts(case: Case):
    case = replace(case, sequences=case.sequences[:1], scores=case.scores[:1], decode_starts=case.decode_starts[:1])
    case = case.changed(warmup_tokens=0, batch_size=1, carry_over=False)
    events, _ = watched(case)
    kinds = [EventRecord.HITS, EventRecord.LATE_HITS, EventRecord.MISSES]
    by_layer = events[:, kinds].reshape(-1, case.geometry.num_layers, len(kinds)).sum(0)
    assert by_layer.tolist() == [row[Counter.HITS : Counter.MISSES + 1] for row in case.outcome().counts]
