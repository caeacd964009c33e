"""Quickstart on the bundled small model: record its routing, fit a predictor, replay, and run it under a budget.

The fit shows how a predictor is made. Replay and run use the pretrained predictor, which was fitted on more text.
"""

import json
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from moe_beyond.callbacks import CacheReplay, EpochSummary, ExportBest
from moe_beyond.collect.collection import collect
from moe_beyond.collect.config import CollectConfig, ProcessRank
from moe_beyond.collect.load import open_checkpoint
from moe_beyond.collect.prompts import Prompt
from moe_beyond.datamodules import TraceDataModule
from moe_beyond.evaluation.options import ReplayOptions
from moe_beyond.evaluation.run import ReplayOutcome, run_evaluation, run_replay
from moe_beyond.evaluation.sources import from_predictor_folder
from moe_beyond.evaluation.strategies import HINDSIGHT
from moe_beyond.files import is_earlier_result, replacing_folder, write_json
from moe_beyond.geometry import budget_slots
from moe_beyond.metrics.names import of_budget
from moe_beyond.predictors.io.folder import read_config
from moe_beyond.pretrained import pretrained_folder, shipped_folder
from moe_beyond.report.plots.replay import budgets_plot, save_png
from moe_beyond.report.tables.results import metrics_table, results_table
from moe_beyond.runtime import load_offloaded
from moe_beyond.runtime.generation import Sampling, TextGenerator
from moe_beyond.runtime.records.recording import write_recording
from moe_beyond.simulator import Result
from moe_beyond.tasks import AdamWSettings, CrossLayerTask
from moe_beyond.traces.reader import TraceSet

MODEL = "small-moe"
PRETRAINED = "cross_layer.small-moe-python-small"
"""Predictor that the replay and the run use; it was fitted on none of the held-out files."""
HELD_OUT_EVERY = 4
"""Every fourth source file of the prompts is held out."""
BUDGETS = ("25%", "50%")
"""Budgets of the table; the picture adds every tenth."""
EPOCHS = 12
PICTURE = "hits.png"
RESULTS = "results.json"
WRITTEN = ("traces", "predictor", "checkpoints", "metrics.csv", "hparams.yaml", "run", PICTURE)
RUN_PROMPTS, RUN_TOKENS = 4, 32
"""Held-out prompts that the model continues under the first budget, and tokens that it generates after each."""


def quickstart(out: str | Path, console: Console) -> dict[str, Any]:
    """Record the small model's routing on new prompts, fit a predictor, replay held-out prompts, and run the model.

    Replay and run use the pretrained predictor.

    Args:
        out: Folder for ``traces/``, ``predictor/``, ``run/``, ``results.json`` and ``hits.png``; replaces an earlier
            result.
        console: Console for progress and tables.

    Returns:
        Content of ``results.json``: metrics and results on the held-out prompts, and those of the run; all of the
        pretrained predictor.
    """
    out = Path(out)
    with replacing_folder(out, overwrite=is_earlier_result(out, RESULTS, *WRITTEN)) as folder:
        with _step(console, "1/4 record: run small-moe over its bundled prompts"):
            traces = record_small_model(folder / "traces")
            splits = traces.manifest.to_json()["splits"]
            console.print(
                f"    {splits['train']['tokens']:,} training tokens, "
                f"{splits['validation']['tokens']:,} held-out tokens from other files"
            )
        with _step(console, f"2/4 fit: cross_layer, {EPOCHS} epochs over these tokens"):
            fit(traces, folder, console)
        predictor = pretrained_folder(PRETRAINED)
        tokens = read_config(predictor)["training"]["tokens"]
        with _step(console, "3/4 replay: held-out prompts, every budget"):
            console.print(f"    with {PRETRAINED}, fitted on {tokens:,} tokens of other files")
            outcome = _replay(traces, predictor)
        with _step(console, f"4/4 run: small-moe with slots for {BUDGETS[0]} of its experts, held-out prompts"):
            run = run_small_model(folder / "run", predictor)
        save_png(budgets_plot(outcome.results, f"{MODEL}, held-out prompts"), folder / PICTURE)
        content = outcome.to_json() | {"run": [result.to_json() for result in run]}
        write_json(folder / RESULTS, content)
    table_slots = [budget_slots(budget, traces.geometry) for budget in BUDGETS]
    for line in outcome.measured_on.lines:
        console.print(line)
    console.print(metrics_table(outcome.metrics))
    console.print(results_table([r for r in outcome.results if r.budget_slots in table_slots], traces.geometry))
    console.print(results_table([replace(run[0], strategy=f"this run: {run[0].strategy}"), *run[1:]], traces.geometry))
    console.print(f"picture: {out / PICTURE}   all budgets: {out / RESULTS}   your predictor: {out / 'predictor'}")
    return content


def run_small_model(folder: Path, predictor: Path) -> list[Result]:
    """Continue held-out prompts with the small model under the first budget, and replay the run's routing.

    Args:
        folder: Folder of the run's trace set to make.
        predictor: Folder of a predictor for the small model.

    Returns:
        Result of the run, and those of the replays: the same strategy, LRU and Belady.
    """
    checkpoint, sampling = open_checkpoint(MODEL), Sampling(RUN_TOKENS)
    generator = TextGenerator(checkpoint, sampling)
    prompts = [prompt for prompt in bundled_prompts() if prompt.split == "validation"][:RUN_PROMPTS]
    run = load_offloaded(
        checkpoint,
        budget=BUDGETS[0],
        policy="belief",
        predictor=predictor,
        device="cpu",
        dtype="float32",
        keep_rows=True,
    )
    with run:
        generations = [generator.generate(run.model, prompt) for prompt in prompts]
    write_recording(run, folder, generations, sampling, "held-out prompts", {})
    result = run.result()
    options = ReplayOptions(budget=BUDGETS[:1], policy=["belief"], carry_over=True, prefill_chunk=result.prefill_chunk)
    replayed = run_replay(options, TraceSet(str(folder)), from_predictor_folder(predictor), split="all")
    return [result, *(each for each in replayed.results if each.strategy != HINDSIGHT)]


def _replay(traces: TraceSet, predictor: Path) -> ReplayOutcome:
    """Measure the predictor on the held-out prompts, and replay it at every budget."""
    source, geometry = from_predictor_folder(predictor), traces.geometry
    budgets = (*BUDGETS, *(f"{tenth}0%" for tenth in range(1, 11)))
    slots = sorted({budget_slots(budget, geometry) for budget in budgets})
    options = ReplayOptions(
        budget=[str(count) for count in slots], policy=["belief", "lru"], lookahead=source.lookaheads[:1]
    )
    return run_evaluation(options, traces, source, split="validation")


def bundled_prompts() -> list[Prompt]:
    """Read the small model's prompts; those of every fourth source file form the split ``validation``."""
    path = shipped_folder(MODEL) / "prompts.jsonl"
    prompts = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    # Whole files are held out, because two excerpts of one file are too similar.
    held_out = set(sorted({prompt["source"] for prompt in prompts})[::HELD_OUT_EVERY])
    return [
        Prompt(row["text"], row["id"], row["source"], "validation" if row["source"] in held_out else "train")
        for row in prompts
    ]


def record_small_model(folder: Path) -> TraceSet:
    """Run the small model over its bundled prompts, and write its routing to a trace set in ``folder``."""
    weights = shipped_folder(MODEL)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(weights)
    traces = collect(
        model,
        tokenizer,
        bundled_prompts(),
        folder,
        CollectConfig(batch_size=1, shard_tokens=4096),
        name=MODEL,
        source="Python 3.11 documentation and library, files that the model never saw",
        quantization_bits=16.0,  # as the weights are stored
        rank=ProcessRank(0, 1),
    )
    assert traces is not None
    return traces


def _describe_epoch(trainer: L.Trainer) -> str:
    """Return recall, hits and bytes of the validation as text."""
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}

    def hits(prefix: str) -> str:
        rate, moved = (logged[of_budget("val", BUDGETS[0], f"{prefix}{name}")] for name in ("hit_rate", "bytes_ratio"))
        return f"{rate:.1%} @ {moved:.2f}"

    return (
        f"recall@k {logged['val/recall_at_k']:.1%}, hits @ bytes {hits('')} (LRU {hits('lru_')}, Belady "
        f"{hits('belady_')})"
    )


def fit(traces: TraceSet, out: Path, console: Console) -> Path:
    """Fit a small cross_layer, and replay the held-out prompts at every validation; return the predictor folder."""
    L.seed_everything(0, verbose=False)
    data = TraceDataModule(traces.folder, token_budget=1024, max_tokens=256)
    task = CrossLayerTask(
        data.geometry, data.vocab_size, width=128, depth=2, heads=4, layer_width=128, dropout=0.2,
        optimizer=AdamWSettings(lr=3e-3),
    )  # fmt: skip
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=CSVLogger(out, name="", version=""),
        callbacks=[
            CacheReplay(budget=BUDGETS[0]),
            ModelCheckpoint(),  # keeps the last weights: choosing the best by the held-out prompts would overstate them
            ExportBest(calibration=None),  # calibrating on the held-out prompts would overstate them, too
            EpochSummary(lambda line: console.print(f"    {line}"), _describe_epoch),
        ],
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=5,
    )
    trainer.fit(task, data)
    return out / "predictor"


@contextmanager
def _step(console: Console, title: str) -> Iterator[None]:
    """Print the title of a step and its duration; Lightning's notices on hardware and all warnings are suppressed."""
    console.print(title)
    began = time.monotonic()
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
    console.print(f"    {time.monotonic() - began:.0f} s")
