"""Origin, tables, curves and artifacts of a run for a `WandbLogger`, in addition to the figures."""

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn

from moe_beyond.callbacks.cache_replay import CacheReplay
from moe_beyond.callbacks.export import ExportBest
from moe_beyond.callbacks.git_revision import git_revision
from moe_beyond.datamodules import TraceDataModule
from moe_beyond.metrics import LookaheadMetrics
from moe_beyond.predictors.io.folder import read_config
from moe_beyond.simulator import Result
from moe_beyond.tasks.base import PredictorTask
from moe_beyond.urls import without_secrets
from moe_beyond.version import __version__

if TYPE_CHECKING:
    import wandb

REPLAY_COLUMNS = (
    "strategy", "policy", "prefetch", "lookahead", "budget_slots", "budget_share", "demand_ratio", "accesses",
    "hit_rate", "bytes_ratio", "prefetch_transfers", "wasted_prefetches", "tokens_per_second",
)  # fmt: skip
"""Columns of the table ``replay``: fields of a `Result`."""


class TrackWandb(L.Callback):
    """Logs to every `WandbLogger`; without one it does nothing.

    - Configuration: geometry, fingerprints of the trace sets, git revision of the working folder and version of this
      package. A run that starts from a checkpoint adds the checkpoint and the run that wrote it.
    - At every validation or test: the table ``by_layer`` (figures by lookahead and layer) and the curve
      ``recall_by_layer``. With `CacheReplay`: the table ``replay``, the curves ``hits_by_budget`` and
      ``hits_by_bytes``.
    - At the end of a fit, as artifacts: the best and the last checkpoint (type ``model``, with these aliases) and the
      folder of `ExportBest` (type ``predictor``). The logger's own ``log_model`` would label the last checkpoint as
      the best.

    A resumed fit is a new run with a new folder: figures that the earlier run logged after the checkpoint belong to
    another fit.
    """

    def __init__(self) -> None:
        self._run: str | None = None
        self._earlier: str | None = None

    def state_dict(self) -> dict[str, Any]:
        """Store the run's id in checkpoints."""
        return {} if self._run is None else {"run": self._run}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Read the id of the run that wrote a checkpoint."""
        self._earlier = state_dict.get("run")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the origin of the run."""
        self._log_origin(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the origin of a run that only validates."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._log_origin(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the origin of the run."""
        self._log_origin(trainer, pl_module)

    def _log_origin(self, trainer: L.Trainer, task: L.LightningModule) -> None:
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
            origin["from"] = {"checkpoint": without_secrets(str(trainer.ckpt_path)), "run": self._earlier}
        for logger in loggers:
            logger.log_hyperparams(origin)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log tables and curves."""
        if not trainer.sanity_checking:
            self._log(trainer, pl_module, "val")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log tables and curves."""
        self._log(trainer, pl_module, "test")

    def _log(self, trainer: L.Trainer, task: L.LightningModule, stage: str) -> None:
        assert isinstance(task, PredictorTask)
        for logger in loggers_of(trainer):
            panels = layer_panels(task.measured)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, CacheReplay):
                    panels |= replay_panels(callback.results)
            logger.experiment.log({f"{stage}/{name}": panel for name, panel in panels.items()})

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the artifacts, unless the fit was interrupted."""
        if trainer.interrupted:
            return
        for logger in loggers_of(trainer):
            run = logger.experiment
            for artifact, alias in artifacts_of(trainer, run.id):  # no wait(): an offline run would never return
                run.log_artifact(artifact, aliases=[alias])


def loggers_of(trainer: L.Trainer) -> list[WandbLogger]:
    """Return the wandb loggers of a trainer, on the rank that logs."""
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger) and trainer.is_global_zero]


def traces_read(data: TraceDataModule, stage: TrainerFn | None) -> dict[str, Any]:
    """Describe the trace sets that a stage reads."""
    read = {}
    if stage == TrainerFn.FITTING:
        read["train_traces"] = data.traces.describe(data.train_split)
    if stage == TrainerFn.TESTING and data.test_traces is not None:
        read["test_traces"] = data.test_traces.describe()
    elif data.val_split is not None:
        read["test_traces" if stage == TrainerFn.TESTING else "val_traces"] = data.val_traces.describe(data.val_split)
    return read


def layer_panels(measured: Sequence[LookaheadMetrics]) -> dict[str, Any]:
    """Return the table of figures by lookahead and layer, and the curves of recall over layers.

    Args:
        measured: One row per lookahead.
    """
    import wandb

    names = ["layer", *(name for name in measured[0].figures() if name != "f1")]  # equals recall@k for k = K
    rows = [
        [str(row.lookahead), *(getattr(layer, name) for name in names)] for row in measured for layer in row.by_layer
    ]
    recall = [[layer.recall_at_k for layer in row.by_layer] for row in measured]
    layers = [layer.layer for layer in measured[0].by_layer]
    lookaheads = [f"lookahead {row.lookahead}" for row in measured]
    return {
        "by_layer": wandb.Table(columns=["lookahead", *names], data=rows),
        "recall_by_layer": wandb.plot.line_series(layers, recall, lookaheads, "recall@k", "MoE layer", True),
    }


def replay_panels(results: Sequence[Result]) -> dict[str, Any]:
    """Return the table of replays, and curves of hits over budget and over bytes, one line per strategy."""
    import wandb

    records = [{**result.to_json(), "lookahead": _lookahead(result)} for result in results]
    rows = [[record.get(name) for name in REPLAY_COLUMNS] for record in records]
    lines: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: result.budget_slots):
        lines.setdefault(result.strategy, []).append(result)
    hits = [[result.hit_rate for result in line] for line in lines.values()]

    def curve(x: str, title: str, axis: str) -> Any:
        xs = [[getattr(result, x) for result in line] for line in lines.values()]
        return wandb.plot.line_series(xs, hits, list(lines), title, axis, True)

    return {
        "replay": wandb.Table(columns=list(REPLAY_COLUMNS), data=rows),
        "hits_by_budget": curve("budget_share", "hit rate against budget", "slots, share of all experts"),
        "hits_by_bytes": curve("bytes_ratio", "hit rate against bytes", "transfers over accesses"),
    }


def _lookahead(result: Result) -> str:
    """Return a lookahead as text, because a column of a table has one type."""
    if result.predictor is None:
        return "-"
    return "all" if result.lookahead is None else str(result.lookahead)


def artifacts_of(trainer: L.Trainer, run: str) -> Iterator[tuple["wandb.Artifact", str]]:
    """Yield the artifacts of a finished fit, each with its alias.

    The files are not copied, because a finished fit does not change them.

    Args:
        trainer: Trainer after the fit.
        run: Id of the run.
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
    """Return path and monitored score of the ``best`` and of the ``last`` checkpoint, if they exist."""
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
