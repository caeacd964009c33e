"""Recordings of other tools become the same tokens, layers and experts; nothing is made up."""

import json
import random

import numpy as np
import pytest
from _helpers.common import word_tokenizer
from _helpers.recordings import (
    EXPERTS,
    LAYERS,
    SMALL,
    TOP_K,
    expert_rows,
    flame_moe,
    json_lines,
    position_rows,
    random_experts,
)

from moe_beyond.errors import UserError
from moe_beyond.geometry import Preset
from moe_beyond.traces.formats import FORMATS
from moe_beyond.traces.formats import flame_moe as flame_module
from moe_beyond.traces.manifest import NO_TOKEN_IDS

WORDS = [f"w{i}" for i in range(30)]


@pytest.fixture
def words(tmp_path):
    return str(word_tokenizer(tmp_path / "words.json", WORDS))


def imported(form, source, **options):
    """Import into a neighbouring folder; return the set and its traces."""
    traces = FORMATS[form].reader(source, source.parent / f"{source.stem}-traces", Preset(SMALL), **options)
    return traces, list(traces.traces())


def gates(length, seed=0):
    return np.random.default_rng(seed).random((length, LAYERS, TOP_K)).astype(np.float16)


# vLLM and SGLang


def test_arrays_without_token_ids_say_so_and_come_in_the_order_that_people_count_in(tmp_path):
    folder = tmp_path / "arrays"
    folder.mkdir()
    experts = {f"q{n}": random_experts(n, n) for n in (2, 10, 1)}
    for name, ids in experts.items():
        np.save(folder / f"{name}.npy", ids)
    traces, found = imported("vllm", folder)
    assert [trace.sequence_id for trace in found] == ["q1", "q2", "q10"]
    for trace in found:
        np.testing.assert_array_equal(trace.experts, experts[trace.sequence_id])
        assert not trace.token_ids.any()
        assert trace.decode_start == len(trace)
    manifest = traces.manifest
    assert (manifest.tokenizer, manifest.has_token_ids) == (NO_TOKEN_IDS, False)
    assert (manifest.author, manifest.quantization_bits) == ("unknown", 16.0)
    assert traces.token_strings is None


@pytest.mark.parametrize("dtype", ["uint8", "int32", ">i8"])
@pytest.mark.parametrize("filler", [None, 0, 7])
def test_any_whole_numbers_are_experts_and_rows_of_dense_layers_are_dropped(dtype, filler, tmp_path):
    experts = random_experts(5)
    array = experts.astype(dtype)
    if filler is not None:
        array = np.full((5, 1 + LAYERS, TOP_K), filler, dtype)
        array[:, 1:] = experts
    np.save(tmp_path / "one.npy", array)
    _, (trace,) = imported("vllm", tmp_path / "one.npy")
    np.testing.assert_array_equal(trace.experts, experts)
    assert trace.experts.dtype == np.uint8


@pytest.mark.parametrize("sampled", [0, 1])
def test_token_ids_and_decode_start_lie_beside_an_array(sampled, tmp_path, words):
    experts, ids = random_experts(6), np.arange(6 + sampled)  # the last sampled token went through no layer
    np.save(tmp_path / "one.npy", experts)
    np.save(tmp_path / "one.tokens.npy", ids)
    np.save(tmp_path / "one.decode_start.npy", np.array(4))
    traces, (trace,) = imported("vllm", tmp_path / "one.npy", tokenizer=words)
    assert trace.token_ids.tolist() == list(range(6))
    assert trace.decode_start == 4
    assert (traces.manifest.author, traces.manifest.has_token_ids) == ("mixed", True)
    assert traces.token_strings == WORDS


def test_an_npz_keeps_its_order_and_whole_blocks_go_to_validation(tmp_path, words):
    arrays = {}
    for first, (name, length) in enumerate((("b", 3), ("a", 2), ("c", 3))):
        arrays |= {name: random_experts(length), f"{name}.tokens": first + np.arange(length)}
    np.savez_compressed(tmp_path / "set.npz", **arrays)
    traces, found = imported("vllm", tmp_path / "set.npz", tokenizer=words, val_blocks="1:3")
    # A third of 8 tokens is nearest to 3, and b is the lower of those.
    assert [trace.sequence_id for trace in found] == ["a", "c", "b"]
    assert [trace.sequence_id for trace in traces.traces("validation")] == ["b"]


# llama.cpp


@pytest.mark.parametrize("rows", [expert_rows, position_rows])
@pytest.mark.parametrize("ubatch", [512, 4])
def test_a_llama_cpp_trace_begins_with_the_last_token_of_the_prompt(rows, ubatch, tmp_path):
    experts = random_experts(15)
    (tmp_path / "run.csv").write_text(rows(experts, prompt=10, ubatch=ubatch))
    traces, (trace,) = imported("llama-cpp", tmp_path / "run.csv")
    np.testing.assert_array_equal(trace.experts, experts[9:])  # of those before, the last layer was not computed
    assert trace.decode_start == 1
    assert traces.manifest.author == "mixed"
    assert "9 prompt tokens omitted, whose last layer was not computed" in traces.manifest.source


@pytest.mark.parametrize("rows", [expert_rows, position_rows])
def test_merged_llama_cpp_traces_are_told_apart(rows, tmp_path):
    experts = [random_experts(length, length) for length in (6, 9, 5)]
    merged = "".join(rows(ids, prompt) for ids, prompt in zip(experts, (3, 7, 2), strict=True))
    (tmp_path / "merged.csv").write_text(merged)
    _, found = imported("llama-cpp", tmp_path / "merged.csv")
    assert [trace.sequence_id for trace in found] == ["merged-0", "merged-1", "merged-2"]
    for trace, ids, prompt in zip(found, experts, (3, 7, 2), strict=True):
        np.testing.assert_array_equal(trace.experts, ids[prompt - 1 :])
        assert trace.decode_start == 1


def prompt_rows(length: int, ubatch: int) -> str:
    """A prompt of which only the last micro-batch has rows of the last layer, one token's."""
    experts, rows = random_experts(length), []
    for first in range(0, length, ubatch):
        part = experts[first : first + ubatch]
        for row, layer in enumerate(SMALL.moe_layers):
            last = layer == SMALL.moe_layers[-1]
            computed = part if not last else part[-1:] if first + ubatch >= length else part[:0]
            rows += [f"{layer},{expert}\n" for expert in computed[:, row].ravel()]
    return "".join(rows)


@pytest.mark.parametrize(
    ("lengths", "ubatch", "row", "sizes"),
    [
        ((9, 9), 4, 39, (9, 9)),  # 9 tokens have 9 * 2 * 2 + 2 rows
        ((9, 5), 4, 39, (5, 9)),
        ((8, 8), 4, 35, (8, 8)),
        ((4, 4), 4, 19, (4, 4)),
        ((8, 4), 4, 35, (4, 8)),
        ((4, 9), 4, 19, (9, 4)),
    ],
)
def test_prompts_without_an_answer_in_one_file_are_refused(lengths, ubatch, row, sizes, tmp_path):
    (tmp_path / "run.csv").write_text("".join(prompt_rows(length, ubatch) for length in lengths))
    with pytest.raises(UserError) as error:
        imported("llama-cpp", tmp_path / "run.csv")
    says = f"run.csv: row {row}: a batch of {sizes[0]} tokens follows one of {sizes[1]} that ends a prompt"
    assert says in str(error.value)
    (tmp_path / "run.csv").write_text(prompt_rows(lengths[0], ubatch))
    _, (trace,) = imported("llama-cpp", tmp_path / "run.csv")
    np.testing.assert_array_equal(trace.experts, random_experts(lengths[0])[-1:])


@pytest.mark.parametrize("missing", [-3, -1, 0, 1, 3])
def test_a_missing_position_is_named(missing, tmp_path):
    lines = position_rows(random_experts(15), prompt=10, ubatch=1).splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(f"{missing},")]
    (tmp_path / "run.csv").write_text("".join(kept))
    with pytest.raises(UserError) as error:
        imported("llama-cpp", tmp_path / "run.csv")
    assert f"run.csv: row 1: position {missing} is missing from the sequence that begins there" in str(error.value)


def in_order(lines: list[str], order: str) -> list[str]:
    keys = {
        "text": lambda line: line,
        "number": lambda line: [int(number) for number in line.split(",")],
        "layer": lambda line: int(line.split(",")[1]),
        "reversed": lambda line: [-int(number) for number in line.split(",")],
    }
    return sorted(lines, key=keys[order])


@pytest.mark.parametrize("order", ["text", "number", "layer", "reversed"])
@pytest.mark.parametrize(("prompt", "ubatch"), [(8, 4), (10, 4), (9, 512), (12, 512)])
def test_position_rows_in_another_order_are_read_right_or_refused(order, prompt, ubatch, tmp_path):
    experts = random_experts(prompt + 12)
    lines = in_order(position_rows(experts, prompt, ubatch).splitlines(keepends=True), order)
    (tmp_path / "run.csv").write_text("".join(lines))
    try:
        _, found = imported("llama-cpp", tmp_path / "run.csv")
    except UserError:
        return
    (trace,) = found
    np.testing.assert_array_equal(trace.experts, experts[-len(trace) :])
    assert trace.decode_start == len(trace) - 12


def test_a_prompt_that_was_sorted_as_text_is_refused_with_the_reason(tmp_path):
    lines = in_order(position_rows(random_experts(12), 8, 4).splitlines(keepends=True), "text")
    (tmp_path / "run.csv").write_text("".join(lines))
    with pytest.raises(UserError, match=r"row 1: the prompt .* is not in the order of computation; keep the"):
        imported("llama-cpp", tmp_path / "run.csv")


@pytest.mark.parametrize("header", ["", "layer,expert\n"])
def test_a_byte_order_mark_is_skipped(header, tmp_path):
    experts = random_experts(8)
    (tmp_path / "run.csv").write_text(header + expert_rows(experts, prompt=5), encoding="utf-8-sig")
    _, (trace,) = imported("llama-cpp", tmp_path / "run.csv")
    np.testing.assert_array_equal(trace.experts, experts[4:])


def test_token_ids_beside_a_llama_cpp_trace_are_those_of_all_tokens(tmp_path, words):
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "run.csv").write_text("layer,expert\n" + expert_rows(random_experts(8), prompt=5))
    np.save(folder / "run.tokens.npy", np.arange(10, 18))
    traces, (trace,) = imported("llama-cpp", folder, tokenizer=words, quantization_bits=4.5)
    assert trace.token_ids.tolist() == [14, 15, 16, 17]
    assert (traces.manifest.has_token_ids, traces.manifest.quantization_bits) == (True, 4.5)


def test_a_prompt_that_was_computed_whole_is_kept_whole(tmp_path):
    experts = random_experts(4)
    rows = [f"{layer},{e}\n" for row, layer in enumerate(SMALL.moe_layers) for e in experts[:, row].ravel()]
    (tmp_path / "run.csv").write_text("".join(rows))
    traces, (trace,) = imported("llama-cpp", tmp_path / "run.csv")
    np.testing.assert_array_equal(trace.experts, experts)
    assert (trace.decode_start, traces.manifest.author) == (4, "dataset")


# JSON lines


def test_json_lines_come_in_any_order_with_gate_weights_and_fields_of_their_own(tmp_path):
    experts, weights = random_experts(7), gates(7)
    lines = json_lines(experts, weights)
    random.Random(0).shuffle(lines)
    (tmp_path / "one.jsonl").write_text("\n".join([*lines[:5], "", *lines[5:]]) + "\n\n")
    traces, (trace,) = imported("jsonl", tmp_path / "one.jsonl")
    np.testing.assert_array_equal(trace.experts, experts)
    np.testing.assert_array_equal(trace.gate_weights, weights)
    assert (trace.decode_start, traces.manifest.author) == (7, "unknown")


def test_a_file_of_json_lines_is_a_sequence(tmp_path, words):
    folder = tmp_path / "lines"
    folder.mkdir()
    for n in (10, 2):
        lines = [json.loads(line) for line in json_lines(random_experts(n, n))]
        later = [json.dumps({**line, "token_idx": line["token_idx"] + 90}) for line in lines]  # only the decode phase
        (folder / f"s{n}.jsonl").write_text("\n".join(later))
        np.save(folder / f"s{n}.tokens.npy", np.arange(n))
        np.save(folder / f"s{n}.decode_start.npy", 0)
    traces, found = imported("jsonl", folder, tokenizer=words, val_blocks="1:2")
    assert [(trace.sequence_id, len(trace), trace.gate_weights) for trace in found] == [
        ("s10", 10, None),
        ("s2", 2, None),
    ]
    np.testing.assert_array_equal(found[0].experts, random_experts(10, 10))
    assert traces.manifest.author == "model"
    assert traces.manifest.splits == ("train", "validation")


# FLAME-MoE


@pytest.mark.parametrize("at_once", [3, 65536])
def test_flame_moe_layers_are_joined_row_by_row_and_cut_into_sequences(at_once, tmp_path, words, monkeypatch):
    monkeypatch.setattr(flame_module, "ROWS_AT_ONCE", at_once)
    experts, weights, ids = random_experts(25), gates(25), np.arange(25) % EXPERTS
    folder = flame_moe(tmp_path, experts, weights, [ids[:4].tolist(), ids[4:].tolist()])
    traces, found = imported("flame-moe", folder, tokenizer=words, sequence_tokens=10, val_blocks="1:3")
    found.sort(key=lambda trace: trace.sequence_id)
    assert [(trace.sequence_id, len(trace)) for trace in found] == [
        ("iter_540-0", 10),
        ("iter_540-1", 10),
        ("iter_540-2", 5),
    ]
    np.testing.assert_array_equal(np.concatenate([trace.experts for trace in found]), experts)
    np.testing.assert_array_equal(np.concatenate([trace.gate_weights for trace in found]), weights)
    np.testing.assert_array_equal(np.concatenate([trace.token_ids for trace in found]), ids)
    assert (traces.manifest.author, traces.manifest.source) == ("dataset", "FLAME-MoE traces, flame iter_540")
    assert set(traces.manifest.splits) == {"train", "validation"}


def test_flame_moe_without_samples_has_no_token_ids(tmp_path):
    folder = flame_moe(tmp_path, random_experts(5), gates(5))
    traces, (trace,) = imported("flame-moe", folder)
    assert len(trace) == 5
    assert not traces.manifest.has_token_ids
