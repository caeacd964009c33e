"""The figures that a fit logs; a callback that monitors another is refused before the first epoch."""

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from moe_beyond.callbacks.cache_replay import CacheReplay
from moe_beyond.datamodules import TraceDataModule
from moe_beyond.errors import UserError, unknown
from moe_beyond.metrics import FIGURES
from moe_beyond.metrics.names import EQUAL, of_lookahead
from moe_beyond.predictors.base import GradientPredictor
from moe_beyond.tasks.base import PredictorTask

KNOWN = ("moe_beyond.", "lightning.")


def check_monitors(callbacks: list[L.Callback], task: PredictorTask, data: TraceDataModule) -> None:
    """Refuse a callback that monitors a figure which the fit does not log.

    Code from outside this package may log more, so a fit with such code is not checked. A `ModelCheckpoint` may monitor
    a figure of a validation that the fit does not have: it then keeps the last checkpoint.

    Raises:
        UserError: A figure is not logged.
    """
    if not all(type(part).__module__.startswith(KNOWN) for part in (task, *callbacks)):
        return
    names = figures_of_fit(callbacks, task, data)
    for callback in callbacks:
        name = getattr(callback, "monitor", None)
        saves = isinstance(callback, ModelCheckpoint)
        if name is None or name in names or not getattr(callback, "strict", True):
            continue
        if saves and (name in ("epoch", "step") or data.val_split is None):
            continue
        raise UserError(f"{type(callback).__name__}: {unknown('figure to monitor', name, names)}")


def figures_of_fit(callbacks: list[L.Callback], task: PredictorTask, data: TraceDataModule) -> list[str]:
    """List the names of all figures that a fit logs."""
    gradient = isinstance(task.predictor, GradientPredictor)
    names = ["train/loss", "train/lr"] if gradient else []
    if data.val_split is None:
        return names
    names += ["val/loss"] if gradient else []
    names += [
        of_lookahead("val", lookahead, figure, first=number == 0)
        for number, lookahead in enumerate(task.predictor.information.lookaheads)
        for figure in FIGURES
        if figure not in EQUAL
    ]
    replays = [callback for callback in callbacks if isinstance(callback, CacheReplay)]
    replayed = [by_field for callback in replays for by_field in callback.names("val", data.manifest)]
    return [*names, *(name for by_field in replayed for name in by_field.values())]
