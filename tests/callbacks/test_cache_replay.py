"""The replay in the loop: when it runs, and what it says."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from fitting import TINY_CROSS_LAYER
from helpers import tiny_traces

from moe_beyond.callbacks import CacheReplay
from moe_beyond.datamodules import TraceDataModule
from moe_beyond.evaluation.evaluate import evaluate
from moe_beyond.evaluation.sources import from_predictor
from moe_beyond.evaluation.strategies import strategies
from moe_beyond.tasks import CrossLayer
from moe_beyond.traces.reader import TraceSet

SIZES: dict[str, Any] = {word.split(".")[1].split("=")[0]: int(word.split("=")[1]) for word in TINY_CROSS_LAYER}


class Watch(L.Callback):
    """Keeps what was logged by the end of the sanity check, and of each validation."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen.append({name: float(value) for name, value in trainer.logged_metrics.items()})

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.on_sanity_check_end(trainer, pl_module)


@pytest.mark.parametrize(("lookahead", "scope"), [(None, "global"), (3, "per-layer")])
def test_it_skips_the_sanity_check_and_agrees_with_evaluate(lookahead: int | None, scope: str, tmp_path: Path) -> None:
    tiny_traces(tmp_path / "traces", sequences=16)
    data = TraceDataModule(str(tmp_path / "traces"))
    task = CrossLayer(data.geometry.to_json(), data.vocab_size, **SIZES)
    watch = Watch()
    replay = CacheReplay(budget="50%", prefetch="top3", lookahead=lookahead, scope=scope, warmup_tokens=2)
    L.Trainer(
        max_epochs=1, num_sanity_val_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[replay, watch],
    ).fit(task, data)  # fmt: skip
    sanity, validated = watch.seen
    assert not any("hit_rate" in name for name in sanity)
    asked = strategies(
        [16], policies=["lru"], prefetches=["top3"], lookaheads=[lookahead or 1], scope=scope, warmup_tokens=2
    )
    source = from_predictor(task.predictor.eval(), "p")
    ours, lru, belady = evaluate(TraceSet(str(tmp_path / "traces")), asked, "validation", source).results
    for name, result in (("", ours), ("lru_", lru), ("belady_", belady)):
        assert validated[f"val/{name}hit_rate"] == pytest.approx(result.hit_rate, rel=1e-6)
        assert validated[f"val/{name}bytes_ratio"] == pytest.approx(result.bytes_ratio, rel=1e-6)
