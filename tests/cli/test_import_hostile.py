"""Damaged and hostile recordings: one line that names the file, soon, and nothing written."""

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from _helpers.common import failure, word_tokenizer
from _helpers.recordings import flame_moe, model_file, random_experts
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_beyond.cli.main import main
from moe_beyond.errors import UserError
from moe_beyond.geometry import PRESETS
from moe_beyond.traces.formats import _arrays as arrays_module
from moe_beyond.traces.formats import readable_formats
from moe_beyond.traces.formats._arrays import find_arrays

GOOD = random_experts(4)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model_file(tmp_path)
    word_tokenizer(tmp_path / "words.json", [f"w{i}" for i in range(8)])
    return tmp_path


def command(form, source, *more):
    return ["import", form, source, "--out", "out", "--model", "small.json", *more]


def with_header(header, data=b""):
    """A ``.npy`` of version 1 with any header."""
    text = header if isinstance(header, bytes) else header.encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


HEADERS = {
    "unfinished": "{'shape': (4,4,2u,}",
    "huge": "{'descr': '<i2', 'fortran_order': False, 'shape': (1000000000000, 3, 2), }",
    "product": "{'descr': '<i2', 'fortran_order': False, 'shape': (4, 3, 2000000000000000000000000), }",
    "bool": "{'descr': '<i2', 'fortran_order': False, 'shape': (True, 3, 2), }",
    "negative": "{'descr': '<i2', 'fortran_order': False, 'shape': (-4, 3, 2), }",
    "fraction": "{'descr': '<i2', 'fortran_order': False, 'shape': (4.0, 3, 2), }",
    "text": "{'descr': '<i2', 'fortran_order': False, 'shape': '432', }",
    "type": "{'descr': '<q9', 'fortran_order': False, 'shape': (4, 3, 2), }",
    "type of numbers": "{'descr': 5, 'fortran_order': False, 'shape': (4, 3, 2), }",
    "keys": "{'shape': (4, 3, 2)}",
    "no dictionary": "[1, 2]",
    "brackets": "(" * 900,
    "nulls": b"\x00" * 40,
    "latin": b"\xe9\xe8",
    "short": "{'descr': '<i2', 'fortran_order': False, 'shape': (9, 3, 2), }",
}


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("archived", [False, True])
def test_a_hostile_header_is_named(name, archived, desk, capsys):
    content = with_header(HEADERS[name], GOOD.tobytes())
    if archived:
        with zipfile.ZipFile("q.npz", "w") as file:
            file.writestr("a.npy", content)
    else:
        Path("q.npy").write_bytes(content)
    source, where = ("q.npz", "q.npz: a") if archived else ("q.npy", "q.npy")
    line = failure(capsys, desk, command("vllm", source))
    assert line.startswith(f"{where}: cannot be read as a NumPy array (")
    assert len(line) < 400


def test_a_member_that_unpacks_to_more_than_its_header_says_is_named(desk, capsys):
    buffer = io.BytesIO()
    np.save(buffer, GOOD)
    with zipfile.ZipFile("q.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.npy", buffer.getvalue() + b"\0" * 1000)
    line = failure(capsys, desk, command("vllm", "q.npz"))
    assert line.startswith("q.npz: a: cannot be read as a NumPy array (its header gives int16 (4, 3, 2), which is 48 ")
    assert "1,048 follow" in line


def test_a_bomb_is_not_unpacked(desk, capsys, monkeypatch):
    monkeypatch.setattr(arrays_module, "LARGE", 1000)
    np.savez_compressed("q.npz", a=np.zeros((10_000, 3, 2), np.int16))
    line = failure(capsys, desk, command("vllm", "q.npz"))
    assert line.startswith("q.npz: a: unpacks ")
    assert " to 120,128, unlike any recording" in line


def test_a_damaged_archive_is_named_whatever_zipfile_makes_of_it(desk, capsys):
    np.savez("q.npz", a=GOOD)
    good = Path("q.npz").read_bytes()
    end = good.index(b"PK\x05\x06")
    for offset in (16, 17, 18, 19):  # where the directory begins
        content = bytearray(good)
        content[end + offset] ^= 0xFF
        Path("q.npz").write_bytes(content)
        assert failure(capsys, desk, command("vllm", "q.npz")).startswith("q.npz: ")


def mutated(content, places):
    array = bytearray(content)
    for place, value in places:
        array[place % len(array)] = value
    return bytes(array)


@settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4), st.booleans())
def test_a_mutated_file_is_arrays_or_one_line(tmp_path_factory, places, archived):
    buffer = io.BytesIO()
    (np.savez if archived else np.save)(buffer, GOOD)
    path = tmp_path_factory.mktemp("mutated") / ("q.npz" if archived else "q.npy")
    path.write_bytes(mutated(buffer.getvalue(), places))
    message = read_all(path)
    assert message is None or (len(message.splitlines()) == 1 and message.startswith(str(path)))


def read_all(path):
    """Read every array of a file; why that cannot be, or None."""
    try:
        for stored in find_arrays(path).values():
            stored.read()
    except UserError as error:
        return str(error)
    return None


def test_a_header_of_csv_that_is_not_utf8_is_named(desk, capsys):
    Path("src").mkdir()
    Path("src/prompt_1_x.csv").write_bytes(b'Layer ID,Token,Activated Expert IDs,\xff\xfe\n1,w1,"[1, 2]",x\n')
    line = failure(capsys, desk, command("moe-beyond-csv", "src", "--tokenizer", "words.json"))
    assert line.startswith("src/prompt_1_x.csv: ")
    assert "UTF-8" in line or "utf-8" in line


def test_a_column_of_parquet_that_is_not_utf8_is_named(desk, capsys):
    folder = flame_moe(Path(), GOOD, np.full(GOOD.shape, 0.5))
    path = folder / "layer_03.parquet"
    table = pq.read_table(path)
    pq.write_table(table.append_column("others", pa.array([1] * 4)), path)
    path.write_bytes(path.read_bytes().replace(b"others", b"\xff\xfehers"))
    assert failure(capsys, desk, command("flame-moe", str(folder))).startswith(f"{path}: ")


def test_a_score_beyond_half_precision_is_named(desk, capsys):
    folder = flame_moe(Path(), GOOD, np.full(GOOD.shape, 0.5))
    path = folder / "layer_03.parquet"
    table = pq.read_table(path)
    scores = pa.array([[0.5, 0.5], [0.5, 70000.0], [0.5, 0.5], [0.5, 0.5]], pa.list_(pa.float32()))
    pq.write_table(table.set_column(table.schema.names.index("scores"), "scores", scores), path)
    line = failure(capsys, desk, command("flame-moe", str(folder)))
    assert line == f"{path}: row 1: scores must be at most 65504, the largest number in half precision (got 70000)"


def test_a_file_that_ends_before_its_rows_is_named(desk, monkeypatch, capsys):
    folder = flame_moe(Path(), GOOD, np.full(GOOD.shape, 0.5))
    monkeypatch.setattr("moe_beyond.traces.formats.flame_moe._rows", lambda path: 5)
    line = failure(capsys, desk, command("flame-moe", str(folder)))
    assert line == f"{folder}/layer_02.parquet: is damaged (it has fewer rows than its footer counts)"


def test_token_ids_of_flame_moe_are_checked_first(desk, capsys):
    folder = flame_moe(Path(), GOOD, np.full(GOOD.shape, 0.5), [[1, 2], [3, 9]])
    line = failure(capsys, desk, command("flame-moe", str(folder), "--tokenizer", "words.json"))
    assert line.startswith(f"{desk}/flame/samples/001.parquet: token id 9 is out of range 0..7 of tokenizer words.json")


def test_help_describes_every_format_and_lists_the_presets(capsys):
    assert main(["import", "--help"]) == 0
    text = capsys.readouterr().out
    for name, described in readable_formats().items():
        assert f"  {name}: {described.summary}\n" in text
        assert len(described.example) == 3
        for line in (*described.fields, *described.example):
            assert f"    {line}\n" in text
    for preset in PRESETS:
        assert preset in text


def test_the_example_of_json_lines_is_one(desk, capsys):
    lines = [line.replace('"layer_idx": 1', '"layer_idx": 2') for line in readable_formats()["jsonl"].example[1:]]
    Path("one.jsonl").write_text("\n".join(lines))
    geometry = Path("g.json")
    geometry.write_text(
        '{"model": "mine", "moe_layers": [2], "num_experts": 64, "top_k": 6, "params_per_expert": 9, '
        '"other_params_per_layer": 0}'
    )
    assert main(["import", "jsonl", "one.jsonl", "--out", "out", "--model", "g.json"]) == 0
    assert "out: 2 entries in = 2 entries out" in capsys.readouterr().out
