"""Weights & Biases for a Lightning command: mode, name and tags of its run, and the end of the run."""

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
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_only

from moe_beyond.datamodules import TraceDataModule
from moe_beyond.errors import UserError, unknown
from moe_beyond.safe_text import brief
from moe_beyond.tasks import PredictorTask
from moe_beyond.urls import without_secrets

MODE = "WANDB_MODE"
WITHOUT_SERVER = ("offline", "dryrun")
MODES = ("online", "offline", "disabled", "shared", "run", "dryrun")
MAX_TAG_LENGTH = 64
SERVER_SETTINGS = (
    "base_url", "http_proxy", "https_proxy", "x_proxies", "x_extra_http_headers", "insecure_disable_ssl",
    "identity_token_file", "credentials_file",
)  # fmt: skip
"""Settings of wandb with which a stranger's configuration could receive the user's key."""


def set_wandb_mode(
    trainer: L.Trainer, command: str, configured: Any, task: PredictorTask, data: TraceDataModule
) -> None:
    """Choose the mode of a trainer's `WandbLogger` without a question on the terminal.

    ``WANDB_MODE`` or the logger's own mode decides, if set: ``online``, ``offline``, or ``disabled``, which removes the
    logger. Otherwise runs go to the server if the user is logged in, and into a folder if not. `predict` logs no
    metrics, so it makes no run. Without a `WandbLogger` this does nothing, and wandb is not imported.

    Args:
        trainer: Trainer that is not running yet.
        command: Command that is about to run.
        configured: Loggers in the configuration: one or a list.
        task: Task that runs, for the run's default name and tags.
        data: Data module, likewise.

    Raises:
        UserError: The mode needs a server and the user is not logged in; the mode is unknown; or the configuration,
            which is stored with the run, contains a key.
    """
    others = [logger for logger in trainer.loggers if not isinstance(logger, WandbLogger)]
    if len(others) == len(trainer.loggers):
        return
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):  # wandb warns about this setting, whatever its value
            logger._wandb_init.pop("anonymous", None)  # noqa: SLF001
    mode = os.environ.get(MODE)
    if mode is not None and mode not in MODES:
        raise unknown(MODE, mode, MODES)
    for arguments in _arguments(configured):
        settings = arguments.get("settings") or {}
        if settings.get("api_key"):
            raise UserError(
                "a configuration is stored with its run, so it must not contain an api_key; set WANDB_API_KEY"
            )
        if moved := [name for name in SERVER_SETTINGS if settings.get(name)]:
            raise UserError(
                f"WandbLogger: settings.{moved[0]} would send your key elsewhere; use an environment variable of wandb"
            )
        if mode != "disabled":
            mode = "offline" if arguments.get("offline") else arguments.get("mode") or mode
    if mode == "disabled" or command == "predict":
        trainer.loggers = others
        return
    _hide_secrets_of_arguments(trainer)
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        os.environ.setdefault("WANDB_JOB_TYPE", command)
        os.environ.setdefault("WANDB_NAME", run_name(trainer, command, task, data))
        os.environ.setdefault("WANDB_TAGS", ",".join(run_tags(task, data)))
        os.environ.setdefault("WANDB_GIT_ROOT", os.getcwd())  # otherwise wandb searches the logger's folder
        if mode in WITHOUT_SERVER or logged_in():
            return
        if mode is not None:
            raise UserError(
                f"wandb: mode {mode} needs a login; run `wandb login`, or set WANDB_API_KEY, or set {MODE}=offline"
            )
        os.environ |= {MODE: "offline", "WANDB_QUIET": "true"}  # the user chose no mode


def _hide_secrets_of_arguments(trainer: L.Trainer) -> None:
    """Remove the secrets of URLs from the arguments of this process, which wandb stores.

    Raises:
        UserError: Lightning is about to start further processes with these arguments.
    """
    clean = [without_secrets(argument) for argument in sys.argv]
    if clean != sys.argv and isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
        raise UserError(
            "wandb stores the arguments of the process, and a URL among them has a password; start the processes with "
            f"torchrun, or set {MODE}=disabled"
        )
    sys.argv[:] = clean


def run_name(trainer: L.Trainer, command: str, task: PredictorTask, data: TraceDataModule) -> str:
    """Return the name of a run from its architecture, trace set and folder version: ``cross_layer-puffin-v3``."""
    versions = [logger.version for logger in trainer.loggers if not isinstance(logger, WandbLogger)]
    version = [f"v{text}" if isinstance(text, int) else str(text) for text in versions[:1] if text not in (None, "")]
    traces = re.split(r"[/:]+", data.traces.folder.rstrip("/"))[-1]
    parts = [] if command == "fit" else [command]
    return "-".join([*parts, task.predictor.architecture, traces, *version])


def run_tags(task: PredictorTask, data: TraceDataModule) -> list[str]:
    """Return the tags of a run: its architecture, the model it predicts, and the source of its traces."""
    tags = (task.predictor.architecture, data.geometry.model, data.manifest.source)
    return [" ".join(tag.replace(",", " ").split())[:MAX_TAG_LENGTH] for tag in tags if tag.strip()]


def _arguments(configured: Any) -> list[dict[str, Any]]:
    """Return the arguments of each `WandbLogger` among the loggers of a configuration: one or a list."""
    loggers = configured if isinstance(configured, list) else [configured]
    entries = [logger.as_dict() for logger in loggers if isinstance(logger, Namespace)]
    loggers = [entry for entry in entries if entry["class_path"].endswith(WandbLogger.__name__)]
    return [(entry.get("init_args") or {}) | (entry.get("dict_kwargs") or {}) for entry in loggers]


def logged_in() -> bool:
    """Return whether wandb has credentials for its server; they are not verified."""
    import wandb

    silent = os.environ.get("WANDB_SILENT")
    os.environ["WANDB_SILENT"] = "true"
    try:
        return wandb.login(prompt=False, verify=False)
    finally:
        wandb.teardown()  # wandb reads its environment once; the run has to read it again
        del os.environ["WANDB_SILENT"]
        if silent is not None:
            os.environ["WANDB_SILENT"] = silent


@contextmanager
def finishing_wandb() -> Iterator[None]:
    """End the run that the block starts, if any, as failed if the block fails; restore the environment.

    Raises:
        UserError: wandb refused something, or its server was unreachable.
    """
    before = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
    try:
        yield
    except BaseException as error:
        _finish(1)
        wandb = sys.modules.get("wandb")
        if wandb is not None and isinstance(error, wandb.Error):
            raise UserError(f"wandb: {brief(error).rstrip('.')}; {MODE}=offline needs no server") from error
        raise
    else:
        _finish(0)
    finally:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            del os.environ[name]
        os.environ.update(before)


def discard_offline_run() -> None:
    """End the run of a command that failed before its first step; delete its files if it is offline."""
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
