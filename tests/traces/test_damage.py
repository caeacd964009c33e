"""Every command names the file and the fault of a changed trace set."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from _helpers.common import TINY, VOCAB, error_line, tiny_trace, tiny_traces, word_tokenizer
from _helpers.damage import edit_json, edit_manifest, edit_shard, replace_shard, with_column
from safetensors.numpy import save_file

from moe_beyond.datamodules import TraceDataModule
from moe_beyond.errors import UserError
from moe_beyond.predictors.architectures.popularity import Popularity
from moe_beyond.predictors.io.folder import save_predictor
from moe_beyond.traces import parquet
from moe_beyond.traces.manifest import Manifest
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.schema import arrow_schema
from moe_beyond.traces.tokenizers import load_vocabulary
from moe_beyond.traces.writer import open_writer

FIRST = "train-00000.parquet"


def changed(name: str, change: Callable[[list], list], number: int = 0) -> Callable[[Path], None]:
    """Damage that changes a column of a shard, as a list of its rows' values."""

    def damage(folder: Path) -> None:
        edit_shard(folder, lambda table: with_column(table, name, change(table[name].to_pylist())), number)

    return damage


def first_value(value: object) -> Callable[[list], list]:
    """A change of the first value of the first row, be that a list or not."""
    return lambda rows: [[value, *rows[0][1:]] if isinstance(rows[0], list) else value, *rows[1:]]


def cut(table: pa.Table) -> pa.Table:
    return table.slice(0, table.num_rows - 1)


def weighed(value: float) -> Callable[[Path], None]:
    """Damage that gives every shard gate weights, all 0.5 but for the very first."""

    def damage(folder: Path) -> None:
        for number in range(len(json.loads((folder / "manifest.json").read_text())["shards"])):
            edit_shard(folder, lambda table, number=number: with_gates(table, value if number == 0 else 0.5), number)

    return damage


def with_gates(table: pa.Table, first: float) -> pa.Table:
    gates = [[0.5] * len(row) for row in table["experts"].to_pylist()]
    gates[0][0] = first
    column = pa.array([np.array(row, np.float16) for row in gates], pa.list_(pa.float16()))
    return table.append_column("gate_weights", column)


def moved_to_the_next_row(folder: Path) -> None:
    for name in ("token_ids", "experts"):
        changed(name, lambda rows: [[], [*rows[0], *rows[1]], *rows[2:]])(folder)


def moved_tokens(folder: Path) -> None:
    changed("decode_start", lambda rows: [0] * len(rows))(folder)
    changed("token_ids", lambda rows: [rows[0][:-1], [rows[0][-1], *rows[1]], *rows[2:]])(folder)


def link_out(folder: Path) -> None:
    (folder / FIRST).rename(folder.parent / FIRST)
    (folder / FIRST).symlink_to(folder.parent / FIRST)


def fifo(folder: Path) -> None:
    (folder / FIRST).unlink()
    os.mkfifo(folder / FIRST)


def same_id_in_two_shards(folder: Path) -> None:
    taken = pq.read_table(folder / FIRST)["sequence_id"][0].as_py()
    edit_shard(
        folder, lambda table: with_column(table, "sequence_id", [taken, *table["sequence_id"].to_pylist()[1:]]), 1
    )


def shards(change: Callable[[list], list]) -> Callable[[Path], None]:
    """Damage of the list of shards in the manifest, all hashes computed again."""

    def damage(folder: Path) -> None:
        edit_manifest(folder, lambda manifest: manifest.update(shards=change(manifest["shards"])))

    return damage


def plain(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """Damage of the manifest, with its old hashes."""
    return lambda folder: edit_json(folder / "manifest.json", change)


def swap(manifest: dict) -> None:
    for shard in manifest["shards"]:
        shard["split"] = {"train": "validation", "validation": "train"}[shard["split"]]


def elsewhere(manifest: dict) -> None:
    manifest["shards"][0]["file"] = f"../outside/{FIRST}"


def bit_flipped_in_a_page(folder: Path) -> None:
    content = bytearray((folder / FIRST).read_bytes())
    content[40] ^= 0x10
    replace_shard(folder, bytes(content))


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "shard left out": (plain(lambda manifest: manifest["shards"].pop(0)), "manifest.json: splits and shards disagree"),
    "shard twice": (plain(lambda m: m["shards"].append(m["shards"][0])), "manifest.json: two shards have the file"),
    "shard twice, hashes anew": (shards(lambda found: [*found, found[0]]), "manifest.json: two shards have the file"),
    "splits swapped": (plain(swap), "manifest.json: splits and shards disagree"),
    "tokens edited": (plain(lambda m: m["shards"][0].update(tokens=99)), "manifest.json: splits and shards disagree"),
    "counts edited, hashes anew": (
        shards(lambda found: [{**found[0], "sequences": 1}, *found[1:]]),
        f"{FIRST}: holds 8 sequences, but the manifest lists 1",
    ),
    "tokens edited, hashes anew": (
        shards(lambda found: [{**found[0], "tokens": 9999}, *found[1:]]),
        f"{FIRST}: column 'token_ids' must hold",
    ),
    "bytes edited, hashes anew": (
        shards(lambda found: [{**found[0], "bytes": 1}, *found[1:]]),
        "bytes, but manifest.json lists 1",
    ),
    "brackets": (lambda folder: (folder / "manifest.json").write_text("[" * 200_000), "manifest.json: is not JSON"),
    "path": (plain(elsewhere), "manifest.json: shard '../outside/train-00000.parquet': file must be a plain name"),
    "link": (link_out, f"{FIRST}: is a link to a file outside the folder"),
    "fifo": (fifo, f"{FIRST}: is not a regular file"),
    "rows cut": (lambda folder: edit_shard(folder, cut), f"{FIRST}: holds 7 sequences, but the manifest lists 8"),
    "not Parquet": (lambda folder: replace_shard(folder, b"PAR1 is not enough"), f"{FIRST}: cannot be read as Parquet"),
    "nearly empty": (lambda folder: replace_shard(folder, b"x"), f"{FIRST}: cannot be read as Parquet"),
    "cut": (
        lambda folder: replace_shard(folder, (folder / FIRST).read_bytes()[:-30]),
        f"{FIRST}: cannot be read as Parquet",
    ),
    "bit of a page": (bit_flipped_in_a_page, f"{FIRST}: "),
    "empty shard": (lambda folder: edit_shard(folder, lambda table: table.slice(0, 0)), f"{FIRST}: holds 0 sequences"),
    "column gone": (
        lambda folder: edit_shard(folder, lambda table: table.drop_columns(["decode_start"])),
        f"{FIRST}: column 'decode_start' is missing",
    ),
    "column twice": (
        lambda folder: edit_shard(folder, lambda table: table.append_column("experts", table["experts"])),
        f"{FIRST}: column 'experts' is doubled",
    ),
    "other type": (
        lambda folder: edit_shard(
            folder, lambda table: table.set_column(2, "token_ids", table["token_ids"].cast(pa.list_(pa.int64())))
        ),
        f"{FIRST}: column 'token_ids' must be list",
    ),
    "token id -1": (changed("token_ids", first_value(-1)), "row 0 (sequence 's0'): token id -1 is out of range 0..31"),
    "token id 32": (changed("token_ids", first_value(32)), "row 0 (sequence 's0'): token id 32 is out of range 0..31"),
    "decode_start -5": (changed("decode_start", first_value(-5)), "row 0 (sequence 's0'): decode_start -5 is not in"),
    "decode_start 99": (changed("decode_start", first_value(99)), "row 0 (sequence 's0'): decode_start 99 is not in"),
    "decode_start null": (changed("decode_start", first_value(None)), f"{FIRST}: column 'decode_start' holds nulls"),
    "expert 8": (changed("experts", first_value(8)), "row 0 (sequence 's0'): expert id 8 is out of range 0..7"),
    "expert twice": (
        changed("experts", lambda rows: [[3, 3, *rows[0][2:]], *rows[1:]]),
        "row 0 (sequence 's0'): an expert occurs twice in one entry",
    ),
    "expert null": (changed("experts", first_value(None)), f"{FIRST}: column 'experts' holds nulls"),
    "row null": (changed("experts", lambda rows: [None, *rows[1:]]), f"{FIRST}: "),
    "id null": (changed("sequence_id", first_value(None)), f"{FIRST}: column 'sequence_id' holds nulls"),
    "one id": (changed("sequence_id", lambda rows: ["s0"] * len(rows)), "two sequences have the id 's0'"),
    "id in two shards": (same_id_in_two_shards, f"train-00001.parquet: sequence 's0' is in {FIRST} too"),
    "no tokens": (moved_to_the_next_row, f"{FIRST}: row 0 (sequence 's0'): has no tokens"),
    "tokens moved": (
        moved_tokens,
        f"{FIRST}: row 0: experts must be 4 x 2 ids per token",
    ),
    "gate weight nan": (weighed(float("nan")), "row 0 (sequence 's0'): gate weights are negative or not finite"),
    "gate weight inf": (weighed(float("inf")), "row 0 (sequence 's0'): gate weights are negative or not finite"),
    "gate weight -1": (weighed(-1.0), "row 0 (sequence 's0'): gate weights are negative or not finite"),
    "gate weights in one shard": (
        lambda folder: edit_shard(folder, lambda table: with_gates(table, 0.5)),
        ".parquet: either all shards have gate weights or none; train-0000",
    ),
}


@pytest.fixture(params=DAMAGE)
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """A damaged set, and the expected error."""
    damage, says = DAMAGE[request.param]
    traces = tiny_traces(tmp_path / "traces", sequences=24, longest=12)
    assert len(traces.shards("train")) > 1
    assert traces.shards()[0].sequences == 8
    damage(tmp_path / "traces")
    return traces.folder, says


def read_all(data: TraceDataModule) -> None:
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for _ in loader:
            pass


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predictor") / "popularity"
    save_predictor(Popularity(TINY, VOCAB), folder, {})
    return folder


def test_every_command_names_the_file_and_the_fault(damaged, predictor, capsys):
    folder, says = damaged
    for words in (
        ["inspect", folder],
        ["replay", "--traces", folder, "--budget", "50%", "--policy", "lru"],
        ["evaluate", str(predictor), "--traces", folder],
    ):
        line = error_line(capsys, words)
        assert says in line
        assert line.startswith(f"{folder}/")
    with pytest.raises(UserError) as error:
        read_all(TraceDataModule(folder))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "says"), [("top_k", 1, "column 'experts' must hold"), ("num_experts", 4, "is out of range 0..3")]
)
def test_shards_of_another_model_than_the_manifest_says(field, value, says, predictor, tmp_path, capsys):
    folder = str(tmp_path / "traces")
    tiny_traces(Path(folder))
    edit_manifest(Path(folder), lambda manifest: manifest["geometry"].update({field: value}))
    for words in (["inspect", folder], ["replay", "--traces", folder, "--budget", "100%", "--policy", "lru"]):
        line = error_line(capsys, words)
        assert line.startswith(f"{folder}/{FIRST}: ")
        assert says in line
    line = error_line(capsys, ["evaluate", str(predictor), "--traces", folder, "--budget", "100%"])
    assert line.startswith(f"{folder}: has 4 MoE layers x {value if field == 'num_experts' else 8} experts, top-")
    with pytest.raises(UserError, match=says):
        read_all(TraceDataModule(folder))


@pytest.mark.parametrize("where", ["tokens", "id"])
def test_a_small_file_that_would_take_the_memory_is_not_decoded(where, tmp_path, monkeypatch, capsys):
    """Its counts are those of the manifest: what gives it away is that no routing compresses so well."""
    monkeypatch.setattr(parquet, "BOMB_BYTES", 2**20)
    tiny_traces(tmp_path / "traces")
    tokens = 2**18 if where == "tokens" else 1
    pair = np.tile(np.array([0, 1], np.uint8), tokens * TINY.num_layers)
    columns = {
        "sequence_id": ["s" * (2**21 if where == "id" else 1)],
        "source": ["x"],
        "token_ids": pa.ListArray.from_arrays(pa.array([0, tokens], pa.int32()), pa.array(np.zeros(tokens, np.int32))),
        "decode_start": [0],
        "experts": pa.ListArray.from_arrays(pa.array([0, len(pair)], pa.int32()), pa.array(pair)),
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=arrow_schema(TINY)), sink, compression="zstd")
    assert sink.tell() < 10_000
    replace_shard(tmp_path / "traces", sink.getvalue().to_pybytes(), sequences=1, tokens=tokens)
    line = error_line(capsys, ["inspect", tmp_path / "traces"])
    assert line.startswith(f"{tmp_path / 'traces' / FIRST}: ")
    assert line.endswith("recorded routing never compresses so far")


def test_a_text_that_every_row_repeats_is_not_decoded(tmp_path, monkeypatch, capsys):
    """The footer counts its bytes once, as Parquet stores them in a dictionary."""
    monkeypatch.setattr(parquet, "BOMB_BYTES", 2**20)
    tiny_traces(tmp_path / "traces")
    rows = 512
    columns = {
        "sequence_id": [f"s{row}" for row in range(rows)],
        "source": ["x" * 2**14] * rows,
        "token_ids": [[0]] * rows,
        "decode_start": [0] * rows,
        "experts": [[0, 1] * TINY.num_layers] * rows,
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=arrow_schema(TINY)), sink, compression="zstd")
    assert sink.tell() < 20_000
    replace_shard(tmp_path / "traces", sink.getvalue().to_pybytes(), sequences=rows, tokens=rows)
    line = error_line(capsys, ["replay", "--traces", tmp_path / "traces", "--budget", "50%", "--policy", "lru"])
    assert line.endswith("recorded routing never compresses so far")
    monkeypatch.setattr(parquet, "TEXT_BYTES", 2**13)
    line = error_line(capsys, ["inspect", tmp_path / "traces"])
    assert line.startswith(f"{tmp_path / 'traces' / FIRST}: 'source' holds texts of ")


OPEN_EACH = """
import sys
from pathlib import Path
import pyarrow as pa
from moe_beyond.errors import UserError
from moe_beyond.traces.parquet import check_size, open_parquet

content = Path(sys.argv[1]).read_bytes()
footer = int.from_bytes(content[-8:-4], "little")
refused = 0
for place in range(len(content) - 8 - footer, len(content) - 8):
    for bit in range(8):
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit
        try:
            check_size(open_parquet(bytes(damaged)), len(content), "shard")
        except (pa.ArrowException, OSError, ValueError, UserError):
            refused += 1
print(refused)
"""


def test_no_footer_ends_the_process(tmp_path):
    """pyarrow does not catch the exception of a footer whose histograms of levels contradict its schema."""
    path = tmp_path / "shard.parquet"
    pq.write_table(pa.table({"experts": [[1, 2]] * 4, "source": ["x"] * 4}), path, row_group_size=2)
    done = subprocess.run([sys.executable, "-c", OPEN_EACH, path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) > 0


@pytest.mark.parametrize("name", ["shard left out", "brackets", "not Parquet", "expert twice", "one id"])
def test_a_set_in_other_storage_is_checked_alike(name, tmp_path):
    damage, says = DAMAGE[name]
    tiny_traces(tmp_path / "traces", sequences=24, longest=12)
    damage(tmp_path / "traces")
    fsspec.filesystem("memory").put(str(tmp_path / "traces"), f"/{tmp_path.name}", recursive=True)
    with pytest.raises(UserError, match=f"^memory://{tmp_path.name}/") as error:
        list(TraceSet(f"memory://{tmp_path.name}").traces())
    assert says in str(error.value)


def test_a_tokenizer_that_is_none_is_named(tmp_path):
    words = word_tokenizer(tmp_path / "words.json", ["<unk>", "a", "b"])
    manifest = Manifest(TINY, load_vocabulary(str(words)).describe(), "tiny", 16.0, "dataset", "tests", "0")
    with open_writer(tmp_path / "set", manifest, vocabulary=words) as writer:
        writer.write(tiny_trace("a", 2, np.random.default_rng(0), vocab=3))
    (tmp_path / "set/tokenizer.json").write_text("garbage")
    sha256 = hashlib.sha256(b"garbage").hexdigest()
    edit_manifest(tmp_path / "set", lambda content: content["tokenizer"].update(sha256=sha256))
    with pytest.raises(UserError, match=r"tokenizer\.json: is not a tokenizer \(.*\)\Z"):
        _ = TraceSet(str(tmp_path / "set")).token_strings


def restated(folder: Path, arrays: dict[str, np.ndarray], file: str, field: str) -> None:
    """Put other tensors in a safetensors file's place; its hash in the manifest is theirs."""
    save_file(arrays, folder / file, {"scoring": "softmax"})
    content = (folder / file).read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()

    def change(manifest: dict) -> None:
        if field == "routers_sha256":
            manifest[field] = sha256
        else:
            manifest["shards"][0] |= {field: sha256, "states_bytes": len(content)}

    edit_manifest(folder, change)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.full((4, 8, 8), np.nan, np.float32), "weight must hold only finite numbers"),
        (np.ones((4, 8, 8), np.int32), "weight must hold only finite numbers"),
        (np.ones((4, 8, 7), np.float32), "must hold routers of shape"),
    ],
)
def test_routers_that_are_none_are_named(array, says, tmp_path):
    tiny_traces(tmp_path / "set", hidden_states=True)
    restated(tmp_path / "set", {"weight": array}, "routers.safetensors", "routers_sha256")
    with pytest.raises(UserError, match=rf"routers\.safetensors: {says}"):
        _ = TraceSet(str(tmp_path / "set")).routers


def test_hidden_states_of_another_number_of_tokens_are_named(tmp_path):
    traces = tiny_traces(tmp_path / "set", hidden_states=True)
    (info, *_) = traces.shards()
    one = np.zeros((1, 4, 8), np.float16)
    restated(tmp_path / "set", {"router_inputs": one, "layer_inputs": one}, info.states_file, "states_sha256")
    with pytest.raises(
        UserError, match=r"states\.safetensors: must hold router_inputs and layer_inputs, float16 \(\d+, 4"
    ):
        list(TraceSet(str(tmp_path / "set")).traces(hidden_states=True))


def test_int8_states_without_scales_or_with_impossible_ones_are_named(tmp_path):
    def code(content: dict) -> None:
        content["states"]["dtype"] = "int8"

    traces = tiny_traces(tmp_path / "set", hidden_states=True)
    edit_manifest(tmp_path / "set", code)
    (info, *_) = traces.shards()
    codes, scales = np.zeros((info.tokens, 4, 8), np.int8), np.ones((info.tokens, 4), np.float32)
    arrays = {"router_inputs": codes, "layer_inputs": codes}
    restated(tmp_path / "set", arrays, info.states_file, "states_sha256")
    with pytest.raises(UserError, match=r"states\.safetensors: must hold .*, int8 \(\d+, 4, 8\) with scales \(got"):
        list(TraceSet(str(tmp_path / "set")).traces(hidden_states=True))
    for wrong in (np.nan, np.inf, -1):
        arrays |= {"router_scales": scales, "layer_scales": np.where(scales > 0, np.float32(wrong), scales)}
        restated(tmp_path / "set", arrays, info.states_file, "states_sha256")
        with pytest.raises(UserError, match=r"states\.safetensors: scales must be finite numbers, at least 0"):
            list(TraceSet(str(tmp_path / "set")).traces(hidden_states=True))


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.full((4, 8, 16), np.nan, np.float16), "must hold only finite numbers"),
        (np.ones((4, 8, 16), np.float32), r"must hold router_inputs and layer_inputs, float16 \(4, 8, 16\)"),
        (np.ones((3, 8, 16), np.float16), r"must hold router_inputs and layer_inputs, float16 \(4, 8, 16\)"),
    ],
)
def test_projections_that_are_none_are_named(array, says, tmp_path):
    folder = tmp_path / "set"
    tiny_traces(folder, hidden_states=True)
    save_file({"router_inputs": array, "layer_inputs": array}, folder / "projection.safetensors")
    sha256 = hashlib.sha256((folder / "projection.safetensors").read_bytes()).hexdigest()
    edit_manifest(folder, lambda content: content["states"].update(projected_from=16, projection_sha256=sha256))
    with pytest.raises(UserError, match=rf"projection\.safetensors: {says}"):
        _ = TraceSet(str(folder)).projection
