"""The progress of a fit, stored so that a resumed fit makes the same steps as an uninterrupted one.

Lightning stores its progress as counters of started, processed and completed batches. Their effect depends on the hook
that saved the checkpoint, and is wrong in four cases:

- Within accumulated gradients: the gradients are lost.
- Between the last batch of an epoch and its validation: the validation never runs.
- At the end of an epoch of a fit with ``max_steps``: the next epoch is skipped.
- After the last step of a fit: the remaining validation and hooks are skipped.

A task therefore stores a `Progress`, and `restore` computes the counters from it.

The randomness of a step (dropout) is seeded by seed, epoch, batch and rank (see `seed_batch`). No rank or worker has
random state to store, and nothing between two batches can change it.
"""

import math
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from moe_beyond.errors import UserError

RESUME_KEY = "resume"
"""Key of the part of a task's record in a checkpoint that only a resumed fit reads."""
ALL_BATCHES = sys.maxsize
"""More batches than any epoch has."""


@dataclass(frozen=True)
class Progress:
    """Progress of a fit at its last optimiser step; later batches, whose gradients would be lost, do not count.

    Attributes:
        epoch: Number of finished epochs.
        batches: Number of batches of the next epoch that are in the weights; 0 between two epochs.
        batches_of_epoch: Number of batches per epoch, on each rank.
        steps: Optimiser steps of the fit.
        steps_of_epoch: Optimiser steps of that epoch.
        due: Whether a validation follows on the last of these batches.
        validated: Whether it has run.
        ended: Whether the epoch's end has been handled, after fewer batches than it has (``max_steps``).
    """

    epoch: int
    batches: int
    batches_of_epoch: int
    steps: int
    steps_of_epoch: int
    due: bool
    validated: bool
    ended: bool

    @property
    def whole(self) -> bool:
        """Whether all batches of the epoch are in the weights."""
        return self.batches == self.batches_of_epoch

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def progress_of(trainer: L.Trainer) -> Progress:
    """Return the progress of a running fit."""
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    epochs, batch = fit.epoch_progress.current, loop.batch_progress.current
    automatic = trainer.lightning_module.automatic_optimization
    optimizer = loop.automatic_optimization.optim_progress.optimizer.step
    steps = (optimizer if automatic else loop.manual_optimization.optim_step_progress).current.completed
    total = 0 if math.isinf(trainer.num_training_batches) else int(trainer.num_training_batches)  # inf before a fit
    batches = min(total, steps * trainer.accumulate_grad_batches)
    running = epochs.started > epochs.processed  # type: ignore[attr-defined]
    if batches == 0 or (batches == total and not running):
        return Progress(epochs.processed, 0, total, trainer.global_step, 0, False, False, False)  # type: ignore[attr-defined]
    here = running and batch.ready == batches
    validation = loop.val_loop.batch_progress
    over = validation.is_last_batch and validation.current.completed == validation.current.ready
    return Progress(
        epoch=epochs.processed - (not running),  # type: ignore[attr-defined]
        batches=batches,
        batches_of_epoch=total,
        steps=trainer.global_step,
        steps_of_epoch=steps,
        due=here and loop._should_check_val_fx(fit._data_fetcher),  # type: ignore[arg-type]  # noqa: SLF001
        validated=here and bool(trainer.validating) and over,
        ended=not running,
    )


def is_finishing(progress: Progress, trainer: L.Trainer) -> bool:
    """Return whether the last step of ``max_steps`` is made, but the epoch has not ended."""
    return progress.batches > 0 and not progress.ended and progress.steps == trainer.max_steps


def batches_to_skip(progress: Progress, trainer: L.Trainer) -> int:
    """Return the number of batches of the epoch that a resumed fit skips."""
    return ALL_BATCHES if progress.whole or is_finishing(progress, trainer) else progress.batches


def restore(progress: Progress, loops: dict[str, Any], trainer: L.Trainer) -> None:
    """Write the counters of Lightning's loops so that a fit continues from ``progress``.

    A counter is (ready, started, processed, completed). Lightning considers a batch that is processed but not completed
    as just made, and a validation whose first batch is ready but not processed as not begun.

    Args:
        progress: Progress of the fit.
        loops: ``fit_loop`` of the checkpoint's loops; it is changed.
        trainer: Trainer of the resumed fit.
    """
    done, batches = progress.epoch, progress.batches
    # Lightning adds one when it sees the last batch again.
    stepped = progress.steps - 1
    last, validation = _counter(batches), _counter(0)
    if batches == 0:
        epoch = _counter(done)
        if trainer.max_steps == -1:
            stepped = progress.steps
        else:  # Lightning considers such a fit as stopped within an epoch
            last = _counter(batches, completed=batches - 1)
    else:
        epoch = {"ready": done + 1, "started": done + 1, "processed": done, "completed": done}
        if progress.due and not progress.validated:
            validation = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        elif not progress.whole and not is_finishing(progress, trainer):
            last = _counter(batches, completed=batches - 1)
        elif not progress.due:
            stepped = progress.steps  # no batch is seen again: the data are at their end
    total = {name: count + done * progress.batches_of_epoch for name, count in last.items()}
    loops["epoch_progress"] = {"total": dict(epoch), "current": epoch}
    loops["epoch_loop.batch_progress"] = {"total": total, "current": last, "is_last_batch": progress.whole}
    loops["epoch_loop.val_loop.batch_progress"] = {
        "total": dict(validation), "current": validation, "is_last_batch": False,
    }  # fmt: skip
    loops["epoch_loop.state_dict"] = {"_batches_that_stepped": stepped}
    optimizer = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    for counters in (*optimizer.values(), loops["epoch_loop.manual_optimization.optim_step_progress"]):
        counters["current"] = dict.fromkeys(counters["current"], progress.steps_of_epoch)


def _counter(count: int, completed: int | None = None) -> dict[str, int]:
    counter = dict.fromkeys(("ready", "started", "processed", "completed"), count)
    return counter if completed is None else counter | {"completed": completed}


def keep_best(checkpoint: dict[str, Any], trainer: L.Trainer) -> None:
    """Restore the best checkpoints of each `ModelCheckpoint`, although a resumed run has a new folder.

    Lightning would forget their scores and consider the first validation as the best. A checkpoint that was moved is
    searched next to the resumed one. A missing checkpoint is dropped, with a warning.

    Args:
        checkpoint: Content of the resumed checkpoint; it is changed.
        trainer: Trainer of the resumed fit.
    """
    states, folder = checkpoint.get("callbacks", {}), Path(str(trainer.ckpt_path)).parent
    for callback in trainer.checkpoint_callbacks:
        state = states.get(callback.state_key)
        if not isinstance(callback, ModelCheckpoint) or not state:
            continue
        paths = {path: _present(path, folder) for path in (*state["best_k_models"], state["best_model_path"]) if path}
        missing = [path for path, present in paths.items() if present is None]
        if missing and callback.monitor and trainer.is_global_zero:
            names = ", ".join(Path(path).name for path in missing)
            print(
                f"moe-beyond: warning: {folder}: {names} is missing; the search for the best checkpoint starts again",
                file=sys.stderr,
            )
        kept = {str(paths[path]): score for path, score in state["best_k_models"].items() if paths[path]}
        best, worst = (max, min) if callback.mode == "max" else (min, max)
        state["dirpath"], state["best_k_models"] = callback.dirpath, kept
        state["best_model_path"] = paths.get(state["best_model_path"]) or ""
        state["kth_best_model_path"] = ""
        if kept:
            state["best_model_path"] = best(kept, key=lambda path: float(kept[path]))
            state["best_model_score"] = kept[state["best_model_path"]]
        elif missing:
            state["best_model_score"] = None
        if kept and len(kept) == callback.save_top_k:
            state["kth_best_model_path"] = worst(kept, key=lambda path: float(kept[path]))
            state["kth_value"] = kept[state["kth_best_model_path"]]


def _present(path: str, folder: Path) -> str | None:
    """Return the path of a checkpoint, or of a file of its name next to the resumed one; None if both are missing."""
    return next((str(place) for place in (Path(path), folder / Path(path).name) if place.exists()), None)


def seed_batch(seed: int, epoch: int, batch: int, rank: int) -> None:
    """Seed torch on all devices, NumPy and Python for one training step.

    A step then does not depend on earlier random numbers, so a fit that is resumed at any batch makes the same step as
    an uninterrupted one. Seeding takes about a quarter of a millisecond.

    Args:
        seed: Seed of the fit.
        epoch: Index of the epoch, from 0.
        batch: Index of the batch in its epoch, from 0.
        rank: Index of the process; each has its own random numbers.
    """
    state = int(np.random.SeedSequence((seed, epoch, batch, rank)).generate_state(1, np.uint64)[0])
    torch.manual_seed(state)
    np.random.seed(state % 2**32)  # noqa: NPY002  (libraries share this generator)
    random.seed(state)


def check_resumable(checkpoint: dict[str, Any], record: dict[str, Any], batching: dict[str, Any], path: str) -> None:
    """Refuse a checkpoint from which a fit cannot be resumed exactly.

    Args:
        checkpoint: Content of the checkpoint.
        record: Record of the task in the checkpoint; ``{}`` for none.
        batching: Settings that determine the batches of this fit.
        path: Path of the checkpoint, for error messages.

    Raises:
        UserError: The checkpoint has only weights, is of an earlier version, or was saved within an epoch that these
            settings divide into other batches.
    """
    if "optimizer_states" not in checkpoint:
        raise UserError(f"{path}: has weights without the state of the optimiser; resume from another checkpoint")
    if not record:
        raise UserError(f"{path}: is from an earlier version, whose fits cannot be resumed exactly; fit again")
    earlier = record["batching"]
    changed = [name for name, value in batching.items() if earlier.get(name) != value]
    if changed and record["progress"]["batches"]:
        before, now = (", ".join(f"{name} {values[name]}" for name in changed) for values in (earlier, batching))
        raise UserError(
            f"{path}: stopped within an epoch of other batches (it had {before}; got {now}); resume with the same "
            "settings, or from a checkpoint of the end of an epoch"
        )
