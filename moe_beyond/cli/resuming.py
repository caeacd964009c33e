"""``moe-beyond fit --resume RUN``, and the last lines of an interrupted fit."""

import pickle
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import ArgumentParser

from moe_beyond.callbacks.export import ExportBest
from moe_beyond.callbacks.interrupt import SaveOnInterrupt
from moe_beyond.cli.main import is_interrupt
from moe_beyond.errors import UserError
from moe_beyond.messages import notify
from moe_beyond.predictors.io.checkpoint import CHECKPOINT_KEY
from moe_beyond.run_folder import CHECKPOINTS_FOLDER, PREDICTOR_FOLDER, RUN_CONFIG_FILE, checkpoints_of, run_of
from moe_beyond.tasks.resuming import RESUME_KEY, Progress
from moe_beyond.unfinished import remove_leftovers

OPTION = "--resume"
LIGHTNING_KEYWORDS = ("last", "best", "hpc", "registry")
"""Keywords of Lightning for checkpoints of the run that is about to start, which has none."""


def add_resume(parser: ArgumentParser) -> None:
    """Add ``--resume RUN``, which `with_resume` replaces before anything is parsed."""
    parser.add_argument(
        OPTION,
        metavar="RUN",
        help="fit only: run to resume, as a folder or one of its checkpoints; other options override its config.yaml",
    )


def with_resume(argv: Sequence[str]) -> list[str]:
    """Replace ``--resume RUN`` by the run's configuration and its newest checkpoint.

    Args:
        argv: The command and its options.

    Returns:
        Arguments that read the configuration with ``-c``, and so with its checks.

    Raises:
        UserError: There is no such run, it has no checkpoint to resume from, or the options contradict each other.
    """
    kept, runs, remaining = list[str](), list[str](), iter(argv)
    for argument in remaining:
        option, equals, value = argument.partition("=")
        if option != OPTION:
            kept.append(argument)
            continue
        run = value if equals else next(remaining, "")
        if not run or run.startswith("-"):
            raise UserError(f"{OPTION} needs a run; name its folder, as {OPTION} runs/predictor/version_0")
        runs.append(run)
    if not runs:
        return kept
    if kept[0] != "fit":
        raise UserError(f"{kept[0]} has no {OPTION}; give --ckpt_path FILE")
    if len(runs) > 1:
        raise UserError(f"{OPTION} is given {len(runs)} times; name one run")
    if any(argument.partition("=")[0] == "--ckpt_path" for argument in kept):
        raise UserError(f"{OPTION} and --ckpt_path both name a checkpoint; give one of them")
    config, checkpoint = find_run(runs[0])
    return ["fit", "-c", str(config), f"--ckpt_path={checkpoint}", *kept[1:]]


def find_run(name: str) -> tuple[Path, Path]:
    """Find the configuration of a run, and the checkpoint to resume from; remove what a killed fit left in its folder.

    Args:
        name: Folder of the run, for its newest checkpoint; or a checkpoint.

    Raises:
        UserError: There is no such run, or it has no checkpoint to resume from.
    """
    path = Path(name)
    if not path.exists():
        raise UserError(f"{name}: run not found; name its folder, as runs/predictor/version_0, or a checkpoint of it")
    folder = path if path.is_dir() else run_of(path)
    config = folder / RUN_CONFIG_FILE
    if not config.exists():
        raise UserError(f"{name}: has no {RUN_CONFIG_FILE}; give the configs of the fit with -c, and --ckpt_path FILE")
    for each in (folder, folder / CHECKPOINTS_FOLDER):
        remove_leftovers(each)
    if not path.is_dir():
        return config, path
    return config, newest_checkpoint(folder)


def newest_checkpoint(folder: Path) -> Path:
    """Return the checkpoint of a run with the most progress, among those that a fit can resume from.

    Raises:
        UserError: There is no such checkpoint.
    """
    orders = [(_order(path), path) for path in checkpoints_of(folder)]
    resumable = [(order, path.stat().st_mtime, path) for order, path in orders if order is not None]
    if not resumable:
        raise UserError(f"{folder}: has no checkpoint that a fit can resume from; fit again")
    return max(resumable)[2]


def check_unfinished(path: Path, trainer: L.Trainer) -> None:
    """Refuse to resume a fit that is finished.

    Args:
        path: Checkpoint to resume from.
        trainer: Trainer of the fit that is about to start.

    Raises:
        UserError: All epochs or steps are made, and `ExportBest` has written its predictor.
    """
    progress = _progress(path)
    if progress is None or (progress.due and not progress.validated):
        return
    exports = any(isinstance(callback, ExportBest) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    if exports and not (run_of(path) / PREDICTOR_FOLDER).exists():
        return
    epochs = progress.epoch + (progress.whole and progress.batches > 0)
    limits = {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps}
    for (option, limit), done in zip(limits.items(), (epochs, progress.steps), strict=True):
        if limit is not None and 0 < limit <= done:
            unit = option.removeprefix("max_")
            raise UserError(
                f"{path}: the fit is finished ({unit} {done} of {limit}); give --trainer.{option} M to go on"
            )


def _order(path: Path) -> tuple[int, int, bool] | None:
    """Return steps, epochs and whether the last validation has run; None if a fit cannot resume from a checkpoint."""
    progress = _progress(path)
    return None if progress is None else (progress.steps, progress.epoch, progress.validated)


def _progress(path: Path) -> Progress | None:
    """Return the progress of a checkpoint's fit; None if a fit cannot resume from it."""
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        progress = Progress(**checkpoint[CHECKPOINT_KEY][RESUME_KEY]["progress"])
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError, KeyError, TypeError):
        notify(f"moe-beyond: warning: {path}: cannot be resumed; skipped")
        return None
    return progress if "optimizer_states" in checkpoint else None


def check_names_a_file(command: str, path: str) -> None:
    """Refuse Lightning's keywords for checkpoints.

    Args:
        command: Command that reads the checkpoint.
        path: Value of ``--ckpt_path``.

    Raises:
        UserError: ``path`` is such a keyword.
    """
    if path.partition(":")[0] in LIGHTNING_KEYWORDS and not Path(path).exists():
        hint = "give one, as runs/predictor/version_0/checkpoints/last.ckpt"
        if command == "fit":
            hint = "moe-beyond fit --resume RUN goes on with the newest checkpoint of a run"
        raise UserError(f"--ckpt_path {path}: names no file; {hint}")


class Stopped(SystemExit):
    """End of an interrupted fit, with lines to print after the last output of the loggers.

    Args:
        code: Exit code of the process.
        lines: Folder of the run, and the command that resumes it.
    """

    def __init__(self, code: int, lines: Sequence[str]) -> None:
        super().__init__(code)
        self.lines = lines


@contextmanager
def printing_how_to_resume(trainer: L.Trainer) -> Iterator[None]:
    """Save a checkpoint if the fit inside is interrupted, and name the run's folder and the command that resumes it.

    Args:
        trainer: Trainer of the fit that is about to start.

    Raises:
        Stopped: The fit was interrupted; the code is 130 for Ctrl-C and 143 for SIGTERM.
    """
    interrupt = SaveOnInterrupt()
    trainer.callbacks.append(interrupt)  # type: ignore[attr-defined]
    try:
        yield
    except BaseException as error:
        if interrupt.signal is None and not is_interrupt(error):
            raise
        lines = _last_lines(interrupt) if trainer.is_global_zero else []
        raise Stopped(128 + (interrupt.signal or signal.SIGINT), lines) from None


@contextmanager
def printing_last_lines() -> Iterator[None]:
    """Print the last lines of an interrupted fit on standard error, after everything else has ended."""
    try:
        yield
    except Stopped as stopped:
        for line in stopped.lines:
            print(line, file=sys.stderr)
        raise


def _last_lines(interrupt: SaveOnInterrupt) -> list[str]:
    folder = interrupt.folder
    if folder is None:
        return ["moe-beyond: interrupted before the first step; run the same command again"]
    lines = [f"moe-beyond: interrupted; the run is in {folder}"]
    if (folder / RUN_CONFIG_FILE).exists() and checkpoints_of(folder):
        return [*lines, f"go on with: moe-beyond fit {OPTION} {shlex.quote(str(folder))}"]
    if interrupt.saved is not None:
        return [*lines, f"go on with the same command and --ckpt_path {shlex.quote(str(interrupt.saved))}"]
    return [*lines, "it has no checkpoint to resume from; run the same command again"]
