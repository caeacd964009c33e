import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _helpers.common import TINY
from _helpers.damage import hash_scores
from safetensors.numpy import save_file

import moe_beyond.evaluation.score_store as module
from moe_beyond.errors import UserError
from moe_beyond.evaluation.score_store import ScoresFolder, writing_scores

LAYERS, EXPERTS, _ = TINY.shape()
LOOKAHEADS = (1, "token")
ABOUT: dict[str, Any] = {"geometry": TINY, "lookaheads": LOOKAHEADS, "predictor": "someone's", "traces": "f" * 8}


def random_scores(length: int) -> np.ndarray:
    shape = (length, len(LOOKAHEADS), LAYERS, EXPERTS)
    return np.random.default_rng(length).random(shape, np.float32)


def write(folder: Path, scores: dict[str, np.ndarray]) -> Path:
    write_all(folder, scores.items())
    return folder


def write_all(folder: Path, scores: Iterable[tuple[str, np.ndarray]]) -> None:
    with writing_scores(folder, **ABOUT) as writer:
        for name, values in scores:
            writer.write(name, values)


def edit_index(folder: Path, **changes: Any) -> None:
    content = {**json.loads((folder / "scores.json").read_text()), **changes}
    kept = {name: value for name, value in content.items() if value is not None or name not in changes}
    (folder / "scores.json").write_text(json.dumps(kept))


# 64 values a token: of 400 values a shard is full after 1 + 5 + 2 tokens, or after 9.
@pytest.mark.parametrize(("values_per_shard", "shards"), [(1, 6), (400, 3), (module.VALUES_PER_SHARD, 1)])
def test_scores_come_back_to_the_bit_from_any_number_of_shards(tmp_path, monkeypatch, values_per_shard, shards):
    monkeypatch.setattr(module, "VALUES_PER_SHARD", values_per_shard)
    scores = {f"a/b {number}": random_scores(length) for number, length in enumerate((1, 5, 2, 9, 1, 4))}
    folder = ScoresFolder(write(tmp_path / "scores", scores))
    assert (folder.predictor, folder.traces, folder.geometry) == ("someone's", "f" * 8, TINY)
    assert folder.lookaheads == LOOKAHEADS
    for name, expected in scores.items():
        found = folder.scores(name, len(expected))
        assert found.dtype == np.float32
        assert np.array_equal(found, expected)
    assert len(list((tmp_path / "scores").glob("*.safetensors"))) == shards


def test_scores_that_are_not_contiguous_are_stored_in_order(tmp_path):
    turned = np.asfortranarray(random_scores(6))
    folder = ScoresFolder(write(tmp_path / "scores", {"s": turned}))
    assert np.array_equal(folder.scores("s", 6), turned)


def test_whoever_may_read_the_index_may_read_the_shards(tmp_path):
    folder = write(tmp_path / "scores", {"s": random_scores(2)})
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_the_edges_of_a_probability_are_allowed(tmp_path):
    scores = random_scores(2)
    scores[0, 0, 0, :2] = 0, 1
    assert np.array_equal(ScoresFolder(write(tmp_path / "s", {"s": scores})).scores("s", 2), scores)


def test_a_sequence_is_written_once(tmp_path):
    with pytest.raises(UserError, match="'s' were written already"):
        write_all(tmp_path / "s", [("s", random_scores(1)), ("s", random_scores(2))])
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_fails_leaves_the_old_scores(tmp_path):
    def broken_off() -> Iterator[tuple[str, np.ndarray]]:
        yield "s", random_scores(2)
        raise RuntimeError("stop")

    write(tmp_path / "scores", {"s": random_scores(3)})
    with pytest.raises(RuntimeError, match="stop"):
        write_all(tmp_path / "scores", broken_off())
    assert np.array_equal(ScoresFolder(tmp_path / "scores").scores("s", 3), random_scores(3))
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]


def test_scores_are_written_over_scores_and_over_nothing_else(tmp_path):
    write(tmp_path / "scores", {"old": random_scores(3)})
    folder = ScoresFolder(write(tmp_path / "scores", {"new": random_scores(2)}))
    assert np.array_equal(folder.scores("new", 2), random_scores(2))
    with pytest.raises(UserError, match="no scores for sequence 'old'"):
        folder.scores("old", 3)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    with pytest.raises(UserError, match="notes already exists"):
        write(tmp_path / "notes", {"s": random_scores(1)})
    assert (tmp_path / "notes" / "diary.txt").read_text() == "dear diary"
    (tmp_path / "scores" / "thesis.txt").write_text("not a score")
    with pytest.raises(UserError, match="scores already exists"):
        write(tmp_path / "scores", {"s": random_scores(1)})
    assert (tmp_path / "scores" / "thesis.txt").read_text() == "not a score"


def test_a_missing_sequence_is_named(tmp_path):
    folder = write(tmp_path / "scores", {"s": random_scores(3)})
    with pytest.raises(UserError, match=re.escape(f"{folder}: has no scores for sequence 'other'")):
        ScoresFolder(folder).scores("other", 3)


@pytest.mark.parametrize("shape", [(2, 2, 4, 8), (3, 1, 4, 8), (3, 2, 3, 8), (3, 2, 4, 7), (3, 2, 32), (3, 2, 8, 4)])
def test_scores_of_another_shape_are_named(tmp_path, shape):
    folder = write(tmp_path / "scores", {"s": np.zeros(shape, np.float32)})
    with pytest.raises(UserError, match=r"scores-00000.safetensors: scores of 's' have shape .*expected \(3, 2, 4, 8"):
        ScoresFolder(folder).scores("s", 3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1e-6, 1.00001])
def test_what_is_no_probability_is_named(tmp_path, value):
    scores = random_scores(3)
    scores[2, 1, 3, 7] = value
    folder = write(tmp_path / "scores", {"good": random_scores(3), "bad": scores})
    assert np.array_equal(ScoresFolder(folder).scores("good", 3), random_scores(3))
    with pytest.raises(UserError, match=r"scores-00000.safetensors: scores of 'bad' are not all finite and within 0"):
        ScoresFolder(folder).scores("bad", 3)


@pytest.mark.parametrize("damage", ["cut", "emptied", "garbled", "removed", "without the sequence"])
def test_a_damaged_shard_is_named(tmp_path, damage):
    folder = write(tmp_path / "scores", {"s": random_scores(3)})
    shard = folder / "scores-00000.safetensors"
    content = shard.read_bytes()
    if damage == "removed":
        shard.unlink()
    elif damage == "without the sequence":
        save_file({"other": random_scores(3)}, shard)
    else:
        shard.write_bytes({"cut": content[:-4], "emptied": b"", "garbled": b"\xff" * 8 + content[8:]}[damage])
    with pytest.raises(UserError, match=re.escape(str(shard))):
        ScoresFolder(folder).scores("s", 3)


def test_a_folder_without_an_index_is_no_scores_folder(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}: is not a scores folder (it has no scores.json)")):
        ScoresFolder(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "3", "{}", '{"format_version": 1}'])
def test_an_index_that_is_none_is_named(tmp_path, content):
    (tmp_path / "scores.json").write_text(content)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "scores.json"))):
        ScoresFolder(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": 2},
        {"lookaheads": ["soon"]},
        {"lookaheads": 1},
        {"geometry": {"model": "tiny"}},
        {"files": None},
        {"files": ["s"]},
        {"files": {"s": 3}},
        {"files": {"s": "../scores-00000.safetensors"}},
        {"files": {"s": "other.safetensors"}},
        {"sha256": {}},
        {"sha256": {"scores-00000.safetensors": "aa"}},
        {"causal": "no"},
        {"causal": 0},
        {"lookaheads": [1, 1]},
        {"lookaheads": [3, "token"]},
        {"lookaheads": [True, "token"]},
        {"predictor": "a\x1b[31m"},
        {"predictor": 5},
        {"traces": 5},
        {"geometry": 5},
        {"geometry": {**TINY.to_json(), "top_k": 3}},
        {"content_sha256": "0" * 64},
        {"content_sha256": None},
    ],
    ids=str,
)
def test_a_wrong_field_of_the_index_is_refused_by_the_folders_name(tmp_path, changes):
    folder = write(tmp_path / "scores", {"s": random_scores(3)})
    edit_index(folder, **changes)
    with pytest.raises(UserError, match=re.escape(str(folder))):
        ScoresFolder(folder)


def test_an_index_whose_files_are_swapped_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "VALUES_PER_SHARD", 1)
    folder = write(tmp_path / "scores", {"a": random_scores(3), "b": random_scores(3)})
    files = json.loads((folder / "scores.json").read_text())["files"]
    edit_index(folder, files={"a": files["b"], "b": files["a"]})
    with pytest.raises(UserError, match="content_sha256 does not match the other fields"):
        ScoresFolder(folder)


def test_a_flipped_bit_of_any_file_is_noticed(tmp_path):
    folder = write(tmp_path / "scores", {"s": random_scores(3)})
    for path in folder.iterdir():
        whole = path.read_bytes()
        for bit in range(0, 8 * len(whole), 1 + 8 * (len(whole) // 100)):
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            with pytest.raises(UserError, match=re.escape(str(path))):
                ScoresFolder(folder).scores("s", 3)
        path.write_bytes(whole)
    assert np.array_equal(ScoresFolder(folder).scores("s", 3), random_scores(3))


def test_scores_in_half_precision_are_named(tmp_path):
    folder = write(tmp_path / "scores", {"s": random_scores(3)})
    shard = folder / "scores-00000.safetensors"
    save_file({"s": random_scores(3).astype(np.float16)}, shard)
    hash_scores(folder)
    with pytest.raises(UserError, match=re.escape(f"{shard}: scores of 's' are float16, not float32")):
        ScoresFolder(folder).scores("s", 3)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    folder = write(tmp_path / "scores", {"s": random_scores(3)})
    shard = folder / "scores-00000.safetensors"
    shard.rename(tmp_path / shard.name)
    shard.symlink_to(tmp_path / shard.name)
    with pytest.raises(UserError, match=re.escape(f"{shard}: is a link to a file outside the folder")):
        ScoresFolder(folder).scores("s", 3)
