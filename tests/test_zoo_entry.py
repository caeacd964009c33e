"""A zoo entry by one command: killed and resumed, refused with other settings, and ready to upload."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from _helpers.tools import TOOLS

from moe_beyond.cli.main import main
from moe_beyond.predictors.io.card import card_with_figures
from moe_beyond.predictors.io.folder import read_config

TOOL = "make_zoo_entry.py"
PROMPTS = [f"import module{number} as m{number}\n" for number in range(40)]
RECIPE = """
seed_everything: 0
model:
  class_path: CrossLayerTask
  init_args: {width: 16, heads: 2, depth: 1, window: 8, layer_width: 16, memory_tokens: 64}
trainer: {max_epochs: 8}
"""


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """The command line of a small entry, with its prompts and its recipe."""
    (tmp_path / "p.txt").write_text("".join(PROMPTS))
    (tmp_path / "mine-cross_layer-tiny.yaml").write_text(RECIPE)
    recipe = ("--recipe", str(tmp_path / "mine-cross_layer-tiny.yaml"))
    return ["small-moe", str(tmp_path / "p.txt"), *recipe, "--blocks", "2:5", "--budget", "25%", "--licence", "mit"]


def start(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(TOOLS / TOOL), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*words: str) -> str:
    out, err = (process := start(*words)).communicate()
    assert process.returncode == 0, err
    return out


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """The error line of the tool in this process, which has imported torch already."""
    monkeypatch.setattr(sys, "argv", [TOOL, *words])
    monkeypatch.syspath_prepend(str(TOOLS))
    with pytest.raises(SystemExit, match=r"^2$"):
        runpy.run_path(str(TOOLS / TOOL), run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix(f"{TOOL}: error: ")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_killed_entry_goes_on_and_equals_an_undisturbed_one(tmp_path: Path, words: list[str]) -> None:
    name = "cross_layer.small-moe-p-tiny"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    printed = finish(*words, "--out", str(whole))
    assert "belady" in printed
    process = start(*words, "--out", str(killed))
    run = killed / "fits" / name / "runs/predictor/version_0"
    while not (run / "checkpoints/last.ckpt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()  # its output ends with the last process that holds it: the fit has ended, too
    assert not (killed / name).exists()
    recorded = (killed / "traces/manifest.json").stat().st_mtime_ns
    printed = finish(*words, "--out", str(killed))
    assert "1/4 collect: finished earlier" in printed
    assert (killed / "traces/manifest.json").stat().st_mtime_ns == recorded
    if not (run / "predictor").exists():  # killed before the end of the fit, which then resumed
        resumed = run.with_name("version_1")
        assert "version_0/checkpoints/" in (resumed / "config.yaml").read_text()
    assert content(killed / name) == content(whole / name)
    before = content(killed)
    printed = finish(*words, "--out", str(killed))
    assert len(re.findall(r"^\d/4 .*: finished earlier$", printed, re.MULTILINE)) == 4
    assert content(killed) == before
    _check_predictor(whole / name)


def _check_predictor(folder: Path) -> None:
    """The folder has a card with its name, and figures of held-out text with bytes, LRU and Belady."""
    config, card = read_config(folder), (folder / "README.md").read_text()
    (figures,) = config["figures"]
    assert (figures["split"], figures["relation"]) == ("test", "held-out")
    assert config["training"]["split"] == "train"
    assert [text["use"] for text in config["training"]["seen"]] == ["chose the epoch of and calibrated"]
    assert config["calibration"] is not None
    assert {"lru", "belady"} < {row["strategy"] for row in figures["replay"]}
    assert all("bytes_ratio" in row for row in figures["replay"])
    assert card == card_with_figures(folder, config)
    assert f"\n# {folder.name}\n" in card
    assert "\nlicense: mit\n" in card
    assert card.count(f"--predictor {folder.name}") == 1
    assert str(folder.parent) not in card + json.dumps(config)
    assert main(["push", str(folder), f"ORG/{folder.name}", "--dry-run", "--quiet"]) == 0


def test_an_entry_with_other_settings_is_refused(tmp_path: Path, words: list[str], capsys, monkeypatch) -> None:
    out = tmp_path / "entry"
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setenv("MOE_BEYOND_CHECKPOINTS", str(tmp_path / "nowhere"))  # the first command fails in one line
    monkeypatch.setattr(sys, "argv", [TOOL, *words, "--out", str(out)])
    monkeypatch.syspath_prepend(str(TOOLS))
    with pytest.raises(SystemExit, match=r"^2$"):
        runpy.run_path(str(TOOLS / TOOL), run_name="__main__")
    begun = content(out)
    assert begun.keys() == {"settings.json", "lock"}
    same = (*words, "--out", str(out))
    for changed, name in (
        ((*same, "--budget", "50%"), "budgets (got '25% 50%', not '25%')"),
        ((*same, "--licence", "apache-2.0"), "licence (got 'apache-2.0', not 'mit')"),
        ((*same, "--", "--dtype", "float32"), "options of collect (got "),
        (("other", *same[1:]), "model (got 'other', not 'small-moe')"),
    ):
        line = refused(capsys, monkeypatch, *changed)
        assert line.startswith(f"{out}: contains an entry with other {name}")
        assert line.endswith("repeat its command, or choose another --out")
    (tmp_path / "p.txt").write_text("".join(PROMPTS[:-1]))
    assert "contains an entry with other prompts" in refused(capsys, monkeypatch, *same)
    (tmp_path / "p.txt").write_text("".join(PROMPTS))
    (tmp_path / "mine-cross_layer-tiny.yaml").write_text(RECIPE + "data: {init_args: {seed: 1}}\n")
    assert "contains an entry with other settings of cross_layer.small" in refused(capsys, monkeypatch, *same)
    assert content(out) == begun


def test_wrong_input_is_one_line_before_anything_is_written(tmp_path: Path, words: list[str], capsys, monkeypatch):
    (tmp_path / "splits.jsonl").write_text('{"text": "a"}\n{"text": "b", "split": "validation"}\n')
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    out = ("--out", str(tmp_path / "entry"))
    for given, line in (
        ((words[0], str(tmp_path / "splits.jsonl"), *out), "splits.jsonl: has splits, but no test; give prompts of"),
        ((*words, "--recipe", "zoo/cros_layer", *out), "--recipe zoo/cros_layer: not found; did you mean zoo/cross"),
        ((*words, "--recipe", "trainer/default", *out), "--recipe trainer/default: its name has no architecture"),
        ((*words, *words[2:4], *out), "--recipe: two predictors are named cross_layer.small-moe-p-tiny; rename a"),
        ((words[0], "nothing.txt", *out), "nothing.txt"),
        ((*words, "--out", str(tmp_path / "mine")), "mine: is no zoo entry; choose another --out"),
    ):
        assert line in refused(capsys, monkeypatch, *given)
    assert not (tmp_path / "entry").exists()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_prompts_of_the_small_model_are_split_by_file(tmp_path: Path) -> None:
    library = tmp_path / "lib"
    library.mkdir()
    for number in range(400):
        (library / f"m{number}.py").write_text(f"value{number} = {number}\n" * 120)
    command = [sys.executable, str(TOOLS / "small_moe_prompts.py"), "--out", str(tmp_path / "p.jsonl")]
    subprocess.run([*command, "--text", str(library), "--tokens", "300"], check=True, capture_output=True)
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    by_split = {
        split: {row["id"].rpartition(":")[0] for row in rows if row["split"] == split}
        for split in ("train", "validation", "test")
    }
    assert all(by_split.values())
    assert sum(map(len, by_split.values())) == len(set().union(*by_split.values()))
    from moe_beyond.quickstart import bundled_prompts

    held_out = {prompt.source for prompt in bundled_prompts() if prompt.split == "validation"}
    assert not held_out & (by_split["train"] | by_split["validation"])
    assert {name for name in held_out if name.startswith("Doc/")} <= by_split["test"]
    files = {name for names in by_split.values() for name in names if name.startswith("Lib/")}
    is_held_out = runpy.run_path(str(TOOLS / "train_small_moe.py"))["is_held_out"]
    assert files == {name for number in range(400) if is_held_out(name := f"Lib/m{number}.py")}
