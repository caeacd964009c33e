"""LightningModules that fit predictors: one base, one thin typed class per architecture.

They work in any `lightning.Trainer`:

```python
import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from moe_beyond.callbacks import CacheReplay, ExportBest
from moe_beyond.datamodules import TraceDataModule
from moe_beyond.tasks import AdamWSettings, CrossLayerTask

data = TraceDataModule("traces/puffin")
task = CrossLayerTask(data.geometry, data.vocab_size, width=128, heads=4, optimizer=AdamWSettings(lr=3e-3))
best = ModelCheckpoint(monitor="val/recall_at_k", mode="max")
export = ExportBest()
trainer = L.Trainer(max_epochs=8, gradient_clip_val=1.0, callbacks=[best, CacheReplay(budget="10%"), export])
trainer.fit(task, data)
print(export.exported)  # the predictor folder
task = CrossLayerTask.load_from_checkpoint(best.best_model_path)
```
"""

from moe_beyond.tasks.adamw import AdamWSettings
from moe_beyond.tasks.architectures import (
    CrossLayerTask,
    EamcTask,
    HistoryTask,
    HybridTask,
    LayerMlpTask,
    NaiveBayesTask,
    NextGateTask,
    PopularityTask,
    PreAttentionTask,
    RowEncoderTask,
    TokenCausalTask,
    TokenTableTask,
)
from moe_beyond.tasks.base import PredictorTask
from moe_beyond.tasks.counting import CountingTask
from moe_beyond.tasks.gradient import GradientTask
from moe_beyond.tasks.registry import TASKS

__all__ = [
    "TASKS",
    "AdamWSettings",
    "CountingTask",
    "CrossLayerTask",
    "EamcTask",
    "GradientTask",
    "HistoryTask",
    "HybridTask",
    "LayerMlpTask",
    "NaiveBayesTask",
    "NextGateTask",
    "PopularityTask",
    "PreAttentionTask",
    "PredictorTask",
    "RowEncoderTask",
    "TokenCausalTask",
    "TokenTableTask",
]
