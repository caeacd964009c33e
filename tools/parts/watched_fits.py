"""Part of `kill_fit.py`: small fits in processes of their own, which note their events and are killed at a moment."""

import hashlib
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from moe_beyond.callbacks import ExportBest
from moe_beyond.datamodules import TraceDataModule
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.io.folder import read_predictor
from moe_beyond.tasks import CrossLayerTask, EamcTask, PredictorTask, RowEncoderTask, TokenCausalTask
from moe_beyond.tasks.checkpoint_io import WholeCheckpointIO

CAUSAL: dict[str, Any] = {"width": 16, "heads": 2, "depth": 1, "window": 8}
CROSS_LAYER = {**CAUSAL, "layer_width": 16}
EVENTS = (
    "on_train_epoch_start", "on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end",
    "on_validation_start", "on_validation_batch_end", "on_validation_end", "on_train_epoch_end",
)  # fmt: skip
CHANGES = ("os.mkdir", "os.chmod", "os.rename", "os.rmdir", "os.remove")
"""Audit events of a save; a kill hits a save before one of them, or in the middle of writing."""
OTHER_DISK = Path("/dev/shm")
"""Another file system for temporary files, if there is one."""


@dataclass(frozen=True)
class Configuration:
    """A kind of fit."""

    trainer: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    task: type[PredictorTask] = CrossLayerTask
    model: dict[str, Any] = field(default_factory=lambda: CROSS_LAYER)
    saving: dict[str, Any] = field(default_factory=lambda: {"every_n_train_steps": 1})
    ranks: int = 1


CONFIGURATIONS = {
    "a checkpoint per step": Configuration(),
    "a checkpoint per epoch": Configuration(saving={}),
    "accumulating 3": Configuration({"accumulate_grad_batches": 3}),
    "two validations per epoch": Configuration({"val_check_interval": 0.5}),
    "a validation in two epochs": Configuration({"check_val_every_n_epoch": 2, "max_epochs": 4}),
    "max_steps within an epoch": Configuration({"max_steps": 13, "max_epochs": -1}),
    "half of each epoch, accumulating 2": Configuration({"limit_train_batches": 0.5, "accumulate_grad_batches": 2}),
    "bf16-mixed": Configuration({"precision": "bf16-mixed"}),
    "two workers": Configuration(data={"num_workers": 2}),
    "two ranks": Configuration({"devices": 2, "strategy": "ddp"}, ranks=2),
    "two ranks, accumulating 3": Configuration(
        {"devices": 2, "strategy": "ddp", "accumulate_grad_batches": 3, "max_epochs": 4}, ranks=2
    ),
    "token_causal": Configuration(task=TokenCausalTask, model=CAUSAL),
    "row_encoder": Configuration(task=RowEncoderTask, model={"width": 16, "heads": 2, "depth": 1}),
    "eamc, which counts": Configuration({"max_epochs": 1, "gradient_clip_val": None}, task=EamcTask, model={}),
}


@dataclass(frozen=True)
class Kill:
    """The moment of a kill.

    Attributes:
        event: Number of the event; None for another kind of moment.
        save: Number of the checkpoint in whose saving it falls; None for another kind.
        place: Place within that saving: before a change of the file system, or -1 for the middle of writing.
        seconds: Seconds after the start; None for another kind.
    """

    event: int | None = None
    save: int | None = None
    place: int = -1
    seconds: float | None = None


@dataclass
class Notes:
    """The doings of a rank in one process.

    Attributes:
        events: Names of the events.
        rates: Learning rate of each step.
        recalls: Recall of each validation, by step.
        losses: Loss of each batch, by epoch and batch.
        batches: Hash and number of entries of each batch, by epoch and batch.
        saves: Number of checkpoints that were saved.
    """

    events: list[str] = field(default_factory=list)
    rates: dict[int, float] = field(default_factory=dict)
    recalls: dict[int, float] = field(default_factory=dict)
    losses: dict[tuple[int, int], float] = field(default_factory=dict)
    batches: dict[tuple[int, int], tuple[str, int]] = field(default_factory=dict)
    saves: int = 0


class Write(L.Callback):
    """Notes batches and figures, before the callbacks that save checkpoints."""

    def __init__(self, kill: Kill | None, notes: Notes) -> None:
        self._killed, self._notes = kill is not None, notes

    def event(self, name: str, trainer: L.Trainer, arguments: tuple[Any, ...]) -> None:
        """Note the batch or the figure of an event."""
        notes = self._notes
        if name.startswith("on_train_batch"):
            *given, batch, index = arguments[:2] if name == "on_train_batch_start" else arguments[:3]
            place = trainer.current_epoch, int(index)
            if given:
                loss = given[0].get("loss") if isinstance(given[0], dict) else given[0]
                notes.losses[place] = 0.0 if loss is None else float(loss)
            else:
                notes.batches[place] = identity(batch)
                for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups[:1]):
                    notes.rates[trainer.global_step] = group["lr"]  # a counting predictor has no group
        if name == "on_validation_end":
            notes.recalls[trainer.global_step] = float(trainer.callback_metrics["val/recall_at_k"])
        if self._killed:  # written before the kill, as the process writes no result
            save_whole(vars(notes), Path(trainer.default_root_dir) / f"notes-{trainer.global_rank}.pt")


def save_whole(content: object, path: Path) -> None:
    """Write a file that a kill leaves whole or absent."""
    torch.save(content, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


class Watch(L.Callback):
    """Counts the events of a fit, after all other callbacks, and kills its process at one of them."""

    def __init__(self, kill: Kill | None, notes: Notes) -> None:
        self._kill, self._notes = kill or Kill(), notes

    def event(self, name: str, trainer: L.Trainer, arguments: tuple[Any, ...]) -> None:
        """Count an event."""
        self._notes.events.append(name)
        if len(self._notes.events) - 1 == self._kill.event:
            die()


for _event in EVENTS:
    for _callback in (Write, Watch):
        setattr(
            _callback,
            _event,
            lambda self, trainer, _module, *given, _name=_event, **__: self.event(_name, trainer, given),
        )


class WatchedCheckpointIO(WholeCheckpointIO):
    """Saves checkpoints as fits do, and kills the process within one of them."""

    def __init__(self, kill: Kill | None, notes: Notes) -> None:
        super().__init__()
        self._kill, self._notes = kill or Kill(), notes

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save a checkpoint, or a part of it."""
        self._notes.saves += 1
        if self._notes.saves - 1 == self._kill.save:
            if self._kill.place < 0:
                torch.save = write_half
            else:
                kill_before_change(self._kill.place)
        super().save_checkpoint(checkpoint, path, storage_options)
        if self._notes.saves - 1 == self._kill.save:  # it had fewer changes
            die()


def write_half(checkpoint: object, file: Any) -> None:
    """Write a part of a checkpoint, and end the process."""
    file.write(b"half")
    file.flush()
    die()


def kill_before_change(place: int) -> None:
    """End this process before the n-th change of the file system from now on."""
    numbers = iter(range(place))

    def hook(event: str, _: object) -> None:
        if event in CHANGES and next(numbers, None) is None:
            die()

    sys.addaudithook(hook)


def die() -> None:
    """End this process as ``kill -9`` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def identity(batch: Batch) -> tuple[str, int]:
    """Return a hash of a batch, and its number of entries."""
    content = hashlib.sha256(repr((batch.sequence_ids, batch.starts, batch.lengths.tolist())).encode())
    content.update(batch.token_ids.numpy().tobytes() + batch.experts.numpy().tobytes())
    return content.hexdigest(), int(batch.lengths.sum()) * batch.experts.shape[2]


def fit(chosen: Configuration, traces: Path, folder: Path, kill: Kill | None, resume: Path | None) -> None:
    """Fit in this process and write ``result-RANK.pt``; a resumed fit gets another seed, which must not matter."""
    L.seed_everything(1 if resume else 0, verbose=False)
    warnings.simplefilter("ignore")
    data = TraceDataModule(str(traces), **{"token_budget": 64, "max_tokens": 16, "window": 1, **chosen.data})
    task = chosen.task(data.geometry.to_json(), data.vocab_size, **chosen.model)  # type: ignore[call-arg, arg-type]
    notes = Notes()
    trainer = L.Trainer(
        default_root_dir=folder, accelerator="cpu", num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, logger=CSVLogger(folder, name="run"),
        plugins=[WatchedCheckpointIO(kill, notes)],
        callbacks=[
            Write(kill, notes),
            ModelCheckpoint(monitor="val/recall_at_k", mode="max", filename="{epoch}-{step}"),
            ModelCheckpoint(filename="last", enable_version_counter=False, **chosen.saving),
            ExportBest(),
        ],
        **{"max_epochs": 3, "gradient_clip_val": 1.0, **chosen.trainer},
    )  # fmt: skip
    trainer.callbacks.append(Watch(kill, notes))  # type: ignore[attr-defined]
    trainer.fit(task, data, ckpt_path=resume)
    result = {"notes": vars(notes), "planned": task.planned_steps, "steps": trainer.global_step}
    if trainer.is_global_zero:
        exported = read_predictor(folder / "run/version_0/predictor").state_dict()
        result |= {"weights": task.state_dict(), "exported": exported}
    save_whole(result, folder / f"result-{trainer.global_rank}.pt")


def in_processes(ranks: int, temporary: Path, work: Callable[[], None], seconds: float | None, one: bool) -> bool:
    """Run one process per rank; return whether all ended without a kill.

    Args:
        ranks: Number of ranks.
        temporary: Folder for their temporary files.
        work: Function to run in each.
        seconds: Seconds after which they are killed; None kills none.
        one: Whether this kill hits one rank, and the others when that one is dead, as torchrun does.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = {_start(rank, ranks, port, temporary, work) for rank in range(ranks)}
    began, whole = time.monotonic(), True
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in running:
            running.discard(child)
            whole &= status == 0
        if not whole:
            kill_all(running)
        elif seconds is not None and time.monotonic() - began > seconds:
            kill_all(set(sorted(running)[: 1 if one else None]))
        if child == 0:
            time.sleep(0.002)
    return whole


def kill_all(processes: set[int]) -> None:
    """Kill processes, of which some may be dead."""
    for process in processes:
        os.kill(process, signal.SIGKILL)


def _start(rank: int, ranks: int, port: int, temporary: Path, work: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
        if ranks > 1:
            os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        work()
        code = 0
    except Exception:  # its peers may have been killed
        traceback.print_exc()
    finally:
        os._exit(code)


def choose_kill(expected: list[str], saves: int, duration: float, chance: random.Random) -> Kill:
    """Choose a moment: an event, often at the end of an epoch; a place within a save; or a time.

    Args:
        expected: Events of an undisturbed fit.
        saves: Number of its checkpoints.
        duration: Duration of an undisturbed fit in seconds.
        chance: Generator of random numbers.
    """
    kind = chance.choice(("event", "end", "save", "time"))
    if kind == "save":
        return Kill(save=chance.randrange(saves), place=chance.randrange(-1, len(CHANGES)))
    if kind == "time":
        return Kill(seconds=chance.uniform(0, duration))
    ends = [at for at, event in enumerate(expected) if "validation" in event or "epoch" in event]
    ends += [at for at, event in enumerate(expected[:-1]) if event == "on_train_batch_end" and at + 1 in ends]
    return Kill(event=chance.choice(ends) if kind == "end" else chance.randrange(len(expected)))
