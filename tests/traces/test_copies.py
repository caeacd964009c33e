"""No text of training is in validation, and copies are counted."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from _helpers.common import TINY, error_line, tiny_trace
from hypothesis import given
from hypothesis import strategies as st

from moe_beyond.cli.main import main
from moe_beyond.datamodules import TraceDataModule
from moe_beyond.errors import UserError
from moe_beyond.traces.copies import count_copies, describe_copies, text_digest
from moe_beyond.traces.manifest import NO_TOKEN_IDS, Manifest, Tokenizer
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.splits import without_copies
from moe_beyond.traces.writer import open_writer


def test_a_chosen_copy_goes_to_training_by_hand():
    # 1 and 4 were chosen. 1 repeats 0, which is in training; 4 and 5 have no copy.
    assert without_copies({1, 4}, dict(enumerate("aabbcd"))) == {4}
    # 2 and 3 are copies of each other, both chosen: no training text is in validation.
    assert without_copies({2, 3}, dict(enumerate("abcc"))) == {2, 3}
    # The training copy comes later.
    assert without_copies({0, 1}, dict(enumerate("abac"))) == {1}
    assert without_copies(set(), {0: "a"}) == set()


def test_copies_alone_make_no_validation_split():
    with pytest.raises(UserError, match="--val-blocks: every sequence chosen for the split is a copy"):
        without_copies({0}, {0: "a", 1: "a"})


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.data())
def test_no_training_text_is_in_validation_and_nothing_else_moves(texts, data):
    numbered = dict(enumerate(texts))
    held_out = data.draw(st.sets(st.sampled_from(sorted(numbered))))
    try:
        kept = without_copies(held_out, numbered)
    except UserError:
        kept = set()
    assert kept <= held_out
    training = {text for number, text in numbered.items() if number not in kept}
    assert not training & {numbered[number] for number in kept}
    unseen = {text for number, text in numbered.items() if number not in held_out}
    assert held_out - kept == {number for number in held_out if numbered[number] in unseen}


def test_copies_are_counted_by_hand():
    assert count_copies({"train": [b"a", b"a", b"b", b"a"], "validation": [b"b", b"c", b"c", b"b"]}) == {
        "train": {"within": 2, "of_other_splits": 1},
        "validation": {"within": 2, "of_other_splits": 2},
    }
    counted = count_copies({"train": [b"a", b"b"], "validation": [b"b"]})
    assert describe_copies(counted) == "1 of train in other splits, 1 of validation in other splits"


def test_equal_numbers_are_equal_texts_whatever_their_type():
    ids = np.array([1, 2, 300], np.int32)
    assert text_digest(ids) == text_digest(ids.astype(np.int64)) == text_digest(np.array([1, 0, 2, 0, 300])[::2])
    assert len({text_digest(ids), text_digest(ids[:2]), text_digest(ids[::-1])}) == 3


def set_with_copies(folder: Path, *, has_token_ids: bool = True) -> TraceSet:
    """Copies in training ``a b a`` and validation ``b c``, by token ids or by routing."""
    tokenizer = Tokenizer("tests", 32) if has_token_ids else NO_TOKEN_IDS
    texts = {text: tiny_trace(text, 4, np.random.default_rng(seed)) for seed, text in enumerate("abc")}
    with open_writer(folder, Manifest(TINY, tokenizer, "tiny", 16.0, "dataset", "tests", "0")) as writer:
        for number, (text, split) in enumerate(zip("abacb", ["train"] * 3 + ["validation"] * 2, strict=True)):
            trace = replace(texts[text], sequence_id=f"s{number}")
            if not has_token_ids:
                trace = replace(trace, token_ids=np.zeros_like(trace.token_ids))
            writer.write(trace, split)
    return TraceSet(str(folder))


@pytest.mark.parametrize("has_token_ids", [True, False])
def test_inspect_reports_copies(has_token_ids, tmp_path, capsys):
    traces = set_with_copies(tmp_path / "set", has_token_ids=has_token_ids)
    assert main(["inspect", traces.folder, "--split", "train", "--json", str(tmp_path / "summary.json")]) == 0
    assert "1 within train, 1 of train in other splits" in " ".join(capsys.readouterr().out.split())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["copies"] == {
        "train": {"within": 1, "of_other_splits": 1},
        "validation": {"within": 0, "of_other_splits": 1},
    }


def test_fit_notes_copies_of_training_in_validation(tmp_path, caplog, monkeypatch):
    # Lightning's logger only propagates if logging was configured before its import.
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    data = TraceDataModule(set_with_copies(tmp_path / "set").folder)
    with caplog.at_level("INFO", "lightning.pytorch"):  # an earlier test may have silenced it
        data.setup("validate")
        assert caplog.messages == []
        data.setup("fit")
    (message,) = set(caplog.messages)
    assert message.startswith("note: 1 of 2 validation sequences are exact copies of training sequences")


def recorded(folder: Path, texts: str) -> Path:
    """A recording in JSON lines: every letter is a text of three tokens."""
    folder.mkdir()
    for number, text in enumerate(texts):
        rng = np.random.default_rng(ord(text))
        lines = [
            {"layer_idx": layer, "token_idx": token, "selected_ids": rng.permutation(8)[:2].tolist()}
            for token in range(3)
            for layer in TINY.moe_layers
        ]
        (folder / f"p{number:02d}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("texts", ["abcdabef", "abcdefgh"])
def test_import_leaves_copies_of_training_out_of_validation(texts, tmp_path, capsys):
    source = recorded(tmp_path / "source", texts)
    (tmp_path / "geometry.json").write_text(json.dumps(TINY.to_json()))
    words = ["import", "jsonl", str(source), "--out", str(tmp_path / "set"), "--model", str(tmp_path / "geometry.json")]
    assert main([*words, "--val-blocks", "2:2", "--json", str(tmp_path / "said.json")]) == 0
    traces = TraceSet(str(tmp_path / "set"))
    # Blocks of two, equally long: of each pair of blocks the first goes to validation, that is 0, 1, 4 and 5.
    chosen, repeated = ["p00", "p01", "p04", "p05"], texts == "abcdabef"
    validation = [trace.sequence_id for trace in traces.traces("validation")]
    assert validation == chosen  # copies of each other, if any, and all in validation
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["copies"] == {
        "train": {"within": 0, "of_other_splits": 0},
        "validation": {"within": 2 * repeated, "of_other_splits": 0},
    }
    assert f"exact copies: {'2 within validation' if repeated else 'none'}" in capsys.readouterr().out


def test_import_moves_a_copy_to_training(tmp_path, capsys):
    source = recorded(tmp_path / "source", "abbc")
    (tmp_path / "geometry.json").write_text(json.dumps(TINY.to_json()))
    words = ["import", "jsonl", str(source), "--out", str(tmp_path / "set"), "--model", str(tmp_path / "geometry.json")]
    assert main([*words, "--val-blocks", "2:2"]) == 0
    traces = TraceSet(str(tmp_path / "set"))
    assert [trace.sequence_id for trace in traces.traces("validation")] == ["p00"]
    assert [trace.sequence_id for trace in traces.traces("train")] == ["p02", "p03", "p01"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["geometry.json", "set", "source"]
    assert "exact copies: 1 within train" in capsys.readouterr().out
    words[4] = str(tmp_path / "none")
    recorded(tmp_path / "other", "aa")
    words[2] = str(tmp_path / "other")
    line = error_line(capsys, [*words, "--val-blocks", "1:2"])
    assert line.startswith("--val-blocks: every sequence chosen for the split is a copy of one outside it")
