"""The release's CSV files: entries in = entries out, whatever the tokens look like."""

import csv
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from _helpers.common import prompt_csv, word_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry, Preset
from moe_beyond.traces.formats.moe_beyond_csv import import_moe_beyond_csv

SMALL = Preset(Geometry("small", (1, 2, 3), num_experts=8, top_k=2, params_per_expert=1000, other_params_per_layer=0))
# What CSV readers like to take for a separator, a missing value or blank space.
TRICKY = [
    "<unk>",
    "Ġthe",
    ",",
    '"',
    "\n",
    "\r\n",
    "NA",
    "null",
    "NaN",
    "",
    " ",
    "  x",
    "▁x",
    "a,b\nc",
    "1",
    "True",
    "ĊĊ",
]


def rows_of(tokens, experts, layers=(1, 2, 3)):
    """CSV rows, layer by layer; ``experts[t][l]`` are ids."""
    return [(layer, token, str(experts[t][i])) for i, layer in enumerate(layers) for t, token in enumerate(tokens)]


def random_experts(length, seed, geometry=SMALL.geometry):
    rng = np.random.default_rng(seed)
    layers, experts, top_k = geometry.shape()
    return np.array([[rng.permutation(experts)[:top_k] for _ in range(layers)] for _ in range(length)]).tolist()


def run(folder, *, preset=SMALL, words=TRICKY, **options):
    """Import ``folder/csv`` into ``folder/out``."""
    tokenizer = word_tokenizer(folder / "words.json", words)
    return import_moe_beyond_csv(folder / "csv", folder / "out", preset, tokenizer=str(tokenizer), **options)


def test_tricky_tokens_keep_their_ids_and_experts_their_order(tmp_path):
    experts = random_experts(len(TRICKY), 0)
    prompt_csv(tmp_path / "csv" / "prompt_7_data.csv", rows_of(TRICKY, experts))
    traces = run(tmp_path)
    (trace,) = traces.traces()
    assert trace.token_ids.tolist() == list(range(len(TRICKY)))
    assert trace.experts.tolist() == experts
    assert (trace.sequence_id, trace.source) == ("csv-7", "csv/prompt_7_data.csv")
    assert trace.decode_start == len(trace)  # the model only read
    assert traces.token_strings == TRICKY


def test_the_manifest_says_what_was_read(tmp_path):
    prompt_csv(tmp_path / "csv" / "prompt_1.csv", rows_of(["NA"], [[[0, 1]] * 3]))
    manifest = run(tmp_path).manifest
    assert manifest.geometry == SMALL.geometry
    assert (manifest.author, manifest.quantization_bits, manifest.model_id) == ("dataset", 8.0, "small")
    assert manifest.source == "MoE-Beyond release, csv"
    assert manifest.tokenizer.vocab_size == len(TRICKY)
    assert manifest.splits == ("train",)


def test_the_folder_may_be_the_current_one(tmp_path, monkeypatch):
    prompt_csv(tmp_path / "csv" / "prompt_1_data.csv", rows_of(["NA"], [[[0, 1]] * 3]))
    tokenizer = word_tokenizer(tmp_path / "words.json", TRICKY)
    monkeypatch.chdir(tmp_path / "csv")
    traces = import_moe_beyond_csv(".", "../out", SMALL, tokenizer=str(tokenizer))
    assert [trace.sequence_id for trace in traces.traces()] == ["csv-1"]
    assert traces.manifest.source == "MoE-Beyond release, csv"


def test_columns_and_rows_may_come_in_another_order(tmp_path):
    tokens = ["NA", "1", "NA", ","]
    experts = random_experts(4, 1)
    rows = rows_of(tokens, experts)
    by_token = sorted(rows, key=lambda row: rows.index(row) % 4)  # all layers of a token, then the next token
    content = [(ids, 0, token, layer) for layer, token, ids in by_token]
    header = ["Activated Expert IDs", "Batch Number", "Token", "Layer ID"]
    prompt_csv(tmp_path / "csv" / "prompt_1_data.csv", content, header)
    (trace,) = run(tmp_path).traces()
    assert trace.token_ids.tolist() == [TRICKY.index(token) for token in tokens]
    assert trace.experts.tolist() == experts


def test_prompts_are_stored_by_number_and_not_by_name(tmp_path):
    for number in (10, 9, 100, 1):
        prompt_csv(tmp_path / "csv" / f"prompt_{number}_data.csv", rows_of(["NA"] * number, [[[0, 1]] * 3] * number))
    (tmp_path / "csv" / "notes.txt").write_text("not a prompt")
    found = [(trace.sequence_id, len(trace)) for trace in run(tmp_path).traces()]
    assert found == [("csv-1", 1), ("csv-9", 9), ("csv-10", 10), ("csv-100", 100)]


def test_ids_beyond_a_byte_are_kept(tmp_path):
    preset = Preset(Geometry("wide", (0,), 300, 3, 1000, 0))
    prompt_csv(tmp_path / "csv" / "prompt_1_data.csv", rows_of(["NA", "1"], [[[299, 0, 256]], [[255, 1, 2]]], (0,)))
    (trace,) = run(tmp_path, preset=preset).traces()
    assert trace.experts.dtype == np.int16
    assert trace.experts.tolist() == [[[299, 0, 256]], [[255, 1, 2]]]


def test_an_expert_listed_twice_is_found_wherever_it_stands(tmp_path):
    preset = Preset(Geometry("three", (0,), 8, 3, 1000, 0))
    prompt_csv(tmp_path / "csv" / "prompt_1_data.csv", rows_of(["NA", "1"], [[[5, 6, 7]], [[5, 6, 5]]], (0,)))
    with pytest.raises(UserError, match=r"prompt_1_data\.csv: row 3: an expert occurs twice in one entry"):
        run(tmp_path, preset=preset)


def test_ids_may_be_written_with_or_without_spaces(tmp_path):
    rows = [(1, "NA", "[5,1]"), (2, "NA", " [ 5 , 1 ] "), (3, "NA", "[5, 1]")]
    prompt_csv(tmp_path / "csv" / "prompt_1_data.csv", rows)
    (trace,) = run(tmp_path).traces()
    assert trace.experts.tolist() == [[[5, 1]] * 3]


def test_whole_blocks_go_to_validation(tmp_path):
    # Blocks of two numbers: 0 and 1 have three tokens each, 2 has one and 3 has two. Ranked they are cut into (0, 1),
    # where the tie goes to block 0, and (3, 2): 3 + 2 and 3 + 1 are both half a token from half of 9, so block 2.
    lengths = {0: 1, 1: 2, 2: 1, 3: 2, 4: 1, 6: 1, 7: 1}
    for number, length in lengths.items():
        tokens = [f"w{number}"] * length
        prompt_csv(tmp_path / "csv" / f"prompt_{number}_data.csv", rows_of(tokens, [[[0, 1]] * 3] * length))
    words = ["<unk>", *(f"w{number}" for number in range(8))]
    traces = run(tmp_path, words=words, val_blocks="2:2")
    assert [trace.sequence_id for trace in traces.traces("validation")] == ["csv-0", "csv-1", "csv-4"]
    assert [trace.sequence_id for trace in traces.traces("train")] == ["csv-2", "csv-3", "csv-6", "csv-7"]
    # Prompt 4 now repeats prompt 7, which is in training, and goes there.
    prompt_csv(tmp_path / "csv" / "prompt_4_data.csv", rows_of(["w7"], [[[0, 1]] * 3]))
    shutil.rmtree(tmp_path / "out")
    traces = run(tmp_path, words=words, val_blocks="2:2")
    assert [trace.sequence_id for trace in traces.traces("validation")] == ["csv-0", "csv-1"]
    assert [trace.sequence_id for trace in traces.traces("train")] == ["csv-2", "csv-3", "csv-4", "csv-6", "csv-7"]


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(words, min_size=1, max_size=6), min_size=1, max_size=3), st.integers(0, 2**32 - 1))
@example([["\ufeff"], ["\x00", "\r", "\\"]], 0)
def test_any_tokens_are_read_as_they_were_written(prompts, seed):
    vocabulary = ["<unk>", *sorted({word for prompt in prompts for word in prompt} - {"<unk>"})]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written = {}
        for number, tokens in enumerate(prompts):
            experts = random_experts(len(tokens), seed + number)
            prompt_csv(folder / "csv" / f"prompt_{number}_data.csv", rows_of(tokens, experts))
            written[f"csv-{number}"] = ([vocabulary.index(token) for token in tokens], experts)
        traces = run(folder, words=vocabulary)
        found = {trace.sequence_id: (trace.token_ids.tolist(), trace.experts.tolist()) for trace in traces.traces()}
    assert found == written
    assert traces.manifest.tokens == sum(map(len, prompts))


def test_a_file_larger_than_the_readers_block_is_read_whole(tmp_path):
    # pyarrow reads a megabyte at a time; quoted line ends must not be cut there.
    length = 25_000
    tokens = ["a,b\nc" if t % 3 else "NA" for t in range(length)]
    experts = random_experts(97, 3)
    experts = [experts[t % 97] for t in range(length)]
    path = prompt_csv(tmp_path / "csv" / "prompt_1_data.csv", rows_of(tokens, experts))
    assert path.stat().st_size > 1_100_000
    (trace,) = run(tmp_path).traces()
    assert trace.token_ids.tolist() == [TRICKY.index(token) for token in tokens]
    np.testing.assert_array_equal(trace.experts, experts)


def test_it_agrees_with_the_csv_module(tmp_path):
    experts = random_experts(len(TRICKY), 5)
    path = prompt_csv(tmp_path / "csv" / "prompt_1_data.csv", rows_of(TRICKY, experts))
    (trace,) = run(tmp_path).traces()
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == trace.experts.shape[0] * trace.experts.shape[1]
    seen = dict.fromkeys(SMALL.geometry.moe_layers, 0)
    for row in rows:
        layer = int(row["Layer ID"])
        t, seen[layer] = seen[layer], seen[layer] + 1
        assert trace.token_ids[t] == TRICKY.index(row["Token"])
        ids = trace.experts[t, SMALL.geometry.moe_layers.index(layer)].tolist()
        assert ids == json.loads(row["Activated Expert IDs"])


def test_without_a_tokenizer_nothing_is_started(tmp_path):
    prompt_csv(tmp_path / "csv" / "prompt_1_data.csv", rows_of(["NA"], [[[0, 1]] * 3]))
    with pytest.raises(UserError, match="small has no default tokenizer for its tokens; give one"):
        import_moe_beyond_csv(tmp_path / "csv", tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()
