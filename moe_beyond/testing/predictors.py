"""The contract of predictors, as checks that raise an AssertionError with one reason."""

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.lookahead import Lookahead, moments, reaches
from moe_beyond.predictors.base import CountingPredictor, Predictor
from moe_beyond.predictors.batch import Batch, collate
from moe_beyond.predictors.stepper import Stepper
from moe_beyond.predictors.training_stats import LONGEST_PREFIX, TrainingStats
from moe_beyond.traces.hidden_states import HiddenStates
from moe_beyond.traces.router_weights import Routers
from moe_beyond.traces.schema import experts_dtype, padding_id
from moe_beyond.traces.state_projection import StateProjection
from moe_beyond.traces.trace import Trace

Scores = npt.NDArray[np.float32]
Experts = npt.NDArray[np.integer[Any]]

GEOMETRY = Geometry("tiny", (1, 2, 3, 4), num_experts=8, top_k=2, params_per_expert=1000, other_params_per_layer=5000)
"""Shape of the model for which a class is built."""
VOCAB_SIZE = 32
HIDDEN_SIZE = 6
"""Width of hidden states of a class that reads them."""
TOKENS = 40
"""Length of the checked sequence."""
STEP_TOLERANCE = 2e-5
"""Largest difference between a stepper's and a batch's score: both compute in float32, in different orders."""
TOLERANCE = 1e-6
"""Largest difference between scores that must not differ."""


def check_predictor(predictor: Predictor | type[Predictor], **arguments: Any) -> None:
    """Check the contract that every predictor keeps.

    - The constructor's arguments are plain JSON values, and arguments and weights restore the predictor.
    - `forward` returns float32 logits ``(B, T, H, L, E)``, and probabilities are in [0, 1].
    - Neither padding tokens nor the order of padding experts changes a score.
    - Stepping through a sequence gives the scores of the batch, unless the predictor reads later tokens.
    - Nothing outside the information set changes a score.

    Args:
        predictor: A fitted predictor; or a class, which is built for a tiny model and fitted on random traces.
        **arguments: Arguments of the class's constructor, after geometry and vocabulary size.

    Raises:
        AssertionError: The predictor breaks the contract; the message gives the reason.

    Example:
        >>> from moe_beyond.predictors.architectures.popularity import Popularity
        >>> check_predictor(Popularity)
    """
    if isinstance(predictor, type):
        predictor = fit_tiny(predictor, **arguments)
    elif arguments:
        raise TypeError("check_predictor: a predictor is built already; give arguments only with a class")
    traces = [random_trace(predictor, f"s{length}", length, seed) for seed, length in enumerate((TOKENS, 1, 3, 17))]
    check_saving(predictor, traces[0])
    check_outputs(predictor, traces[1:])
    check_padding(predictor, traces)
    check_stepping(predictor, traces[0])
    check_stepping(predictor, replace(traces[0], experts=with_padding(traces[0].experts)))
    for at, shift in ((1, 1), (2, 2), (TOKENS // 2, 3), (TOKENS - 2, 1)):
        check_information_set(predictor, traces[0], at, shift)


def fit_tiny(predictor_class: type[Predictor], **arguments: Any) -> Predictor:
    """Build a predictor for a tiny model and fit it by counting random traces, or give it random weights.

    Args:
        predictor_class: Class of the predictor.
        **arguments: Arguments of its constructor, after geometry and vocabulary size.
    """
    if "hidden_size" in inspect.signature(predictor_class).parameters:
        arguments = {"hidden_size": HIDDEN_SIZE} | arguments
    with torch.random.fork_rng():
        torch.manual_seed(0)
        predictor = predictor_class(GEOMETRY, VOCAB_SIZE, **arguments)
        traces = [random_trace(predictor, f"train{seed}", TOKENS, 100 + seed) for seed in range(4)]
        predictor.prepare(_training_stats(traces, predictor))
        if isinstance(predictor, CountingPredictor):
            predictor.partial_fit(collate(traces))
        with torch.no_grad():
            for parameter in predictor.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return predictor.eval()


def check_saving(predictor: Predictor, trace: Trace) -> None:
    """Check that a JSON copy of the arguments and a safetensors copy of the weights restore a predictor."""
    name = type(predictor).__name__
    assert isinstance(getattr(predictor, "architecture", None), str), (
        f"{name}: has no architecture; set the class attribute architecture to its name"
    )
    try:
        arguments = predictor.arguments()
    except AttributeError as error:
        raise AssertionError(f"{name}: {error}; keep every argument of the constructor as an attribute") from error
    try:
        restored = json.loads(json.dumps(arguments, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise AssertionError(f"{name}: arguments() returns values that JSON cannot store ({error})") from error
    assert restored == arguments, f"{name}: arguments() returns other values after JSON (got {restored})"
    twin = type(predictor)(predictor.geometry, predictor.vocab_size, **restored)
    weights = safetensors.torch.load(safetensors.torch.save(_copied(predictor.state_dict())))
    try:
        twin.load_state_dict(weights)
    except RuntimeError as error:
        raise AssertionError(f"{name}: a predictor of the same arguments refuses the weights ({error})") from error
    twin.calibration = predictor.calibration
    assert twin.information == predictor.information, f"{name}: a restored predictor has another information set"
    _equal(
        probabilities(twin.eval(), collate([trace])),
        probabilities(predictor, collate([trace])),
        0.0,
        f"{name}: a restored predictor has other scores",
    )


def check_outputs(predictor: Predictor, traces: Sequence[Trace]) -> None:
    """Check shapes, types and ranges of logits and probabilities."""
    name, batch = type(predictor).__name__, collate(traces)
    with torch.inference_mode():
        logits = predictor(batch)
    shape = (*batch.mask.shape, len(predictor.information.lookaheads), *predictor.geometry.shape()[:2])
    assert logits.shape == shape, f"{name}: forward returns logits of another shape (got {tuple(logits.shape)})"
    assert logits.dtype == torch.float32, f"{name}: forward returns logits of another type (got {logits.dtype})"
    scores = probabilities(predictor, batch)[batch.mask.numpy()]
    assert ((scores >= 0) & (scores <= 1)).all(), f"{name}: a probability is not in [0, 1]"


def check_padding(predictor: Predictor, traces: Sequence[Trace]) -> None:
    """Check that neither padding tokens nor the positions of padding experts change a score."""
    name = type(predictor).__name__
    together = probabilities(predictor, collate(traces))
    for row, trace in enumerate(traces):
        apart = probabilities(predictor, collate([trace]))[0]
        _equal(together[row, : len(trace)], apart, STEP_TOLERANCE, f"{name}: padding tokens change a score")
    padded = replace(traces[0], experts=with_padding(traces[0].experts))
    permuted = replace(padded, experts=np.random.default_rng(1).permuted(padded.experts, axis=-1))
    _equal(
        probabilities(predictor, collate([permuted])),
        probabilities(predictor, collate([padded])),
        TOLERANCE,
        f"{name}: the order of a token's experts changes a score",
    )


def check_stepping(predictor: Predictor, trace: Trace, first: int = 0) -> None:
    """Check that a stepper gives the batch's scores at every moment.

    A predictor that reads later tokens must refuse to make a stepper instead.

    Args:
        predictor: Fitted predictor to check.
        trace: Sequence to step through.
        first: Number of tokens that are observed at once before the steps (default: 0).
    """
    name = type(predictor).__name__
    if not predictor.information.causal:
        try:
            predictor.stepper()
        except UserError:
            return
        raise AssertionError(f"{name}: reads later tokens, and its stepper does not raise a UserError")
    scores, stepper = probabilities(predictor, collate([trace]))[0], predictor.stepper()
    if first:
        stepper.observe_tokens(trace.token_ids[:first], trace.experts[:first])
    assert_steps(stepper, trace, scores, predictor, first)
    stepper.reset()
    assert np.isnan(stepper.scores()).all(), f"{name}: reset keeps scores of the sequence"


def assert_steps(
    stepper: Stepper, trace: Trace, scores: Scores, predictor: Predictor, first: int = 0, end: int | None = None
) -> None:
    """Step through some tokens and compare every moment with the scores of the batch.

    Args:
        stepper: Stepper that has observed the tokens before ``first``.
        trace: Sequence to step through.
        scores: ``(T, H, L, E)``, scores of the batch.
        predictor: Predictor of the stepper.
        first: Index of the first token (default: 0).
        end: Index after the last token (default: the last token whose next token has batch scores).

    Raises:
        AssertionError: A score differs.
    """
    lookaheads, layers = predictor.information.lookaheads, scores.shape[2]
    for token in range(first, len(trace) - ("next" in lookaheads) if end is None else end):
        stepper.observe_token(int(trace.token_ids[token]))
        following = scores[min(token + 1, len(scores) - 1)]
        for routed, computed in moments(layers):
            if computed:
                stepper.observe_computed(routed, layer_input(trace, token, routed + 1))
            elif routed >= 0:
                experts = trace.experts[token, routed]
                stepper.observe_layer(
                    routed, experts[experts != padding_id(experts.dtype)], router_input(trace, token, routed)
                )
            _equal(
                stepper.scores(),
                available_scores(scores[token], following, lookaheads, routed, computed=computed),
                STEP_TOLERANCE,
                f"{type(predictor).__name__}: stepping gives other scores than the batch, "
                f"at token {token} after {routed + 1} layers{', of which the last is computed' if computed else ''}",
            )


def check_information_set(predictor: Predictor, trace: Trace, at: int, shift: int) -> None:
    """Check that scores of one token do not depend on what the predictor does not declare to read.

    Once each layer of the token is routed, and once it is computed, everything that is not available yet is changed.

    Args:
        predictor: Fitted predictor to check.
        trace: Sequence with hidden states.
        at: Index of the token, neither the first nor the last.
        shift: Distance of changed ids from the true ones, in [1, E / 2).
    """
    name, information = type(predictor).__name__, predictor.information
    layers, later = predictor.geometry.num_layers, slice(at + 1, None)
    own = slice(at, at + 1)
    before = probabilities(predictor, collate([trace]))[0]

    def scores_of(altered: Trace) -> Scores:
        scores: Scores = probabilities(predictor, collate([altered]))[0]
        return scores

    for routed, computed in moments(layers):
        if computed and "computed" not in information.lookaheads:
            continue  # less is changed than when the layer is routed, and the same scores are available
        altered = _shift_experts(predictor, trace, own, slice(routed + 1, None), shift)
        altered = _shift_experts(predictor, altered, later, slice(None), shift)
        known = (routed + 1, routed + 1 + computed if routed >= 0 else 0)
        altered = _shift_states(_shift_states(altered, own, known, shift), later, (0, 0), shift)
        if information.causal:
            altered = _shift_ids(predictor, altered, later, shift)
        after = scores_of(altered)
        _equal(after[:at], before[:at], TOLERANCE, f"{name}: a score depends on later tokens or layers")
        for index, lookahead in enumerate(information.lookaheads):
            reached = [
                layer
                for layer in range(layers)
                if layer <= routed or reaches(lookahead, layer, routed, computed=computed)
            ]
            _equal(
                after[at, index, reached],
                before[at, index, reached],
                TOLERANCE,
                f"{name}: a score of lookahead {lookahead} depends on what is routed or computed later",
            )
            if lookahead == "next":
                _equal(
                    after[at + 1, index, : routed + 1],
                    before[at + 1, index, : routed + 1],
                    TOLERANCE,
                    f"{name}: a score of lookahead next depends on the next token",
                )
    if not information.token_ids:
        after = scores_of(_shift_ids(predictor, trace, slice(None), shift))
        _equal(after, before, TOLERANCE, f"{name}: a score depends on token ids, not in the information set")
    for kind, known in (("router_inputs", (0, layers)), ("layer_inputs", (layers, 0))):
        if kind not in information.hidden_states:
            after = scores_of(_shift_states(trace, slice(None), known, shift))
            reason = f"depends on {kind.replace('_', ' ')}, not in the information set"
            _equal(after, before, TOLERANCE, f"{name}: a score {reason}")


@torch.inference_mode()
def probabilities(predictor: Predictor, batch: Batch) -> Scores:
    """Return the probabilities of a batch, ``(B, T, H, L, E)``."""
    scores: Scores = np.asarray(predictor.probabilities(predictor(batch)), np.float32)
    return scores


def random_trace(predictor: Predictor, sequence_id: str, tokens: int, seed: int) -> Trace:
    """Return a trace of random ids, experts and hidden states that fits a predictor."""
    rng, geometry = np.random.default_rng(seed), predictor.geometry
    layers, experts, top_k = geometry.shape()
    chosen: Experts = rng.random((tokens, layers, experts)).argsort(-1)[..., :top_k].astype(experts_dtype(geometry))
    token_ids = rng.integers(0, predictor.vocab_size, tokens).astype(np.int32)
    token_ids[:1] = 0  # a start token: a prefix that all traces share
    width = int(getattr(predictor, "hidden_size", None) or HIDDEN_SIZE)
    states = HiddenStates(*rng.normal(size=(2, tokens, layers, width)).astype(np.float16))
    return Trace(sequence_id, "tests", token_ids, chosen, tokens, hidden_states=states)


def with_padding(experts: Experts, share: float = 0.4) -> Experts:
    """Return experts of which a random share is replaced by padding."""
    padded = np.random.default_rng(0).random(experts.shape) < share
    return np.where(padded, padding_id(experts.dtype), experts).astype(experts.dtype)


def router_input(trace: Trace, token: int, layer: int) -> npt.NDArray[np.float16] | None:
    """Return the input of a layer's router, ``(W,)``; None without hidden states.

    Args:
        trace: Sequence to read from.
        token: Index of the token.
        layer: Index of the layer among the MoE layers.
    """
    states = trace.hidden_states
    return None if states is None else np.asarray(states.router_inputs[token, layer], np.float16)


def layer_input(trace: Trace, token: int, layer: int) -> npt.NDArray[np.float16] | None:
    """Return the input of a layer before its attention, ``(W,)``; None without hidden states or after the last layer.

    Args:
        trace: Sequence to read from.
        token: Index of the token.
        layer: Index of the layer among the MoE layers.
    """
    states = trace.hidden_states
    if states is None or layer == trace.experts.shape[1]:
        return None
    return np.asarray(states.layer_inputs[token, layer], np.float16)


def available_scores(
    scores: Scores, following: Scores, lookaheads: Sequence[Lookahead], routed: int, *, computed: bool
) -> Scores:
    """Return the scores ``(L, E)`` that are available within a token, and NaN elsewhere.

    Args:
        scores: ``(H, L, E)``, batch scores of the token.
        following: ``(H, L, E)``, batch scores of the next token.
        lookaheads: The H lookaheads, in their order.
        routed: Index of the last routed layer; -1 before the first.
        computed: Whether the last routed layer is computed.
    """
    available = np.full(scores.shape[1:], np.nan, np.float32)
    if "next" in lookaheads:
        available[: routed + 1] = following[lookaheads.index("next"), : routed + 1]
    for layer in range(routed + 1, len(available)):
        reaching = [index for index, h in enumerate(lookaheads) if reaches(h, layer, routed, computed=computed)]
        if reaching:
            available[layer] = scores[reaching[0], layer]
    return available


def _training_stats(traces: Sequence[Trace], predictor: Predictor) -> TrainingStats:
    layers, experts, _ = GEOMETRY.shape()
    counts = np.bincount(np.concatenate([trace.token_ids for trace in traces]), minlength=VOCAB_SIZE)
    strings = [f"{'abc'[token_id % 3]}token{token_id}" for token_id in range(VOCAB_SIZE)]
    routers = np.random.default_rng(3).normal(size=(layers, experts, HIDDEN_SIZE)).astype(np.float32)
    projection = None
    if predictor.projected_from is not None:
        matrices = np.random.default_rng(4).normal(
            size=(2, layers, predictor.projected_from, predictor.hidden_size or 1)
        )
        rows = np.linalg.qr(matrices)[0].swapaxes(-1, -2)
        projection = StateProjection(*rows.astype(np.float16))
    prefixes = count_prefixes(traces, GEOMETRY.num_experts, VOCAB_SIZE)
    return TrainingStats(counts, strings, _expert_counts(traces), prefixes, Routers(routers, "logits"), projection)


def _expert_counts(traces: Sequence[Trace]) -> Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int32]]:
    layers, experts, _ = GEOMETRY.shape()

    def expert_counts(token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        counts = np.zeros((len(token_ids), layers, experts), np.int32)
        for row, token_id in enumerate(token_ids):
            for trace in traces:
                chosen = trace.experts[trace.token_ids == token_id].astype(np.int64)
                for layer in range(layers):
                    counts[row, layer] += np.bincount(chosen[:, layer].ravel(), minlength=experts).astype(np.int32)
        return counts.reshape(len(token_ids), -1)

    return expert_counts


def count_prefixes(
    traces: Sequence[Trace], num_experts: int, vocab_size: int
) -> Callable[[int], tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]]:
    """Return `TrainingStats.prefixes` of some traces, by a plain loop over tuples of token ids.

    Args:
        traces: At least one trace.
        num_experts: Experts per layer, E.
        vocab_size: Number of token ids, V.
    """
    layers = traces[0].experts.shape[1]

    def prefixes(limit: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        routed: dict[tuple[int, ...], list[Experts]] = {}
        for trace in traces:
            for last in range(min(len(trace), LONGEST_PREFIX)):
                routed.setdefault(tuple(trace.token_ids[: last + 1].tolist()), []).append(trace.experts[last])
        frequent = sorted(routed, key=lambda prefix: (-len(routed[prefix]), len(prefix), prefix))[:limit]
        frequent.sort(key=lambda prefix: (len(prefix), prefix))
        parents = {prefix: row for row, prefix in enumerate([(), *frequent])}
        keys = [parents[prefix[:-1]] * vocab_size + prefix[-1] for prefix in frequent]
        counts = np.zeros((len(frequent), layers, num_experts), np.int32)
        for row, prefix in enumerate(frequent):
            for experts in routed[prefix]:
                for layer, chosen in enumerate(experts):
                    counts[row, layer, chosen[chosen != padding_id(experts.dtype)]] += 1
        return np.array(keys, np.int64), counts.reshape(len(frequent), -1)

    return prefixes


def _copied(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone().contiguous() for name, tensor in weights.items()}


def _equal(scores: Scores, expected: Scores, tolerance: float, reason: str) -> None:
    same = np.allclose(scores, expected, rtol=0, atol=tolerance, equal_nan=True)
    assert isinstance(scores, np.ndarray), f"{reason} (got {type(scores).__name__}, not an array)"
    assert scores.dtype == np.float32, f"{reason} (got {scores.dtype}, not float32)"
    assert same, f"{reason} (difference {np.nanmax(np.abs(scores - expected)):.2g})"


def _shift_ids(predictor: Predictor, trace: Trace, tokens: slice, shift: int) -> Trace:
    token_ids = trace.token_ids.copy()
    token_ids[tokens] = (token_ids[tokens] + shift) % predictor.vocab_size
    return replace(trace, token_ids=token_ids)


def _shift_experts(predictor: Predictor, trace: Trace, tokens: slice, layers: slice, shift: int) -> Trace:
    experts = trace.experts.copy()
    experts[tokens, layers] = (experts[tokens, layers] + shift) % predictor.geometry.num_experts
    return replace(trace, experts=experts)


def _shift_states(trace: Trace, tokens: slice, known: tuple[int, int], shift: int) -> Trace:
    """Change the states of all layers but the first ones, whose numbers are given of router inputs and layer inputs."""
    assert trace.hidden_states is not None
    router, inputs = trace.hidden_states.router_inputs.copy(), trace.hidden_states.layer_inputs.copy()
    step = shift * np.linspace(1, 2, router.shape[-1], dtype=np.float16)
    router[tokens, known[0] :] += step
    inputs[tokens, known[1] :] += step
    return replace(trace, hidden_states=HiddenStates(router, inputs))
