"""Hidden states, their projection and the routers of a trace set: written, read, streamed and damaged."""

import json
from dataclasses import replace

import numpy as np
import pytest
from _helpers.common import TINY, VOCAB, tiny_trace
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from hypothesis.strategies import floats

from moe_beyond.cli.main import main
from moe_beyond.datamodules.traces import whole_sequences
from moe_beyond.errors import UserError
from moe_beyond.traces import writer as writing_module
from moe_beyond.traces.hidden_states import HiddenStates, StateFormat, to_int8
from moe_beyond.traces.manifest import Manifest, Tokenizer
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.router_weights import Routers
from moe_beyond.traces.state_projection import StateProjection
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
            states = replace(trace.hidden_states, layer_values=trace.hidden_states.layer_inputs + np.float16(1))
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
        (replace(trace, hidden_states=replace(states, layer_values=states.layer_inputs.astype(float))), "layer inputs"),
        (replace(trace, hidden_states=to_int8(states)), "router inputs must be float16"),
    ):
        with pytest.raises(UserError, match=said), open_writer(tmp_path / "set", MANIFEST) as writer:
            writer.write(wrong)
    with pytest.raises(UserError, match="must be without hidden states"):
        with open_writer(tmp_path / "set", replace(MANIFEST, hidden_size=None, states=None)) as writer:
            writer.write(trace)
    with open_writer(tmp_path / "without", replace(MANIFEST, hidden_size=None, states=None)) as writer:
        writer.write(replace(trace, hidden_states=None))
    with pytest.raises(UserError, match="has no hidden states; collect it with --record experts,gate"):
        list(TraceSet(str(tmp_path / "without")).traces(hidden_states=True))


def test_int8_codes_by_hand():
    values = np.array([[[1.0, -4.0, 2.0], [0.0, 0.0, 0.0]], [[127.0, 63.4, -0.6], [1e-7, 0.0, 0.0]]], np.float16)
    coded = to_int8(HiddenStates(values, -values))
    np.testing.assert_array_equal(coded.router_values, [[[32, -127, 64], [0, 0, 0]], [[127, 63, -1], [127, 0, 0]]])
    np.testing.assert_array_equal(coded.layer_values, -coded.router_values)
    np.testing.assert_allclose(coded.router_scales[:, 0], [4 / 127, 1])
    assert coded.router_scales[0, 1] == 0
    np.testing.assert_allclose(coded.router_inputs[0, 0], np.array([32, -127, 64]) * 4 / 127, rtol=1e-3)
    assert coded.router_inputs.dtype == np.float16
    assert coded.nbytes == 2 * (values.size + 4 * 4)


@given(values=arrays(np.float16, (3, 2, 7), elements=floats(-65504, 65504, width=16)))
@settings(deadline=None)
def test_int8_states_differ_by_half_a_code_at_most(values):
    states = HiddenStates(values, values)
    decoded = to_int8(states).router_inputs.astype(np.float32)
    scales = np.abs(values.astype(np.float32)).max(-1, keepdims=True) / 127
    assert (np.abs(decoded - values) <= 0.5 * scales + np.abs(values) * 2**-10 + 1e-7).all()


PROJECTED = (2, 4)
"""Layers of a set whose states are projected and stored as int8."""


def projected(folder, **changed):
    """Write a set with int8 states of two layers, projected from 10 to 6 values."""
    matrices = np.random.default_rng(2).normal(size=(2, len(PROJECTED), SIZE, 10)).astype(np.float16)
    projection = StateProjection(*matrices)
    states = StateFormat("int8", PROJECTED, 10, projection.sha256)
    rng = np.random.default_rng(1)
    weights = Routers(rng.normal(size=(LAYERS, EXPERTS, 10)).astype(np.float32), "sigmoid")
    manifest = replace(MANIFEST, states=states)
    with open_writer(folder, manifest, shard_tokens=16, routers=weights, projection=projection) as writer:
        for number, trace in enumerate(traces_with_states()):
            some = to_int8(HiddenStates(*(array[:, :2] for array in trace.hidden_states.arrays().values())))
            writer.write(replace(trace, hidden_states=some), "validation" if number == 5 else "train")
    return TraceSet(str(folder))


def test_projected_states_of_some_layers_come_back(tmp_path, capsys):
    traces = projected(tmp_path / "set")
    manifest = traces.manifest
    assert (manifest.hidden_size, manifest.full_hidden_size, manifest.states.layers) == (SIZE, 10, PROJECTED)
    assert traces.routers.weight.shape[-1] == 10
    for found, expected in zip(traces.traces(hidden_states=True), traces_with_states(), strict=True):
        some = expected.hidden_states.layer_inputs[:, :2]
        assert found.hidden_states.layer_values.dtype == np.int8
        np.testing.assert_allclose(found.hidden_states.layer_inputs, some, atol=0.02)
    assert main(["export", "trace-set", traces.folder, str(tmp_path / "copy")]) == 0
    copy = TraceSet(str(tmp_path / "copy"))
    assert copy.manifest.states == manifest.states
    for before, after in zip(traces.traces(hidden_states=True), copy.traces(hidden_states=True), strict=True):
        for name, array in before.hidden_states.arrays().items():
            np.testing.assert_array_equal(after.hidden_states.arrays()[name], array)
    np.testing.assert_array_equal(copy.projection.layer_inputs, traces.projection.layer_inputs)
    card = (tmp_path / "copy" / "README.md").read_text()
    assert "int8, 6 of 10 values, layers 2, 4; tokens\nx 2 layers x 6." in card
    capsys.readouterr()
    assert main(["inspect", traces.folder, "--json", str(tmp_path / "json")]) == 0
    entries = manifest.tokens * LAYERS
    summary = json.loads((tmp_path / "json").read_text())
    assert summary["hidden_states"] == "int8, 6 of 10 values, layers 2, 4"
    assert summary["state_bytes_per_entry"] == round(sum(s.states_bytes for s in manifest.shards) / entries, 4)
    assert "int8, 6 of 10 values, layers 2, 4; " in capsys.readouterr().out
    assert main(["export", "trace-set", traces.folder, str(tmp_path / "public"), "--drop-tokens"]) == 0
    public = TraceSet(str(tmp_path / "public"))
    assert public.manifest.states is None
    assert not list((tmp_path / "public").glob("*.safetensors"))


def test_a_damaged_projection_is_named(tmp_path):
    traces = projected(tmp_path / "set")
    path = tmp_path / "set" / "projection.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"projection\.safetensors: file is damaged"):
        _ = TraceSet(traces.folder).projection
    path.unlink()
    with pytest.raises(UserError, match=r"projection\.safetensors: file named in manifest.json is missing"):
        _ = TraceSet(traces.folder).projection
    assert len(list(traces.traces(hidden_states=True))) == 6


def test_a_writer_refuses_another_projection_than_its_manifest_states(tmp_path):
    other = StateProjection(*np.ones((2, LAYERS, SIZE, 10), np.float16))
    for manifest, projection in (
        (MANIFEST, other),
        (replace(MANIFEST, states=StateFormat("int8", (2,), 10, "a" * 64)), other),
        (replace(MANIFEST, states=StateFormat("int8", (2,), 10, "a" * 64)), None),
    ):
        with pytest.raises(UserError, match="the projection differs from that of the manifest"):
            with open_writer(tmp_path / "set", manifest, projection=projection):
                pass
    assert not (tmp_path / "set").exists()
