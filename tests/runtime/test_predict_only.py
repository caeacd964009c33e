"""A predictor that scores a run without acting: figures by hand, against a plain reference, and by the command line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _helpers.cache_cases import small_geometry
from _helpers.common import VOCAB, error_line
from _helpers.moe_architectures import LAYERS, tiny_model
from _helpers.predictor_variants import Variant, fitted, probabilities
from hypothesis import given
from hypothesis import strategies as st

from moe_beyond.cache.cache import Cache
from moe_beyond.cli.main import main
from moe_beyond.errors import UserError
from moe_beyond.predictors.batch import collate
from moe_beyond.predictors.information import InformationSet
from moe_beyond.predictors.io.folder import save_predictor
from moe_beyond.runtime import load_offloaded, offload
from moe_beyond.runtime.stepping import prediction_log
from moe_beyond.runtime.stepping.observer import Observer
from moe_beyond.runtime.stepping.prediction_figures import Agreement, agreement, partners
from moe_beyond.runtime.stepping.prediction_log import PredictionLog
from moe_beyond.simulator import ReplaySettings
from moe_beyond.traces.trace import Trace

PROMPTS = [[5, 9, 30, 7, 11, 4, 3, 17], [6, 8]]
NEW = 6
SLOTS = 6
SMALL = {"width": 8, "depth": 1, "heads": 2, "window": 4, "known_tokens": 24, "min_count": 1, "ngram_buckets": 64}
VARIANTS = [
    Variant("history", "default"),
    Variant("token_table", "default"),
    Variant("cross_layer", "next", {**SMALL, "layer_width": 8, "lookaheads": 2, "next_token_head": True}),
]


class Script:
    """Scorer whose scores are given: a function of the layer that was observed, -1 at a token's start."""

    def __init__(self, scores: Any, of_computed: Any = ()) -> None:
        self.scores, self.of_computed = scores, of_computed

    def start(self, token_ids: Any, past: int) -> Any:
        return None if token_ids is None else self.scores[0]

    def routed(self, layer: int, routed: Any, state: Any) -> Any:
        return self.scores[layer + 1]

    def computed(self, layer: int, state: Any) -> Any:
        return self.of_computed[layer]


def rows(**layers: list[float]) -> np.ndarray:
    """Scores of two layers with four experts; NaN for a layer that is not given."""
    return np.array([layers.get(name, [np.nan] * 4) for name in ("first", "second")], np.float32)


def test_figures_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lookahead 1: the first layer is scored at the start, the second after the first."""
    geometry = small_geometry(2, 4, 2)
    settings = ReplaySettings(4, prefetch="top3,p>0.15", lookahead=1, lookaheads=(1,), predictor="by hand")
    script: Any = Script(
        [rows(first=[0.9, 0.8, 0.1, 0.2]), rows(second=[0.1, 0.2, 0.3, 0.4]), rows()]  # top 2: 0 and 1; 2 and 3
    )
    monkeypatch.setattr(prediction_log, "make_observer", lambda strategy: Observer(script))
    cache = Cache(geometry, 4)
    strategy: Any = type("Strategy", (), {"settings": settings})()
    log = PredictionLog(geometry, strategy, cache, [10, 100])

    def decode(*events: tuple[list[int], list[float]]) -> None:
        log.begin_step(np.array([3]), 1)
        cache.start_step()
        for layer, (routed, weights) in enumerate(events):
            cache.demand(layer, np.sort(routed) + 4 * layer, np.ones(2, np.int64))
            while cache.next_wave() is not None:
                pass
            log.event(layer, np.array([routed]), torch.tensor([weights]))

    decode(([1, 3], [0.75, 0.25]), ([3, 2], [0.5, 0.5]))  # finds expert 1; then both
    decode(([1, 3], [1.0, 3.0]), ([0, 3], [2.0, 2.0]))  # finds expert 1; then expert 3
    content = log.to_json()
    assert (content["tokens"], content["k"], content["predictor"]) == (2, 2, "by hand")
    (found,) = content["lookaheads"]
    assert (found["entries"], found["recall_at_k"], found["gate_mass_at_k"]) == (4, 5 / 8, (0.75 + 1 + 0.25 + 0.5) / 4)
    assert [row["layer"] for row in found["per_layer"]] == list(geometry.moe_layers)
    first, second = found["per_layer"]
    assert (first["recall_at_k"], first["gate_mass_at_k"]) == (0.5, 0.5)
    assert (second["recall_at_k"], second["gate_mass_at_k"]) == (0.75, 0.75)
    # The control of either token is the other one.
    assert (first["shuffled_recall_at_k"], first["shuffled_gate_mass_at_k"]) == (0.5, 0.5)
    assert (second["shuffled_recall_at_k"], second["shuffled_gate_mass_at_k"]) == (0.75, 0.75)
    prefetch = content["prefetch"]
    assert (prefetch["prefetch"], prefetch["lookahead"]) == ("top3,p>0.15", 1)
    # First layer: experts 0, 1 and 3 without a slot, of which 1 and 3 are used; then 1 and 3 have slots, 0 has none.
    # Second layer: 1, 2 and 3 without a slot, of which 2 and 3 are used; then 1 only, which is not.
    # Misses: 2 + 0 experts, 2 + 1 experts.
    assert {name: prefetch[f"{name}_bytes"] for name in ("moved", "used", "missed")} == {
        "moved": 10 * 4 + 100 * 4, "used": 10 * 2 + 100 * 2, "missed": 10 * 2 + 100 * 3
    }  # fmt: skip
    assert prefetch["shuffled_used_bytes"] == 10 * 2 + 100 * 1
    assert [row["moved_bytes"] for row in prefetch["per_layer"]] == [40, 400]
    log.begin_step(None, 0)  # a batch
    log.event(0, np.array([[1, 3]]), torch.ones(1, 2))
    assert log.to_json() | {"predictor_ms_per_token": 0} == content | {"predictor_ms_per_token": 0}


@pytest.mark.parametrize(("lookahead", "used"), [("computed", 2), (1, 1)])
def test_scores_of_two_moments_by_hand(lookahead: int | str, used: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second layer's best are 0 and 1 once the first is routed, and 2 and 3, its experts, once it is computed."""
    geometry, lookaheads = small_geometry(2, 4, 2), ("computed", 1)
    settings = ReplaySettings(4, prefetch="top1", lookahead=lookahead, lookaheads=lookaheads, predictor="by hand")
    early, late = [0.9, 0.8, 0.1, 0.2], [0.1, 0.2, 0.9, 0.8]
    script: Any = Script([rows(first=early), rows(second=early), rows()], [rows(second=late), rows()])
    observer = Observer(script, InformationSet(lookaheads))
    monkeypatch.setattr(prediction_log, "make_observer", lambda strategy: observer)
    strategy: Any = type("Strategy", (), {"settings": settings})()
    log = PredictionLog(geometry, strategy, Cache(geometry, 4), [10, 10])
    log.begin_step(np.array([3]), 1)
    for layer, routed in enumerate(([0, 1], [3, 2])):
        log.event(layer, np.array([routed]), torch.full((1, 2), 0.5))
    found = {name: [row.found for row in by_layer] for name, by_layer in log.agreement().items()}
    assert found == {"computed": [2, 2], 1: [2, 0]}
    assert [log.to_json()["prefetch"][f"{name}_bytes"] for name in ("moved", "used")] == [20, 10 * used]


@given(count=st.integers(0, 40), seed=st.integers(0, 2**32 - 1))
def test_every_token_has_another_partner(count: int, seed: int) -> None:
    other = partners(count, seed)
    if count < 2:
        assert len(other) == 0
    else:
        assert sorted(other.tolist()) == list(range(count))
        assert (other != np.arange(count)).all()
        assert (other == partners(count, seed)).all()


def test_totals_are_sums() -> None:
    none = agreement(np.full((3, 2), -1), np.zeros((3, 2), int), np.ones((3, 2)), 0)
    assert none == Agreement(0, 0, 0, 0.0, 0, 0, 0, 0.0)
    assert none.to_json() == dict.fromkeys(none.to_json()) | {"entries": 0}
    one = agreement(np.array([[1, 2]]), np.array([[2, 3]]), np.array([[1.0, 3.0]]), 0)
    assert one == Agreement(1, 2, 1, 0.25, 0, 0, 0, 0.0)  # there is no other token
    assert Agreement.total([one, none, one]) == Agreement(2, 4, 2, 0.5, 0, 0, 0, 0.0)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("OlmoeForCausalLM", vocab_size=VOCAB)


def generate(model: Any) -> None:
    for prompt in PROMPTS:
        with torch.inference_mode():
            model.generate(torch.tensor([prompt]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_recall_is_that_of_the_batch_forward(variant: Variant, model: Any) -> None:
    predictor = fitted(variant, offload(model).geometry)
    lookaheads = predictor.information.lookaheads
    with offload(model, SLOTS, predictor=predictor, predict_only=True) as run:
        generate(model)
    with offload(model, SLOTS) as plain:
        generate(model)
    assert (run.cache.state.counters == plain.cache.state.counters).all()  # the predictor does not act
    found = {name: np.zeros((LAYERS, 2), int) for name in lookaheads}
    for sequence in run.log.sequences:
        ids = np.concatenate(sequence.token_ids).astype(np.int32)
        trace = Trace("0", "tests", ids, sequence.routing(LAYERS), sequence.steps[0])
        scores = probabilities(predictor, collate([trace]))[0]
        for token in range(trace.decode_start, len(trace)):
            for layer in range(LAYERS):
                for place, name in enumerate(lookaheads):
                    if name == "next" and token == trace.decode_start:
                        continue  # no scores follow a prompt's layers
                    if name not in ("token", "next") and name > layer:  # available at the start: the smallest one
                        place = next(i for i, other in enumerate(lookaheads) if other == "token" or other > layer)
                    best = np.argsort(-scores[token, place, layer], kind="stable")[: run.geometry.top_k]
                    hits = len(set(best.tolist()) & set(trace.experts[token, layer].tolist()))
                    found[name][layer] += hits, run.geometry.top_k
    assert run.predictions is not None
    for name, rows in run.predictions.agreement().items():
        assert [[row.found, row.chosen] for row in rows] == found[name].tolist(), name
    assert run.predictions.tokens == len(PROMPTS) * (NEW - 1)
    assert run.strategy.options == replace(plain.strategy.options, budget=SLOTS)


def test_states_reach_a_predictor_that_does_not_act(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from _helpers import predictor_variants

    monkeypatch.setattr(predictor_variants, "HIDDEN", 64)
    for variant in (
        Variant("next_gate", "router_inputs", {"hidden_size": 64, "lookaheads": 2}),
        Variant("layer_mlp", "layer_inputs", {"hidden_size": 64, "stride": 2, "width": 8}),
    ):
        predictor = fitted(variant, offload(model).geometry)
        with offload(model, SLOTS, predictor=predictor, predict_only=True) as run:
            generate(model)
        assert run.predictions is not None
        (rows,) = list(run.predictions.agreement().values())[:1]
        assert [row.entries for row in rows[1:]] == [len(PROMPTS) * (NEW - 1)] * (LAYERS - 1)


def test_what_would_act_is_refused(model: Any) -> None:
    predictor = fitted(VARIANTS[0], offload(model).geometry)
    for options, message in (
        ({}, "predict-log: needs a predictor to score"),
        ({"predictor": predictor, "policy": "belief"}, "does not act, and policy belief reads scores"),
        ({"predictor": predictor, "prefetch": "adaptive"}, r"counts prefetches by score only \(got adaptive\)"),
        ({"predictor": predictor, "prefetch": "none"}, "nor prefetch none reads scores"),
    ):
        with pytest.raises(UserError, match=message):
            offload(model, SLOTS, predict_only=True, **options)


def test_the_command_writes_the_log(capsys: Any, tmp_path: Path) -> None:
    words = ["run", "--model", "small-moe", "--prompt", "import os", "--budget", "25%", "--max-new-tokens", "6"]
    log, trace = tmp_path / "log.json", tmp_path / "trace"
    manifest = load_offloaded("small-moe", budget=60).manifest
    training = {"tokenizer": {"sha256": manifest.tokenizer.sha256}}
    save_predictor(fitted(VARIANTS[0], manifest.geometry), tmp_path / "fitted", training)
    scored = [*words, "--predictor", str(tmp_path / "fitted")]
    line = error_line(capsys, [*words, "--predict-log", log])
    assert line == "--predict-log: needs a predictor to score (got none); give --predictor"
    assert "is a folder; name a file" in error_line(capsys, [*scored, "--predict-log", tmp_path])
    assert main([*scored, "--prefetch", "p>0.3", "--predict-log", str(log), "--trace", str(trace)]) == 0
    out = capsys.readouterr().out
    content = json.loads(log.read_text())
    assert content["tokens"] == 5
    assert content["prefetch"]["prefetch"] == "p>0.3"
    assert "would move" in out
    assert "this run: lru" in out
    assert main(["replay", "--traces", str(trace), "--as-run"]) == 0  # without the predictor
    assert "48 of 48 events equal" in capsys.readouterr().out
