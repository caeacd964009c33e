"""What a `WandbLogger` is told besides figures: where a run comes from, tables and curves, what it leaves behind."""

import re
import subprocess
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn

from moe_beyond.callbacks.cache_replay import CacheReplay
from moe_beyond.callbacks.export import ExportBest
from moe_beyond.datamodules import TraceDataModule
from moe_beyond.lookahead import format_lookahead
from moe_beyond.predictors.io.folder import read_config
from moe_beyond.simulator import Result
from moe_beyond.tasks.base import PredictorTask
from moe_beyond.version import __version__

if TYPE_CHECKING:
    import wandb

REPLAYED = (
    "strategy", "policy", "prefetch", "lookahead", "budget_slots", "budget_share", "demand_ratio", "accesses",
    "hit_rate", "bytes_ratio", "prefetch_transfers", "wasted_prefetches", "tokens_per_second",
)  # fmt: skip
"""Fields of a `Result` that make a row of the table ``replay``."""


class TrackWandb(L.Callback):
    """Tells every `WandbLogger` what Lightning does not; without one it does nothing.

    - Into the configuration: geometry, fingerprints of the trace sets, the git revision of the working folder, this
      package's version, and of a run that starts from a checkpoint, which, and the run that wrote it.
    - At every validation or test the tables ``by_layer`` (figures by lookahead and layer) and, of `CacheReplay`,
      ``replay``; the curves ``recall_by_layer``, ``hits_by_budget`` and ``hits_by_bytes``.
    - At the end of a fit, as artifacts, the best and the last checkpoint (type ``model``, with those aliases) and what
      `ExportBest` wrote (type ``predictor``). The logger's own ``log_model`` would call the last one the best.

    A fit that resumes from a checkpoint is a run of its own, as it has a folder of its own: what the earlier one logged
    after that checkpoint would not be the same fit's.
    """

    def __init__(self) -> None:
        self._run: str | None = None
        self._earlier: str | None = None

    def state_dict(self) -> dict[str, Any]:
        """Note in checkpoints which run wrote them."""
        return {} if self._run is None else {"run": self._run}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Read which run wrote a checkpoint."""
        self._earlier = state_dict.get("run")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say where the run comes from."""
        self._introduce(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say where the run comes from, where it only validates."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._introduce(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say where the run comes from."""
        self._introduce(trainer, pl_module)

    def _introduce(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        assert isinstance(task, PredictorTask)
        loggers = loggers_of(trainer)
        if not loggers:
            return
        self._run = loggers[0].experiment.id
        origin: dict[str, Any] = {
            "moe_beyond": __version__,
            "git": git_revision(),
            "geometry": task.predictor.geometry.to_json(),
            **traces_read(task.data, trainer.state.fn),
        }
        if trainer.ckpt_path is not None:
            origin["from"] = {"checkpoint": str(trainer.ckpt_path), "run": self._earlier}
        for logger in loggers:
            logger.log_hyperparams(origin)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log tables and curves, after Lightning logged the figures."""
        if not trainer.sanity_checking:
            self._log(trainer, pl_module, "val")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log tables and curves, after Lightning logged the figures."""
        self._log(trainer, pl_module, "test")

    def _log(self, trainer: L.Trainer, task: L.LightningModule, stage: str) -> None:
        assert isinstance(task, PredictorTask)
        for logger in loggers_of(trainer):
            shown = layers_shown(task.measured)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, CacheReplay):
                    shown |= replays_shown(callback.results)
            logger.experiment.log({f"{stage}/{name}": what for name, what in shown.items()})

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what the fit leaves behind; nothing where it was cut off."""
        if trainer.interrupted:
            return
        for logger in loggers_of(trainer):
            run = logger.experiment
            for artifact, alias in artifacts_of(trainer, run.id):  # no wait(): without a server there is no answer
                run.log_artifact(artifact, aliases=[alias])


def loggers_of(trainer: L.Trainer) -> list[WandbLogger]:
    """Return the loggers to tell: those of wandb, on the one rank that logs."""
    return [one for one in trainer.loggers if isinstance(one, WandbLogger) and trainer.is_global_zero]


def traces_read(data: TraceDataModule, verb: TrainerFn | None) -> dict[str, Any]:
    """Describe the trace sets that a verb reads."""
    read = {}
    if verb == TrainerFn.FITTING:
        read["train_traces"] = data.traces.describe(data.train_split)
    if verb == TrainerFn.TESTING and data.test_traces is not None:
        read["test_traces"] = data.test_traces.describe()
    elif data.val_split is not None:
        read["test_traces" if verb == TrainerFn.TESTING else "val_traces"] = data.val_traces.describe(data.val_split)
    return read


def git_revision() -> dict[str, Any] | None:
    """Return the commit that the working folder is at, and whether tracked files differ from it.

    Returns:
        ``{"commit": ..., "dirty": ...}``; None outside a repository, or without git.
    """
    try:
        commit, changes = (
            subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit.strip(), "dirty": bool(changes)}


def layers_shown(measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the table of figures by lookahead and layer, and the curves of recall over layers.

    Args:
        measured: As `RoutingMetrics.to_rows` gives it.
    """
    import wandb

    names = [name for name in measured[0]["by_layer"][0] if name != "f1"]  # of K experts it is recall@k
    rows = [[str(one["lookahead"]), *(layer[name] for name in names)] for one in measured for layer in one["by_layer"]]
    recall = [[layer["recall_at_k"] for layer in one["by_layer"]] for one in measured]
    layers = [layer["layer"] for layer in measured[0]["by_layer"]]
    lookaheads = [f"lookahead {one['lookahead']}" for one in measured]
    return {
        "by_layer": wandb.Table(columns=["lookahead", *names], data=rows),
        "recall_by_layer": wandb.plot.line_series(layers, recall, lookaheads, "recall@k", "MoE layer", True),
    }


def replays_shown(results: Sequence[Result]) -> dict[str, Any]:
    """Return the table of replays, and hits against the budget and against bytes, a line a strategy."""
    import wandb

    told = [{**result.to_json(), "lookahead": _lookahead(result)} for result in results]
    rows = [[one.get(name) for name in REPLAYED] for one in told]
    lines: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: result.budget_slots):
        lines.setdefault(result.strategy, []).append(result)
    hits = [[result.hit_rate for result in line] for line in lines.values()]

    def curve(x: str, title: str, axis: str) -> Any:
        xs = [[getattr(result, x) for result in line] for line in lines.values()]
        return wandb.plot.line_series(xs, hits, list(lines), title, axis, True)

    return {
        "replay": wandb.Table(columns=list(REPLAYED), data=rows),
        "hits_by_budget": curve("budget_share", "hit rate against budget", "slots, share of all experts"),
        "hits_by_bytes": curve("bytes_ratio", "hit rate against bytes", "transfers over accesses"),
    }


def _lookahead(result: Result) -> str:
    """Name when scores were known; a table's column has one type."""
    return "-" if result.predictor is None else format_lookahead(result.lookahead)


def artifacts_of(trainer: L.Trainer, run: str) -> Iterator[tuple["wandb.Artifact", str]]:
    """Yield what a fit leaves behind, each with its alias.

    Files are not copied aside: those of a finished fit stay as they are.

    Args:
        trainer: After the fit.
        run: The run's id.
    """
    import wandb

    for alias, (path, score) in checkpoints_kept(trainer).items():
        artifact = wandb.Artifact(f"model-{run}", "model", metadata={"file": path, "score": score})
        artifact.add_file(path, "model.ckpt", policy="immutable")  # named as the logger's own log_model names it
        yield artifact, alias
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ExportBest) and callback.exported is not None:
            config = read_config(callback.exported)
            names = ("architecture", "arguments", "lookaheads", "parameters", "sha256", "training", "tool_version")
            model = re.sub(r"[^A-Za-z0-9_.-]+", "-", config["geometry"]["model"])
            artifact = wandb.Artifact(
                f"{config['architecture']}.{model}", "predictor", metadata={name: config[name] for name in names}
            )
            artifact.add_dir(str(callback.exported), policy="immutable")
            yield artifact, "latest"


def checkpoints_kept(trainer: L.Trainer) -> dict[str, tuple[str, float | None]]:
    """Return the file and the monitored score of the ``best`` checkpoint and of the ``last``, as far as there are."""
    kept: dict[str, tuple[str, float | None]] = {}
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint):
            continue
        if callback.monitor and callback.best_model_path:
            score = callback.best_model_score
            kept.setdefault("best", (callback.best_model_path, None if score is None else float(score)))
        if path := callback.last_model_path or ("" if callback.monitor else callback.best_model_path):
            kept.setdefault("last", (path, None))
    return kept
