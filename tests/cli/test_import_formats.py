"""``moe-beyond import`` of every other tool's format, and ``export``: what is wrong is named in a line."""

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from _helpers.common import failure, tiny_traces, word_tokenizer
from _helpers.recordings import (
    expert_rows,
    flame_moe,
    json_lines,
    model_file,
    position_rows,
    random_experts,
)

from moe_beyond.cli.main import main

GOOD = random_experts(4)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """The current folder, with a model and a tokenizer of eight words."""
    monkeypatch.chdir(tmp_path)
    model_file(tmp_path)
    word_tokenizer(tmp_path / "words.json", [f"w{i}" for i in range(8)])
    Path("src").mkdir()
    return tmp_path


def command(form, *more, source="src"):
    return ["import", form, source, "--out", "out", "--model", "small.json", *more]


def changed(value, *place, dtype=np.int16):
    """The good experts with something else in one place."""
    array = GOOD.astype(dtype)
    array[place] = value
    return array


def test_an_import_says_what_the_recording_does_not_tell(desk, capsys):
    np.save("src/q.npy", GOOD)
    assert main(command("vllm", "--quantization", "4.25", "--json", "told.json")) == 0
    out = capsys.readouterr().out
    assert "out: 12 entries in = 12 entries out" in out
    assert "text: routed experts of an engine, src (author: unknown)" in out
    assert "no token ids: predictors" in out
    assert json.loads(Path("told.json").read_text())["token_ids"] is False
    assert json.loads(Path("out/manifest.json").read_text())["quantization_bits"] == 4.25


# Each writes one damaged array; the name is the damage.
ARRAYS = {
    "must hold whole numbers (got float32)": lambda path: np.save(path, GOOD.astype(np.float32)),
    "must hold whole numbers (got bool)": lambda path: np.save(path, GOOD > 3),
    "holds pickled objects, which are never loaded": lambda path: np.save(path, GOOD.astype(object), allow_pickle=True),
    "cannot be read as a NumPy array (the magic string": lambda path: path.write_bytes(pickle.dumps(GOOD)),
    "cannot be read as a NumPy array (EOF": lambda path: path.write_bytes(b""),
    "cannot be read as a NumPy array (": lambda path: (
        np.save(path, GOOD),
        path.write_bytes(path.read_bytes()[:-3]),
    ),
    "must have shape (tokens, 3, 2) for small's 3 MoE layers x 8 experts, top-2 (got (4, 6))": lambda path: np.save(
        path, GOOD.reshape(4, -1)
    ),
    "must have shape (tokens, 3, 2) for small's 3 MoE layers x 8 experts, top-2 (got (4, 3, 1))": lambda path: np.save(
        path, GOOD[..., :1]
    ),
    "must have shape (tokens, 3, 2) for small's 3 MoE layers x 8 experts, top-2 (got (4, 2, 2))": lambda path: np.save(
        path, GOOD[:, :2]
    ),
    "token 2, layer 3: expert id 8 is out of range 0..7": lambda path: np.save(path, changed(8, 2, 2, 1)),
    "token 0, layer 1: expert id -1 is out of range 0..7": lambda path: np.save(path, changed(-1, 0, 0, 0)),
    "token 3, layer 2: an expert occurs twice in one entry": lambda path: np.save(path, changed(5, 3, 1)),
    "has experts of layer 0, which is not an MoE layer of small": lambda path: np.save(
        path, np.concatenate([GOOD[:, :1], GOOD], axis=1)
    ),
}


@pytest.mark.parametrize("says", ARRAYS)
def test_a_bad_array_is_named_and_nothing_is_left(says, desk, capsys):
    np.save("src/a.npy", GOOD)
    ARRAYS[says](Path("src/b.npy"))
    assert failure(capsys, desk, command("vllm")).startswith(f"src/b.npy: {says}")


@pytest.mark.parametrize(
    ("arrays", "more", "says"),
    [
        ({"a": GOOD, "b": GOOD, "b.tokens": np.arange(4)}, [], "src: 'a' has no token ids, but others do"),
        ({"a": GOOD, "b": GOOD, "a.decode_start": np.array(1)}, [], "src: 'b' has no decode_start, but others do"),
        (
            {"a": GOOD, "a.tokens": np.arange(3)},
            ["--tokenizer", "words.json"],
            "src/a.tokens.npy: must have shape (4,), one id per recorded token (got (3,))",
        ),
        (
            {"a": GOOD, "a.tokens": np.arange(6)},
            ["--tokenizer", "words.json"],
            "src/a.tokens.npy: must have shape (4,), one id per recorded token (got (6,))",
        ),
        (
            {"a": GOOD, "a.tokens": -np.arange(4)},
            ["--tokenizer", "words.json"],
            "src/a.tokens.npy: a token id must be in 0..2147483647 (got -1)",
        ),
        ({"a": GOOD, "a.tokens": np.ones(4)}, [], "src/a.tokens.npy: must hold whole numbers (got float64)"),
        (
            {"a": GOOD, "a.tokens": np.full(4, 8)},
            ["--tokenizer", "words.json"],
            "src/a.tokens.npy: token id 8 is out ",
        ),
        ({"a": GOOD, "a.tokens": np.arange(4)}, [], "src: has token ids, but small has no default tokenizer; give one"),
        ({"a": GOOD}, ["--tokenizer", "words.json"], "--tokenizer: src has no token ids (got words.json)"),
        (
            {"a": GOOD, "a.decode_start": np.array(5)},
            [],
            "src/a.decode_start.npy: decode_start must be in 0..4 (got 5)",
        ),
        (
            {"a": GOOD, "a.decode_start": np.array([1])},
            [],
            "src/a.decode_start.npy: decode_start must be one number (got shape (1,))",
        ),
        ({"a": GOOD, "c.tokens": np.arange(4)}, [], "src/c.tokens.npy: is a sidecar of 'c', which is missing"),
        ({}, [], "src: has no *.npy file"),
        ({"a": GOOD}, ["--val-blocks", "1:2"], "--val-blocks 1:2: only 1 blocks"),
        ({"a": GOOD}, ["--quantization", "0"], "--quantization 0: bits per parameter must be more than 0"),
        ({"a": GOOD}, ["--sequence-tokens", "4"], "--sequence-tokens is only for flame-moe"),
        ({"a": GOOD}, ["--predictions", "p", "--scores", "s"], "--predictions is only for moe-beyond-csv"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arrays_that_do_not_go_together_are_named_and_nothing_is_left(arrays, more, says, desk, capsys):
    for name, array in arrays.items():
        np.save(f"src/{name}.npy", array)
    assert failure(capsys, desk, command("vllm", *more)).startswith(says)


def archive(*members):
    with zipfile.ZipFile("set.npz", "w") as file:
        for name, content in members:
            file.writestr(name, content)


def damaged():
    np.savez("set.npz", a=GOOD)
    content = bytearray(Path("set.npz").read_bytes())
    content[content.index(b"\x93NUMPY") + 130] ^= 1  # in the data
    Path("set.npz").write_bytes(content)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda: Path("set.npz").write_bytes(b"PK"), "set.npz: cannot be read as a NumPy array (File is not a zip"),
        (lambda: archive(), "set.npz: has no array"),
        (lambda: archive(("a.txt", "x")), "set.npz: all members must be .npy files (got 'a.txt')"),
        (lambda: archive(("a.npy", pickle.dumps([1]))), "set.npz: a: cannot be read as a NumPy array (the magic"),
        (lambda: np.savez("set.npz", a=np.array([None])), "set.npz: a: holds pickled objects"),
        (damaged, "set.npz: a: cannot be read as a NumPy array (Bad CRC-32"),
        (
            lambda: np.savez("set.npz", a=changed(9, 1, 0, 0)),
            "set.npz: a: token 1, layer 1: expert id 9 is out of range",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_npz_is_named_and_nothing_is_left(write, says, desk, capsys):
    write()
    assert failure(capsys, desk, command("vllm", source="set.npz")).startswith(says)


@pytest.mark.parametrize("form", ["vllm", "llama-cpp", "flame-moe", "jsonl"])
@pytest.mark.parametrize("source", ["nowhere", "words.json"])
def test_a_source_that_is_none_is_named(form, source, desk, capsys):
    line = failure(capsys, desk, command(form, source=source))
    assert line.startswith(f"{source}: is neither a *.")


ROWS = expert_rows(GOOD, prompt=2).splitlines(keepends=True)  # 2 tokens at layers 1 and 2, 1 at 3; then token by token
POSITIONS = position_rows(GOOD, prompt=2).splitlines(keepends=True)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("1,2,3\n", "must have 2 columns (layer,expert) or 4 (position,layer,experts) for small (got 3)"),
        ("1,2\n1,x\n", "cannot be read as rows of numbers (In CSV column #1: Row #2"),
        ("1,2\n1,2,3\n", "cannot be read as rows of numbers (CSV parse error: Row #2: Expected 2 columns"),
        ("1,2\n1,\n", "row 2: a number is missing"),
        ("".join(ROWS[:4] + ROWS[8:]), "row 1: has layers 1..3 (2), but small's MoE layers are 1..3 (3)"),
        ("".join(ROWS[:-2]), "row 17: has layers 1..2 (2), but small's MoE layers are 1..3 (3)"),
        ("".join(ROWS) + "1,0\n1,1\n2,0\n2,1\n3,0\n", "row 23: in the batch that begins there, layer 3 has 1 experts"),
        (
            "".join(ROWS[:5] + ROWS[6:]),
            "row 1: in the batch that begins there, layer 2 has 3 experts, but layer 1 has 4",
        ),
        ("".join(ROWS[:8]) + "3,9\n" + "".join(ROWS[9:]), "row 9: expert id 9 is out of range 0..7"),
        ("".join(ROWS[:2]) + "1,0\n1,0\n" + "".join(ROWS[4:]), "row 3: an expert occurs twice in one entry"),
        ("".join(POSITIONS[:-1]), "row 9: the token has no experts of layer 3"),
        ("".join(POSITIONS[:2] + POSITIONS[4:]), "row 1: the token has no experts of layer 2"),
        ("0,0,1,2\n" + "".join(POSITIONS), "has layers 0..3 (4), but small's MoE layers are 1..3 (3)"),
        ("".join(POSITIONS[:1]) + "-1,1,0,8\n" + "".join(POSITIONS[2:]), "row 2: expert id 8 is out of range 0..7"),
        ("".join(POSITIONS[:1]) + "-1,1,4,4\n" + "".join(POSITIONS[2:]), "row 2: an expert occurs twice in one entry"),
    ],
    ids=lambda value: value[:40] if " " in value else "",
)
def test_a_bad_llama_cpp_row_is_named_and_nothing_is_left(content, says, desk, capsys):
    Path("src/a.csv").write_text(expert_rows(GOOD, prompt=2))
    Path("src/b.csv").write_text(content)
    assert failure(capsys, desk, command("llama-cpp")).startswith(f"src/b.csv: {says}")


def test_token_ids_cannot_lie_beside_several_sequences(desk, capsys):
    Path("src/a.csv").write_text(position_rows(GOOD, 2) * 2)
    np.save("src/a.tokens.npy", np.arange(4))
    line = failure(capsys, desk, command("llama-cpp", "--tokenizer", "words.json"))
    assert line.startswith("src/a.csv: has token ids for 2 sequences; give each sequence a file")


LINES = json_lines(GOOD, np.full(GOOD.shape, 0.5))


def line(number, **fields):
    """The good lines with fields of one changed; None takes a field out."""
    entry = {**json.loads(LINES[number - 1]), **fields}
    told = json.dumps({name: value for name, value in entry.items() if value is not None})
    return [*LINES[: number - 1], told, *LINES[number:]]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["{"], "line 1: is not JSON ("),
        (["[" * 100_000], "line 1: is not JSON ("),
        (["[1]"], "line 1: is not a JSON object"),
        (line(2, layer_idx=None), "line 2: layer_idx is missing"),
        (line(2, selected_ids=None), "line 2: selected_ids is missing"),
        (line(3, token_idx=-1), "line 3: token_idx must be a whole number from 0 on (got -1)"),
        (
            line(3, token_idx=10**30),
            "line 3: token_idx must be a whole number from 0 on (got 1000000000000000000000000000000)",
        ),
        (line(3, layer_idx=1.0), "line 3: layer_idx must be a whole number from 0 on (got 1.0)"),
        (line(3, layer_idx=True), "line 3: layer_idx must be a whole number from 0 on (got true)"),
        (line(3, selected_ids=[1, "2"]), "line 3: selected_ids must be a list of whole numbers"),
        (line(3, selected_ids=3), "line 3: selected_ids must be a list of whole numbers"),
        (line(3, selected_ids=[1]), "line 3: selected_ids must have the 2 experts of small (got 1)"),
        (line(3, selected_ids=[1, 8]), "line 3: expert id 8 is out of range 0..7"),
        (line(3, selected_ids=[1, 1]), "line 3: an expert occurs twice in one entry"),
        (line(3, gate_weights=[0.5]), "line 3: gate_weights must have one number per expert (got 1 for 2)"),
        (line(3, gate_weights=[0.5, float("nan")]), "line 3: gate_weights must be a list of numbers up to 65504"),
        (line(3, gate_weights=[0.5, 1e6]), "line 3: gate_weights must be a list of numbers up to 65504"),
        (line(3, gate_weights=None), "line 3: gate_weights must be in all lines or in none"),
        (line(3, layer_idx=4), "has layers 1..4 (4), but small's MoE layers are 1..3 (3)"),
        (line(2, layer_idx=1), "line 2: token 0 of layer 1 is in line 1 too"),
        (LINES[:-1], "token 3 has no line for layer 3"),
        ([*LINES[:3], *LINES[6:]], "token 1 has no line"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_bad_json_line_is_named_and_nothing_is_left(lines, says, desk, capsys):
    Path("src/a.jsonl").write_text("\n".join(LINES))
    Path("src/b.jsonl").write_text("\n".join(lines))
    assert failure(capsys, desk, command("jsonl")).startswith(f"src/b.jsonl: {says}")


def rewritten(name, **columns):
    """Replace columns of a file of the checkpoint; None takes one out."""
    path = Path("flame/actives/iter_540") / name
    table = pq.read_table(path)
    kept = {column: table[column] for column in table.schema.names} | columns
    pq.write_table(pa.table({column: values for column, values in kept.items() if values is not None}), path)


FLAME = {
    "flame/actives/iter_540 (counted from one in file names): has layers 1..2 (2), but small's": lambda folder: (
        folder / "layer_04.parquet"
    ).unlink(),
    "flame/actives/iter_540/last.parquet: must be named layer_<number>.parquet": lambda folder: (
        folder / "layer_04.parquet"
    ).rename(folder / "last.parquet"),
    "flame/actives/iter_540/layer_03.parquet: cannot be read as Parquet (": lambda folder: (
        folder / "layer_03.parquet"
    ).write_bytes(b"PAR1"),
    "flame/actives/iter_540/layer_03.parquet: must have as many rows as layer_02.parquet, 4 (got 1)": lambda folder: (
        rewritten("layer_03.parquet", scores=[[0.5, 0.5]], indices=[[1, 2]])
    ),
    "flame/actives/iter_540/layer_03.parquet: column 'scores' is missing (got indices)": lambda folder: rewritten(
        "layer_03.parquet", scores=None
    ),
    "flame/actives/iter_540/layer_03.parquet: column 'indices' must hold lists of int16 (got int64)": lambda folder: (
        rewritten("layer_03.parquet", indices=[1, 2, 3, 4])
    ),
    "flame/actives/iter_540/layer_03.parquet: row 2: indices must have the 2 experts of small (got 1)": lambda folder: (
        rewritten("layer_03.parquet", indices=[[1, 2], [3, 4], [5], [6, 7]])
    ),
    "flame/actives/iter_540/layer_03.parquet: row 1: indices must not be null": lambda folder: rewritten(
        "layer_03.parquet", indices=[[1, 2], [3, None], [5, 6], [6, 7]]
    ),
    "flame/actives/iter_540/layer_03.parquet: row 2: scores must be finite numbers": lambda folder: rewritten(
        "layer_03.parquet", scores=[[0.5, 0.5], [0.5, 0.5], [0.5, float("nan")], [0.5, 0.5]]
    ),
    "flame/actives/iter_540/layer_03.parquet: row 3: expert id 8 is out of range 0..7": lambda folder: rewritten(
        "layer_03.parquet", indices=[[1, 2], [3, 4], [5, 6], [8, 7]]
    ),
    "flame/actives/iter_540/layer_03.parquet: row 0: an expert occurs twice in one entry": lambda folder: rewritten(
        "layer_03.parquet", indices=[[1, 1], [3, 4], [5, 6], [6, 7]]
    ),
    "{}/flame/samples: must have a token id for each of the 4 rows (got 3)": lambda folder: pq.write_table(
        pa.table({"token_id": [1, 2, 3]}), "flame/samples/000.parquet"
    ),
    "{}/flame/samples/000.parquet: column 'token_id' must hold whole numbers, without nulls": lambda folder: (
        pq.write_table(pa.table({"token_id": [0.5] * 4}), "flame/samples/000.parquet")
    ),
}


@pytest.mark.parametrize("says", FLAME)
def test_a_bad_flame_moe_file_is_named_and_nothing_is_left(says, desk, capsys):
    folder = flame_moe(Path(), GOOD, np.full(GOOD.shape, 0.5), [[1, 2, 3, 4]])
    FLAME[says](folder)
    more = ("--tokenizer", "words.json", "--sequence-tokens", "2")
    assert failure(capsys, desk, command("flame-moe", *more, source=str(folder))).startswith(says.format(desk))


def test_a_sequence_of_no_rows_is_refused(desk, capsys):
    folder = flame_moe(Path(), GOOD, np.full(GOOD.shape, 0.5))
    line = failure(capsys, desk, command("flame-moe", "--sequence-tokens", "0", source=str(folder)))
    assert line.startswith("--sequence-tokens: must be at least 1 (got 0)")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nonsense", "set", "x"], "unknown format 'nonsense'"),
        (["vllm", "nowhere", "x"], "nowhere: no trace set here (manifest.json is missing)"),
        (["vllm", "set", "x", "--split", "tset"], "unknown split of set 'tset'"),
        (["libcachesim", "set", "x", "--split", "tset"], "unknown split of set 'tset'"),
        (["llama-cpp", "set", "x", "--split", "tset"], "unknown split of set 'tset'"),
        (["libcachesim", "set", "small.json"], "small.json already exists"),
        (["llama-cpp", "set", "small.json"], "small.json already exists"),
        (["vllm", "set", "set.npz"], "set.npz already exists"),
        (["vllm", "set", "src"], "src already exists"),
    ],
    ids=" ".join,
)
def test_an_export_that_cannot_be_is_named_and_nothing_is_left(words, says, desk, capsys):
    tiny_traces(desk / "set")
    for path in ("set.npz", "src/precious"):
        Path(path).write_text("1")
    assert failure(capsys, desk, ["export", *words]).startswith(says)


def test_a_sequence_that_cannot_name_a_file_goes_into_an_npz(desk, capsys):
    np.savez("set.npz", **{"a/b": GOOD})
    assert main(command("vllm", source="set.npz")) == 0
    capsys.readouterr()
    line = failure(capsys, desk, ["export", "vllm", "out", "arrays"])
    assert line == "out: sequence 'a/b' cannot be the name of a file; export to an .npz, or rename it"
    assert main(["export", "vllm", "out", "again.npz"]) == 0
    with np.load("again.npz") as arrays:
        np.testing.assert_array_equal(arrays["a/b"], GOOD)
