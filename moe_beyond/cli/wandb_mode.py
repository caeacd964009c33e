"""Weights & Biases around a Lightning verb: whether it runs, where its run goes, its name, and that the run ends."""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from moe_beyond.datamodules import TraceDataModule
from moe_beyond.errors import UserError, unknown
from moe_beyond.fields import brief
from moe_beyond.tasks import PredictorTask

MODE = "WANDB_MODE"
WITHOUT_SERVER = ("offline", "dryrun")
MODES = ("online", "offline", "disabled", "shared", "run", "dryrun")


LONGEST_TAG = 64


def settle_wandb(trainer: L.Trainer, verb: str, configured: Any, task: PredictorTask, data: TraceDataModule) -> None:
    """Decide where the runs of a trainer's `WandbLogger` go, without ever asking on the terminal.

    ``WANDB_MODE`` or the logger's own mode says it, if set: ``online``, ``offline``, or ``disabled``, which leaves the
    logger out. Else runs go to the server where somebody is logged in, and into a folder where not. `predict` has no
    figures to log, so it makes no run. Without a logger of wandb nothing happens, and wandb is not even imported.

    Args:
        trainer: Not running yet.
        verb: What it will do.
        configured: What the configuration says of its loggers.
        task: The task that runs, for the run's name and tags, unless the user gives them.
        data: The same of the traces.

    Raises:
        UserError: A server is asked for and nobody is logged in, the mode is not one, or the configuration, which is
            kept with the run, holds a key.
    """
    others = [logger for logger in trainer.loggers if not isinstance(logger, WandbLogger)]
    if len(others) == len(trainer.loggers):
        return
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):  # wandb warns of this setting, whatever its value
            logger._wandb_init.pop("anonymous", None)  # noqa: SLF001
    mode = os.environ.get(MODE)
    if mode is not None and mode not in MODES:
        raise unknown(MODE, mode, MODES)
    for arguments in _arguments(configured):
        if (arguments.get("settings") or {}).get("api_key"):
            raise UserError("a configuration is kept with its run, so it cannot hold an api_key; set WANDB_API_KEY")
        if mode != "disabled":
            mode = "offline" if arguments.get("offline") else arguments.get("mode") or mode
    if mode == "disabled" or verb == "predict":
        trainer.loggers = others
    elif rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        os.environ.setdefault("WANDB_JOB_TYPE", verb)
        os.environ.setdefault("WANDB_NAME", run_name(trainer, verb, task, data))
        os.environ.setdefault("WANDB_TAGS", ",".join(run_tags(task, data)))
        os.environ.setdefault("WANDB_GIT_ROOT", os.getcwd())  # it would look where the logger saves
        if mode in WITHOUT_SERVER or logged_in():
            return
        if mode is not None:
            raise UserError(
                f"wandb is to run {mode}, but nobody is logged in: run `wandb login`, or set WANDB_API_KEY, or set "
                f"{MODE}=offline"
            )
        os.environ |= {MODE: "offline", "WANDB_QUIET": "true"}  # nobody asked for it


def run_name(trainer: L.Trainer, verb: str, task: PredictorTask, data: TraceDataModule) -> str:
    """Name a run by its architecture, its trace set and the version of its folder: ``cross_layer-puffin-v3``."""
    versions = [logger.version for logger in trainer.loggers if not isinstance(logger, WandbLogger)]
    version = [f"v{text}" if isinstance(text, int) else str(text) for text in versions[:1] if text not in (None, "")]
    traces = re.split(r"[/:]+", data.traces.folder.rstrip("/"))[-1]
    parts = [] if verb == "fit" else [verb]
    return "-".join([*parts, task.predictor.architecture, traces, *version])


def run_tags(task: PredictorTask, data: TraceDataModule) -> list[str]:
    """Tag a run with its architecture, the model it predicts, and the source of its traces."""
    words = (task.predictor.architecture, data.geometry.model, data.manifest.source)
    return [" ".join(word.replace(",", " ").split())[:LONGEST_TAG] for word in words if word.strip()]


def _arguments(configured: Any) -> list[dict[str, Any]]:
    """Return the arguments of each `WandbLogger` among one or several loggers of a configuration."""
    several = configured if isinstance(configured, list) else [configured]
    named = [one.as_dict() for one in several if isinstance(one, Namespace)]
    return [one["init_args"] for one in named if one["class_path"].endswith(WandbLogger.__name__)]


def logged_in() -> bool:
    """Tell whether wandb has credentials for its server; it is not asked whether they are right."""
    import wandb

    silent = os.environ.get("WANDB_SILENT")
    os.environ["WANDB_SILENT"] = "true"
    try:
        return wandb.login(prompt=False, verify=False)
    finally:
        wandb.teardown()  # it looks at its environment once; the run is to look again
        del os.environ["WANDB_SILENT"]
        if silent is not None:
            os.environ["WANDB_SILENT"] = silent


@contextmanager
def finishing_wandb() -> Iterator[None]:
    """End the run that the block starts, if any, as failed where the block fails; leave the environment as it was.

    Raises:
        UserError: wandb refused something, or could not be reached.
    """
    before = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
    try:
        yield
    except BaseException as error:
        _finish(1)
        wandb = sys.modules.get("wandb")
        if wandb is not None and isinstance(error, wandb.Error):
            raise UserError(f"wandb: {brief(error).rstrip('.')}; {MODE}=offline does without its server") from error
        raise
    else:
        _finish(0)
    finally:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            del os.environ[name]
        os.environ.update(before)


def discard_offline_run() -> None:
    """End the run that a failed verb started before it did anything, and delete its files where no server has it."""
    wandb = sys.modules.get("wandb")
    run = None if wandb is None else wandb.run
    if run is None or not run.offline:
        return
    folder = Path(run.dir).parent
    _finish(1)
    shutil.rmtree(folder, ignore_errors=True)
    for link in folder.parent.iterdir():
        if link.is_symlink() and not link.exists():
            link.unlink()
    if not any(folder.parent.iterdir()):
        folder.parent.rmdir()


def _finish(exit_code: int) -> None:
    wandb = sys.modules.get("wandb")
    if wandb is not None:
        wandb.finish(exit_code)
        wandb.teardown()
