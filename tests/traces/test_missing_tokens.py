"""Tokens that a recording lacks: left out at both ends with all that belongs to them, refused in the middle."""

import json
from pathlib import Path

import numpy as np
import pytest
from _helpers.common import word_tokenizer
from _helpers.recordings import LAYERS, SMALL, TOP_K, expert_rows, json_lines, position_rows, random_experts
from hypothesis import given
from hypothesis import strategies as st

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry, Preset, load_preset
from moe_beyond.traces.formats import FORMATS
from moe_beyond.traces.formats._missing import recorded_span

CASES = Path(__file__).parents[1] / "data" / "cases"


def imported(form, source, out, geometry=SMALL, **options):
    traces = FORMATS[form].reader(source, out, Preset(geometry), **options)
    return traces, list(traces.traces())


def marked(experts, head=0, tail=0, marker=-1):
    """The same, with so many tokens marked as missing at both ends."""
    experts = experts.copy()
    experts[:head] = marker
    experts[len(experts) - tail :] = marker
    return experts


# llama.cpp: micro-batches without rows of the last layer


def micro_batches(experts, prompts, geometry=SMALL):
    """``layer,expert`` rows: of a prompt, given as sizes of micro-batches, only the last has the last layer, and there
    only its last token; then what is written, token by token."""
    sizes = [(size, index == len(prompts) - 1) for index, size in enumerate(prompts)]
    sizes += [(1, True)] * (len(experts) - sum(prompts))
    rows, first = [], 0
    for size, ends in sizes:
        batch = experts[first : first + size]
        for row, layer in enumerate(geometry.moe_layers):
            if layer != geometry.moe_layers[-1] or ends:
                computed = batch[-1:] if layer == geometry.moe_layers[-1] else batch
                rows += [f"{layer},{expert}\n" for expert in computed[:, row].ravel()]
        first += size
    return "".join(rows)


def test_the_last_layer_is_that_of_the_last_micro_batch(tmp_path):
    geometry = load_preset(str(CASES / "llama-cpp" / "geo.json")).geometry
    names = ("one_ubatch", "two_ubatches", "pos_two_ubatches")
    sets = [imported("llama-cpp", CASES / "llama-cpp" / f"{name}.csv", tmp_path / name, geometry) for name in names]
    for traces, (trace,) in sets:
        assert trace.experts.shape == (5 + 1, 4, 4)  # the prompt's last token, and the generated ones
        assert trace.experts[0].tolist() == [[4, 15, 1, 3], [15, 1, 11, 8], [5, 2, 10, 6], [13, 14, 6, 4]]
        assert trace.experts[-1].tolist() == [[8, 12, 6, 3], [12, 1, 2, 10], [15, 6, 3, 14], [6, 14, 12, 2]]
        assert trace.decode_start == 1
        assert "11 prompt tokens omitted" in traces.manifest.source
    first, *others = (trace for _, (trace,) in sets)
    assert all(np.array_equal(other.experts, first.experts) for other in others)


@pytest.mark.parametrize(
    "prompt", [(8,), (8, 4), (8, 8, 4), (8, 8, 8), (8, 8, 1), (4, 8), (1, 1, 3), (1, 1), (7, 3, 5, 2)], ids=str
)
def test_micro_batches_of_any_sizes_make_one_prompt(prompt, tmp_path):
    experts = random_experts(sum(prompt) + 3, sum(prompt))
    (tmp_path / "run.csv").write_text(micro_batches(experts, prompt))
    _, (trace,) = imported("llama-cpp", tmp_path / "run.csv", tmp_path / "out")
    np.testing.assert_array_equal(trace.experts, experts[sum(prompt) - 1 :])
    assert trace.decode_start == 1


def positions(experts, prompts, geometry=SMALL):
    """The same run as `micro_batches` with rows of positions: in a prompt, minus the tokens that are left."""
    rows, first, prompt = [], 0, sum(prompts)
    for size in (*prompts, *[1] * (len(experts) - prompt)):
        for row, layer in enumerate(geometry.moe_layers):
            for token in range(first, first + size):
                if layer != geometry.moe_layers[-1] or token >= prompt - 1:
                    rows.append(",".join(map(str, [token - prompt, layer, *experts[token, row]])) + "\n")
        first += size
    return "".join(rows)


@pytest.mark.parametrize("prompt", [(8, 4), (8, 8, 4), (8, 8, 1), (4, 8), (1, 1, 3)], ids=str)
def test_both_forms_of_a_run_are_the_same(prompt, tmp_path):
    experts = random_experts(sum(prompt) + 3, 1)
    (tmp_path / "rows.csv").write_text(micro_batches(experts, prompt))
    (tmp_path / "positions.csv").write_text(positions(experts, prompt))
    (one,), (other,) = (
        imported("llama-cpp", tmp_path / f"{name}.csv", tmp_path / name)[1] for name in ("rows", "positions")
    )
    np.testing.assert_array_equal(one.experts, other.experts)
    np.testing.assert_array_equal(one.experts, experts[sum(prompt) - 1 :])
    assert one.decode_start == other.decode_start == 1


def test_merged_prompts_of_several_micro_batches_are_told_apart(tmp_path):
    prompts = [(8, 4), (8,), (1, 1, 2), (8, 8, 3)]
    runs = [random_experts(sum(prompt) + 2, number) for number, prompt in enumerate(prompts)]
    merged = "".join(micro_batches(experts, prompt) for experts, prompt in zip(runs, prompts, strict=True))
    (tmp_path / "run.csv").write_text(merged)
    _, traces = imported("llama-cpp", tmp_path / "run.csv", tmp_path / "out")
    assert len(traces) == 4
    for trace, experts, prompt in zip(traces, runs, prompts, strict=True):
        np.testing.assert_array_equal(trace.experts, experts[sum(prompt) - 1 :])


def test_token_ids_of_several_micro_batches_stay_aligned(tmp_path):
    (tmp_path / "run.csv").write_text(micro_batches(random_experts(15), (8, 4)))
    np.save(tmp_path / "run.tokens.npy", np.arange(15))
    words = str(word_tokenizer(tmp_path / "words.json", [f"w{i}" for i in range(15)]))
    _, (trace,) = imported("llama-cpp", tmp_path / "run.csv", tmp_path / "out", tokenizer=words)
    assert trace.token_ids.tolist() == [11, 12, 13, 14]


def test_a_file_that_does_not_tell_where_a_prompt_ends_is_refused(tmp_path):
    experts = random_experts(12)
    (tmp_path / "run.csv").write_text(micro_batches(experts[:4], (4,)) + micro_batches(experts[4:], (6, 2)))
    with pytest.raises(UserError, match=r"row 19: a batch of 8 tokens follows one of 4 that ends .* positions"):
        imported("llama-cpp", tmp_path / "run.csv", tmp_path / "out")
    (tmp_path / "run.csv").write_text(micro_batches(experts, (8, 4))[: -4 * TOP_K])  # cut before the last layer
    with pytest.raises(UserError, match=r"row 33: has layers 1\.\.2"):
        imported("llama-cpp", tmp_path / "run.csv", tmp_path / "out")


# vLLM and SGLang: rows of -1


@pytest.mark.parametrize(("head", "tail"), [(3, 0), (0, 2), (3, 2), (5, 3), (9, 0), (0, 9)])
@pytest.mark.parametrize("dense", [None, -1, 0])
@pytest.mark.parametrize("dtype", ["int16", "int32", "uint8"])
def test_missing_tokens_are_cut_with_what_lies_next_to_them(head, tail, dense, dtype, tmp_path):
    experts = random_experts(10)
    array = marked(experts, head, tail).astype(dtype)
    if dense is not None:  # a row for layer 0, which has no experts
        array = np.concatenate([np.full((10, 1, TOP_K), dense).astype(dtype), array], axis=1)
    np.save(tmp_path / "q.npy", array)
    np.save(tmp_path / "q.tokens.npy", np.arange(11))
    np.save(tmp_path / "q.decode_start.npy", 4)
    words = str(word_tokenizer(tmp_path / "words.json", [f"w{i}" for i in range(11)]))
    traces, (trace,) = imported("vllm", tmp_path / "q.npy", tmp_path / "out", tokenizer=words)
    kept = range(head, 10 - tail)
    np.testing.assert_array_equal(trace.experts, experts[kept.start : kept.stop])
    assert trace.token_ids.tolist() == list(kept)
    assert trace.decode_start == sum(token < 4 for token in kept)
    count = head + tail
    assert (
        traces.manifest.source == f"routed experts of an engine, q.npy; {count} tokens omitted, marked as missing (-1)"
    )


def test_cases_of_engines(tmp_path):
    geometry = load_preset(str(CASES / "vllm" / "geo.json")).geometry
    for name, kept in (("minus_one_head", slice(4, 10)), ("minus_one_tail", slice(0, 8))):
        _, (trace,) = imported("vllm", CASES / "vllm" / name, tmp_path / name, geometry)
        array = np.load(CASES / "vllm" / name / "q.npy")
        np.testing.assert_array_equal(trace.experts, array[kept])
        assert (array[kept] >= 0).all()
    traces, (trace,) = imported("vllm", CASES / "vllm" / "empty_seq", tmp_path / "empty", geometry)
    assert (trace.sequence_id, len(trace)) == ("a", 10)
    assert traces.manifest.source.endswith("; 1 request without recorded tokens omitted")


def test_requests_without_a_recorded_token_are_passed_over_with_their_token_ids(tmp_path):
    arrays = {
        "gone": np.full((4, LAYERS, TOP_K), -1), "gone.tokens": np.arange(4), "gone.decode_start": np.array(2),
        "none": np.array([]), "none.tokens": np.array([]), "none.decode_start": np.array(0),
        "there": random_experts(5), "there.tokens": np.arange(5), "there.decode_start": np.array(5),
    }  # fmt: skip
    np.savez(tmp_path / "set.npz", **arrays)
    words = str(word_tokenizer(tmp_path / "words.json", ["a", "b", "c", "d", "e"]))
    traces, (trace,) = imported("vllm", tmp_path / "set.npz", tmp_path / "out", tokenizer=words)
    assert (trace.sequence_id, trace.token_ids.tolist()) == ("there", [0, 1, 2, 3, 4])
    assert traces.manifest.author == "dataset"
    assert traces.manifest.source.endswith(
        "; 4 tokens omitted, marked as missing (-1); 2 requests without recorded tokens omitted"
    )


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (np.s_[4], "q.npy: token 4 is marked as missing .-1. between recorded tokens"),
        (np.s_[4:7], "q.npy: token 4 is marked as missing"),
        (np.s_[5, 1], "q.npy: token 5 is marked as missing .-1. in layer 2, but not in all layers"),
        (np.s_[:, 1], "q.npy: token 0 is marked as missing .-1. in layer 2, but not in all layers"),
        (np.s_[0, 2], "q.npy: token 0 is marked as missing .-1. in layer 3, but not in all layers"),
        (np.s_[9, :, 0], "q.npy: token 9, layer 1: expert id -1 is out of range"),
    ],
)
def test_what_is_missing_in_the_middle_is_refused_by_row(place, says, tmp_path):
    experts = random_experts(10)
    experts[place] = -1
    np.save(tmp_path / "q.npy", experts)
    with pytest.raises(UserError, match=says):
        imported("vllm", tmp_path / "q.npy", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_recorded_at_all_is_refused(tmp_path):
    np.save(tmp_path / "q.npy", np.full((4, LAYERS, TOP_K), -1))
    with pytest.raises(UserError, match=r"q\.npy: none of its 1 requests has a recorded token"):
        imported("vllm", tmp_path / "q.npy", tmp_path / "out")


def test_the_largest_byte_is_an_expert_where_there_are_so_many():
    ids = np.full((2, 1, 1), 255, np.uint8)
    assert recorded_span(ids, (0,), 256, "q") == slice(0, 2)
    assert recorded_span(ids, (0,), 255, "q") == slice(0, 0)


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_a_span_is_what_lies_between_the_marks(there):
    ids = np.where(np.array(there)[:, None, None], 3, -1).repeat(2, 1)
    recorded = [token for token, is_there in enumerate(there) if is_there]
    if recorded and not all(there[recorded[0] : recorded[-1] + 1]):
        with pytest.raises(UserError):
            recorded_span(ids, (1, 2), 8, "q")
    else:
        span = recorded_span(ids, (1, 2), 8, "q")
        assert list(range(span.start, span.stop)) == recorded


# JSON lines and files without rows


def test_missing_json_lines_are_cut_with_their_gate_weights_and_token_ids(tmp_path):
    experts, gates = random_experts(7), np.random.default_rng(0).random((7, LAYERS, TOP_K)).astype(np.float16)
    (tmp_path / "q.jsonl").write_text("\n".join(json_lines(marked(experts, 2, 1), gates)))
    np.save(tmp_path / "q.tokens.npy", np.arange(7))
    np.save(tmp_path / "q.decode_start.npy", 3)
    words = str(word_tokenizer(tmp_path / "words.json", [f"w{i}" for i in range(7)]))
    traces, (trace,) = imported("jsonl", tmp_path / "q.jsonl", tmp_path / "out", tokenizer=words)
    np.testing.assert_array_equal(trace.experts, experts[2:6])
    np.testing.assert_array_equal(trace.gate_weights, gates[2:6])
    assert (trace.token_ids.tolist(), trace.decode_start) == ([2, 3, 4, 5], 1)
    assert traces.manifest.source.endswith("; 3 tokens omitted, marked as missing (-1)")


@pytest.mark.parametrize(
    ("form", "name", "good", "empty"),
    [
        ("jsonl", "b.jsonl", "\n".join(json_lines(random_experts(4))), "\n\n"),
        ("llama-cpp", "b.csv", expert_rows(random_experts(4), 2), "layer,expert\n"),
        ("llama-cpp", "b.csv", position_rows(random_experts(4), 2), ""),
    ],
)
def test_files_without_rows_are_passed_over_and_counted(form, name, good, empty, tmp_path):
    folder = tmp_path / "src"
    folder.mkdir()
    (folder / name).write_text(empty)
    with pytest.raises(UserError, match=f"{folder}: has no (rows|lines)"):
        imported(form, folder, tmp_path / "out")
    (folder / f"a{name}").write_text(good)
    traces, found = imported(form, folder, tmp_path / "out")
    assert len(found) == 1
    assert "; 1 request without recorded tokens omitted" in traces.manifest.source


# Vocabularies


def test_the_vocabulary_is_as_large_as_the_embedding(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    words = [f"w{i}" for i in range(6)]
    word_tokenizer(folder / "tokenizer.json", words)
    config = {
        "model_type": "dots1", "hidden_size": 8, "moe_intermediate_size": 16, "num_hidden_layers": 4,
        "first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 2,
        "vocab_size": 8,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    np.save(tmp_path / "q.npy", random_experts(4))
    np.save(tmp_path / "q.tokens.npy", [0, 5, 6, 7])
    preset = load_preset(str(folder))
    traces = FORMATS["vllm"].reader(tmp_path / "q.npy", tmp_path / "out", preset)
    assert traces.manifest.tokenizer.vocab_size == 8
    assert traces.token_strings == [*words, "", ""]
    np.save(tmp_path / "q.tokens.npy", [0, 5, 6, 8])
    with pytest.raises(
        UserError, match=r"q\.tokens\.npy: token id 8 is out of range 0\.\.7 of tokenizer .*config\.json"
    ):
        FORMATS["vllm"].reader(tmp_path / "q.npy", tmp_path / "again", preset)


def test_token_ids_are_checked_before_a_sequence_is_read(tmp_path, monkeypatch):
    geometry = Geometry("small", (1, 2, 3), 8, 2, 1000, 0)
    np.save(tmp_path / "q.npy", random_experts(4))
    np.save(tmp_path / "q.tokens.npy", [0, 1, 2, 9])
    words = str(word_tokenizer(tmp_path / "words.json", ["a", "b", "c"]))
    monkeypatch.setattr("moe_beyond.traces.formats._recording.open_writer", None)  # never called
    with pytest.raises(UserError, match=r"token id 9 is out of range 0\.\.2"):
        imported("vllm", tmp_path / "q.npy", tmp_path / "out", geometry, tokenizer=words)
