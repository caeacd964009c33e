"""``moe-beyond evaluate --bootstrap``: intervals on the screen, in the JSON, and in a predictor's folder."""

import json
from pathlib import Path

import pytest
from _helpers.common import error_line, tiny_traces
from _helpers.scoring import history_folder

from moe_beyond.cli.main import main


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """An evaluation of a counted predictor."""
    folder = history_folder(tmp_path / "history.tiny", tiny_traces(tmp_path / "traces"), source="tests", split="train")
    return ["evaluate", folder, "--traces", str(tmp_path / "traces"), "--split", "validation", "--budget", "8"]


def test_intervals_are_shown_written_and_the_same_again(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--bootstrap", "200", "--json", "-"]) == 0
    once = capsys.readouterr().out
    assert main([*words, "--bootstrap", "200", "--json", "-"]) == 0
    assert capsys.readouterr().out == once
    found = json.loads(once)
    assert found["bootstrap_draws"] == 200
    [row] = found["metrics"]
    low, high = row["intervals"]["recall_at_k"]
    assert low < row["recall_at_k"] < high
    ours, lru, *_ = found["results"]
    assert ours["intervals"].keys() == {"hit_rate", "bytes_ratio", "minus_lru"}
    assert lru["intervals"].keys() == {"hit_rate", "bytes_ratio"}
    assert main([*words, "--bootstrap", "200"]) == 0
    said = capsys.readouterr().out
    assert f"{100 * row['recall_at_k']:.1f} ({100 * low:.1f}..{100 * high:.1f})" in said
    low, high = ours["intervals"]["minus_lru"]["bytes_ratio"]
    assert f"{low:+.2f}..{high:+.2f}" in said
    assert "200 bootstrap draws of sequences" in said
    assert main([*words, "--json", "-"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert "intervals" not in plain["results"][0]
    assert plain["results"][0]["hits"] == ours["hits"]


def test_a_card_shows_them(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--bootstrap", "200", "--record", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    card = (Path(words[1]) / "README.md").read_text()
    (recorded,) = json.loads((Path(words[1]) / "config.json").read_text())["figures"]
    assert recorded["command"].endswith("--bootstrap 200")
    assert [row["intervals"] for row in recorded["replay"]] == [row["intervals"] for row in found["results"]]
    low, high = found["metrics"][0]["intervals"]["recall_at_k"]
    assert f"| token | {found['metrics'][0]['recall_at_k']:.1%} ({low:.1%}..{high:.1%}) |" in card
    for row in found["results"]:
        (low, high), (least, most) = row["intervals"]["hit_rate"], row["intervals"]["bytes_ratio"]
        figures = f"{row['hit_rate']:.1%} ({low:.1%}..{high:.1%}) | {row['bytes_ratio']:.2f} ({least:.2f}..{most:.2f})"
        assert figures in card
    assert "95 % intervals over the sequences measured" in card


@pytest.mark.parametrize("draws", ["5", "-1", "many"])
def test_draws_that_are_none(words: list[str], draws: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "bootstrap" in error_line(capsys, [*words, "--bootstrap", draws])
