"""``moe-beyond fit --resume RUN``, and what an interrupted fit says."""

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
from moe_beyond.predictors.io.checkpoint import CHECKPOINT_KEY
from moe_beyond.run_folder import PREDICTOR_FOLDER, RUN_CONFIG_FILE, checkpoints_of, run_of
from moe_beyond.tasks.resuming import RESUME_KEY, Progress

OPTION = "--resume"
NO_FILES = ("last", "best", "hpc", "registry")
"""Words by which Lightning looks for a checkpoint of the run that is about to start, which has none."""


def add_resume(parser: ArgumentParser) -> None:
    """Add ``--resume RUN``, which `with_resume` replaces before anything is parsed."""
    parser.add_argument(
        OPTION,
        metavar="RUN",
        help="of fit only: go on with a run that was stopped: its folder, or one of its checkpoints; other options "
        "override its config.yaml",
    )


def with_resume(words: Sequence[str]) -> list[str]:
    """Replace ``--resume RUN`` by the run's configuration and its newest checkpoint.

    The configuration is read as ``-c`` reads it, with the same checks.

    Args:
        words: The verb and its options.

    Raises:
        UserError: There is no such run, it has no checkpoint to go on from, or the options contradict each other.
    """
    kept, runs, rest = list[str](), list[str](), iter(words)
    for word in rest:
        option, joined, value = word.partition("=")
        if option != OPTION:
            kept.append(word)
            continue
        run = value if joined else next(rest, "")
        if not run or run.startswith("-"):
            raise UserError(f"{OPTION} needs a run; name its folder, as {OPTION} runs/predictor/version_0")
        runs.append(run)
    if not runs:
        return kept
    if kept[0] != "fit":
        raise UserError(f"{kept[0]} has no {OPTION}; give --ckpt_path FILE")
    if len(runs) > 1:
        raise UserError(f"{OPTION} is given {len(runs)} times; name one run")
    if any(word.partition("=")[0] == "--ckpt_path" for word in kept):
        raise UserError(f"{OPTION} and --ckpt_path both name a checkpoint; give one of them")
    config, checkpoint = find_run(runs[0])
    return ["fit", "-c", str(config), f"--ckpt_path={checkpoint}", *kept[1:]]


def find_run(name: str) -> tuple[Path, Path]:
    """Return the configuration of a run, and the checkpoint to go on from.

    Args:
        name: The run's folder, which gives its newest checkpoint, or a checkpoint.

    Raises:
        UserError: There is no such run, or nothing in it to go on from.
    """
    place = Path(name)
    if not place.exists():
        raise UserError(f"{name}: run not found; name its folder, as runs/predictor/version_0, or a checkpoint of it")
    folder = place if place.is_dir() else run_of(place)
    config = folder / RUN_CONFIG_FILE
    if not config.exists():
        raise UserError(f"{name}: has no {RUN_CONFIG_FILE}; give the configs of the fit with -c, and --ckpt_path FILE")
    if not place.is_dir():
        return config, place
    return config, newest_checkpoint(folder)


def newest_checkpoint(folder: Path) -> Path:
    """Return the checkpoint of a run that is furthest, of those that a fit can go on from.

    Raises:
        UserError: There is none.
    """
    progress = [(_how_far(path), path) for path in checkpoints_of(folder)]
    resumable = [(far, path.stat().st_mtime, path) for far, path in progress if far is not None]
    if not resumable:
        raise UserError(f"{folder}: holds no checkpoint that a fit can go on from; fit again")
    return max(resumable)[2]


def check_unfinished(path: Path, trainer: L.Trainer) -> None:
    """Refuse to go on with a fit of which nothing is left to do.

    Args:
        path: Checkpoint to go on from.
        trainer: About to fit.

    Raises:
        UserError: All epochs or steps are made, and what `ExportBest` writes at the end of a fit is written.
    """
    progress = _progress(path)
    if progress is None or (progress.due and not progress.validated):
        return
    exports = any(isinstance(callback, ExportBest) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    if exports and not (run_of(path) / PREDICTOR_FOLDER).exists():
        return
    epochs = progress.epoch + (progress.whole and progress.batches > 0)
    limits = {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps}
    for (option, most), made in zip(limits.items(), (epochs, progress.steps), strict=True):
        if most is not None and 0 < most <= made:
            what = option.removeprefix("max_")
            raise UserError(
                f"{path}: the fit is finished ({what} {made} of {most}); give --trainer.{option} M to go on"
            )


def _how_far(path: Path) -> tuple[int, int, bool] | None:
    """Return steps, epochs and whether the last validation has run; None where a fit cannot go on from there."""
    progress = _progress(path)
    return None if progress is None else (progress.steps, progress.epoch, progress.validated)


def _progress(path: Path) -> Progress | None:
    """Return how far a checkpoint's fit is; None where a fit cannot go on from there."""
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        progress = Progress(**checkpoint[CHECKPOINT_KEY][RESUME_KEY]["progress"])
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError, KeyError, TypeError):
        print(f"moe-beyond: warning: {path}: cannot be resumed; skipped", file=sys.stderr)
        return None
    return progress if "optimizer_states" in checkpoint else None


def check_names_a_file(verb: str, path: str) -> None:
    """Refuse Lightning's words for checkpoints.

    Raises:
        UserError: ``path`` is one of them.
    """
    if path.partition(":")[0] in NO_FILES and not Path(path).exists():
        what = "moe-beyond fit --resume RUN goes on with the newest checkpoint of a run"
        raise UserError(
            f"--ckpt_path {path}: names no file; "
            + (what if verb == "fit" else "give one, as runs/predictor/version_0/checkpoints/last.ckpt")
        )


class Stopped(SystemExit):
    """The end of an interrupted fit, with what to print last, after what loggers print when they finish.

    Args:
        code: Exit code.
        lines: Where the run is and how to go on.
    """

    def __init__(self, code: int, lines: Sequence[str]) -> None:
        super().__init__(code)
        self.lines = lines


@contextmanager
def saying_how_to_resume(trainer: L.Trainer) -> Iterator[None]:
    """Let a fit be interrupted at any time: it saves a checkpoint, and says where the run is and how to go on.

    Args:
        trainer: About to fit.

    Raises:
        Stopped: It was interrupted; the code is 130 for Ctrl-C and 143 for SIGTERM.
    """
    interrupt = SaveOnInterrupt()
    trainer.callbacks.append(interrupt)  # type: ignore[attr-defined]
    try:
        yield
    except BaseException as error:
        if interrupt.signal is None and not is_interrupt(error):
            raise
        lines = _last_words(interrupt) if trainer.is_global_zero else []
        raise Stopped(128 + (interrupt.signal or signal.SIGINT), lines) from None


@contextmanager
def printing_last_words() -> Iterator[None]:
    """Print on standard error what an interrupted fit has to say, once everything else has ended."""
    try:
        yield
    except Stopped as stopped:
        for line in stopped.lines:
            print(line, file=sys.stderr)
        raise


def _last_words(interrupt: SaveOnInterrupt) -> list[str]:
    folder = interrupt.folder
    if folder is None:
        return ["moe-beyond: interrupted before the first step; nothing is lost"]
    lines = [f"moe-beyond: interrupted; the run is in {folder}"]
    if (folder / RUN_CONFIG_FILE).exists() and checkpoints_of(folder):
        return [*lines, f"go on with: moe-beyond fit {OPTION} {shlex.quote(str(folder))}"]
    if interrupt.saved is not None:
        return [*lines, f"go on with the same command and --ckpt_path {shlex.quote(str(interrupt.saved))}"]
    return [*lines, "it holds no checkpoint to go on from"]
