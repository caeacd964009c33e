"""From a clone of MoE-Beyond's repository to its table, in miniature."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from _helpers.common import release
from _helpers.tools import TOOLS, run

PREDICTIONS = "webglm_moe_beyond_predictions/prompt_{}_data_predicted.csv"
RECORDINGS = "webglm/prompt_{}_data_formatted.csv"
PUFFIN = "puffin/prompt_{}_data.csv"
TOKENS = [3, 12, 11, 14]
NUMBERS = {1: 3, 2: 2, 3: 4, 4: 1}
"""The clone's number of the predictions for each recording."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return release(tmp_path / "release", TOKENS, missed=1)


@pytest.fixture
def clone(source: Path, tmp_path: Path) -> Path:
    """The repository as it is: Puffin in two folders, predictions under numbers of their own."""
    root = tmp_path / "clone"
    for number in NUMBERS:
        puffin = "training_data_eamc" if number < 3 else "expert_activation_scripts/training_data_eamc"
        put(source / PUFFIN.format(number), root / puffin / f"prompt_{number}_data.csv")
        put(source / RECORDINGS.format(number), recording(root, number))
        put(source / PREDICTIONS.format(number), prediction(root, NUMBERS[number]))
    (root / "training_data_eamc/.ipynb_checkpoints").mkdir()
    (root / "training_data_eamc/.ipynb_checkpoints/prompt_2_data-checkpoint.csv").write_text("old")
    (root / "training_data_eamc/.ipynb_checkpoints/prompt_2_data.csv").write_text("old")
    (root / "codegen_instruct_tagged.txt").write_text("text")
    return root


def put(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, to)


def recording(root: Path, number: int) -> Path:
    return root / f"test_datasets/formatted_csvs/prompt_{number}_data_formatted.csv"


def prediction(root: Path, number: int) -> Path:
    return root / f"test_datasets/predicted_csvs/prompt_{number}_data_predicted.csv"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(*words: object) -> str:
    command = [sys.executable, str(TOOLS / "arrange_moe_beyond_release.py"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_a_clone_gives_the_table(source: Path, clone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = run("arrange_moe_beyond_release.py", str(clone), str(out))
    assert f"{out / 'puffin'}: 4 prompts" in printed
    assert "4 predictions match a recording; 3 of them were renumbered" in printed
    assert "excluded" not in printed
    made = files(out)
    arranged = json.loads(made.pop("arranged.json"))
    assert made == files(source)
    assert arranged["predictions_by_recording"] == {str(to): of for to, of in NUMBERS.items()}
    words = ("--fillings", "1", "--json", str(tmp_path / "f.json"))
    run("reproduce_moe_beyond.py", "--data", str(out), *words)
    assert json.loads((tmp_path / "f.json").read_text())["classifier"]["recall_at_6"] == pytest.approx(5 / 6)
    # A second run replaces an earlier result, and nothing else.
    assert run("arrange_moe_beyond_release.py", str(clone), str(out)) == printed
    (out / "webglm/notes.txt").write_text("mine")
    assert f"{out} already exists" in refused(clone, out)
    assert (out / "webglm/notes.txt").exists()


def test_experts_in_another_order_and_rows_by_token_are_the_same_prompt(clone: Path, tmp_path: Path) -> None:
    path = prediction(clone, NUMBERS[3])
    header, *rows = path.read_text().splitlines(keepends=True)
    by_token = sorted(rows, key=lambda row: int(row.split(",")[1]))
    assert by_token != rows
    path.write_text("".join([header, *by_token]))
    path = recording(clone, 2)
    path.write_text(path.read_text().replace('"[', '"[ '))
    printed = run("arrange_moe_beyond_release.py", str(clone), str(tmp_path / "out"))
    assert "4 predictions match a recording" in printed


def test_files_without_a_partner_are_excluded_and_listed(clone: Path, tmp_path: Path) -> None:
    prediction(clone, NUMBERS[3]).unlink()
    recording(clone, 2).unlink()
    printed = run("arrange_moe_beyond_release.py", str(clone), str(tmp_path / "out"))
    assert "excluded: 1 recordings without predictions: 3\n" in printed
    assert f"excluded: 1 predictions without a recording: {NUMBERS[2]}\n" in printed
    made = files(tmp_path / "out")
    assert {name for name in made if name.startswith("webglm")} == {
        name.format(number) for name in (RECORDINGS, PREDICTIONS) for number in (1, 4)
    }


def test_prompts_with_the_same_experts_are_paired_in_order(clone: Path, tmp_path: Path) -> None:
    shutil.copyfile(recording(clone, 2), recording(clone, 9))
    shutil.copyfile(prediction(clone, NUMBERS[2]), prediction(clone, 7))
    printed = run("arrange_moe_beyond_release.py", str(clone), str(tmp_path / "out"))
    assert "paired in order, all with the same experts: recordings 2, 9, predictions 2, 7" in printed
    arranged = json.loads((tmp_path / "out/arranged.json").read_text())
    assert arranged["predictions_by_recording"] == {"1": 3, "2": 2, "3": 4, "4": 1, "9": 7}


def test_a_prompt_in_two_folders_must_be_the_same(clone: Path, tmp_path: Path) -> None:
    one, two = clone / "training_data_eamc/prompt_2_data.csv", clone / "more/prompt_2_data.csv"
    put(one, two)
    run("arrange_moe_beyond_release.py", str(clone), str(tmp_path / "out"))
    two.write_text(two.read_text() + "\n")
    printed = refused(clone, tmp_path / "other")
    assert f"{one}: differs from {two}, although both are prompt 2" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clone", "out", "release"]


def test_a_folder_that_is_no_clone_is_refused_in_one_line(clone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "nowhere: is not a folder" in refused(tmp_path / "nowhere", out)
    (tmp_path / "empty").mkdir()
    assert "empty: contains no prompt_N_data.csv" in refused(tmp_path / "empty", out)
    assert "must be outside" in refused(clone, clone / "out")
    assert "must be outside" in refused(clone, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("x")
    assert f"{other} already exists" in refused(clone, other)
    path = recording(clone, 1)
    path.write_text(path.read_text().replace("[", "[x", 1))
    assert f"{path}: row 2: an expert id must be a whole number (got 'x" in refused(clone, out)
    path.unlink()
    for number in (2, 3, 4):
        prediction(clone, NUMBERS[number]).unlink()
    assert "no predictions match the experts of any recording" in refused(clone, out)
    assert not out.exists()
