"""Online updates: figures by hand, a plain reference, equality of stepper and sequence, and files of their state."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from _helpers.common import TINY, there
from _helpers.predictor_variants import HIDDEN, VARIANTS, Variant, fitted_once, random_trace
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from moe_beyond.errors import UserError
from moe_beyond.predictors.batch import collate
from moe_beyond.predictors.online import MOST_VISITS, OnlineSettings, OnlineUpdates, first_of
from moe_beyond.testing.predictors import assert_steps, probabilities
from moe_beyond.traces.trace import Trace

POPULARITY = Variant("popularity", "default")
NEXT = next(variant for variant in VARIANTS if str(variant) == "cross_layer-next")
FAST = OnlineSettings(id_rate=0.5, pair_rate=1.0, bound=1.5, contexts=16)


def scores_of(trace: Trace, variant: Variant) -> np.ndarray:
    return probabilities(fitted_once(variant), collate([trace]))[0]


def test_two_tokens_by_hand() -> None:
    """The second token has the id of the first, so its id's row has one step and the row of its pair none."""
    updates = OnlineUpdates(fitted_once(POPULARITY), OnlineSettings(id_rate=0.5, pair_rate=1.0))
    experts = np.broadcast_to(np.arange(TINY.top_k), (2, TINY.num_layers, TINY.top_k))
    scores = np.full((2, 1, *TINY.shape()[:2]), 0.25, np.float32)
    corrected = updates.correct([7, 7], experts, scores)
    assert corrected[0] == pytest.approx(scores[0])
    selected, other = math.log(1 / 3) + 0.5 * 0.75, math.log(1 / 3) - 0.5 * 0.25
    expected = [1 / (1 + math.exp(-x)) for x in [selected] * TINY.top_k + [other] * (TINY.num_experts - TINY.top_k)]
    assert corrected[1, 0, 0].tolist() == pytest.approx(expected, rel=1e-6)
    # A third token of this id, in another sequence: the id's row has two steps, and (start, 7) has one.
    third = updates.correct([7], experts[:1], scores[:1])[0, 0, 0, 0]
    row = 0.5 * 0.75 + 0.5 * (1 - expected[0])
    assert third == pytest.approx(1 / (1 + math.exp(-(math.log(1 / 3) + row + 1.0 * 0.75))), rel=1e-6)


class Reference:
    """The same in plain Python: one list of floats per context."""

    def __init__(self, config: OnlineSettings, parts: int) -> None:
        self.config, self.parts = config, parts
        self.table: dict[int, tuple[int, int, list]] = {}  # place -> key, visits, corrections

    def rows(self, token_id: int, previous: int) -> list[list | None]:
        keys = token_id + 1, (previous + 2) * 2**32 + token_id + 1
        return [self.row(key) for key in keys]

    def row(self, key: int) -> list | None:
        place = ((key * 0x9E3779B97F4A7C15) % 2**64 >> 32) % self.config.contexts
        held, visits, corrections = self.table.get(place, (0, 0, []))
        if held == key:
            self.table[place] = (key, min(visits + 1, MOST_VISITS), corrections)
            return corrections
        if visits:
            self.table[place] = (held, visits - 1, corrections)
            return None
        layers, experts, _ = TINY.shape()
        corrections = [[[0.0] * experts for _ in range(layers)] for _ in range(self.parts)]
        self.table[place] = (key, 1, corrections)
        return corrections

    @staticmethod
    def corrected(score: float, values: list[float]) -> float:
        score = min(max(score, 1e-6), 1 - 1e-6)
        return 1 / (1 + math.exp(-(math.log(score / (1 - score)) + sum(values))))

    def correct(self, trace: Trace, scores: np.ndarray, lookaheads: tuple) -> np.ndarray:
        out, before, bound = scores.astype(float), [], self.config.bound
        for token, token_id in enumerate(trace.token_ids.tolist()):
            rows = self.rows(token_id, int(trace.token_ids[token - 1]) if token else -1)
            for ahead, lookahead in enumerate(lookaheads):
                part, used = (1, before) if lookahead == "next" else (0, rows)
                for layer, expert in np.ndindex(scores.shape[2:]):
                    # The score "next" was corrected after this layer of the token before, by the rows of then.
                    if part == 0:
                        values = [row[part][layer][expert] for row in used if row is not None]
                        out[token, ahead, layer, expert] = self.corrected(out[token, ahead, layer, expert], values)
            updated = [(first_of(lookaheads), 0, rows)]
            if "next" in lookaheads and token:
                updated.append((lookaheads.index("next"), 1, before))
            for ahead, part, used in updated:
                for layer, expert in np.ndindex(scores.shape[2:]):
                    if ahead >= 0:
                        selected = expert in there(trace.experts[token, layer])
                        error = out[token, ahead, layer, expert] - selected
                        for row, rate in zip(used, (self.config.id_rate, self.config.pair_rate), strict=True):
                            if row is not None:
                                moved = row[part][layer][expert] - rate * error
                                row[part][layer][expert] = min(max(moved, -bound), bound)
            if "next" in lookaheads and token + 1 < len(trace):
                ahead = lookaheads.index("next")
                for layer, expert in np.ndindex(scores.shape[2:]):
                    values = [row[1][layer][expert] for row in rows if row is not None]
                    score = out[token + 1, ahead, layer, expert]
                    out[token + 1, ahead, layer, expert] = self.corrected(score, values)
            before = rows
        return out


@pytest.mark.parametrize("variant", [POPULARITY, NEXT], ids=str)
@given(seed=st.integers(0, 1000), contexts=st.sampled_from([1, 2, 5, 64]), lengths=st.lists(st.integers(1, 12)))
@settings(max_examples=15, deadline=None)
def test_scores_equal_a_plain_reference(variant: Variant, seed: int, contexts: int, lengths: list[int]) -> None:
    predictor, config = fitted_once(variant), OnlineSettings(0.5, 1.0, 1.5, contexts)
    lookaheads = predictor.information.lookaheads
    updates, reference = OnlineUpdates(predictor, config), Reference(config, 1 + ("next" in lookaheads))
    for number, length in enumerate(lengths):
        trace = random_trace("s", length, seed + number, vocab=4)
        scores = scores_of(trace, variant)
        corrected = updates.correct(trace.token_ids, trace.experts, scores)
        assert np.allclose(corrected, reference.correct(trace, scores, lookaheads), rtol=0, atol=2e-5)
    assert np.abs(updates.values).max() <= 1.5


@pytest.mark.parametrize("variant", [v for v in VARIANTS if not v.reads & {"later ids", "own states"}], ids=str)
def test_stepping_equals_the_sequences(variant: Variant) -> None:
    """A stepper gives the corrected scores of the batch at every moment, and leaves the same table."""
    predictor = fitted_once(variant)
    updates, stepped = OnlineUpdates(predictor, FAST), OnlineUpdates(predictor, FAST)
    stepper = stepped.stepper()
    for number, length in enumerate((9, 1, 14)):
        trace = random_trace("s", length, number, vocab=5)
        corrected = updates.correct(trace.token_ids, trace.experts, scores_of(trace, variant))
        stepper.reset()
        assert_steps(stepper, trace, corrected, predictor, end=length - 1)
        stepper.observe_token(int(trace.token_ids[-1]))
        for layer, experts in enumerate(trace.experts[-1]):
            stepper.observe_layer(layer, there(experts))
        assert (stepped.keys == updates.keys).all()
        assert (stepped.visits == updates.visits).all()
    assert np.allclose(stepped.values, updates.values, rtol=0, atol=1e-4)


@given(at=st.integers(0, 11), seed=st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_the_future_changes_no_score(at: int, seed: int) -> None:
    """Changed ids and experts of later tokens, and of later layers of a token, change no score that comes before."""
    trace, other = random_trace("s", 12, seed, vocab=4), random_trace("s", 12, seed + 1, vocab=4)
    layer = seed % TINY.num_layers
    ids, experts = trace.token_ids.copy(), trace.experts.copy()
    ids[at + 1 :], experts[at + 1 :] = other.token_ids[at + 1 :], other.experts[at + 1 :]
    experts[at, layer:] = other.experts[at, layer:]
    predictor, scores = fitted_once(NEXT), scores_of(trace, NEXT)
    before = OnlineUpdates(predictor, FAST).correct(trace.token_ids, trace.experts, scores)
    after = OnlineUpdates(predictor, FAST).correct(ids, experts, scores)
    following = predictor.information.lookaheads.index("next")
    assert (after[: at + 1] == before[: at + 1]).all()
    assert (after[at + 1 : at + 2, following, :layer] == before[at + 1 : at + 2, following, :layer]).all()


def test_a_predictor_that_reads_hidden_states_is_refused() -> None:
    predictor = fitted_once(Variant("pre_attention", "default", {"hidden_size": HIDDEN, "width": 8}))
    with pytest.raises(
        UserError, match="pre_attention reads hidden states, and only predictors of ids are updated; leave"
    ):
        OnlineUpdates(predictor)


def test_a_state_file_continues_exactly(tmp_path: Path) -> None:
    predictor, file = fitted_once(NEXT), tmp_path / "online.safetensors"
    traces = [random_trace("s", 20, seed, vocab=6) for seed in range(4)]
    whole, begun = OnlineUpdates(predictor, FAST), OnlineUpdates(predictor, FAST)

    def corrected(updates: OnlineUpdates, trace: Trace) -> np.ndarray:
        return updates.correct(trace.token_ids, trace.experts, scores_of(trace, NEXT))

    for trace in traces[:2]:
        assert (corrected(whole, trace) == corrected(begun, trace)).all()
    begun.save(file)
    resumed, twin = OnlineUpdates.load(file, predictor), begun.copy()
    assert resumed.settings == FAST
    for trace in traces[2:]:
        expected = corrected(whole, trace)
        assert (corrected(resumed, trace) == expected).all()
        assert (corrected(twin, trace) == expected).all()
    resumed.save(file)
    whole.save(tmp_path / "whole.safetensors")
    assert file.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def not_finite(tensors: dict[str, np.ndarray], description: dict) -> None:
    tensors["values"][0, 0, 0, 0] = np.nan


def out_of_bound(tensors: dict[str, np.ndarray], description: dict) -> None:
    tensors["values"][0, 0, 0, 0] = 9


def wrong_shape(tensors: dict[str, np.ndarray], description: dict) -> None:
    tensors["values"] = tensors["values"][:, :, :-1]


def wrong_type(tensors: dict[str, np.ndarray], description: dict) -> None:
    tensors["values"] = tensors["values"].astype(np.float64)


def repeated(tensors: dict[str, np.ndarray], description: dict) -> None:
    tensors["keys"][:] = tensors["keys"][0]


def visited_too_often(tensors: dict[str, np.ndarray], description: dict) -> None:
    tensors["visits"][0] = MOST_VISITS + 1


def wrong_settings(tensors: dict[str, np.ndarray], description: dict) -> None:
    description["settings"]["contexts"] = -1


def wrong_version(tensors: dict[str, np.ndarray], description: dict) -> None:
    description["format_version"] = 2


def without_a_field(tensors: dict[str, np.ndarray], description: dict) -> None:
    del description["predictor"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (not_finite, "its corrections are not finite or exceed their bound"),
        (out_of_bound, "its corrections are not finite or exceed their bound"),
        (wrong_shape, "its tensors have other shapes or types"),
        (wrong_type, "its tensors have other shapes or types"),
        (repeated, "its contexts contradict one another"),
        (visited_too_often, "its contexts contradict one another"),
        (wrong_settings, "contexts must be from 1 to 2"),
        (wrong_version, "format 2; this package reads 1"),
        (without_a_field, "its description is damaged"),
    ],
)
def test_wrong_state_files(tmp_path: Path, damage: Callable[..., None], message: str) -> None:
    file, predictor = tmp_path / "online.safetensors", fitted_once(POPULARITY)
    updates = OnlineUpdates(predictor, FAST)
    trace = random_trace("s", 9, 0, vocab=3)
    updates.correct(trace.token_ids, trace.experts, scores_of(trace, POPULARITY))
    updates.save(file)
    tensors = load_file(file)
    header = file.read_bytes()
    length = int.from_bytes(header[:8], "little")
    description = json.loads(json.loads(header[8 : 8 + length])["__metadata__"]["moe_beyond_online"])
    damage(tensors, description)
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(tensors, file, {"moe_beyond_online": json.dumps(description)})
    with pytest.raises(UserError, match=message):
        OnlineUpdates.load(file, predictor)


def test_state_files_of_others_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "online.safetensors"
    OnlineUpdates(fitted_once(POPULARITY)).save(file)
    with pytest.raises(UserError, match="online updates of another predictor than cross_layer"):
        OnlineUpdates.load(file, fitted_once(NEXT))
    save_file({"keys": np.zeros(1)}, file)
    with pytest.raises(UserError, match="is no file of online updates"):
        OnlineUpdates.load(file, fitted_once(POPULARITY))
    file.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="damaged safetensors file"):
        OnlineUpdates.load(file, fitted_once(POPULARITY))
    with pytest.raises(UserError, match="cannot be read"):
        OnlineUpdates.load(tmp_path / "absent", fitted_once(POPULARITY))


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "0.5", True])
def test_wrong_settings_are_refused(value: object) -> None:
    with pytest.raises(UserError, match="id_rate must be a number of at least 0"):
        OnlineSettings(id_rate=value)  # type: ignore[arg-type]
