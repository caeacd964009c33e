"""Predictors, policies and prefetchers of a run: their inputs, their scores, and the counters."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _helpers import predictor_variants
from _helpers.common import VOCAB
from _helpers.moe_architectures import LAYERS, tiny_model
from _helpers.predictor_variants import Variant, fitted, probabilities
from _helpers.two_moments import TwoMoments

from moe_beyond.cache.counters import Counter
from moe_beyond.cache.policies import POLICIES, load_policy
from moe_beyond.cache.steps import EventRecord
from moe_beyond.collect.recorder import recording
from moe_beyond.collect.router_probe import find_routers
from moe_beyond.predictors.batch import collate
from moe_beyond.runtime import offload
from moe_beyond.runtime.run import OffloadedRun
from moe_beyond.runtime.stepping.scorer import SequenceScorer
from moe_beyond.simulator import Replay
from moe_beyond.simulator.sequence import ReplaySequence
from moe_beyond.traces.hidden_states import HiddenStates
from moe_beyond.traces.trace import Trace
from moe_beyond.usage_profile import UsageProfile, default_hazard
from moe_beyond.validation.stepped_scores import stepped_scores

WIDTH = 64
PROMPTS = [[5, 9, 30, 7, 11, 4, 3, 17], [6, 8], [21, 21, 3, 30, 2, 9]]
NEW = 8
SLOTS = 6
SMALL = {"width": 8, "depth": 1, "heads": 2, "window": 4, "known_tokens": 24, "min_count": 1, "ngram_buckets": 64}
TEXT_VARIANTS = [
    Variant("history", "default"),
    Variant("token_table", "default"),
    Variant("eamc", "default"),
    Variant("naive_bayes", "default"),
    Variant("token_causal", "window", {**SMALL, "copy_heads": 1, "memory_tokens": 0}),
    Variant("cross_layer", "two_ahead", {**SMALL, "layer_width": 8, "lookaheads": 2, "next_token_head": False}),
]
NEXT = Variant("cross_layer", "next", {**SMALL, "layer_width": 8, "lookaheads": 2, "next_token_head": True})
"""Its scores of a layer's next run follow the layer in a replay, but come only at the next step after a chunk."""
TWO_MOMENTS = Variant("two_moments", "default")
READER = {"layer_width": 8, "lookaheads": 2, "next_token_head": False, "state_width": 8}
STATE_VARIANTS = [
    Variant("next_gate", "router_inputs", {"hidden_size": WIDTH, "lookaheads": 2}),
    Variant("layer_mlp", "two_ahead", {"hidden_size": WIDTH, "stride": 2, "width": 8}),
    Variant("pre_attention", "layer_inputs", {"hidden_size": WIDTH, "width": 8}),
    Variant("layer_mlp", "projected", {"hidden_size": 12, "projected_from": WIDTH, "width": 8}),
    Variant("pre_attention", "projected", {"hidden_size": 12, "projected_from": WIDTH, "width": 8}),
    TWO_MOMENTS,
    Variant("hybrid", "two_ahead", {**SMALL, **READER, "hidden_size": WIDTH}),
    Variant("hybrid", "projected", {**SMALL, **READER, "hidden_size": 12, "projected_from": WIDTH}),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("OlmoeForCausalLM", vocab_size=VOCAB)


@pytest.fixture(autouse=True)
def _width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor_variants, "HIDDEN", WIDTH)


def predictor_of(variant: Variant, model: Any) -> Any:
    if variant is TWO_MOMENTS:
        predictor = TwoMoments(offload(model).geometry, VOCAB, WIDTH).eval()
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            for parameter in predictor.parameters():
                parameter.copy_(torch.randn_like(parameter))
        return predictor
    return fitted(variant, offload(model).geometry)


def generate(model: Any, prompt: list[int], **options: Any) -> torch.Tensor:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        return model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **options)


def recorded_states(model: Any, prompt: list[int]) -> HiddenStates:
    """Hidden states of a prompt and its continuation, as a recording of the unmodified model stores them."""
    readers = {layer: router.module for layer, router in find_routers(model).items()}
    calls = []
    with recording(model, readers) as recorder:
        handle = model.register_forward_hook(lambda *_: calls.append(recorder.pop()[0].hidden_states))
        generate(model, prompt)
        handle.remove()
    return HiddenStates(
        np.concatenate([call.router_inputs for call in calls]), np.concatenate([call.layer_inputs for call in calls])
    )


def traces_of(run: OffloadedRun, states: list[HiddenStates]) -> list[Trace]:
    """The sequences of a run as traces."""
    return [
        Trace(
            str(number), "tests", np.concatenate(sequence.token_ids).astype(np.int32),
            sequence.routing(run.geometry.num_layers), sequence.steps[0], hidden_states=state,
        )
        for number, (sequence, state) in enumerate(zip(run.log.sequences, states, strict=False))
    ]  # fmt: skip


@pytest.mark.parametrize("variant", [*TEXT_VARIANTS, *STATE_VARIANTS, NEXT], ids=str)
def test_events_have_the_counts_of_a_replay(variant: Variant, model: Any) -> None:
    """Policy belief ranks by the scores, so equal counts mean equal scores at equal times."""
    predictor = predictor_of(variant, model)
    prompts = [[5], [6]] if variant is NEXT else PROMPTS
    with offload(model, SLOTS, "belief", predictor=predictor, prefetch="none", keep_rows=True) as run:
        for prompt in prompts:
            generate(model, prompt)
    states = [recorded_states(model, prompt) for prompt in prompts]
    replaying = Replay(run.geometry, replace(run.strategy.settings, prefill_chunk=max(map(len, PROMPTS))))
    unscored = Replay(run.geometry, replaying.settings)
    expected = []
    for trace in traces_of(run, states):
        scores = probabilities(predictor, collate([trace]))[0]
        start, after = trace.decode_start if trace.decode_start > 1 else 0, None
        if variant is NEXT:
            scores, after = stepped_scores(predictor, trace, scores)
        sequence = ReplaySequence(run.geometry, trace.experts, scores, start, scores_after=after)
        events, _ = replaying.watch(sequence)
        expected += events[:, [EventRecord.HITS, EventRecord.LATE_HITS, EventRecord.MISSES]].tolist()
        unscored.add(trace.experts, np.full_like(scores, 0.5), start)
    got = [[event.hits, event.late_hits, event.misses] for event in run.telemetry.events]
    assert got == expected
    if variant.architecture != "pre_attention":  # whose scores come too late to spare a victim
        assert (unscored.counts() != run.cache.state.counters).any()  # the scores matter
    assert run.telemetry.unscored == 0
    assert run.telemetry.decode.steps == len(prompts) * (NEW - (variant is not NEXT))


@pytest.mark.parametrize("variant", STATE_VARIANTS, ids=str)
def test_predictors_read_the_states_that_a_recording_stores(
    variant: Variant, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And both kinds at their moments, whichever of them a predictor reads."""
    predictor, seen = predictor_of(variant, model), list[tuple[bool, int, Any, Any]]()
    monkeypatch.setattr(SequenceScorer, "routed", watched(SequenceScorer.routed, seen, computed=False))
    monkeypatch.setattr(SequenceScorer, "computed", watched(SequenceScorer.computed, seen, computed=True))
    with offload(model, budget=SLOTS, predictor=predictor) as run:
        generate(model, PROMPTS[0])
    states, prompt = recorded_states(model, PROMPTS[0]), len(PROMPTS[0])
    (trace,) = traces_of(run, [states])
    expected = probabilities(predictor, collate([trace]))[0]
    reads_inputs = "layer_inputs" in predictor.information.hidden_states
    moments = [(False, 0), *((computed, layer + 1 - computed) for layer in range(LAYERS - 1)
                             for computed in ((True, False) if reads_inputs else (False,)))]  # fmt: skip
    assert [moment[:2] for moment in seen] == moments * (NEW - 1)
    for place, (computed, layer, state, scores) in enumerate(seen):
        token = prompt + place // len(moments)
        if computed:
            np.testing.assert_array_equal(state, states.layer_inputs[token, layer + 1])
        elif "router_inputs" in predictor.information.hidden_states:
            np.testing.assert_array_equal(state, states.router_inputs[token, layer])
        else:
            assert state is None
        if layer + 1 < LAYERS and computed == (predictor.information.lookaheads[0] == "computed"):
            np.testing.assert_allclose(scores[layer + 1], expected[token, 0, layer + 1], atol=1e-5)
    assert run.telemetry.unscored == 0


def watched(observe: Any, seen: list[tuple[bool, int, Any, Any]], *, computed: bool) -> Any:
    """Let a method of the scorer note the moment, the state and the scores of every scored layer."""

    def see(self: SequenceScorer, layer: int, *words: Any) -> Any:
        scores, state = observe(self, layer, *words), words[-1]
        if self.active:
            seen.append((computed, layer, None if state is None else state.copy(), scores))
        return scores

    return see


def test_forwards_of_no_single_sequence_are_unscored(model: Any) -> None:
    predictor = predictor_of(TEXT_VARIANTS[0], model)
    batch = torch.tensor([PROMPTS[2], PROMPTS[2][::-1]])
    steps = NEW - 1
    with torch.inference_mode(), offload(model, budget=SLOTS, policy="belief", predictor=predictor) as run:
        generate(model, PROMPTS[0])
        assert (run.telemetry.unscored, run.telemetry.decode.steps) == (0, steps)
        model.generate(batch, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
        assert (run.telemetry.unscored, run.telemetry.decode.steps) == (steps, 2 * steps)
        assert run.telemetry.decode.tokens == 2 * steps  # of each sequence
        generate(model, PROMPTS[0], prefill_chunk_size=3)  # chunks are of one sequence
        assert (run.telemetry.unscored, run.telemetry.decode.steps) == (steps, 3 * steps)
        generate(model, PROMPTS[1])
        assert run.telemetry.unscored == steps
        assert [sequence.steps[0] for sequence in run.log.sequences] == [8, 3, 2]


def test_drafts_that_are_rejected_end_the_scores_of_a_sequence(model: Any) -> None:
    predictor = predictor_of(TEXT_VARIANTS[0], model)
    prompt = [5, 9, 30, 7, 5, 9, 30, 7, 5, 9]
    expected = generate(model, prompt, prompt_lookup_num_tokens=2)
    scored: list[bool] = []
    with offload(model, budget=SLOTS, policy="belief", predictor=predictor, keep_rows=True) as run:
        assert torch.equal(generate(model, prompt, prompt_lookup_num_tokens=2), expected)
        scored += [row.scored for row in run.telemetry.steps]
        assert run.log.unlogged > 0
        assert run.telemetry.unscored == sum(row.tokens == 1 and not row.scored for row in run.telemetry.steps)
        generate(model, PROMPTS[0])
    assert all(row.scored == (row.tokens == 1) for row in run.telemetry.steps[len(scored) :])


PAIRS = [
    *((policy, prefetch) for policy in POLICIES for prefetch in ("none", "top2")),
    *(("lru", prefetch) for prefetch in ("p>0.2", "top4,p>0.1", "adaptive", "moe_infinity")),
]


@pytest.mark.parametrize(
    ("policy", "prefetch"),
    [
        pytest.param(*pair, marks=() if pair[0] in ("lru", "belief") else pytest.mark.slow)  # each policy is compiled
        for pair in PAIRS
        if "future" not in load_policy(pair[0]).NEEDS
    ],
)
def test_strategies_are_exact_and_count_consistently(
    policy: str, prefetch: str, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = prefetch != "none" or load_policy(policy).HOOKS.reads_scores
    predictor = predictor_of(TEXT_VARIANTS[3], model) if reads else None
    options: dict[str, Any] = {}
    if "profile" in load_policy(policy).NEEDS:
        profile = UsageProfile(np.linspace(0, 1, LAYERS * 8).reshape(LAYERS, 8), default_hazard())
        monkeypatch.setattr("moe_beyond.runtime.strategy.find_predictor", lambda name: Path(__file__))
        monkeypatch.setattr("moe_beyond.runtime.strategy.load_profile", lambda *_: profile)
        options["profile"] = "a profile"
    expected = [generate(model, prompt) for prompt in PROMPTS]
    with offload(
        model, SLOTS, policy, predictor=predictor, prefetch=prefetch if reads else None, keep_rows=True, **options
    ) as run:
        for _ in range(2):
            for prompt, tokens in zip(PROMPTS, expected, strict=True):
                assert torch.equal(generate(model, prompt), tokens)
    counts, rows = run.cache.state.counters.copy(), run.telemetry
    assert (counts[:, Counter.ACCESSES] == counts[:, Counter.HITS : Counter.MISSES + 1].sum(1)).all()
    steps, events = len(PROMPTS) * 2 * NEW, run.telemetry.events
    assert [event.step for event in events] == [step for step in range(steps) for _ in range(LAYERS)]
    assert [event.layer for event in events] == list(range(LAYERS)) * steps
    for layer in range(LAYERS):
        of_layer = [event for event in events if event.layer == layer]
        for name, counter in (("hits", Counter.HITS), ("late_hits", Counter.LATE_HITS), ("misses", Counter.MISSES)):
            assert sum(getattr(event, name) for event in of_layer) == counts[layer, counter]
        assert counts[layer, Counter.DEMAND_TRANSFERS] == counts[layer, Counter.MISSES]
        arrived = [row for row in rows.transfers if row.expert // 8 == layer and not row.prefetch]
        demanded = sum(event.transfers for event in of_layer)  # queued prefetches included
        assert counts[layer, Counter.MISSES] <= demanded == len(arrived)
        assert demanded <= counts[layer, Counter.MISSES : Counter.LATE_HITS - 1 : -1].sum()
    prefetched = sum(row.prefetch for row in rows.transfers)
    transfers = counts[:, Counter.DEMAND_TRANSFERS : Counter.PREFETCH_TRANSFERS + 1].sum()
    assert transfers - rows.transferred in (0, 1)  # in transit at the end of the run
    assert (prefetched > 0) == (prefetch != "none")
    run.cache.finish()  # the resident ones count as wasted
    ended = [Counter.LATE_HITS, Counter.USEFUL_PREFETCHES, Counter.WASTED_PREFETCHES]
    assert (counts[:, Counter.PREFETCH_TRANSFERS] == run.cache.state.counters[:, ended].sum(1)).all()
    assert rows.transferred == len(rows.transfers)
    assert sum(rows.sources) == rows.sources.host == rows.transferred * run.store.layouts[0].nbytes
    for name in ("wait_s", "compute_s", "cache_s", "predictor_s"):
        total = getattr(rows.prefill, name) + getattr(rows.decode, name)
        assert total >= sum(getattr(event, name) for event in events) * 0.999
