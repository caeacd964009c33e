"""LightningModules that fit predictors: one base, one thin typed class per architecture."""

from moe_beyond.tasks.adamw import AdamWSettings
from moe_beyond.tasks.architectures import (
    CrossLayerTask,
    EamcTask,
    HistoryTask,
    LayerMlpTask,
    NaiveBayesTask,
    NextGateTask,
    PopularityTask,
    PreAttentionTask,
    RowEncoderTask,
    TokenCausalTask,
    TokenTableTask,
)
from moe_beyond.tasks.base import PredictorTask, as_geometry
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
    "LayerMlpTask",
    "NaiveBayesTask",
    "NextGateTask",
    "PopularityTask",
    "PreAttentionTask",
    "PredictorTask",
    "RowEncoderTask",
    "TokenCausalTask",
    "TokenTableTask",
    "as_geometry",
]
