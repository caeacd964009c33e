"""A kill at any moment leaves the old or the new target, whole, and the next run leaves nothing else."""

import errno
import fcntl
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from _helpers.common import TINY, VOCAB, tiny_trace, tiny_traces
from _helpers.killing import die, in_child, killed_before
from _helpers.publishing import FIGURES, TRAINING

from moe_beyond import unfinished
from moe_beyond.collect.resume import write_part
from moe_beyond.evaluation.score_store import ScoresFolder, writing_scores
from moe_beyond.files import read_json, replacing, replacing_folder, write_json
from moe_beyond.predictors.io.card import card_with_figures, record_figures
from moe_beyond.predictors.io.folder import read_config, read_predictor, save_predictor
from moe_beyond.predictors.registry import create
from moe_beyond.tasks.checkpoint_io import WholeCheckpointIO
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.trace import Trace
from moe_beyond.unfinished import lasting_temporary_folder, remove_leftovers, temporary_files, unfinished_folder

OLD, NEW = 1, 2


@dataclass(frozen=True)
class Target:
    """A file or folder that is written whole.

    Attributes:
        write: Function of the path and a number, which decides the content.
        read: Function of the path that returns the number, and raises an error unless the content is whole.
        replaces: Whether there is an earlier one.
    """

    write: Callable[[Path, int], object]
    read: Callable[[Path], int]
    replaces: bool = True


def write_predictor(path: Path, number: int) -> None:
    predictor = create("popularity", TINY, VOCAB)
    predictor.load_state_dict({name: torch.full_like(value, number) for name, value in predictor.state_dict().items()})
    save_predictor(predictor, path, {**TRAINING, "fingerprint": f"{number:064}"})


def read_predictor_number(path: Path) -> int:
    (number,) = {int(value.max()) for value in read_predictor(path).state_dict().values()}
    assert int(read_config(path)["training"]["fingerprint"]) == number
    assert f"fingerprint\n  `{number:064}`" in (path / "README.md").read_text()
    return number


def write_scores(path: Path, number: int) -> None:
    scores = np.full((3, 1, *TINY.shape()[:2]), number / 4, np.float32)
    with writing_scores(path, geometry=TINY, lookaheads=[1], predictor=str(number), traces="0") as writer:
        writer.write("a", scores)


def read_scores(path: Path) -> int:
    folder = ScoresFolder(path)
    assert (folder.scores("a", 3) == int(folder.predictor) / 4).all()
    return int(folder.predictor)


def traces_of(number: int) -> list[Trace]:
    return [tiny_trace(f"{number}", 8, np.random.default_rng(number))]


def read_part(path: Path) -> int:
    (name,) = pq.read_table(path)["sequence_id"].to_pylist()
    return int(name)


def read_traces(path: Path) -> int:
    return len(list(TraceSet(str(path)).traces())) // 4


TARGETS = {
    "JSON": Target(write_json, read_json),
    "checkpoint": Target(
        lambda path, number: WholeCheckpointIO().save_checkpoint({"number": torch.full((9,), number)}, path),
        lambda path: int(torch.load(path, weights_only=True)["number"].max()),
    ),
    "part file": Target(lambda path, number: write_part(path, traces_of(number), TINY), read_part),
    "predictor": Target(write_predictor, read_predictor_number),
    "scores": Target(write_scores, read_scores),
    "trace set": Target(lambda path, number: tiny_traces(path, sequences=4 * number), read_traces, replaces=False),
}


@pytest.mark.parametrize(
    ("name", "exchanges"), [*((name, True) for name in TARGETS), ("predictor", False), ("scores", False)]
)
def test_a_kill_at_any_moment_leaves_a_whole_target(
    name: str, exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, found, moment = TARGETS[name], list[int | None](), 0
    if not exchanges:
        monkeypatch.setattr(unfinished, "_exchange_names", lambda *_: False)
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    if target.replaces:
        target.write(earlier / "target", OLD)
    killed = True
    while killed:
        folder = tmp_path / str(moment)
        shutil.copytree(earlier, folder)
        path = folder / "target"
        killed = killed_before(moment, partial(target.write, path, NEW))
        if not exchanges:
            remove_leftovers(folder)
        found.append(target.read(path) if path.exists() else None)
        if target.replaces or found[-1] is None:
            target.write(path, NEW)
            assert target.read(path) == NEW
            assert os.listdir(folder) == ["target"]
        moment += 1
    before = OLD if target.replaces else None
    assert found == sorted(found, key=lambda number: number == NEW)  # no way back
    assert {*found} == {before, NEW}
    assert found.count(before) > 5


def test_the_card_of_a_predictor_is_never_ahead_of_its_configuration(tmp_path: Path) -> None:
    earlier, moment, killed = tmp_path / "earlier", 0, True
    write_predictor(earlier, OLD)
    while killed:
        folder = tmp_path / str(moment)
        shutil.copytree(earlier, folder)
        killed = killed_before(moment, partial(record_figures, folder, FIGURES))
        recorded = "figures" in read_config(folder)
        card = (folder / "README.md").read_text()
        assert recorded or FIGURES["command"] not in card
        if not killed:
            assert card == card_with_figures(folder, read_config(folder))
        record_figures(folder, FIGURES)
        assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
        assert FIGURES["command"] in (folder / "README.md").read_text()
        moment += 1
    assert moment > 10


def test_a_predictor_can_be_read_while_it_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "predictor"
    write_predictor(path, OLD)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for number in range(40):
                write_predictor(path, number)
            code = 0
        finally:
            os._exit(code)
    read = set()
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        read.add(read_predictor(path).state_dict()["counts"].max().item())
    assert len(read) > 5
    assert os.listdir(tmp_path) == ["predictor"]


def test_leftovers_of_a_running_process_stay(tmp_path: Path) -> None:
    ready, write = os.pipe()
    child = os.fork()
    if child == 0:
        with replacing_folder(tmp_path / "folder") as temporary:
            (temporary / "half").write_text("1")
            os.write(write, b"x")
            time.sleep(60)
    os.read(ready, 1)
    remove_leftovers(tmp_path)
    (left,) = tmp_path.iterdir()
    assert (left / "folder" / "half").read_text() == "1"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for precious in (".folder.unfinished", ".folder.unfinished-abc", "folder.unfinished-abcdefgh", ".env.template"):
        (tmp_path / precious).mkdir()
    (tmp_path / ".file.unfinished-abcdefgh").write_text("no folder")
    remove_leftovers(tmp_path)
    assert not left.exists()
    assert len(os.listdir(tmp_path)) == 5


def test_a_hidden_folder_that_is_taken_for_a_leftover_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may look between the making of a folder and its lock."""
    flock, taken = fcntl.flock, list[str]()

    def after_another(handle: int, operation: int) -> None:
        if not taken:
            taken.extend(os.listdir(tmp_path))
            assert in_child(lambda: (monkeypatch.undo(), remove_leftovers(tmp_path))) == 0
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", after_another)
    with unfinished_folder(tmp_path / "file") as hidden:
        assert os.listdir(tmp_path) == [hidden.name]
        assert hidden.name not in taken


def test_a_file_system_without_locks_keeps_its_leftovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".a.unfinished-abcdefgh").mkdir()
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("x")
    assert sorted(os.listdir(tmp_path)) == [".a.unfinished-abcdefgh", "a"]


def test_a_folder_that_cannot_be_moved_into_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    rename = Path.rename

    def refuse(source: Path, target: Path) -> Path:
        if source.name == "folder" and source.parent != tmp_path and target == path:
            raise OSError(errno.EIO, "Input/output error")
        return rename(source, target)

    monkeypatch.setattr(unfinished, "_exchange_names", lambda *_: False)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Input/output error"), replacing_folder(path, overwrite=True):
        pass
    assert os.listdir(path) == ["old"]
    assert os.listdir(tmp_path) == ["folder"]


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk" / "folder").mkdir(parents=True)
    (tmp_path / "disk" / "folder" / "old").touch()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "folder")
    with replacing_folder(tmp_path / "link", overwrite=True) as temporary:
        (temporary / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert os.listdir(tmp_path / "disk" / "folder") == ["new"]


def test_temporary_files_of_a_killed_process_are_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as those of wandb, in a fit."""
    short = Path(tempfile.mkdtemp(dir="/tmp"))
    monkeypatch.setenv("TMPDIR", str(short))
    monkeypatch.setattr(tempfile, "tempdir", None)

    def work(last: Callable[[], None]) -> None:
        with temporary_files():
            tempfile.mkdtemp("wandb-media")
            assert os.environ["TMPDIR"] == tempfile.gettempdir() != str(short)
            assert lasting_temporary_folder() == short
            last()

    assert in_child(partial(work, die)) == -signal.SIGKILL
    (left,) = short.iterdir()
    assert list(left.glob("*wandb-media"))
    assert in_child(partial(work, lambda: None)) == 0
    assert not list(short.iterdir())
    assert os.environ["TMPDIR"] == str(short)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 60)))
    with temporary_files():  # a socket's path would be too long
        assert tempfile.gettempdir() == str(tmp_path / ("x" * 60))
    short.rmdir()
