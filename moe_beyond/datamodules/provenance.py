"""The text that a fit reads, as a predictor's configuration records it."""

from typing import Any

from moe_beyond.datamodules.traces import TraceDataModule
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.texts import sketch, text_hashes


def fitted_on(data: TraceDataModule) -> dict[str, Any]:
    """Describe the training split and, under ``validation``, the split that is validated on (None without).

    Each has a sketch of its texts, by which `moe_beyond.predictors.training_text` finds them in other trace sets.
    """
    validation = None if data.val_split is None else _described(data.val_traces, data.val_split)
    return {**_described(data.traces, data.train_split), "validation": validation}


def _described(traces: TraceSet, split: str) -> dict[str, Any]:
    return {**traces.describe(split), "texts": sketch(text_hashes(traces, split))}
