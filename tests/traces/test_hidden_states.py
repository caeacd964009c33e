"""Hidden states and routers of a trace set: written, read, streamed and damaged."""

from dataclasses import replace

import numpy as np
import pytest
from _helpers.common import TINY, VOCAB, tiny_trace

from moe_beyond.datamodules.traces import whole_sequences
from moe_beyond.errors import UserError
from moe_beyond.traces import writer as writing_module
from moe_beyond.traces.hidden_states import HiddenStates
from moe_beyond.traces.manifest import Manifest, Tokenizer
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.router_weights import Routers
from moe_beyond.traces.writer import open_writer

LAYERS, EXPERTS, _ = TINY.shape()
SIZE = 6
MANIFEST = Manifest(TINY, Tokenizer("tests", VOCAB), "tiny", 16.0, "dataset", "tests", "0", hidden_size=SIZE)


def traces_with_states(sequences=6):
    rng = np.random.default_rng(0)
    for number in range(sequences):
        trace = tiny_trace(f"s{number}", 5 + number, rng)
        states = rng.normal(size=(2, len(trace), LAYERS, SIZE)).astype(np.float16)
        yield replace(trace, hidden_states=HiddenStates(*states))


def routers(**more):
    rng = np.random.default_rng(1)
    return Routers(rng.normal(size=(LAYERS, EXPERTS, SIZE)).astype(np.float32), "sigmoid", **more)


def written(folder, *, shard_tokens=16, **more):
    with open_writer(folder, MANIFEST, shard_tokens=shard_tokens, routers=routers(**more)) as writer:
        for number, trace in enumerate(traces_with_states()):
            writer.write(trace, "validation" if number == 5 else "train")
    return TraceSet(str(folder))


def test_states_come_back_with_their_tokens_where_they_are_asked_for(tmp_path):
    traces = written(tmp_path / "set")
    assert len(traces.shards("train")) > 1
    for found, expected in zip(traces.traces(hidden_states=True), traces_with_states(), strict=True):
        assert found.sequence_id == expected.sequence_id
        assert found.hidden_states.router_inputs.dtype == np.float16
        np.testing.assert_array_equal(found.hidden_states.router_inputs, expected.hidden_states.router_inputs)
        np.testing.assert_array_equal(found.hidden_states.layer_inputs, expected.hidden_states.layer_inputs)
    assert all(trace.hidden_states is None for trace in traces.traces())


def test_batches_are_padded_and_cut_like_their_entries(tmp_path):
    traces = written(tmp_path / "set")
    expected = {trace.sequence_id: trace for trace in traces_with_states()}
    for batch in whole_sequences(traces, hidden_states=True):
        for row, (name, length) in enumerate(zip(batch.sequence_ids, batch.lengths.tolist(), strict=True)):
            states = expected[name].hidden_states
            np.testing.assert_array_equal(batch.router_inputs[row, :length], states.router_inputs)
            np.testing.assert_array_equal(batch.layer_inputs[row, :length], states.layer_inputs)
            assert not batch.layer_inputs[row, length:].any()
    assert next(iter(whole_sequences(traces))).router_inputs is None


@pytest.mark.parametrize("more", [{}, {"bias": np.ones((LAYERS, EXPERTS), np.float32)}])
def test_routers_come_back(more, tmp_path):
    found = written(tmp_path / "set", **more).routers
    np.testing.assert_array_equal(found.weight, routers().weight)
    assert (found.scoring, found.selection_bias) == ("sigmoid", None)
    assert (found.bias is None) == (not more)


def test_shards_are_closed_by_the_size_of_their_states(tmp_path, monkeypatch):
    monkeypatch.setattr(writing_module, "SHARD_BYTES", 400)
    assert len(written(tmp_path / "set", shard_tokens=10**6).shards("train")) == 5


def test_another_hidden_state_is_another_set(tmp_path):
    prints = {written(tmp_path / "a").manifest.fingerprint, written(tmp_path / "b").manifest.fingerprint}
    assert len(prints) == 1
    with open_writer(tmp_path / "c", MANIFEST, shard_tokens=16) as writer:
        for number, trace in enumerate(traces_with_states()):
            states = replace(trace.hidden_states, layer_inputs=trace.hidden_states.layer_inputs + np.float16(1))
            writer.write(replace(trace, hidden_states=states), "validation" if number == 5 else "train")
    assert TraceSet(str(tmp_path / "c")).manifest.fingerprint not in prints


def test_what_is_damaged_is_named(tmp_path):
    traces = written(tmp_path / "set")
    path = tmp_path / "set" / traces.shards("train")[0].states_file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train-00000.states.safetensors: file is damaged"):
        list(traces.traces("train", hidden_states=True))
    assert len(list(traces.traces("train"))) == 5  # the entries are whole
    path.unlink()
    with pytest.raises(UserError, match=r"train-00000.states.safetensors: file named in manifest.json is missing"):
        list(traces.traces("train", hidden_states=True))
    (tmp_path / "set" / "routers.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"routers.safetensors: file is damaged"):
        _ = traces.routers


def test_states_that_do_not_fit_are_refused(tmp_path):
    trace = next(traces_with_states())
    states = trace.hidden_states
    for wrong, said in (
        (replace(trace, hidden_states=None), "must be with hidden states"),
        (replace(trace, hidden_states=states[:2]), "router inputs must be float16"),
        (replace(trace, hidden_states=replace(states, layer_inputs=states.layer_inputs.astype(float))), "layer inputs"),
    ):
        with pytest.raises(UserError, match=said), open_writer(tmp_path / "set", MANIFEST) as writer:
            writer.write(wrong)
    with pytest.raises(UserError, match="must be without hidden states"):
        with open_writer(tmp_path / "set", replace(MANIFEST, hidden_size=None)) as writer:
            writer.write(trace)
    with open_writer(tmp_path / "without", replace(MANIFEST, hidden_size=None)) as writer:
        writer.write(replace(trace, hidden_states=None))
    with pytest.raises(UserError, match="has no hidden states; collect it with --record experts,gate"):
        list(TraceSet(str(tmp_path / "without")).traces(hidden_states=True))
