"""Kill fits at random events, resume them, and compare the results with undisturbed fits.

    python tools/kill_fit.py [--kills 12] [--seed 0] [--only NAME ...] [--json FILE]

Each kill is SIGKILL to a real process, with all its ranks, at a random event. Events are the start of an epoch or
batch, an optimiser step, the end of a batch, the start, middle or end of a validation, and the end of an epoch. Half
of the kills hit the last batch of an epoch, its validation or its end. The fit is then resumed from its newest
checkpoint with another seed, so that anything drawn outside a step differs. All fits use the shipped dropout.

The tool compares the learning rate at every step, the final weights, the exported predictor, the figures of every
validation, and the numbers of planned and made steps. It also measures the time to flush a checkpoint to disk and to
seed a step. The exit code is 1 if anything differs.
"""

import argparse
import logging
import os
import random
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.table import Table

from moe_beyond.callbacks import ExportBest
from moe_beyond.cli.resuming import newest_checkpoint
from moe_beyond.datamodules import TraceDataModule
from moe_beyond.files import write_json
from moe_beyond.geometry import Geometry
from moe_beyond.predictors.io.folder import read_predictor
from moe_beyond.tasks import CrossLayerTask, EamcTask, PredictorTask, RowEncoderTask, TokenCausalTask
from moe_beyond.tasks.checkpoint_io import WholeCheckpointIO
from moe_beyond.tasks.resuming import seed_batch
from moe_beyond.traces.manifest import Manifest, Tokenizer
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.writer import open_writer

GEOMETRY = Geometry("tiny", (1, 2, 3, 4), num_experts=8, top_k=2, params_per_expert=1000, other_params_per_layer=5000)
VOCAB = 32
CAUSAL: dict[str, Any] = {"width": 16, "heads": 2, "depth": 1, "window": 8}
CROSS_LAYER = {**CAUSAL, "layer_width": 16}
EVENTS = (
    "on_train_epoch_start", "on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end",
    "on_validation_start", "on_validation_batch_end", "on_validation_end", "on_train_epoch_end",
)  # fmt: skip


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


class Watch(L.Callback):
    """Records the events of a fit, after all other callbacks, and kills its process at one of them."""

    def __init__(self, kill_at: int | None) -> None:
        self._kill_at, self.events = kill_at, list[str]()
        self.rates: dict[int, float] = {}
        self.recalls: dict[int, float] = {}

    def event(self, name: str, trainer: L.Trainer) -> None:
        """Record an event."""
        if name == "on_train_batch_start":
            for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups[:1]):
                self.rates[trainer.global_step] = group["lr"]  # a counting predictor has no group
        if name == "on_validation_end":
            self.recalls[trainer.global_step] = float(trainer.callback_metrics["val/recall_at_k"])
        self.events.append(name)
        if len(self.events) - 1 == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._kill_at is not None:  # saved before the kill, as the process writes no result
            torch.save((self.rates, self.recalls), Path(trainer.default_root_dir) / f"killed-{trainer.global_rank}.pt")


for _event in EVENTS:
    setattr(Watch, _event, lambda self, trainer, *_, _name=_event, **__: self.event(_name, trainer))


def fit(chosen: Configuration, traces: Path, folder: Path, kill_at: int | None, resume: Path | None) -> None:
    """Fit in a separate process and write ``result.pt``."""
    L.seed_everything(1 if resume else 0, verbose=False)
    warnings.simplefilter("ignore")
    data = TraceDataModule(str(traces), **{"token_budget": 64, "max_tokens": 16, "window": 1, **chosen.data})
    task = chosen.task(data.geometry.to_json(), data.vocab_size, **chosen.model)  # type: ignore[call-arg, arg-type]
    watch = Watch(kill_at)
    trainer = L.Trainer(
        default_root_dir=folder, accelerator="cpu", num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, logger=CSVLogger(folder, name="run"),
        callbacks=[
            ModelCheckpoint(monitor="val/recall_at_k", mode="max", filename="{epoch}-{step}"),
            ModelCheckpoint(filename="last", enable_version_counter=False, **chosen.saving),
            ExportBest(),
        ],
        **{"max_epochs": 3, "gradient_clip_val": 1.0, **chosen.trainer},
    )  # fmt: skip
    trainer.callbacks.append(watch)  # type: ignore[attr-defined]
    trainer.fit(task, data, ckpt_path=resume)
    if trainer.is_global_zero:
        exported = read_predictor(folder / "run/version_0/predictor").state_dict()
        result = {
            "events": watch.events, "rates": watch.rates, "recalls": watch.recalls, "planned": task.planned_steps,
            "steps": trainer.global_step, "weights": task.state_dict(), "exported": exported,
        }  # fmt: skip
        torch.save(result, folder / "result.pt")


def in_processes(ranks: int, work: Callable[[], None]) -> bool:
    """Run one process per rank; return whether all ended without a kill."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if ranks > 1:
                    os.environ.update(
                        LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
                    )
                work()
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    return all([os.waitpid(child, 0)[1] == 0 for child in children])


def run(name: str, traces: Path, work: Path, kills: int, chance: random.Random) -> dict[str, Any]:
    """Fit once undisturbed; then kill, resume and compare."""
    chosen = CONFIGURATIONS[name]

    def one(folder: Path, kill_at: int | None = None, resume: Path | None = None) -> dict[str, Any] | None:
        folder.mkdir(parents=True)
        whole = in_processes(chosen.ranks, lambda: fit(chosen, traces, folder, kill_at, resume))
        if whole != (kill_at is None):
            raise SystemExit(f"{name}: a fit {'ended' if whole else 'failed'} that should not have")
        return torch.load(folder / "result.pt", weights_only=True) if whole else None

    expected = one(work / name / "undisturbed")
    assert expected is not None
    events = expected["events"]
    ends = [at for at, event in enumerate(events) if "validation" in event or "epoch" in event]
    ends += [at for at, event in enumerate(events[:-1]) if event == "on_train_batch_end" and at + 1 in ends]
    found: dict[str, Any] = {
        "planned": expected["planned"], "made": expected["steps"], "kills": 0, "weights": 0.0, "exported": 0.0,
        "rates": 0, "validations": 0, "steps": 0, "before_a_checkpoint": 0,
    }  # fmt: skip
    for count in range(kills):
        at = chance.choice(ends) if count % 2 else chance.randrange(len(events))
        folder = work / name / str(count)
        one(folder / "killed", kill_at=at)
        found["kills"] += 1
        if not list(folder.rglob("*.ckpt")):
            found["before_a_checkpoint"] += 1
            continue
        resumed = one(folder / "resumed", resume=newest_checkpoint(folder / "killed"))
        assert resumed is not None
        rates, recalls = torch.load(folder / "killed/killed-0.pt", weights_only=True)
        for kind in ("weights", "exported"):
            found[kind] = max(found[kind], difference(expected[kind], resumed[kind]))
        found["rates"] += {**rates, **resumed["rates"]} != expected["rates"]
        found["validations"] += {**recalls, **resumed["recalls"]} != expected["recalls"]
        found["steps"] += (resumed["planned"], resumed["steps"]) != (expected["planned"], expected["steps"])
        shutil.rmtree(folder)
    return found


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of two sets of weights."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one if one[name].numel())


def write_traces(folder: Path) -> None:
    """Write random traces in more shards than are mixed."""
    random_numbers = np.random.default_rng(0)
    manifest = Manifest(GEOMETRY, Tokenizer("tools", VOCAB), "tiny", 16.0, "dataset", "tools", "0")
    with open_writer(folder, manifest, shard_tokens=64) as writer:
        for number in range(24):
            length = int(random_numbers.integers(1, 21))
            experts = np.argsort(random_numbers.random((length, *GEOMETRY.shape()[:2])))[..., : GEOMETRY.top_k]
            token_ids = random_numbers.integers(0, VOCAB, length).astype(np.int32)
            trace = Trace(f"s{number}", "tools", token_ids, experts.astype(np.uint8), length)
            writer.write(trace, "validation" if number % 4 == 3 else "train")


def costs(work: Path) -> dict[str, float]:
    """Time a checkpoint of 13 MB with and without its flush, and the seeding of a step; medians in milliseconds."""

    def timed(act: Callable[[], Any], times: int) -> float:
        spans = []
        for _ in range(times):
            begun = time.perf_counter()
            act()
            spans.append(time.perf_counter() - begun)
        return 1000 * statistics.median(spans)

    checkpoint = {"state_dict": {"weight": torch.randn(3_400_000)}}
    whole, fsync = WholeCheckpointIO(), os.fsync
    flushed = timed(lambda: whole.save_checkpoint(checkpoint, work / "flushed.ckpt"), 15)
    os.fsync = lambda _: None  # type: ignore[assignment]
    unflushed = timed(lambda: whole.save_checkpoint(checkpoint, work / "unflushed.ckpt"), 15)
    small_unflushed = timed(lambda: write_json(work / "unflushed.json", {}), 100)
    os.fsync = fsync
    return {
        "checkpoint_ms": flushed,
        "checkpoint_without_flush_ms": unflushed,
        "small_file_ms": timed(lambda: write_json(work / "flushed.json", {}), 100),
        "small_file_without_flush_ms": small_unflushed,
        "seeding_ms": timed(lambda: seed_batch(0, 1, 2, 0), 200),
    }


def main() -> None:
    """Parse the options, kill, compare and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12, help="kills per configuration (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS), metavar="NAME")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    chance, console = random.Random(args.seed), Console(width=120)
    torch.set_num_threads(1)
    logging.getLogger("lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_traces(work / "traces")
        rows = {}
        for name in args.only:
            rows[name] = run(name, work / "traces", work, args.kills, chance)
            print(name, rows[name], file=sys.stderr, flush=True)
        cost = costs(work)
    table = Table(title="fits that were killed and resumed, compared with undisturbed fits")
    columns = {
        "planned": "steps planned", "made": "made", "kills": "kills", "weights": "weights differ by",
        "exported": "exported by", "rates": "rates", "validations": "validations", "steps": "steps",
    }  # fmt: skip
    table.add_column("configuration")
    for head in columns.values():
        table.add_column(head, justify="right")
    for name, row in rows.items():
        table.add_row(name, *("-" if row[key] is None else f"{row[key]:g}" for key in columns))
    before = sum(row["before_a_checkpoint"] for row in rows.values())
    lines = [f"rates, validations, steps: resumed fits that differ; {before} kills came before the first checkpoint"]
    lines += [f"{key.removesuffix('_ms').replace('_', ' ')}: {value:.3f} ms" for key, value in cost.items()]
    table.caption = "\n".join(lines)
    console.print(table)
    if args.json:
        write_json(args.json, {"configurations": rows, "costs": cost})
    differ = any(row[key] for row in rows.values() for key in ("weights", "exported", "rates", "validations", "steps"))
    sys.exit(differ or any(row["planned"] not in (None, row["made"]) for row in rows.values()))


if __name__ == "__main__":
    main()
