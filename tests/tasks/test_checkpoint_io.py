"""A path holds a whole checkpoint at any time."""

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from _helpers.common import TINY, VOCAB, tiny_traces
from lightning.fabric.plugins import TorchCheckpointIO

from moe_beyond.datamodules import TraceDataModule
from moe_beyond.errors import UserError
from moe_beyond.tasks import PopularityTask
from moe_beyond.tasks.checkpoint_io import WholeCheckpointIO

EARLIER, LATER = {"weight": torch.zeros(100)}, {"weight": torch.ones(100_000)}


def in_child(act: Callable[[], None]) -> int:
    """Run something in a process of its own and return how it ended."""
    child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("moment", ["as it is written", "before it is renamed"])
def test_a_kill_leaves_the_earlier_checkpoint(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the folder for temporary files is another file system, Lightning would have copied over it."""
    if Path("/dev/shm").is_dir():
        monkeypatch.setenv("TMPDIR", "/dev/shm")
    path = tmp_path / "last.ckpt"
    WholeCheckpointIO().save_checkpoint(EARLIER, path)

    def save() -> None:
        def cut(checkpoint: object, file: object) -> None:
            file.write(b"half")  # type: ignore[attr-defined]
            file.flush()  # type: ignore[attr-defined]
            die()

        monkeypatch.setattr(*((torch, "save", cut) if moment == "as it is written" else (os, "fsync", die)))
        WholeCheckpointIO().save_checkpoint(LATER, path)

    assert in_child(save) == -signal.SIGKILL
    assert torch.equal(torch.load(path, weights_only=True)["weight"], EARLIER["weight"])
    (left,) = set(os.listdir(tmp_path)) - {"last.ckpt"}
    assert left.startswith(".last.ckpt.")  # hidden, and next to it


def test_a_full_disk_is_a_line_and_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    WholeCheckpointIO().save_checkpoint(EARLIER, path)

    def save() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            WholeCheckpointIO().save_checkpoint(LATER, path)
        except UserError as error:
            os._exit(0 if str(error).startswith(f"{path}: cannot be written (File too large); free some space") else 3)

    assert in_child(save) == 0
    assert torch.equal(torch.load(path, weights_only=True)["weight"], EARLIER["weight"])
    assert os.listdir(tmp_path) == ["last.ckpt"]


class Own(TorchCheckpointIO):
    """A user's."""


@pytest.mark.parametrize("given", [None, TorchCheckpointIO, Own])
def test_a_fit_writes_whole_checkpoints_unless_told_otherwise(given: type | None, tmp_path: Path) -> None:
    plugins = [] if given is None else [given()]
    trainer = L.Trainer(
        plugins=plugins, max_epochs=1, logger=False, default_root_dir=tmp_path, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = TraceDataModule(tiny_traces(tmp_path / "traces").folder)
    trainer.fit(PopularityTask(TINY, VOCAB), data)
    assert type(trainer.strategy.checkpoint_io) is (given or WholeCheckpointIO)
    assert list(tmp_path.glob("checkpoints/*.ckpt"))
