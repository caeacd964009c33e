"""The whole path on the small model that ships with this package: record, fit, replay, picture."""

import json
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from moe_beyond.callbacks import CacheReplay, ExportBest
from moe_beyond.collect.collect import collect
from moe_beyond.collect.config import Collection, Rank
from moe_beyond.collect.prompts import Prompt
from moe_beyond.datamodules import TraceDataModule
from moe_beyond.evaluation.run import Evaluation, evaluate
from moe_beyond.evaluation.sources import from_predictor_folder
from moe_beyond.evaluation.strategies import beside, combinations
from moe_beyond.files import is_earlier_result, replacing_folder, write_json
from moe_beyond.geometry import budget_slots
from moe_beyond.metrics.names import of_budget
from moe_beyond.pretrained import shipped_folder
from moe_beyond.report.plots.replay import budgets_figure, save
from moe_beyond.report.tables.results import metrics_table, results_table
from moe_beyond.simulator import ReplaySettings
from moe_beyond.tasks import CrossLayer
from moe_beyond.traces.reader import TraceSet

MODEL = "small-moe"
HELD_OUT_ONE_IN = 4  # of the files that prompts come from
BUDGETS = ("25%", "50%")  # in the table; the picture has all tenths
EPOCHS = 12
PICTURE = "hits.png"
RESULTS = "results.json"
WRITTEN = ("traces", "predictor", "checkpoints", "metrics.csv", "hparams.yaml", PICTURE)


def quickstart(out: str | Path, console: Console) -> Evaluation:
    """Record the small model's routing on prompts it never saw, fit a predictor, and replay held-out prompts.

    Args:
        out: Folder for ``traces/``, ``predictor/``, ``results.json`` and ``hits.png``; replaces an earlier one.
        console: Where progress and tables go.

    Returns:
        The figures of the held-out prompts.
    """
    out = Path(out)
    with replacing_folder(out, overwrite=is_earlier_result(out, RESULTS, *WRITTEN)) as folder:
        with _step(console, "1/3 record: run small-moe over its bundled prompts"):
            traces = record_small_model(folder / "traces")
            splits = traces.manifest.to_json()["splits"]
            console.print(
                f"    {splits['train']['tokens']:,} tokens to fit on, "
                f"{splits['validation']['tokens']:,} from other files held out"
            )
        with _step(console, f"2/3 fit: cross_layer, {EPOCHS} epochs"):
            predictor = fit(traces, folder, console)
        with _step(console, "3/3 replay: held-out prompts, every budget"):
            found = _replay(traces, predictor)
        save(budgets_figure(found.results, f"{MODEL}, held-out prompts"), folder / PICTURE)
        write_json(folder / RESULTS, found.to_json())
    shown = [budget_slots(budget, traces.geometry) for budget in BUDGETS]
    console.print(metrics_table(found.metrics))
    console.print(results_table([r for r in found.results if r.budget_slots in shown], traces.geometry))
    console.print(f"picture: {out / PICTURE}   all budgets: {out / RESULTS}   predictor: {out / 'predictor'}")
    return found


def _replay(traces: TraceSet, predictor: Path) -> Evaluation:
    source, geometry = from_predictor_folder(predictor), traces.geometry
    budgets = (*BUDGETS, *(f"{tenth}0%" for tenth in range(1, 11)))
    slots = sorted({budget_slots(budget, geometry) for budget in budgets})
    common = ReplaySettings(geometry.total_experts, bits=traces.manifest.quantization_bits)
    asked = combinations(common, slots, ("belief", "lru"), (f"top{geometry.top_k}",), source, source.lookaheads[:1])
    return evaluate(traces, beside(asked, common, geometry), "validation", [source], measure=source)


def bundled_prompts() -> list[Prompt]:
    """Read the small model's prompts, those of every fourth file held out."""
    path = shipped_folder(MODEL) / "prompts.jsonl"
    prompts = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    # Whole files are held out: two excerpts of one file are too much alike.
    held_out = set(sorted({prompt["source"] for prompt in prompts})[::HELD_OUT_ONE_IN])
    return [
        Prompt(one["text"], one["id"], one["source"], "validation" if one["source"] in held_out else "train")
        for one in prompts
    ]


def record_small_model(folder: Path) -> TraceSet:
    """Run the small model over its bundled prompts, and write its routing as a trace set."""
    weights = shipped_folder(MODEL)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(weights)
    traces = collect(
        model,
        tokenizer,
        bundled_prompts(),
        folder,
        Collection(batch_size=1, shard_tokens=4096),
        name=MODEL,
        source="Python 3.11 documentation and library, files that the model never saw",
        quantization_bits=16.0,  # as the weights are stored
        rank=Rank(0, 1),
    )
    assert traces is not None
    return traces


class _EpochLines(L.Callback):
    """Tells the figures of each validation in a line."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.console.print(
            f"    epoch {trainer.current_epoch + 1:>2}/{trainer.max_epochs}: recall@k {logged['val/recall_at_k']:.1%}, "
            f"hits at {BUDGETS[0]} {logged[of_budget('val', BUDGETS[0], 'hit_rate')]:.1%} "
            f"(LRU {logged[of_budget('val', BUDGETS[0], 'lru_hit_rate')]:.1%})"
        )


def fit(traces: TraceSet, out: Path, console: Console) -> Path:
    """Fit a small cross_layer, replaying the held-out prompts at every validation; return the predictor's folder."""
    L.seed_everything(0, verbose=False)
    data = TraceDataModule(traces.folder, token_budget=1024, max_tokens=256)
    task = CrossLayer(
        traces.geometry.to_json(), data.vocab_size, width=128, depth=2, heads=4, layer_width=128, lr=3e-3,
        dropout=0.2,
    )  # fmt: skip
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=CSVLogger(out, name="", version=""),
        callbacks=[
            CacheReplay(budget=BUDGETS[0]),
            ModelCheckpoint(),  # the last weights: choosing the best on the held-out prompts would flatter them
            ExportBest(calibration=None),  # as calibrating on them would
            _EpochLines(console),
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
def _step(console: Console, what: str) -> Iterator[None]:
    """Say what is done, and how long it took; keep Lightning's remarks on hardware to itself meanwhile."""
    console.print(what)
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
