"""The replay in the loop: its schedule, and its figures."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from _helpers.common import tiny_traces
from _helpers.fitting import TINY_CROSS_LAYER

from moe_beyond.callbacks import CacheReplay
from moe_beyond.datamodules import TraceDataModule
from moe_beyond.evaluation.engine import evaluate
from moe_beyond.evaluation.sources import from_predictor
from moe_beyond.evaluation.strategies import BASELINES, strategy
from moe_beyond.simulator import ReplaySettings, Result
from moe_beyond.simulator.devices import DEVICES
from moe_beyond.tasks import CrossLayerTask
from moe_beyond.traces.reader import TraceSet

SIZES: dict[str, Any] = {word.split(".")[1].split("=")[0]: int(word.split("=")[1]) for word in TINY_CROSS_LAYER}


class Watch(L.Callback):
    """Keeps the figures logged by the end of the sanity check, and of each validation."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen.append({name: float(value) for name, value in trainer.logged_metrics.items()})

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.on_sanity_check_end(trainer, pl_module)


def counts(result: Result) -> tuple[Any, ...]:
    """Which strategy and budget, and all that was counted."""
    return result.strategy, result.lookahead, result.budget_slots, result.per_layer


@pytest.mark.parametrize(
    ("lookahead", "scope", "device"), [(None, "global", None), (3, "per-layer", None), (2, "global", "rtx3060")]
)
def test_it_skips_the_sanity_check_and_agrees_with_evaluate(
    lookahead: int | None, scope: str, device: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_traces(tmp_path / "traces", sequences=16)
    data = TraceDataModule(str(tmp_path / "traces"))
    task = CrossLayerTask(data.geometry, data.vocab_size, **SIZES)
    watch = Watch()
    caplog.set_level("INFO", "lightning.pytorch")
    replay = CacheReplay(
        budget="50%", prefetch="top3", lookahead=lookahead, scope=scope, warmup_tokens=2, device=device,
        budgets=["75%", "24"],
    )  # fmt: skip
    L.Trainer(
        max_epochs=2, num_sanity_val_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[replay, watch],
    ).fit(task, data)  # fmt: skip
    sanity, _, validated = watch.seen
    assert not any("hit_rate" in name for name in sanity)
    source = from_predictor(task.predictor.eval(), "p")
    common = ReplaySettings(32, scope=scope, warmup_tokens=2, device=DEVICES[device] if device else None)
    asked = []
    for slots in (16, 24):
        asked.append(strategy(common, slots, "lru", "top3", source, lookahead))
        asked += [strategy(common, slots, policy) for policy in BASELINES]
    found = evaluate(TraceSet(str(tmp_path / "traces")), asked, "validation", [source]).results
    # Also the figures that were replayed only at the first of two validations.
    assert [counts(result) for result in replay.results] == [counts(result) for result in found]
    ours, lru, belady = found[:3]
    line = "without prefetch at {}, hit_rate @ bytes_ratio: lru {:.4f} @ {:.4f}, belady {:.4f} @ {:.4f}"
    pairs = [("50%", lru, belady), ("75%", *found[4:6])]
    assert [each for each in caplog.messages if "without prefetch" in each] == [
        line.format(budget, one.hit_rate, one.bytes_ratio, other.hit_rate, other.bytes_ratio)
        for budget, one, other in pairs
    ]
    for name, result in (("", ours), ("lru_", lru), ("belady_", belady)):
        assert validated[f"val_budget_50pct/{name}hit_rate"] == pytest.approx(result.hit_rate, rel=1e-6)
        assert validated[f"val_budget_50pct/{name}bytes_ratio"] == pytest.approx(result.bytes_ratio, rel=1e-6)
        assert validated.get(f"val_budget_50pct/{name}tokens_per_second") == (
            None if device is None else pytest.approx(result.tokens_per_second, rel=1e-6)
        )
    sections = dict.fromkeys(name.partition("/")[0] for name in validated if "budget" in name)
    assert list(sections) == ["val_budget_50pct", "val_budget_75pct"]  # which is 24 slots
    assert validated["val_budget_75pct/hit_rate"] == pytest.approx(found[3].hit_rate, rel=1e-6)
