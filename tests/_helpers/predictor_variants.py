"""Tiny instances of every registered predictor, with weights for which every input matters."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NoReturn

import numpy as np
import torch

from _helpers.common import TINY, VOCAB, there
from moe_beyond.geometry import Geometry
from moe_beyond.predictors.base import CountingPredictor, Predictor
from moe_beyond.predictors.batch import Batch, collate
from moe_beyond.predictors.registry import create
from moe_beyond.predictors.training_stats import TrainingStats
from moe_beyond.testing.predictors import count_prefixes
from moe_beyond.traces.hidden_states import HiddenStates
from moe_beyond.traces.router_weights import Routers
from moe_beyond.traces.schema import experts_dtype
from moe_beyond.traces.state_projection import StateProjection
from moe_beyond.traces.trace import Trace

# Ids from here on never occur in the training text.
SEEN = 2 * VOCAB // 3
# Longer than any window below, and than the blocks in which long sequences are computed.
LONG = 40
HIDDEN = 6
"""Width of hidden states."""

# More experts than a byte counts, and another number of layers; K > 2.
WIDE = Geometry("wide", (0, 3, 5), num_experts=300, top_k=3, params_per_expert=10, other_params_per_layer=10)


@dataclass(frozen=True)
class Variant:
    """A predictor's constructor arguments, a name for test ids, and its inputs.

    ``reads`` contains some of "own id", "earlier ids", "earlier experts" (of earlier tokens), "earlier layers" (of this
    token), "own states" and "later ids". The scores of a variant that ``jumps`` need not change with every input.
    """

    architecture: str
    name: str
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)
    reads: frozenset[str] = frozenset()
    jumps: bool = False

    def __str__(self) -> str:
        return f"{self.architecture}-{self.name}"


# A variant names which of these it has.
PLAIN = {"copy_heads": 0, "objective": "softmax", "memory_tokens": 0, "memory_prefixes": 0}
VOCABULARY = {"known_tokens": 24, "min_count": 1, "ngram_buckets": 64}


def _row_encoder(name: str, reads: Iterable[str], **arguments: Any) -> Variant:
    small = {"token_width": 8, "layer_width": 4, "width": 8, "depth": 2, "heads": 2, "feedforward": 16}
    return Variant("row_encoder", name, {**arguments, **small, **VOCABULARY}, frozenset({"own id", *reads}))


def _token_causal(name: str, reads: Iterable[str], **arguments: Any) -> Variant:
    small = {"width": 8, "depth": 2, "heads": 2, **VOCABULARY, **PLAIN}
    return Variant("token_causal", name, {**small, **arguments}, frozenset({"own id", *reads}))


def _cross_layer(name: str, reads: Iterable[str], **arguments: Any) -> Variant:
    small = {"width": 8, "depth": 2, "heads": 2, "layer_width": 8, **VOCABULARY, **PLAIN}
    small |= {"layer_copy_heads": 0, "next_token_head": False}
    return Variant("cross_layer", name, {**small, **arguments}, frozenset({"own id", *reads}))


def _hybrid(name: str, **arguments: Any) -> Variant:
    small = {"width": 8, "depth": 1, "heads": 2, "layer_width": 8, "state_width": 8, "window": 4}
    small |= {"memory_tokens": 0, "memory_prefixes": 0, "state_dropout": 0.5, **VOCABULARY}
    reads = {"own id", "own states", *ALL_EARLIER}
    return Variant("hybrid", name, {"hidden_size": HIDDEN, **small, **arguments}, frozenset(reads))


def _naive_bayes(name: str, reads: Iterable[str], **arguments: Any) -> Variant:
    return Variant("naive_bayes", name, arguments, frozenset(reads))


def _eamc(name: str, reads: Iterable[str], **arguments: Any) -> Variant:
    return Variant("eamc", name, arguments, frozenset(reads), jumps=True)


def _from_states(architecture: str, name: str, **arguments: Any) -> Variant:
    return Variant(architecture, name, {"hidden_size": HIDDEN, **arguments}, frozenset({"own states"}))


ALL_EARLIER = ("earlier ids", "earlier experts", "earlier layers")
VARIANTS = [
    Variant("popularity", "default"),
    Variant("token_table", "default", reads=frozenset({"own id"})),
    Variant("token_table", "backoff", {"backoff": 0.5}, frozenset({"own id"})),
    Variant("token_table", "frequent", {"min_count": 3}, frozenset({"own id"})),
    Variant("history", "default", reads=frozenset({"earlier experts"}), jumps=True),
    _eamc("default", ["earlier experts", "earlier layers"]),
    # Fewer places than sequences to fit on.
    _eamc("overflowing", ["earlier experts", "earlier layers"], capacity=3, backoff=0.0, ahead=2),
    _eamc("six_ahead", ["earlier experts", "earlier layers"], ahead=6),
    _eamc("whole_token", ["earlier experts"], ahead=0),
    _row_encoder("window", ["earlier ids"], context_tokens=3),
    _row_encoder("all", ["earlier ids"], context_tokens=64),
    _row_encoder("alone", [], context_tokens=1),
    _row_encoder("bidirectional", ["earlier ids", "later ids"], context_tokens=3, bidirectional=True),
    _naive_bayes("default", ["own id", "earlier experts", "earlier layers"]),
    # More lookaheads and sources than layers.
    _naive_bayes("six_ahead", ["own id", "earlier experts", "earlier layers"], lookaheads=6, sources=3),
    _naive_bayes("layers_alone", ["earlier layers"], lookaheads=1, sources=1, token=0.0, history=0.0),
    _naive_bayes("token_alone", ["own id"], lookaheads=2, history=0.0, layers=0.0, min_count=3),
    _token_causal("window", ["earlier ids", "earlier experts"], window=3),
    _token_causal("all", ["earlier ids", "earlier experts"], window=64),
    _token_causal("alone", ["earlier experts"], window=1),
    _token_causal("copying", ["earlier ids", "earlier experts"], window=3, copy_heads=2, objective="subset"),
    _token_causal("sigmoid", ["earlier ids", "earlier experts"], window=3, objective="sigmoid"),
    _token_causal("copying_all", ["earlier ids", "earlier experts"], window=64, copy_heads=1),
    _token_causal(
        "remembering",
        ["earlier ids", "earlier experts"],
        window=3,
        memory_tokens=VOCAB,
        memory_prefixes=6,
        known_tokens=0,
        ngram_buckets=0,
    ),
    _cross_layer("one_ahead", ALL_EARLIER, lookaheads=1, window=3),
    _cross_layer("three_ahead", ALL_EARLIER, lookaheads=3, window=3),
    # More lookaheads than layers, and no token out of the window.
    _cross_layer("six_ahead", ALL_EARLIER, lookaheads=6, window=64),
    _cross_layer("copying", ALL_EARLIER, lookaheads=2, window=5, copy_heads=3, objective="subset"),
    _cross_layer("copying_layers", ALL_EARLIER, lookaheads=3, window=4, layer_copy_heads=2, objective="ranking"),
    _cross_layer(
        "copying_all", ALL_EARLIER, lookaheads=6, window=64, copy_heads=1, layer_copy_heads=1, objective="subset"
    ),
    _cross_layer("next", ALL_EARLIER, lookaheads=2, window=4, copy_heads=2, next_token_head=True),
    _cross_layer(
        "everything",
        ALL_EARLIER,
        lookaheads=6,
        window=5,
        copy_heads=1,
        layer_copy_heads=1,
        next_token_head=True,
        memory_tokens=VOCAB,
        memory_prefixes=9,
        objective="subset",
    ),
    _cross_layer("next_alone", ALL_EARLIER, lookaheads=1, window=64, next_token_head=True),
    _cross_layer("alone", ["earlier experts", "earlier layers"], lookaheads=2, window=1),
    _hybrid("three_ahead", layer_copy_heads=0, next_token_head=False),
    _hybrid("one_ahead", lookaheads=1, next_token_head=False),
    _hybrid("everything", lookaheads=6, memory_tokens=VOCAB, memory_prefixes=5),
    _from_states("next_gate", "one_ahead", lookaheads=1),
    _from_states("next_gate", "three_ahead"),
    _from_states("next_gate", "six_ahead", lookaheads=6),
    _from_states("layer_mlp", "one_ahead", width=8),
    _from_states("layer_mlp", "three_ahead", stride=3, width=8),
    _from_states("layer_mlp", "six_ahead", stride=6, width=8),
    _from_states("pre_attention", "default", width=8),
]


def random_trace(name: str, length: int, seed: int, geometry: Geometry = TINY, vocab: int = VOCAB) -> Trace:
    """Return a trace of random ids and experts, for any number of experts."""
    rng = np.random.default_rng(seed)
    layers, experts, top_k = geometry.shape()
    chosen = rng.random((length, layers, experts)).argsort(-1)[..., :top_k].astype(experts_dtype(geometry))
    token_ids = rng.integers(0, vocab, length).astype(np.int32)
    token_ids[:1] = 1  # a start token: a prefix that all traces share
    states = HiddenStates(*rng.normal(size=(2, length, layers, HIDDEN)).astype(np.float16))
    return Trace(name, "tests", token_ids, chosen, length, hidden_states=states)


def training_stats(
    traces: Sequence[Trace], num_experts: int = TINY.num_experts, projection: StateProjection | None = None
) -> TrainingStats:
    """Return statistics of the traces, with a different string for every id, and with routers."""
    counts = np.bincount(np.concatenate([trace.token_ids for trace in traces]), minlength=VOCAB)
    strings = [f"{'abc'[i % 3]}token{i}" for i in range(VOCAB)]
    weight = np.random.default_rng(3).normal(size=(traces[0].experts.shape[1], num_experts, HIDDEN))
    routers = Routers(weight.astype(np.float32), "logits")
    counters = counted(traces, num_experts), count_prefixes(traces, num_experts, VOCAB)
    return TrainingStats(counts, strings, *counters, routers, projection)


def random_projection(layers: int, width: int, projected_from: int) -> StateProjection:
    """Return different orthonormal rows for every layer and kind of hidden state."""
    columns = np.linalg.qr(np.random.default_rng(4).normal(size=(2, layers, projected_from, width)))[0]
    return StateProjection(*columns.swapaxes(-1, -2).astype(np.float16))


def counted(traces: Sequence[Trace], num_experts: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return `TrainingStats.expert_counts` of these traces, by a plain loop."""
    layers = traces[0].experts.shape[1]

    def expert_counts(token_ids: np.ndarray) -> np.ndarray:
        counts = np.zeros((len(token_ids), layers, num_experts), np.int32)
        for row, token_id in enumerate(token_ids):
            for trace in traces:
                for experts in trace.experts[trace.token_ids == token_id]:
                    for layer, chosen in enumerate(experts):
                        counts[row, layer, there(chosen)] += 1
        return counts.reshape(len(token_ids), -1)

    return expert_counts


def uncounted(argument: object) -> NoReturn:
    """Fail: a predictor without a memory of routing must not count it."""
    raise AssertionError("this predictor has no memory of routing")


def fitted(variant: Variant, geometry: Geometry = TINY) -> Predictor:
    """Build a variant and give it weights that differ from zero, or counts."""
    traces = [random_trace(f"train{i}", LONG, 100 + i, geometry, SEEN) for i in range(4)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        predictor = create(variant.architecture, geometry, VOCAB, **variant.arguments)
        widths = predictor.hidden_size, predictor.projected_from
        projection = None if widths[1] is None else random_projection(geometry.num_layers, *widths)
        predictor.prepare(training_stats(traces, geometry.num_experts, projection))
        if isinstance(predictor, CountingPredictor):
            predictor.partial_fit(collate(traces))
        with torch.no_grad():
            for parameter in predictor.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return predictor.eval()


fitted_once = cache(fitted)


@torch.inference_mode()
def probabilities(predictor: Predictor, batch: Batch) -> np.ndarray:
    """Return the probabilities ``(B, T, H, L, E)`` of a batch."""
    return predictor.probabilities(predictor(batch)).numpy()
