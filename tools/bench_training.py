"""Training throughput of MoE-Beyond's architecture and of cross_layer.

    python tools/bench_training.py --data TRACES [--steps N] [--eager] [--json FILE]

Fits `row_encoder` with the paper's settings, and `cross_layer`, large and small, with its own and a compiled
objective. All use the same training segments of at most 512 tokens and the package's own loop, in float32 and in
bfloat16, each at the batch sizes around its best. An entry is a (token, layer) pair. Prints entries/s of each run, and
the ratio of the best runs. The first two steps of each run are a warm-up.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from rich.table import Table

from moe_beyond.datamodules import TraceDataModule
from moe_beyond.files import write_json
from moe_beyond.predictors.batch import Batch
from moe_beyond.tasks import CrossLayerTask, PredictorTask, RowEncoderTask
from moe_beyond.traces.reader import TraceSet

WARM_UP = 2
SMALL = {"width": 128, "depth": 1, "heads": 4, "layer_width": 128, "copy_heads": 2}
"""Arguments in configs/experiment/puffin-cross_layer-small.yaml."""
ARCHITECTURES: dict[str, tuple[type[PredictorTask], dict[str, Any], tuple[int, ...]]] = {
    "row_encoder": (RowEncoderTask, {}, (512, 1024)),
    "cross_layer": (CrossLayerTask, {"compiled": True}, (512, 1024, 2048, 4096)),
    "cross_layer, small": (CrossLayerTask, {**SMALL, "compiled": True}, (512, 1024, 2048, 4096)),
}
"""Name -> task class, its arguments, and tokens per batch."""


class Clock(L.Callback):
    """Records the end of each step and its number of tokens."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.tokens: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, task: L.LightningModule, _: Any, batch: Batch, __: int) -> None:
        """Record a step."""
        self.ends.append(time.perf_counter())
        self.tokens.append(int(batch.lengths.sum()))


def entries_per_second(
    name: str, traces: str, budget: int, precision: Any, steps: int, *, eager: bool = False
) -> list[float]:
    """Train for a number of steps; return the rate of each step."""
    data = TraceDataModule(traces, val_split=None, token_budget=budget, max_tokens=512)
    task_class, arguments, _ = ARCHITECTURES[name]
    if eager:
        arguments = {key: value for key, value in arguments.items() if key != "compiled"}
    task = task_class(geometry=data.geometry.to_json(), vocab_size=data.vocab_size, **arguments)  # type: ignore[call-arg, arg-type]
    clock = Clock()
    trainer = L.Trainer(
        accelerator="cpu", max_steps=WARM_UP + steps, precision=precision, callbacks=[clock], gradient_clip_val=1.0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, data)
    layers = data.geometry.num_layers
    spans = zip(clock.ends[WARM_UP - 1 :], clock.ends[WARM_UP:], clock.tokens[WARM_UP:], strict=False)
    return [tokens * layers / (end - start) for start, end, tokens in spans]


def main() -> None:
    """Parse the options, train and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="trace set")
    parser.add_argument("--steps", type=int, default=3, help="timed steps per run (default: 3)")
    parser.add_argument("--eager", action="store_true", help="compile nothing; needed without a C++ compiler")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    rows, tokens = [], sum(shard.tokens for shard in TraceSet(args.data).shards("train"))
    for name, (_, _, budgets) in ARCHITECTURES.items():
        for precision in ("32-true", "bf16-mixed"):
            for budget in (budgets[0], *(budget for budget in budgets[1:] if budget <= tokens)):
                rates = entries_per_second(name, args.data, budget, precision, args.steps, eager=args.eager)
                rows.append({"architecture": name, "precision": precision, "tokens": budget, "entries_per_s": rates})
                print(f"{name} {precision} {budget}: {statistics.median(rates):,.0f} entries/s", flush=True)
    table = Table(title=f"entries/s in training, medians of {args.steps} steps")
    for heading in ("architecture", "precision", "tokens per batch", "entries/s"):
        table.add_column(heading, justify="right" if heading in ("tokens per batch", "entries/s") else "left")
    for row in rows:
        rate = f"{statistics.median(row['entries_per_s']):,.0f}"
        table.add_row(row["architecture"], row["precision"], str(row["tokens"]), rate)
    best = {
        name: max(statistics.median(row["entries_per_s"]) for row in rows if row["architecture"] == name)
        for name in ARCHITECTURES
    }
    ratios = {name: best[name] / best["row_encoder"] for name in ARCHITECTURES if name != "row_encoder"}
    table.caption = "\n".join(f"best of {name} / best of row_encoder: {ratio:.1f}" for name, ratio in ratios.items())
    Console().print(table)
    if args.json:
        write_json(args.json, {"ratios": ratios, "best": best, "runs": rows})


if __name__ == "__main__":
    main()
